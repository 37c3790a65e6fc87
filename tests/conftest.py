"""One thread for all tests and the commands they start: with tiny models, more threads only wait for each other."""

import os

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def seed():
    """Random choices are the same in every run of the tests."""
    torch.manual_seed(0)
