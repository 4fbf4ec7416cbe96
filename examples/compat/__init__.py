"""Training with a loss of another library and with ours: one line changes, the curve stays."""
