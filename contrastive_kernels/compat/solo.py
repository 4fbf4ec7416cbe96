"""Losses of solo under their own names."""

__all__: list[str] = []
