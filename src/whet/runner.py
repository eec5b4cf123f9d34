"""Task and recipe in, artefact and readings out, step by step.

The runner checks what techniques declare, so that no technique has to: needs and order before any
work, promises and finite outputs after every step. Every figure comes from the file that will be
deployed, in the runtime that will run it.
"""

from __future__ import annotations

import copy
import datetime
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from whet import artifact, catalog, checkpoint, packed, promises
from whet.errors import BadInput, BrokenPromise, Refused, TargetFailed, nearest
from whet.graph import trace
from whet.measure import cost, latency, quality
from whet.measure.goals import EXAMPLES, Goals
from whet.measure.signature import signature
from whet.recipe import Recipe
from whet.release import VERSION
from whet.report.page import page
from whet.targets.lowered import Lowered
from whet.targets.onnxfile import as_arrays
from whet.targets.target import Target
from whet.task import Batches, Task, batch_size, tensors_in
from whet.task import seed as seed_batches
from whet.technique import Technique, Work

LEAST = {"threads": 1, "rounds": 5, "seed": 0, "step_examples": 1}
Tell = Callable[[str, int, int], None]  # (what, done, of)


@dataclass(frozen=True)
class Settings:
    """How to run and measure.

    Args:
        target: a target's name, or "auto" for the fastest of those installed.
        goals: what the result is judged by.
        threads: of the runtime, when timing.
        seed: of everything random.
        rounds: of the final timing; steps take a quarter.
        step_examples: validation examples for the reading after each step.
        step_readings: deploy and measure after every step, not at the end alone.
        workspace: where checkpoints live; None for a temporary folder.
        resume: go on from the checkpoints in `workspace`.
        begun: workspace of another run, whose checkpoints count as far as its steps are these.
        known: readings by content of the file and data; runs on one task may share them.
        tell: progress.
    """

    target: str = "onnxruntime"
    goals: Goals = field(default_factory=Goals)
    threads: int = 1
    seed: int = 0
    rounds: int = 40
    step_examples: int = 1000
    step_readings: bool = True
    workspace: Path | None = None
    resume: bool = False
    begun: Path | None = None
    known: dict[tuple[Any, ...], quality.Reading] = field(default_factory=dict, repr=False)
    tell: Tell = lambda what, done, of: None


