"""What earlier steps made survives, or the step is stopped by name."""

import copy

import pytest
import torch
from torch import nn

from whet import packed
from whet.errors import BrokenPromise
from whet.graph import surgery
from whet.graph.ledger import Edit, Grid, ledger
from whet.promises import check, promises
from whet.recipe import Recipe
from whet.technique import Work
from whet.testing import tiny_task

TASK = tiny_task("flatten_cnn")
STEPS = "steps: [L1Filters: {amount: 0.3, multiple_of: 4}, Magnitude, StaticInt8: {examples: 16}]"


@pytest.fixture(scope="module")
def compressed() -> nn.Module:
    work = Work(copy.deepcopy(TASK.model), TASK.model, TASK)
    for step in Recipe.parse(STEPS).steps:
        step.apply(work)
    return work.model


@pytest.fixture
def model(compressed: nn.Module) -> nn.Module:
    return copy.deepcopy(compressed)


def broken(model: nn.Module, before: nn.Module, words: str) -> None:
    with pytest.raises(BrokenPromise, match=f"apply Step: {words}"):
        check(promises(before), model, TASK.example, "Step")


def test_nothing_has_changed(model: nn.Module, compressed: nn.Module):
    check(promises(compressed), model, TASK.example, "Step")


def test_a_mask_that_grows_is_no_breach(model: nn.Module, compressed: nn.Module):
    for form in packed.forms(model):
        sparse = next(f for f in form[2].modules() if isinstance(f, packed.Sparse))
        sparse.mask &= False
    check(promises(compressed), model, TASK.example, "Step")


def test_forms_lost(model: nn.Module, compressed: nn.Module):
    packed.bake(model)
    broken(model, compressed, "the weight 0.weight lost its form Affine, Sparse")


def test_one_kind_lost(model: nn.Module, compressed: nn.Module):
    layer = model[0]
    packed.install(layer, "weight", packed.Sparse(packed.Dense(layer.weight), layer.weight != 0))
    broken(model, compressed, "the weight 0.weight lost its form Affine")


def test_zeros_that_came_back(model: nn.Module, compressed: nn.Module):
    form = packed.form_of(model[3])
    assert form is not None
    mask = next(f for f in form.modules() if isinstance(f, packed.Sparse)).mask
    mask.reshape(-1)[int((~mask).reshape(-1).nonzero()[0])] = True
    broken(model, compressed, "zeros of the weight 3.weight came back")


def test_edit_log_rewritten(model: nn.Module, compressed: nn.Module):
    ledger(model).edits[0] = Edit("take", "0.weight", {"dim": 0, "keep": [0]})
    broken(model, compressed, "the edit log was rewritten")
    ledger(model).edits.clear()
    broken(model, compressed, "the edit log was rewritten")


def test_grids_taken_away(model: nn.Module, compressed: nn.Module):
    ledger(model).grids.popitem()
    broken(model, compressed, "grids of activations were taken away")


def test_outputs_that_are_not_finite(model: nn.Module, compressed: nn.Module):
    with torch.no_grad():
        model[-1].bias[0] = float("nan")
    broken(model, compressed, "the outputs .* hold NaN or infinite values. Take the step out")


def test_a_layer_that_is_gone_keeps_no_promise(model: nn.Module, compressed: nn.Module):
    surgery.replace(model, "9", nn.Identity())
    check(promises(compressed), model, TASK.example, "Step")


def test_new_forms_grids_and_edits_are_no_breach(compressed: nn.Module):
    bare = copy.deepcopy(TASK.model)
    check(promises(bare), compressed, TASK.example, "Step")
    surgery.set_grids(bare, {"input:0": Grid(0.1, 0, 0, 255)})
    assert promises(bare).grids == {"input:0"}
