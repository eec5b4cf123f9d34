"""What its package says of itself, and what it needs."""

import pytest
import torch
from torch import nn

from whet.errors import TargetFailed
from whet.targets.inductor import Inductor

TARGET = Inductor()


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(TargetFailed, match="no C\\+\\+ compiler was found. Install g"):
        TARGET.lower(nn.Linear(2, 2), (torch.ones(1, 2),))


def test_integer_layers_are_products_of_codes():
    kernels = {"qconv_pointwise_tensor/i8": 3, "mkl_linear/f32": 2, "qlinear_pointwise/i8": 1}
    assert TARGET.integer_layers(kernels) == 4
