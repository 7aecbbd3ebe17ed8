"""Settings of the whole test run."""

from __future__ import annotations

import torch

# The tests' tensors are tiny: threads only wait for each other, and on a busy machine for a hundred times as long.
torch.set_num_threads(1)
