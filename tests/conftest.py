"""Settings for all tests."""

import os

# The models are tiny: more threads would only get in each other's way, and in that of the ranks.
os.environ.setdefault("OMP_NUM_THREADS", "1")
