"""Tiny networks run fastest on one thread, and every test starts from the same random state."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
