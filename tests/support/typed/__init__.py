"""Programs as users write them: tests/package/test_types.py checks their types and runs them."""
