"""SwapActivation deviates as little as its card says, and names what it cannot reach."""

import re

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from whet.technique import card
from whet.techniques.substitute.swapactivation import SWAPS, SwapActivation
from whet.testing import tiny_task


@pytest.mark.parametrize("kind", SWAPS)
def test_the_deviation_is_the_cards(kind):
    smooth, straight = SWAPS[kind]
    row = rf"{smooth.__name__} .*-> +{straight.__name__} .*off by at most ([\d.]+)"
    bound = float(re.search(row, card(SwapActivation)).group(1))
    x = torch.linspace(-50, 50, 400_001, dtype=torch.float64)
    off = (smooth()(x) - straight()(x)).abs().max()
    assert bound - 2e-3 < off <= bound + 1e-4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.SiLU(inplace=True), nn.GELU("tanh"), nn.Sigmoid()
        self.first, self.out = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        x = F.silu(self.first(x)) + self.a(self.first(x))
        return self.out(self.c(self.b(x.mean((2, 3)))))


def test_each_module_is_swapped_and_each_function_is_named(apply):
    task = tiny_task(Net().eval())
    work = apply(task, SwapActivation())
    kinds = (nn.Hardswish, nn.ReLU, nn.Hardsigmoid)
    assert [type(work.model.get_submodule(n)) for n in "abc"] == list(kinds)
    assert work.notes[0] == "silu:0 stays: a function is called, not a module."
    assert len(work.notes) == 2
    with torch.no_grad():
        old, new = task.model(*task.example), work.model(*task.example)
    share = float((new - old).norm() / old.norm())
    assert f"(GELU, SiLU, Sigmoid); outputs on the example change by {share:.1%}" in work.notes[1]


def test_only_what_is_asked_for_is_swapped(apply):
    task = tiny_task(Net().eval())
    for knobs, swapped in (
        ({"kinds": ("gelu",)}, "b"),
        ({"skip": ("b",)}, "ac"),
        ({"only": ("c",)}, "c"),
    ):
        model = apply(task, SwapActivation(**knobs)).model
        assert {
            n for n in "abc" if type(getattr(model, n)) is not type(getattr(task.model, n))
        } == set(swapped)
    assert SwapActivation(skip=("a",)).places(task.model, task.example) == ["b", "c"]


def test_other_classes_and_networks_without_them_are_refused(refuses):
    class Mine(nn.SiLU):
        pass

    refuses(tiny_task("plain_cnn"), SwapActivation(), "no module is one of these activations")
    task = tiny_task(
        nn.Sequential(nn.Conv2d(3, 4, 3), Mine(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    )
    refuses(task, SwapActivation(), "Drop it, or write the activations as modules.")
    with pytest.raises(ValidationError):
        SwapActivation(kinds=("tanh",))
