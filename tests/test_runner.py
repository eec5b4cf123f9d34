"""The runner keeps its promises whatever the steps and the task do."""

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import whet
from whet import catalog, checkpoint, inspection, packed, runner
from whet.errors import BadInput, BrokenPromise, Disagrees, Refused
from whet.recipe import Recipe, built_in
from whet.runner import Result, Settings, free, settings_of
from whet.targets.onnxfile import Deployable
from whet.targets.onnxruntime import OnnxRuntime
from whet.task import Metric, Task
from whet.technique import Technique, Work
from whet.testing import tiny_task

QUICK: dict[str, Any] = {"rounds": 5, "step_examples": 32}
STEPS = "steps: [FoldBatchNorm, Magnitude, Distill: {epochs: 0.5}, StaticInt8: {examples: 32}]"


def flags(model: nn.Module) -> dict[str, Any]:
    """Everything about a network that a run must leave as it is."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return {
        name: (
            module.training,
            type(module),
            sorted(vars(module)),
            [len(getattr(module, hook)) for hook in hooks],
        )
        for name, module in model.named_modules()
    }


@pytest.fixture(scope="module")
def task() -> Task:
    task = tiny_task("flatten_cnn")
    task.model.train()
    task.model[0].eval()
    task.model[3].weight.requires_grad_(False)
    return task


@pytest.fixture(scope="module")
def result(task: Task) -> Result:
    """One whole run, which also checks that its task comes out as it went in."""
    state, before = copy.deepcopy(task.model.state_dict()), flags(task.model)
    trains = [p.requires_grad for p in task.model.parameters()]
    told: list[tuple[str, int, int]] = []
    found = whet.apply(
        Recipe.parse(STEPS), task, drop="100pp", size="1B", tell=lambda *t: told.append(t), **QUICK
    )
    assert flags(task.model) == before
    assert all(torch.equal(state[k], v) for k, v in task.model.state_dict().items())
    assert trains == [p.requires_grad for p in task.model.parameters()]
    assert all(p.grad is None for p in task.model.parameters())
    assert not [key for key in vars(task.model) if "whet" in key]
    assert told[0] == ("original", 0, 1)
    assert told[-1] == ("proof", 3, 3)
    assert all(0 <= done <= of for _, done, of in told)
    return found


def test_the_input_network_is_untouched(result: Result):
    assert result.readings["compressed"]["bytes"] < result.readings["original"]["bytes"]


def test_a_refused_step_is_noted_and_the_run_goes_on(result: Result):
    fold, *others = result.readings["steps"]
    assert (fold["step"], fold["refused"]) == ("FoldBatchNorm", True)
    assert fold["notes"][-1].startswith("refused: FoldBatchNorm: no BatchNorm follows")
    assert [(step["step"], step["refused"]) for step in others] == [
        ("Magnitude", False), ("Distill", False), ("StaticInt8", False),
    ]  # fmt: skip
    kinds = {kind for _, _, form in packed.forms(result.model) for kind in packed.kinds(form)}
    assert {packed.Sparse, packed.Affine} <= kinds


def test_the_last_step_reads_the_files_that_are_proved(result: Result):
    last, now = result.readings["steps"][-1], result.readings["compressed"]
    assert (last["bytes"], last["bytes_packed"]) == (now["bytes"], now["bytes_packed"])
    assert now["bytes"] == len(result.files["model.onnx"])
    assert now["bytes_packed"] == len(result.files["model.whet"])
    start, was = result.readings["start"], result.readings["original"]
    assert (start["bytes"], start["bytes_packed"]) == (was["bytes"], was["bytes_packed"])
    assert last["bytes_packed"] < was["bytes_packed"]


def test_runs_that_share_what_is_known_measure_a_file_once(
    task: Task, monkeypatch: pytest.MonkeyPatch
):
    files: list[bytes] = []
    measure = runner.quality.measure

    def counted(target: Any, file: Path, *args: Any, **options: Any) -> Any:
        files.append(file.read_bytes())
        return measure(target, file, *args, **options)

    monkeypatch.setattr(runner.quality, "measure", counted)
    known: dict[Any, Any] = {}
    options: dict[str, Any] = {"rounds": 5, "step_readings": False, "known": known}
    values = []
    for amount in (0.3, 0.6):
        recipe = Recipe([catalog.technique("Magnitude", {"amount": amount})])
        values.append(runner.apply(recipe, task, **options).readings["original"]["metric"])
    original, *others = files
    # the reading at the start is of fewer examples than the one at the end
    assert files.count(original) == 2
    assert len(others) == 3
    assert values[0] == values[1]
    assert len(known) == 4


def test_goals_are_judged(result: Result):
    assert [(goal["name"], goal["met"]) for goal in result.readings["goals"]] == [
        ("drop", True), ("size", False),
    ]  # fmt: skip
    assert not result.met


def test_a_report_is_json_and_complete(result: Result):
    again = json.loads(result.files["report.json"])
    assert again == result.readings
    assert set(result.files) == {
        "model.whet", "model.onnx", "recipe.yaml", "report.json", "report.html",
    }  # fmt: skip
    assert Recipe.parse(result.files["recipe.yaml"].decode()) == result.recipe
    assert [step["knobs"] for step in again["steps"]] == [{}, {}, {"epochs": 0.5}, {"examples": 32}]
    assert again["signature"]["seed"] == 0
    assert again["gate"]["int8"]["expected"] == 4
    assert result.files["report.html"].startswith(b"<!")


def test_saving_replaces_only_what_whet_wrote(result: Result, tmp_path: Path):
    out = result.save(tmp_path / "new" / "out")
    names = sorted(result.files)
    assert sorted(p.name for p in out.iterdir()) == names
    assert oct(out.stat().st_mode)[-3:] == "755"
    with pytest.raises(BadInput, match=r"it exists already. Choose another folder"):
        result.save(out)
    (out / "model.onnx").write_text("old")
    (out / "more.txt").write_text("old")
    result.save(out, replace=True)
    assert sorted(p.name for p in out.iterdir()) == names
    assert (out / "model.onnx").read_bytes() == result.files["model.onnx"]
    (tmp_path / "empty").mkdir()
    result.save(tmp_path / "empty")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    with pytest.raises(BadInput, match="it holds files that whet did not write"):
        result.save(theirs, replace=True)
    assert [p.name for p in theirs.iterdir()] == ["thesis.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "new", "theirs"]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]


def test_saving_that_fails_leaves_nothing_and_keeps_the_old(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = result.save(tmp_path / "out")
    (out / "report.html").write_text("old")

    def full(self: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BadInput, match=r"write the result to .*: No space left on device. Choose"):
        result.save(out, replace=True)
    with pytest.raises(BadInput, match="No space left on device"):
        result.save(tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "report.html").read_text() == "old"


def test_saving_into_the_current_folder(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    result.save(".")
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == sorted(result.files)


def test_folder_below_a_file(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "out", tmp_path / "file" / "a" / "out"):
        with pytest.raises(BadInput, match=f"write the result to {path}: .*file cannot be written"):
            free(path, replace=True)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# -- steps that misbehave -----------------------------------------------------------------------


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are not measured: these runs end before the proof."""
    monkeypatch.setattr(runner._Run, "_reading", lambda *_: {"metric": None})
    monkeypatch.setattr(runner._Run, "_lower", lambda *_: (Path("none"), None))


