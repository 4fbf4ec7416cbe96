"""The tests of the benchmarks, skipped where the packages that the benchmarks need are missing."""

import pytest

for package in ("matplotlib", "rich"):
    pytest.importorskip(package)
