"""The rung of fusions places what gives the same outputs, and nothing else."""

import contextlib
import copy

import pytest
import torch

from whet import catalog
from whet.errors import Refused
from whet.graph.trace import trace
from whet.rungs.fusion import Fusion, FusionTechnique, close, equal
from whet.targets.onnxfile import Deployable
from whet.technique import Work
from whet.techniques.fuse.foldbatchnorm import FoldBatchNorm
from whet.techniques.fuse.fuselinear import FuseLinear
from whet.techniques.fuse.mergeparallel import MergeParallel
from whet.testing import tiny_task


def changed(model, path, by):
    twin = copy.deepcopy(model.get_submodule(path))
    with torch.no_grad():
        twin.weight.mul_(1 + by)
    return Fusion(path, {path: twin}, f"{path} was changed")


@pytest.mark.parametrize(("by", "same"), [(0, True), (1e-7, True), (1e-3, False)])
def test_a_fusion_is_equal_if_the_outputs_are(by, same):
    task = tiny_task("flatten_cnn")
    fusion = changed(task.model, "9", by)
    assert equal(task.model, fusion, task.example) is same
    assert task.model[9] is not fusion.modules["9"]


class Scaling(FusionTechnique):
    """Offers a last layer that is scaled."""

    by: float

    def fusions(self, wiring):
        reasons = {"3": "a reason", "7": "a reason", "0": "another"}
        return [changed(wiring.model, "9", self.by)], reasons


def test_what_differs_is_refused_and_named():
    task = tiny_task("flatten_cnn")
    work = Work(copy.deepcopy(task.model), task.model, task)
    with pytest.raises(Refused, match="Scaling: nothing here becomes one exactly"):
        Scaling(by=0.1).apply(work)
    assert work.notes == [
        "3, 7 stay: a reason.",
        "0 stay: another.",
        "9 stay: the network then computes something else.",
    ]
    assert torch.equal(work.model[9].weight, task.model[9].weight)


def test_closeness():
    y = torch.randn(50)
    assert close(y + 0.9e-5, y)
    assert not close(y + 2e-5 * y.abs().max().clamp_min(1), y)
    assert close(100 * y + 1e-4, 100 * y)
    assert not close(y[:20], y)
    assert not close(y * torch.nan, y)
    assert close(y.half() + 1e-3, y.half())
    assert not close(torch.tensor([1, 2]), torch.tensor([1, 3]))


EXACTLY = (FoldBatchNorm(), MergeParallel(), FuseLinear())
NORMED = ("plain_cnn", "residual_cnn", "depthwise_cnn", "grouped_cnn", "concat_cnn", "linear_cnn")


@pytest.mark.parametrize("name", NORMED)
def test_all_exact_fusions_leave_the_outputs_and_fewer_calls(name):
    task = tiny_task(name)
    work = Work(copy.deepcopy(task.model), task.model, task)
    for technique in EXACTLY:
        with contextlib.suppress(Refused):
            technique.apply(work)
    with torch.no_grad():
        expected = task.model(*task.example)
        assert float((work.model(*task.example) - expected).abs().max()) <= 1e-5
    calls = [
        sum(n.op == "call_function" for n in trace(m, task.example).nodes)
        for m in (work.model, task.model)
    ]
    assert calls[0] < calls[1]
    if name == "linear_cnn":  # the exporter folds BatchNorms itself
        target = catalog.target("onnxruntime")
        files = [Deployable(m, task.example, target).proto for m in (work.model, task.model)]
        assert len(files[0].graph.node) < len(files[1].graph.node)