class DropsMasks(Technique):
    """A technique that forgets the masks of earlier steps."""

    def apply(self, work: Work) -> None:
        packed.bake(work.model)


class Diverges(Technique):
    """A technique after which the outputs are NaN."""

    def apply(self, work: Work) -> None:
        with torch.no_grad():
            work.model[-1].bias.fill_(float("nan"))


class HalfDone(Technique):
    """A technique that refuses after it has begun."""

    def apply(self, work: Work) -> None:
        with torch.no_grad():
            work.model[-1].bias.fill_(5.0)
        work.notes.append("looked at one layer.")
        raise Refused("HalfDone", "the second layer cannot be done", "Leave it out.")


@pytest.mark.usefixtures("unmeasured")
def test_a_step_that_breaks_a_promise_stops_the_run(task: Task):
    magnitude = whet.step("Magnitude")
    with pytest.raises(
        BrokenPromise, match=r"apply DropsMasks: the weight 0\.weight lost its form"
    ):
        whet.apply(Recipe([magnitude, DropsMasks()]), task, **QUICK)
    with pytest.raises(BrokenPromise, match=r"apply Diverges: the outputs .* NaN or infinite"):
        whet.apply(Recipe([Diverges()]), task, **QUICK)


@pytest.mark.usefixtures("unmeasured")
def test_a_step_that_refuses_half_way_is_undone(task: Task, monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    monkeypatch.setattr(runner._Run, "_finish", lambda self, *a: seen.extend(a))
    whet.apply(Recipe([HalfDone()]), task, **QUICK)
    model, _, (said,) = seen
    assert torch.equal(model[-1].bias, task.model[-1].bias)
    assert said["notes"] == [
        "looked at one layer.",
        "refused: HalfDone: the second layer cannot be done. Leave it out.",
    ]


@pytest.mark.usefixtures("unmeasured")
def test_same_seed_same_network_other_seed_another(task: Task, monkeypatch: pytest.MonkeyPatch):
    loader = DataLoader(
        [(x, y) for xs, ys in task.train for x, y in zip(xs, ys, strict=True)],
        batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    shuffled = dataclasses.replace(task, train=loader, validation=None)
    monkeypatch.setattr(runner._Run, "_finish", lambda self, model, *_: model)
    recipe = Recipe.parse("steps: [FineTune: {epochs: 1}]")
    digests = []
    for seed in (0, 0, 1):
        torch.rand(seed + 3)  # what was drawn before does not matter
        digests.append(checkpoint.fingerprint(whet.apply(recipe, shuffled, seed=seed, **QUICK)))
    assert digests[0] == digests[1] != digests[2]


def test_a_file_that_computes_something_else_names_the_layer(
    task: Task, monkeypatch: pytest.MonkeyPatch
):
    class Wrong(Deployable):
        """One weight of the second convolution is off."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            node = next(n for n in self.proto.graph.node if n.name == "3")
            weight = next(i for i in self.proto.graph.initializer if i.name == node.input[1])
            array = numpy_helper.to_array(weight).copy()
            array.reshape(-1)[7] += 3
            weight.CopyFrom(numpy_helper.from_array(array, weight.name))

    monkeypatch.setattr(OnnxRuntime, "lower", lambda self, *what: Wrong(*what, self))
    monkeypatch.setattr(runner._Run, "_reading", lambda *_: {"metric": None})
    words = r"deploy the network to onnxruntime: .* the first layer that differs is 3 \("
    with pytest.raises(Disagrees, match=words):
        whet.apply(Recipe.parse("steps: [Magnitude]"), task, **QUICK)


@pytest.mark.usefixtures("unmeasured")
def test_the_stored_file_is_read_back_before_it_is_given_out(
    task: Task, monkeypatch: pytest.MonkeyPatch
):
    real: Callable[..., nn.Module] = runner.artifact.decode

    def off(data: bytes, into: nn.Module | None = None) -> nn.Module:
        net = real(data, into)
        if into is not None:
            with torch.no_grad():
                into[-1].bias += 1e-6
        return net

    monkeypatch.setattr(runner.artifact, "decode", off)
    with pytest.raises(BrokenPromise, match=r"read model.whet back into its class: .*identical"):
        whet.apply(Recipe.parse("steps: [Magnitude]"), task, **QUICK)


# -- checkpoints --------------------------------------------------------------------------------


def test_a_run_goes_on_where_another_with_the_same_first_steps_ended(task: Task, tmp_path: Path):
    first = Recipe.parse("steps: [L1Filters: {amount: 0.25}, FineTune: {epochs: 1}]")
    whole = Recipe([*first.steps, *Recipe.parse("steps: [StaticInt8]").steps])
    other = Recipe([first.steps[0].model_copy(update={"amount": 0.5}), *whole.steps[1:]])
    quick = QUICK | {"step_readings": False}
    whet.apply(first, task, workspace=tmp_path / "first", **quick)

    def resumed(recipe: Recipe, **options: Any) -> tuple[list[str], bytes]:
        told: list[str] = []
        options |= {"begun": tmp_path / "first", "tell": lambda what, done, of: told.append(what)}
        result = whet.apply(recipe, task, **quick, **options)
        return [what for what in told if "resumed" in what], result.files["model.whet"]

    names, file = resumed(whole)
    assert names == ["1/3 L1Filters (resumed)", "2/3 FineTune (resumed)"]
    assert file == whet.apply(whole, task, **quick).files["model.whet"]
    assert resumed(other)[0] == resumed(whole, seed=1)[0] == []


def test_a_run_goes_on_from_steps_that_were_carried_out_alone(task: Task, tmp_path: Path):
    """They were not measured, and what is not known is said to be None."""
    first = Recipe.parse("steps: [L1Filters: {amount: 0.25}, L1Filters: {amount: 0.0}]")
    whole = Recipe([*first.steps, *Recipe.parse("steps: [StaticInt8]").steps])
    told: list[str] = []
    quick = QUICK | {"step_readings": False}
    keeps = quick | {"tell": lambda what, *_: told.append(what), "workspace": tmp_path / "whole"}
    alone = runner.carried(first, task, workspace=tmp_path / "first", **QUICK)
    began = whet.apply(whole, task, begun=tmp_path / "first", **keeps)
    assert "1/3 L1Filters (resumed)" in told and "2/3 L1Filters (resumed)" in told
    straight = whet.apply(whole, task, **quick)
    assert began.files["model.whet"] == straight.files["model.whet"]
    assert alone[0].weight.shape == began.model[0].weight.shape
    for mine, theirs in zip(began.readings["steps"], straight.readings["steps"], strict=True):
        assert set(mine) == set(theirs) and mine["refused"] == theirs["refused"]
        assert mine["metric"] is None
    # its own checkpoints are whole: the first ones are not needed any more
    shutil.rmtree(tmp_path / "first")
    told.clear()
    whet.apply(whole, task, resume=True, **keeps)
    assert [what.split()[2:] for what in told if "/3" in what] == [["(resumed)"]] * 3


@pytest.mark.usefixtures("unmeasured")
def test_workspaces(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    applied: list[str] = []

    class Noted(Technique):
        """A technique that says when it runs."""

        tag: str = ""

        def apply(self, work: Work) -> None:
            applied.append(self.tag)

    monkeypatch.setattr(runner._Run, "_finish", lambda self, model, *_: model)
    recipe, work = Recipe([Noted(tag="a"), Noted(tag="b")]), tmp_path / "work"
    options = QUICK | {"workspace": str(work)}  # a text is a path as well
    whet.apply(recipe, task, **options)
    assert sorted(p.name for p in work.iterdir()) == ["run.json", "step-1", "step-2"]
    whet.apply(recipe, task, resume=True, **options)
    assert applied == ["a", "b"]
    (work / "step-2").rename(work / "step-2.partial")
    whet.apply(recipe, task, resume=True, **options)
    assert applied == ["a", "b", "b"]
    whet.apply(recipe, task, **options)  # without --resume all of it is done again
    assert applied == ["a", "b", "b", "a", "b"]
    for other, changed in (
        (Recipe([Noted(tag="a")]), task),
        (recipe, tiny_task(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))),
    ):
        with pytest.raises(BadInput, match=r"resume the run in .*: it was another network, recipe"):
            whet.apply(other, changed, resume=True, **options)
    (work / "run.json").write_text("{")  # killed while it was written
    with pytest.raises(BadInput, match="Start again without --resume"):
        whet.apply(recipe, task, resume=True, **options)


@pytest.mark.usefixtures("unmeasured")
def test_a_folder_of_the_users_is_never_taken_as_workspace(task: Task, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    recipe = Recipe.parse("steps: [Magnitude]")
    for resume in (False, True):
        with pytest.raises(BadInput, match=r"keep checkpoints in .*: it holds files that whet did"):
            whet.apply(recipe, task, workspace=tmp_path, resume=resume, **QUICK)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(BadInput, match=r"write the result to .*: Not a directory"):
        whet.apply(recipe, task, workspace=tmp_path / "thesis.txt" / "work", **QUICK)


@pytest.mark.usefixtures("unmeasured")
def test_a_full_disk_is_said(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.replace

    def full(source: Any, place: Any) -> None:
        if "step-" in str(place):
            raise OSError(28, "No space left on device")
        real(source, place)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(BadInput, match="No space left on device"):
        whet.apply(Recipe.parse("steps: [Magnitude]"), task, workspace=tmp_path / "w", **QUICK)


# -- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"thread": 1}, "set the option 'thread': there is none. Did you mean threads"),
        ({"dorp": "1pp"}, "Did you mean drop"),
        ({"drop": 0.005}, "set the goal drop to 0.005: it is float, not text. Write 0.5pp"),
        ({"latency": "1"}, "set the goal latency to '1'"),
        ({"threads": 0}, "set the option threads to 0: it is not a whole number from 1"),
        ({"threads": "2"}, "set the option threads to '2'"),
        ({"rounds": 4}, "set the option rounds to 4: it is not a whole number from 5"),
        ({"seed": -1}, "set the option seed to -1"),
        ({"seed": 0.5}, "set the option seed to 0.5"),
        ({"step_examples": 0}, "set the option step_examples to 0"),
        ({"target": "tpu"}, "choose a target: 'tpu' is not one"),
    ],
)
def test_options_that_cannot_be_used(task: Task, options: dict[str, Any], words: str):
    with pytest.raises(BadInput, match=words):
        whet.apply(Recipe.parse("steps: [Magnitude]"), task, **options)


def test_settings():
    assert settings_of({}) == Settings()
    said = settings_of({"drop": "1pp", "threads": 2, "workspace": "x"})
    assert said.goals.drop == "1pp"
    assert (said.threads, said.workspace) == (2, Path("x"))


# -- other kinds of task ------------------------------------------------------------------------


class Named(nn.Module):
    """Outputs in a dict that holds a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.kind, self.size = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = torch.relu(self.body(x))
        return {"kind": self.kind(y), "more": (self.size(y), y)}


def test_outputs_in_a_dict_with_a_loss_and_metric_of_its_own():
    torch.manual_seed(0)
    rows = [(torch.randn(8, 6), {"kind": torch.randint(0, 3, (8,)), "size": torch.ones(8, 1)})]

    def loss(y: dict[str, Any], t: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(y["kind"], t["kind"]) + F.mse_loss(y["more"][0], t["size"])

    def metric(y: dict[str, Any], t: dict[str, Tensor]) -> Tensor:
        return (y["kind"].argmax(1) == t["kind"]).float().mean()

    task = Task(
        Named(), (torch.randn(1, 6),), train=rows, validation=rows, loss=loss, metric=metric
    )
    recipe = Recipe.parse("steps: [Distill, FineTune: {epochs: 2}, StaticInt8]")
    found = whet.apply(recipe, task, **QUICK)
    distill, tune, int8 = found.readings["steps"]
    assert distill["refused"]
    assert "Use FineTune, or a loss between features" in distill["notes"][-1]
    assert tune["notes"][0].startswith("validation metric ")
    assert int8["metric"] is not None
    assert found.readings["original"]["metric"]["split"] == "validation"
    assert found.readings["gate"]["agreed"]
    outputs = found.model(torch.randn(1, 6))
    assert list(outputs) == ["kind", "more"]


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    """Batches whose number is not known beforehand, the last one smaller."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        chance = torch.Generator().manual_seed(0)
        for size in (8, 8, 3):
            x = torch.randn(size, 5, generator=chance)
            yield x, x.sum(1, keepdim=True)


def test_regression_without_training_data_in_batches_of_four():
    torch.manual_seed(0)
    batches = DataLoader(Endless(), batch_size=None)
    mae = Metric("mean error", lambda y, t: (y - t).abs().mean(), better="lower", unit="m")
    task = Task(
        nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 1)),
        (torch.randn(4, 5),),
        validation=batches, calibration=batches, test=[next(iter(batches))],
        loss=F.mse_loss, metric=mae,
    )  # fmt: skip
    found = whet.apply(built_in(task), task, drop="0.5", **QUICK)
    assert [step.name for step in found.recipe.steps][-2:] == ["StaticInt8", "BiasCorrection"]
    before, after = (found.readings[side] for side in ("original", "compressed"))
    x, y = next(iter(batches))
    with torch.no_grad():
        want = float((task.model(x) - y).abs().mean())
    assert before["metric"]["value"] == pytest.approx(want, abs=1e-5)
    assert before["metric"] | {"value": 0} == {
        "name": "mean error", "value": 0, "better": "lower", "unit": "m", "split": "test",
        "examples": 8,
    }  # fmt: skip
    worse = after["metric"]["value"] - before["metric"]["value"]
    assert found.readings["ratios"]["drop"] == pytest.approx(worse)
    assert found.readings["ratios"]["drop_error"] is None  # of one batch
    assert found.readings["gate"]["examples"] == 19
    assert found.met
    assert found.readings["signature"]["batch"] == 4


def test_the_drop_has_a_standard_error_from_the_deployed_files():
    task = tiny_task("plain_cnn")
    found = whet.apply(Recipe.parse("steps: [{L1Filters: {amount: 0.75}}]"), task, **QUICK)
    with torch.no_grad():
        nets = task.model.eval(), found.model.eval()
        right = [
            [float((net(x).argmax(1) == y).float().mean()) for net in nets]
            for x, y in task.final()[1]
        ]
    d = torch.tensor([before - after for before, after in right], dtype=torch.float64)
    want = float(d.std()) / len(d) ** 0.5
    assert want > 0
    assert found.readings["ratios"]["drop_error"] == pytest.approx(want)


def test_the_report_says_what_zeros_are_worth_in_the_target():
    task = tiny_task("flatten_cnn")
    said = "zeros in onnxruntime: no kernel: unstructured and N:M sparsity save bytes, not time."
    found = whet.apply(Recipe.parse("steps: [Magnitude]"), task, size="1B", **QUICK)
    assert said in found.readings["notes"]


def test_a_network_and_nothing_else(tmp_path):
    task = Task(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), (torch.randn(2, 4),))
    found = whet.compress(task, size="2x", **QUICK)
    assert [step.name for step in found.recipe.steps] == ["FoldBatchNorm"]
    assert found.readings["original"]["metric"] is None
    assert "drop" not in found.readings["ratios"]
    assert (
        "the artefact was compared on Task.example alone: there is no data."
        in (found.readings["notes"])
    )
    assert not any("zeros" in note for note in found.readings["notes"])
    assert found.met
    assert found.files["report.html"]
    found.save(tmp_path / "out")
    said = inspection.again(tmp_path / "out", found.readings, task, threads=1, rounds=5)
    assert said["now"]["compressed"]["metric"] is None
    assert said["figures"]["compressed metric"] == ("not measured", "not measured")
    with pytest.raises(BadInput, match="judge the goal drop 1pp: the task has neither test nor"):
        whet.compress(task, drop="1pp", **QUICK)
