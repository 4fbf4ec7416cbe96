"""Losses of transformers under their own names."""

__all__: list[str] = []