@dataclass(frozen=True)
class Result:
    """What came out.

    Args:
        model: the compressed network, packed.
        recipe: what was done.
        readings: the content of report.json.
        example: the inputs it was deployed for.
        files: the deployable files by name, as bytes.
    """

    model: nn.Module
    recipe: Recipe
    readings: dict[str, Any]
    example: tuple[Any, ...]
    files: dict[str, bytes] = field(repr=False)

    @property
    def met(self) -> bool:
        """Whether every goal was met."""
        return all(goal["met"] for goal in self.readings["goals"])

    def save(self, folder: str | Path, replace: bool = False) -> Path:
        """Write the output folder, which appears whole or not at all.

        Raises:
            BadInput: it exists already (and not `replace`), or cannot be written.
        """
        folder = Path(folder).absolute()
        free(folder, replace)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        except OSError as error:
            raise unwritable(folder, error) from error
        try:
            for name, data in self.files.items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).write_bytes(data)
            partial.chmod(0o755)
            old = partial.with_name(f"{partial.name}.old")
            if folder.exists():
                os.replace(folder, old)
            os.replace(partial, folder)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            raise unwritable(folder, error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return folder


def free(folder: Path, replace: bool) -> None:
    """Check, before any work, that the output folder may be written.

    Raises:
        BadInput: it exists already (and not `replace`), holds something else than a result of
            whet, or its parent cannot be written.
    """
    asked = f"write the result to {folder}"
    if folder.exists() and not folder.is_dir():
        raise BadInput(asked, "it is a file", "Choose another folder with -o.")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if names and not names & {"report.json", "model.whet"}:
        raise BadInput(
            asked, "it holds files that whet did not write", "Choose another folder with -o."
        )
    if names and not replace:
        raise BadInput(
            asked,
            "it exists already",
            "Choose another folder with -o, or replace it with --force.",
        )
    home = folder.absolute().parent
    while not home.exists():
        home = home.parent
    if not home.is_dir() or not os.access(home, os.W_OK):
        raise BadInput(asked, f"{home} cannot be written", "Choose another folder with -o.")


def unwritable(folder: Path, error: OSError) -> BadInput:
    """The message for a folder that the system will not let us write."""
    return BadInput(f"write the result to {folder}", str(error.strerror), "Choose another folder.")


def apply(recipe: Recipe, task: Task, **options: Any) -> Result:
    """Apply `recipe` to a copy of the task's network and measure what came out.

    Args:
        recipe: the steps.
        task: the network and its data.
        options: fields of `Settings`: target, threads, seed, rounds, ...; and limits to judge
            the result by: drop, latency, size, macs, memory.

    Raises:
        BadInput: the task, recipe or options cannot be used; nothing has been done.
        BrokenPromise: a step undid an earlier one.
        TargetFailed: the runtime refused or died.
        Disagrees: the deployed file computes something else.
    """
    settings = settings_of(options)
    targets = targets_of(settings.target)
    task.check()
    recipe.check(task)
    if settings.goals.drop is not None and task.final()[1] is None:
        raise BadInput(
            f"judge the goal drop {settings.goals.drop}",
            "the task has neither test nor validation batches to measure it on",
            "Add them to the task, or leave that goal out.",
        )
    with tempfile.TemporaryDirectory(prefix="whet-") as folder:
        return _Run(task, recipe, settings, targets, Path(folder)).result()


def carried(recipe: Recipe, task: Task, **options: Any) -> nn.Module:
    """The network after the steps of `recipe`, which are neither deployed nor measured.

    Args:
        recipe: the steps.
        task: the network and its data.
        options: as `apply` takes them. A run that does the same steps first may begin with what
            stays in `workspace`.
    """
    settings = settings_of(options | {"step_readings": False})
    with tempfile.TemporaryDirectory(prefix="whet-") as folder:
        run = _Run(task, recipe, settings, targets_of(settings.target), Path(folder))
        return run.carried()


def prove(result: Result, task: Task, said: dict[str, Any] | None = None, **options: Any) -> Result:
    """Deploy and measure the network of `result` again: on test data, where `task` has any.

    Args:
        result: of `apply`; its recipe and the readings of its steps are kept.
        task: the same, with other data perhaps.
        said: more that the report is to say.
        options: as `apply` takes them.
    """
    settings = settings_of(options)
    targets = targets_of(settings.target)
    with tempfile.TemporaryDirectory(prefix="whet-") as folder:
        run = _Run(task, result.recipe, settings, targets, Path(folder))
        return run.again(result, said or {})


def settings_of(options: dict[str, Any]) -> Settings:
    """Settings from plain options, limits among them.

    Raises:
        BadInput: an unknown option, or a limit that cannot be read.
    """
    limits: dict[str, Any] = {k: v for k, v in options.items() if k in Goals.model_fields}
    known = {f.name for f in fields(Settings)} | set(Goals.model_fields)
    for name in options:
        if name not in known:
            raise BadInput(f"set the option {name!r}", "there is none", nearest(name, known))
    for name, text in limits.items():
        if text is not None and not isinstance(text, str):
            raise BadInput(
                f"set the goal {name} to {text!r}",
                f"it is {type(text).__name__}, not text",
                f"Write {EXAMPLES[name]}.",
            )
    for name, least in LEAST.items():
        value = options.get(name, least)
        if type(value) is not int or value < least:
            raise BadInput(
                f"set the option {name} to {value!r}",
                f"it is not a whole number from {least}",
                f"Give {least} or more.",
            )
    goals = Goals(**limits) if limits else options.get("goals", Goals())
    goals.limits()
    rest: dict[str, Any] = {k: v for k, v in options.items() if k not in limits}
    rest["goals"] = goals
    for name in ("workspace", "begun"):
        if rest.get(name) is not None:
            rest[name] = Path(rest[name])
    return Settings(**rest)


def targets_of(name: str) -> list[Target]:
    """The target called `name`, or for "auto" all installed ones that run the same file.

    Raises:
        BadInput: there is none of that name.
        TargetFailed: it is not installed.
    """
    if name != "auto":
        return [catalog.target(name)]
    found = [each for each in catalog.present() if each.suffix == Target.suffix]
    if not found:
        raise TargetFailed(
            "choose a target", "no runtime is installed", "Run: pip install onnxruntime."
        )
    return found


def seed_all(seed: int, task: Task) -> None:
    """Seed everything random, generators inside the user's loaders included."""
    seed_batches(seed, task.train, task.validation, task.calibration)


class _Run:
    """One run: the original's file, the steps, the final measurement."""

    def __init__(
        self, task: Task, recipe: Recipe, settings: Settings, targets: list[Target], folder: Path
    ) -> None:
        self.task, self.recipe, self.settings, self.folder = task, recipe, settings, folder
        self.targets, self.target = targets, targets[0]
        self.batch = batch_size(task.example)
        self.inputs = as_arrays(task.example)
        self.parent = copy.deepcopy(task.model).eval()
        with torch.no_grad():
            self.like = self.parent(*task.example)
        self.notes: list[str] = []
        self.said: dict[str, Any] = {}
        self.workspace = settings.workspace
        self.lowered: tuple[nn.Module, Path, Lowered] | None = None
        self.encoded: tuple[nn.Module, bytes] | None = None

    # -- the steps ---------------------------------------------------------------------------

    def result(self) -> Result:
        """Do everything."""
        self._claim_workspace()
        self.settings.tell("original", 0, 1)
        self.original, self.original_net = self._lower(self.parent, "original")
        start = {"step": "original"} | self._reading(self.parent, None)
        model, steps = self._carried_out(start)
        return self._finish(model, start, steps)

    def carried(self) -> nn.Module:
        """Do the steps alone."""
        self._claim_workspace()
        return self._carried_out({})[0]

    def _carried_out(self, last: dict[str, Any]) -> tuple[nn.Module, list[dict[str, Any]]]:
        """The network behind the steps, and what is said of each."""
        self.begun = self._begun()
        model, steps = self.parent, []
        for place, step in enumerate(self.recipe.steps, start=1):
            model, last = self._step(model, step, place, last)
            steps.append(last)
        return model, steps

    def again(self, result: Result, said: dict[str, Any]) -> Result:
        """Measure the end of a run once more."""
        self.original, self.original_net = self._lower(self.parent, "original")
        self.notes += result.readings["notes"]
        self.said = said
        return self._finish(result.model, result.readings["start"], result.readings["steps"])

    def _claim_workspace(self) -> None:
        """Checkpoints of another run are never taken for this one's."""
        if self.workspace is None:
            return
        mark, mine = self.workspace / "run.json", self._identity()
        if mark.exists() and self.settings.resume:
            if mark.read_text() != json.dumps(mine):
                raise BadInput(
                    f"resume the run in {self.workspace}",
                    "it was another network, recipe, seed, target, thread count or version of whet",
                    "Start again without --resume.",
                )
            return
        if self.workspace.is_dir() and any(self.workspace.iterdir()) and not mark.exists():
            raise BadInput(
                f"keep checkpoints in {self.workspace}",
                "it holds files that whet did not write",
                "Give a folder of its own.",
            )
        shutil.rmtree(self.workspace, ignore_errors=True)
        try:
            self.workspace.mkdir(parents=True)
            mark.write_text(json.dumps(mine))
        except OSError as error:
            raise unwritable(self.workspace, error) from error

    def _identity(self) -> dict[str, Any]:
        """What two runs with the same checkpoints have in common."""
        return {
            "recipe": self.recipe.yaml(),
            "seed": self.settings.seed,
            "target": self.settings.target,
            "threads": self.settings.threads,
            "network": checkpoint.fingerprint(self.parent),
            "whet": VERSION,
        }

    def _begun(self) -> dict[int, Path]:
        """Checkpoints of another run, by the place of the step, while it did the same."""
        folder = self.settings.begun
        if folder is None or not (folder / "run.json").exists():
            return {}
        theirs, mine = json.loads((folder / "run.json").read_text()), self._identity()
        if theirs | {"recipe": ""} != mine | {"recipe": ""}:
            return {}
        pairs = zip(Recipe.parse(theirs["recipe"]).steps, self.recipe.steps, strict=False)
        same = enumerate(takewhile(lambda pair: pair[0] == pair[1], pairs), start=1)
        found = {place: folder / f"step-{place}" for place, _ in same}
        return {place: path for place, path in found.items() if path.exists()}

    def _step(
        self, model: nn.Module, step: Technique, place: int, last: dict[str, Any]
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Apply one step and read what came of it; a refused one keeps the reading before it."""
        saved = None if self.workspace is None else self.workspace / f"step-{place}"
        label = f"{place}/{len(self.recipe.steps)} {step.name}"
        known = saved if saved is not None and saved.exists() else self.begun.get(place)
        if known is not None:
            self.settings.tell(f"{label} (resumed)", 1, 1)
            if saved is not None and saved != known:
                checkpoint.take(known, saved)
            model, said = checkpoint.read(known, self.task.model)
            # the other run may have measured nothing
            return model, (last if said["refused"] else dict.fromkeys(last)) | said
        self.settings.tell(label, 0, 1)
        seed_all(self.settings.seed * 1000 + place, self.task)
        work = Work(
            copy.deepcopy(model),
            self.parent,
            self.task,
            tell=lambda done, of: self.settings.tell(label, done, of),
            targets=self.targets,
        )
        before, began, refused = promises.promises(model), time.perf_counter(), False
        try:
            step.apply(work)
        except Refused as error:
            refused, work.model = True, copy.deepcopy(model)
            work.notes.append(f"refused: {error}")
            self.notes.append(f"{step.name} was refused: {error}")
        seconds = time.perf_counter() - began
        promises.check(before, work.model, self.task.example, step.name)
        said = {
            "step": step.name,
            "knobs": _changed(step),
            "seconds": seconds,
            "refused": refused,
            "notes": work.notes,
            "overhead_seconds": {},
        }
        read = self.settings.step_readings and not refused
        was = last if refused else dict.fromkeys(last)  # what was not measured is not known
        said = was | said | (self._reading(work.model, label) if read else {})
        if saved is not None:
            try:
                checkpoint.write(saved, work.model, said)
            except OSError as error:
                raise unwritable(saved, error) from error
        return work.model, said

    # -- readings ----------------------------------------------------------------------------

    def _lower(self, model: nn.Module, stem: str) -> tuple[Path, Lowered]:
        """Write the file of a network, or find it: the last step is read and then proved."""
        if self.lowered is None or self.lowered[0] is not model:
            net = self.target.lower(model, self.task.example)
            file = self.folder / f"{stem}{self.target.suffix}"
            self.lowered = model, net.write(file), net
        return self.lowered[1:]

    def _encode(self, model: nn.Module) -> bytes:
        """The bytes of model.whet, made once for the network that is read and then proved."""
        if self.encoded is None or self.encoded[0] is not model:
            self.encoded = model, artifact.encode(model, self.task.example)
        return self.encoded[1]

    def _reading(self, model: nn.Module, label: str | None) -> dict[str, Any]:
        """Metric, size and time of the network as it is now, from its deployed file."""
        took: dict[str, float] = {}

        def lap(name: str, began: float) -> None:
            took[name] = round(time.perf_counter() - began, 3)

        began = time.perf_counter()
        file = self.original if label is None else self._lower(model, "step")[0]
        lap("export", began)
        said: dict[str, Any] = cost.totals(model, self.task.example)
        said["bytes"] = file.stat().st_size
        said["bytes_packed"] = len(self._encode(model))
        began = time.perf_counter()
        said["metric"] = self._metric(file)
        lap("verify", began)
        began = time.perf_counter()
        variants = [latency.Variant("original", self.original)]
        variants += [latency.Variant("now", file)] if label is not None else []
        times = self._times(variants, max(5, self.settings.rounds // 4))
        lap("timing", began)
        said["latency_ms"] = times[variants[-1].name].summary()["median"]
        if label is not None:
            said["ratio"] = latency.compare(times["original"], times["now"])
        return said | {"overhead_seconds": took}

    def _metric(self, file: Path) -> float | None:
        if self.task.validation is None:
            return None
        most = self.settings.step_examples
        return self._measured(file, "validation", self.task.validation, most).value

    def _measured(
        self, file: Path, split: str, batches: Batches, examples: int | None = None
    ) -> quality.Reading:
        """The metric of a file, measured once."""
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        key = (digest, self.target.name, split, examples)
        if key not in self.settings.known:
            self.settings.known[key] = quality.measure(
                self.target,
                file,
                self.task.example,
                self.like,
                batches,
                self.task.measure,
                threads=cores(),
                examples=examples,
            )
        return self.settings.known[key]

    def _times(self, variants: list[latency.Variant], rounds: int) -> dict[str, latency.Timing]:
        return latency.time_together(
            self.target, variants, self.inputs, self.settings.threads, rounds
        )

    # -- the end -----------------------------------------------------------------------------

    def _finish(
        self, model: nn.Module, start: dict[str, Any], steps: list[dict[str, Any]]
    ) -> Result:
        self.settings.tell("proof", 0, 3)
        packed_bytes = self._saved(model)
        file, net = self._lower(model, "model")
        if len(self.targets) > 1:
            self._choose_fastest(file)
        gate = self._gate(file, net, model)
        self.settings.tell("proof", 1, 3)
        times = self._final_times(file)
        ratio = latency.compare(times["original"], times["compressed"])
        self.settings.tell("proof", 2, 3)
        size = start["bytes_packed"]
        before = self._figures(self.parent, self.original, times["original"], size)
        after = self._figures(model, file, times["compressed"], len(packed_bytes))
        readings = {
            "whet": VERSION,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "task": self.task.name,
            "target": self.target.name,
            "signature": signature(
                self.target.package,
                self.settings.threads,
                self.settings.seed,
                self.batch,
                self.settings.rounds,
            ),
            "original": before,
            "compressed": after,
            "others": self._others(times),
            "ratios": self._ratios(before, after, ratio, file),
            "start": start,
            "steps": steps,
            "layers": self._layers(model, file, net),
            "gate": gate,
            "goals": self.settings.goals.judge(before, after, self.task.measure, ratio["value"]),
            "notes": self.notes,
            "recipe": self.recipe.yaml(),
            "sha256": {
                "model.whet": hashlib.sha256(packed_bytes).hexdigest(),
                f"model{file.suffix}": hashlib.sha256(file.read_bytes()).hexdigest(),
            },
            "command": f"whet compress {self.task.name} --recipe recipe.yaml"
            f" --target {self.target.name} -o out/",
        } | self.said
        files = {
            "model.whet": packed_bytes,
            f"model{file.suffix}": file.read_bytes(),
            "recipe.yaml": self.recipe.yaml().encode(),
            "report.json": json.dumps(readings, indent=1).encode(),
            "report.html": page(readings).encode(),
        }
        self.settings.tell("proof", 3, 3)
        return Result(model, self.recipe, readings, self.task.example, files)

    def _saved(self, model: nn.Module) -> bytes:
        """model.whet, after it was read back both ways and gave the same bits."""
        data = self._encode(model)
        with torch.no_grad():
            # torch may take a fused kernel for a module that its graph does not name
            graph = trace.exported_module(model, self.task.example)
            for into, net in ((copy.deepcopy(self.task.model), model.eval()), (None, graph)):
                want = list(tensors_in(net(*self.task.example)))
                got = list(tensors_in(artifact.decode(data, into)(*self.task.example)))
                if not all(torch.equal(a, b) for a, b in zip(want, got, strict=True)):
                    way = "without its class" if into is None else "into its class"
                    raise BrokenPromise(
                        f"read model.whet back {way}",
                        "its outputs are not bit-identical",
                        "This is a bug of whet; please report the recipe.",
                    )
        return data

    def _choose_fastest(self, file: Path) -> None:
        """Take the target whose runtime runs the compressed file fastest."""
        found = {}
        for target in self.targets:
            variant = [latency.Variant("compressed", file)]
            times = latency.time_together(
                target, variant, self.inputs, self.settings.threads, self.settings.rounds // 2
            )
            found[target.name] = times["compressed"].summary()["median"]
        best = min(found, key=lambda name: found[name])
        self.target = next(t for t in self.targets if t.name == best)
        words = ", ".join(f"{name} {ms:.3f} ms" for name, ms in found.items())
        self.notes.append(f"the compressed network takes {words}; {best} is taken.")

    def _gate(self, file: Path, net: Lowered, model: nn.Module) -> dict[str, Any]:
        splits = (self.task.validation, self.task.test, self.task.statistics())
        batches = next((split for split in splits if split is not None), None)
        if batches is None:
            self.notes.append("the artefact was compared on Task.example alone: there is no data.")
            batches = [(self.task.example, None)]
        zeros = any(form.support() is not None for _, _, form in packed.forms(model))
        if zeros and "zeros" in self.target.facts:
            self.notes.append(f"zeros in {self.target.name}: {self.target.facts['zeros']}.")
        said = quality.gate(self.target, file, net, model, batches, threads=cores())
        quality.require_agreement(said, self.target)
        missing = said["int8"]["expected"] - said["int8"]["found"]
        if missing > 0:
            self.notes.append(
                f"{missing} of {said['int8']['expected']} quantized layers run in floating point "
                f"in {self.target.name}."
            )
        return said

    def _final_times(self, file: Path) -> dict[str, latency.Timing]:
        variants = [latency.Variant("original", self.original), latency.Variant("compressed", file)]
        for precision in self.target.precisions[1:]:
            variants.append(latency.Variant(f"original in {precision}", self.original, precision))
            variants.append(latency.Variant(f"compressed in {precision}", file, precision))
        return self._times(variants, self.settings.rounds)

    def _others(self, times: dict[str, latency.Timing]) -> list[dict[str, Any]]:
        others = [n for n in times if n not in ("original", "compressed")]
        fastest = times["compressed"].summary()["median"]
        for name in others:
            if name.startswith("original") and times[name].summary()["median"] <= fastest:
                self.notes.append(f"the {name} is as fast as the compressed network or faster.")
        return [{"name": n, "latency_ms": times[n].summary()} for n in others]

    def _figures(
        self, model: nn.Module, file: Path, timing: latency.Timing, packed_bytes: int
    ) -> dict[str, Any]:
        split, batches = self.task.final()
        said: dict[str, Any] = {"metric": None}
        metric = self.task.measure
        if batches is not None:
            reading = self._measured(file, split, batches)
            said["metric"] = {
                "name": metric.name,
                "value": reading.value,
                "better": metric.better,
                "unit": metric.unit,
                "split": split,
                "examples": reading.examples,
            }
            said["memory_mb"] = reading.memory_mb
        said |= {"bytes": file.stat().st_size, "bytes_packed": packed_bytes}
        return said | cost.totals(model, self.task.example) | {"latency_ms": timing.summary()}

    def _ratios(
        self, before: dict[str, Any], after: dict[str, Any], ratio: dict[str, Any], file: Path
    ) -> dict[str, Any]:
        ratios: dict[str, Any] = {"latency": ratio}
        for key in ("bytes", "bytes_packed", "params", "macs", "memory_mb"):
            if before.get(key) and after.get(key) is not None:
                ratios[key] = after[key] / before[key]
        if before["metric"] is not None:
            values = before["metric"]["value"], after["metric"]["value"]
            ratios["drop"] = self.task.measure.drop(*values)
            ratios["drop_error"] = self._drop_error(file)
        return ratios

    def _drop_error(self, file: Path) -> float | None:
        split, batches = self.task.final()
        assert batches is not None
        pair = [self._measured(each, split, batches) for each in (self.original, file)]
        return quality.standard_error(*pair)

    def _layers(self, model: nn.Module, file: Path, net: Lowered) -> list[dict[str, Any]]:
        old, new = (cost.layers(m, self.task.example) for m in (self.parent, model))
        times = [
            latency.shares(self.target, n, f, self.inputs, self.settings.threads)
            for n, f in ((self.original_net, self.original), (net, file))
        ]
        rows = []
        for path in [*old, *(p for p in new if p not in old)]:
            rows.append(
                {
                    "path": path,
                    "type": (old.get(path) or new[path]).kind,
                    "before": _row(old.get(path), times[0].get(path)),
                    "after": _row(new.get(path), times[1].get(path)),
                    "form": new[path].form if path in new else "",
                }
            )
        return rows


def _changed(step: Technique) -> dict[str, Any]:
    """The knobs of a step that are not as they are by default, as JSON.

    pydantic's exclude_defaults keeps those that have a serializer of their own.
    """
    fields = type(step).model_fields
    said = step.model_dump(mode="json").items()
    return {
        name: value
        for name, value in said
        if getattr(step, name) != fields[name].get_default(call_default_factory=True)
    }


def _row(layer: cost.Layer | None, share: float | None) -> dict[str, Any] | None:
    return None if layer is None else layer.numbers() | {"share": share}


def cores() -> int:
    """Threads for runs that are not timed."""
    return max(1, torch.get_num_threads())
