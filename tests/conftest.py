"""Settings for all tests."""

import os

import hypothesis
import torch

# pytest --hypothesis-profile=10000, where a test leaves the number of examples open.
hypothesis.settings.register_profile("10000", max_examples=10_000)

# The models are tiny: more threads would only get in each other's way, and in that of the ranks.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)  # of this process, which has read the variable already

# Without a GPU, Triton's kernels are interpreted on the CPU. Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
