"""Tests of zimage. Importing this package prepares MLX before any test file imports it."""

import atexit
import os
import shutil
import tempfile

# Set before MLX reads them. OpenBLAS stalls when its threads outnumber the free cores, and tests have other processes
# beside them; and on GPUs fp32 products would run in TF32, far coarser than the bounds of the parity tests.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MLX_ENABLE_TF32", "0")
# What tests measure, with one thread, is no peak of the machine: it stays out of the user's cache. Processes that tests
# start have the same folder: many of them are killed, and would leave their own behind.
_PREFIX = "zimage-tests-"
if not os.path.basename(os.environ.get("XDG_CACHE_HOME", "")).startswith(_PREFIX):
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix=_PREFIX)
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import zimage as zimage  # noqa: E402  after the variables
