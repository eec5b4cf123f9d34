"""The conformance kit: one battery that every technique must pass; third parties may call it.

    import pytest
    from whet import conformance

    @pytest.mark.parametrize("network", conformance.KINDS)
    def test_mine(network):
        conformance.check(Mine(), network)

Each clause is a promise of the protocol; an AssertionError names the clause that was broken.
"""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from whet import artifact, catalog, packed, promises, testing
from whet.codecs.choice import plain
from whet.errors import BadInput, BadOrder, Refused
from whet.graph import surgery, trace
from whet.graph.ledger import ledger
from whet.measure import cost, quality
from whet.recipe import Recipe
from whet.runner import seed_all
from whet.targets.onnxfile import Deployable
from whet.task import Task, tensors_in
from whet.technique import Technique, Work

KINDS = ("plain_cnn", "residual_cnn", "depthwise_cnn", "concat_cnn", "rnn", "transformer")
TARGET = "onnxruntime"


def sample(name: str) -> Technique:
    """The technique called `name` with knobs that suit tiny networks."""
    return catalog.technique(name, dict(catalog.techniques()[name].tiny))


def applied(technique: Technique, task: Task, model: nn.Module | None = None) -> Work | None:
    """The work after `technique` on a copy of the task's network (or `model`); None: refused."""
    seed_all(0, task)
    work = Work(
        copy.deepcopy(model or task.model), task.model, task, targets=[catalog.target(TARGET)]
    )
    try:
        prepare(technique, work)
        technique.apply(work)
    except Refused as error:
        assert error.found, f"{technique.name} refuses without a reason"
        assert error.todo, f"{technique.name} refuses without saying what to do"
        return None
    return work


def makers(technique: Technique) -> list[Technique]:
    """For each form that `technique` wants, a technique that makes it."""
    known = catalog.techniques().items()
    names = [[n for n, t in known if form in t.makes and not t.wants] for form in technique.wants]
    return [sample(broadest(each)) for each in names]


def broadest(names: list[str]) -> str:
    """The first of the techniques that make forms in most places: in weights, in activations."""
    made = {name: catalog.techniques()[name].makes for name in names}
    return max(names, key=lambda n: len({issubclass(form, packed.Packed) for form in made[n]}))


def prepare(technique: Technique, work: Work) -> None:
    """Make the forms that `technique` wants and that are not there."""
    here = {kind for _, _, form in packed.forms(work.model) for kind in packed.kinds(form)}
    for maker in makers(technique):
        if not maker.makes & here:
            maker.apply(work)


def check(technique: Technique, network: str, agreed: set[str] | None = None) -> bool:
    """Run the battery on one kind of network.

    Args:
        technique: with its knobs.
        network: a name in `testing.NETWORKS` or `testing.SPECIAL`.
        agreed: what the runtime is known to agree on, and is not asked again; grows.

    Returns:
        Whether the technique applied; False where it refused with a reason.
    """
    task = testing.tiny_task(network)
    before = copy.deepcopy(task.model.state_dict())
    work = applied(technique, task)
    _input_untouched(task, before, technique)
    if work is None:
        return False
    _runs_and_trains(work.model, task, technique)
    _saves_and_loads(work.model, task, technique)
    drawing = _drawing(work.model, network)
    if drawing is None or drawing not in (agreed or ()):
        _agrees_in_the_runtime(work.model, task, technique)
        if agreed is not None and drawing is not None:
            agreed.add(drawing)
    _cost_falls(work.model, task, technique)
    again = applied(technique, task)
    same = again is not None and _same(work.model, again.model)
    assert same, f"{technique.name}: the same seed gave another network"
    return True


def _same(one: nn.Module, two: nn.Module) -> bool:
    """Whether two networks of one class are equal to the bit, and so are written as equal bytes."""
    a, b = one.state_dict(), two.state_dict()
    alike = surgery.structure(one) == surgery.structure(two) and list(a) == list(b)
    return alike and all(torch.equal(a[name], b[name]) for name in a)


def _drawing(model: nn.Module, network: str) -> str | None:
    """All but the numbers of a network of floats; None where its file depends on numbers as well.

    Two networks of one drawing are one graph, written as one file with other floats in it.
    """
    if ledger(model).grids or any(True for _ in packed.forms(model)):
        return None
    state = model.state_dict(keep_vars=True)
    tied = {id(tensor): name for name, tensor in state.items()}
    tensors = [[n, str(t.dtype), t.shape, t.stride(), tied[id(t)]] for n, t in state.items()]
    return json.dumps([network, surgery.structure(model), tensors])


def _outputs(model: nn.Module, task: Task) -> list[Tensor]:
    with torch.no_grad():
        return list(tensors_in(model.eval()(*task.example)))


