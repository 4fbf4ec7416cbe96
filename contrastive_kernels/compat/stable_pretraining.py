"""Losses of stable_pretraining under their own names."""

__all__: list[str] = []
