"""Tests of zimage. Importing this package prepares MLX's BLAS before any test file imports MLX."""

import os

# OpenBLAS stalls when its threads outnumber the free cores, and tests have other processes beside them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import zimage as zimage