def _input_untouched(task: Task, before: dict[str, Any], technique: Technique) -> None:
    now = task.model.state_dict()
    same = before.keys() == now.keys() and all(torch.equal(before[k], now[k]) for k in now)
    assert same, f"{technique.name} changed the input model"
    assert "forward" not in task.model.__dict__, f"{technique.name} left grids on the input"


def _runs_and_trains(model: nn.Module, task: Task, technique: Technique) -> None:
    twin = copy.deepcopy(model)
    assert all(bool(torch.isfinite(t).all()) for t in _outputs(twin, task)), "outputs not finite"
    twin.train()
    sum(t.square().sum() for t in tensors_in(twin(*task.example))).backward()  # type: ignore
    moved = [p for p in twin.parameters() if p.grad is not None and bool(p.grad.any())]
    assert moved, f"{technique.name}: no gradient reaches a weight afterwards"


def _saves_and_loads(model: nn.Module, task: Task, technique: Technique) -> None:
    data, want = artifact.encode(model, task.example, plain), _outputs(model, task)
    for into in (copy.deepcopy(task.model), None):
        got = _outputs(artifact.decode(data, into), task)
        same = all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
        if into is None and not same:
            # a module may run kernels that its graph does not name, and round otherwise
            graph = trace.exported_module(model, task.example)
            with torch.no_grad():
                want = list(tensors_in(graph(*task.example)))
            same = all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
        assert same, f"{technique.name}: outputs change by saving and loading"


def _agrees_in_the_runtime(model: nn.Module, task: Task, technique: Technique) -> None:
    target = catalog.target(TARGET)
    net = Deployable(model, task.example, target)
    assert task.validation is not None
    with tempfile.TemporaryDirectory() as folder:
        file = net.write(Path(folder) / "model.onnx")
        said = quality.gate(target, file, net, model, task.validation, threads=1, examples=16)
    assert said["agreed"], f"{technique.name}: the runtime disagrees at {said['first_difference']}"


def _cost_falls(model: nn.Module, task: Task, technique: Technique) -> None:
    old, new = (cost.layers(m, task.example) for m in (task.model, model))
    before, after = (
        {key: sum(layer.numbers()[key] for layer in side.values()) for key in ("bytes", "macs")}
        for side in (old, new)
    )
    for key, allowed, what in (
        ("macs", technique.adds_operations, "operations"),
        ("bytes", technique.adds_bytes, "bytes"),
    ):
        assert allowed or after[key] <= before[key], f"{technique.name} adds {what}"


def others(technique: Technique) -> Iterator[Technique]:
    """One technique of each other family."""
    families: dict[str, list[str]] = {}
    for name, kind in catalog.techniques().items():
        if not kind.wants:
            families.setdefault(catalog.family(kind), []).append(name)
    for family, names in families.items():
        if family != catalog.family(type(technique)):
            yield sample(broadest(names))


@functools.cache
def _alone(name: str, network: str) -> Work | None:
    """`applied` of a technique of the catalogue; only copies of it are worked on."""
    return applied(sample(name), testing.tiny_task(network))


def check_composition(technique: Technique) -> int:
    """Apply `technique` after and before one of every other family; promises must hold.

    Returns:
        How many orders were carried out; the others were refused by the recipe.
    """
    task, done = testing.tiny_task(technique.shows), 0
    mine = applied(technique, task)
    for other in others(technique):
        theirs = _alone(other.name, technique.shows)
        for first, one, second in ((other, theirs, technique), (technique, mine, other)):
            try:
                Recipe([*makers(first), first, *makers(second), second]).check(task)
            except BadOrder:
                continue
            if one is None:
                continue
            kept = promises.promises(one.model)
            two = applied(second, task, one.model)
            if two is not None:
                promises.check(kept, two.model, task.example, f"{second.name} after {first.name}")
                done += 1
    return done


def check_knobs(kind: type[Technique]) -> int:
    """Absurd values of every knob with a range are refused with a message.

    Returns:
        How many were tried.
    """
    tried = 0
    for knob, facts in kind.model_json_schema().get("properties", {}).items():
        for absurd in _absurd(facts):
            tried += 1
            try:
                catalog.technique(kind.__name__, {knob: absurd})
            except BadInput as error:
                assert knob in str(error), f"{kind.__name__}.{knob}: the message does not name it"
                continue
            raise AssertionError(f"{kind.__name__}.{knob} accepts {absurd!r}")
    return tried


def _absurd(facts: dict[str, Any]) -> Iterator[Any]:
    for each in [facts, *facts.get("anyOf", ())]:
        for key, step in (("minimum", -1), ("maximum", 1), ("exclusiveMinimum", 0)):
            if key in each:
                yield each[key] + step
        if "exclusiveMaximum" in each:
            yield each["exclusiveMaximum"]
        if "enum" in each or each.get("type") in ("number", "integer", "boolean"):
            yield "no such thing"
        if "enum" in each.get("items", {}):
            yield ["no such thing"]
