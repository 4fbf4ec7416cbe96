"""Losses of supcontrast under their own names."""

__all__: list[str] = []
