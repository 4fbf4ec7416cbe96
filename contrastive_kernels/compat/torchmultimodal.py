"""Losses of torchmultimodal under their own names."""

__all__: list[str] = []
