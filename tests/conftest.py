"""Settings of the whole test run, and what several files need."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

# The tests' tensors are tiny: threads only wait for each other, and on a busy machine for a hundred times as long.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def deepinv() -> Any:
    """The peer library. It is an extra: it imports torchvision, and a build that fits the installed torch is not to be
    had everywhere that the tests have to run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepinv
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises a RuntimeError
        pytest.skip(
            f"deepinv cannot be imported ({error}): pip install 'posteriori[deepinv]' and the torchvision of this torch"
        )
    return deepinv
