"""Losses of open_clip under their own names."""

__all__: list[str] = []
