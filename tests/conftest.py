"""What every test shares: one thread, fixed seeds, hypothesis without deadlines."""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import settings

# Runs pytest within pytest, for the tests of the plugin; only a conftest that is loaded first may name it.
pytest_plugins = ["pytester"]

# Before anything imports torch or numpy: reductions change with the number of threads, and
# processes started by a test inherit it.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"

# Deadlines are the classic flake of tests with torch (PyTorch pull requests 26663 and 42871);
# derandomized, a failure is the same for everyone.
settings.register_profile("equivcheck", deadline=None, derandomize=True, database=None)
settings.load_profile("equivcheck")


@pytest.fixture(autouse=True)
def deterministic():
    """Start every test from the same random state; a test without torch stays without it."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        torch.manual_seed(0)
