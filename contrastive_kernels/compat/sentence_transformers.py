"""Losses of sentence_transformers under their own names."""

__all__: list[str] = []
