"""What a maintainer runs beside the tests: every way of installing, and several versions of Python and torch."""
