"""Losses of lightly under their own names."""

__all__: list[str] = []
