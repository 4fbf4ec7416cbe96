"""Losses of pytorch_metric_learning under their own names."""

__all__: list[str] = []
