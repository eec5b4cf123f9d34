"""FoldBatchNorm is exact, says what it leaves, and has nothing to do the second time."""

import pytest
import torch
from torch import nn

from whet import catalog, packed
from whet.graph.ledger import Grid
from whet.optional import installed
from whet.targets.onnxfile import Deployable
from whet.techniques.fuse.foldbatchnorm import FoldBatchNorm
from whet.techniques.prune.magnitude import Magnitude
from whet.techniques.quantize.kmeansshare import KMeansShare
from whet.techniques.quantize.roundtonearest import RoundToNearest
from whet.testing import scramble, tiny_task

NORMED = (
    "plain_cnn",
    "residual_cnn",
    "padded_residual_cnn",
    "depthwise_cnn",
    "grouped_cnn",
    "concat_cnn",
)


def outputs(model, task):
    with torch.no_grad():
        return torch.cat([model.eval()(x) for x, _ in task.validation])


@pytest.mark.parametrize("name", NORMED)
def test_outputs_stay_and_norms_go(apply, name):
    task = tiny_task(name)
    work = apply(task, FoldBatchNorm())
    before = [m for m in task.model.modules() if isinstance(m, nn.BatchNorm2d)]
    after = [m for m in work.model.modules() if isinstance(m, nn.BatchNorm2d)]
    torch.testing.assert_close(
        outputs(work.model, task), outputs(task.model, task), rtol=1e-5, atol=1e-5
    )
    assert work.notes[-1] == f"folded {len(before) - len(after)} BatchNorms."
    assert len(after) < len(before)
    assert all("stays: its input does not come from" in note for note in work.notes[:-1])
    assert len(work.notes) - 1 == len(after) == (2 if name == "concat_cnn" else 0)


def test_the_folded_layers_have_a_bias_and_train(apply):
    work = apply(tiny_task("plain_cnn"), FoldBatchNorm())
    convs = [m for m in work.model.modules() if isinstance(m, nn.Conv2d)]
    assert all(c.bias is not None and c.weight.requires_grad for c in convs)


def test_norms_behind_and_in_front_of_layers_go_in_any_order(apply):
    norms = [nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)]
    rest = [nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    layers = [*norms[:2], nn.Conv2d(3, 6, 3), *norms[2:], nn.ReLU(), *rest]
    for norm in [*norms, rest[0]]:
        scramble(norm)
    task = tiny_task(nn.Sequential(*layers).eval())
    work = apply(task, FoldBatchNorm())
    torch.testing.assert_close(
        outputs(work.model, task), outputs(task.model, task), rtol=1e-5, atol=1e-5
    )
    assert [type(m) for m in work.model].count(nn.BatchNorm2d) == 1
    why = "its input does not come from a convolution or linear layer"
    also = "7 behind it pads with zeros, which the shift would change"
    assert work.notes == [f"6 stays: {why}, and {also}.", "folded 4 BatchNorms."]


@pytest.mark.parametrize("name", ["flatten_cnn", "rnn", "transformer"])
def test_a_network_without_norms_is_refused(refuses, name):
    text = "FoldBatchNorm: no BatchNorm follows a layer it could fold into. Drop it."
    refuses(tiny_task(name), FoldBatchNorm(), text)


def test_the_second_time_is_refused(refuses):
    text = "FoldBatchNorm: no BatchNorm follows a layer it could fold into."
    refuses(tiny_task("plain_cnn"), FoldBatchNorm(), text, FoldBatchNorm())


def test_masks_made_before_stay(apply):
    task = tiny_task("plain_cnn")
    pruned = apply(task, Magnitude())
    work = apply(task, Magnitude(), FoldBatchNorm())
    torch.testing.assert_close(
        outputs(work.model, task), outputs(pruned.model, task), rtol=1e-5, atol=1e-5
    )
    for (path, _, old), (also, _, new) in zip(
        packed.forms(pruned.model), packed.forms(work.model), strict=True
    ):
        assert path == also
        assert torch.equal(old.support(), new.support())


def test_it_must_come_before_grids():
    assert FoldBatchNorm.spoils == {Grid}


PACKED = {
    "grids": [RoundToNearest(group=0)],
    "grids from zero": [RoundToNearest(group=0, grid="affine", bits=3)],
    "groups": [RoundToNearest(group=4, grid="affine")],
    "tables": [KMeansShare(clusters=8)],
    "a mask over groups": [RoundToNearest(group=4), Magnitude(amount=0.5)],
    "a mask under a table": [Magnitude(amount=0.5), KMeansShare(clusters=8)],
}


@pytest.mark.parametrize("steps", PACKED)
@pytest.mark.parametrize("name", ["plain_cnn", "depthwise_cnn"])
def test_weights_of_few_bits_stay_what_they_are(apply, name, steps):
    task = tiny_task(name)
    for module in task.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight[::3] *= -1  # channels that change their sign
                module.weight[1] = 0
    before = apply(task, *PACKED[steps]).model
    after = apply(task, *PACKED[steps], FoldBatchNorm()).model
    assert not any(isinstance(m, nn.BatchNorm2d) for m in after.modules())
    torch.testing.assert_close(outputs(after, task), outputs(before, task), rtol=1e-4, atol=1e-5)
    assert [packed.kinds(f) for *_, f in packed.forms(after)] == [
        packed.kinds(f) for *_, f in packed.forms(before)
    ]


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_the_file_holds_codes_though_norms_stand_in_the_network(apply, name):
    if not installed(name):
        pytest.skip(f"{name} is not installed")
    task, target = tiny_task("plain_cnn"), catalog.target(name)
    steps = PACKED["groups"]
    found = []
    for before in ([], [FoldBatchNorm()]):
        model = apply(task, *before, *steps).model
        found.append(len(Deployable(model, task.example, target).proto.SerializeToString()))
    whole = len(Deployable(task.model, task.example, target).proto.SerializeToString())
    assert abs(found[0] - found[1]) < 0.02 * whole
    assert found[0] < 0.6 * whole
