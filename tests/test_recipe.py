"""A recipe is read, and refused as a whole before any work."""

import copy
import dataclasses
from pathlib import Path

import pytest

from whet import catalog
from whet.errors import BadInput, BadOrder
from whet.packed import forms
from whet.recipe import Recipe, built_in
from whet.rungs.rounding import affine
from whet.task import Task
from whet.technique import Work
from whet.testing import tiny_task


@pytest.fixture(scope="module")
def task() -> Task:
    return tiny_task("flatten_cnn")


def parse(*steps: str) -> Recipe:
    return Recipe.parse("steps:\n" + "".join(f"  - {step}\n" for step in steps))


def test_round_trip_writes_every_knob():
    recipe = parse("FoldBatchNorm", "L1Filters: {amount: 0.25}", "StaticInt8: {skip: [head]}")
    text = recipe.yaml()
    assert Recipe.parse(text) == recipe
    assert Recipe.parse(text).yaml() == text
    assert "amount: 0.25" in text
    assert "multiple_of: 8" in text
    assert [step.name for step in recipe.steps] == ["FoldBatchNorm", "L1Filters", "StaticInt8"]


def test_three_ways_to_write_a_step_without_knobs():
    assert parse("StaticInt8") == parse("StaticInt8: {}") == parse("StaticInt8:")


FORM = r"Write steps: and under it lines like  - L1Filters: \{amount: 0\.5\}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: [", "read the recipe: it is not YAML .*. Mend the file"),
        ("a: b: c", "it is not YAML"),
        ("\0", "it is not YAML"),
        ("steps:\n  - !!python/object/apply:os.system [ls]", "it is not YAML"),
        ("", f"it is not a mapping with the one key steps. {FORM}"),
        ("[]", "it is not a mapping"),
        ("StaticInt8", "it is not a mapping"),
        ("step: [StaticInt8]", "it is not a mapping"),
        ("steps: [StaticInt8]\nseed: 3", "it is not a mapping"),
        ("steps:", f"steps is not a list with at least one entry. {FORM}"),
        ("steps: []", "steps is not a list"),
        ("steps: StaticInt8", "steps is not a list"),
        ("steps: {StaticInt8: {}}", "steps is not a list"),
        ("steps: [3]", f"a step is 3. {FORM}"),
        ("steps: [[StaticInt8]]", "a step is"),
        ("steps: [{}]", "a step is {}"),
        ("steps: [{StaticInt8: {}, Svd: {}}]", "a step is"),
        ("steps: [{StaticInt8: 8}]", "a step is"),
        ("steps: [{3: {}}]", "a step is"),
        ("steps: &a [*a]", "a step is"),
        ("steps: [StaticInt9]", "'StaticInt9' is not a technique. Did you mean StaticInt8"),
        ("steps: [staticint8]", "is not a technique. Did you mean StaticInt8"),
        ("steps: [xyzzy]", "is not a technique. Known are: A"),
        ("steps: [L1Filters: {amuont: 1}]", "'amuont' of L1Filters: .*. Did you mean amount"),
        ("steps: [L1Filters: {3: 1}]", "set the knob '3' of L1Filters: it has no such knob"),
        ("steps: [L1Filters: {amount: 1.5}]", "set L1Filters.amount to 1.5: input should be less"),
        ("steps: [L1Filters: {amount: -0.1}]", "to -0.1: .*. See: whet techniques L1Filters"),
        ("steps: [L1Filters: {amount: .nan}]", "set L1Filters.amount to nan"),
        ("steps: [L1Filters: {amount: half}]", "set L1Filters.amount to 'half'"),
        ("steps: [StaticInt8: {weight_bits: 9}]", "set StaticInt8.weight_bits to 9"),
        ("steps: [StaticInt8: {weight_bits: 7.5}]", "set StaticInt8.weight_bits to 7.5"),
        ("steps: [StaticInt8: {ranges: best}]", "ranges to 'best': .*'minmax'.*'mse'"),
        ("steps: [StaticInt8: {skip: conv1}]", "set StaticInt8.skip to 'conv1': .*tuple"),
        ("steps: [Distill: {epochs: 0}]", "set Distill.epochs to 0"),
        ("steps: [Distill: {epochs: .inf}]", "set Distill.epochs to inf"),
        ("steps: [DropBlocks: {rounds: 0}]", "set DropBlocks.rounds to 0"),
    ],
)
def test_what_cannot_be_read(text: str, words: str):
    with pytest.raises(BadInput, match=words):
        Recipe.parse(text)


def test_files_that_cannot_be_read(tmp_path: Path):
    binary = tmp_path / "r.yaml"
    binary.write_bytes(b"\xff\xfe\x00steps")
    for path in (tmp_path / "none.yaml", tmp_path, binary):
        with pytest.raises(BadInput, match=f"read the recipe {path}: .*Give a YAML file"):
            Recipe.read(path)
    named = tmp_path / "named.yaml"
    named.write_text("[]")
    with pytest.raises(BadInput, match=f"read {named}: it is not a mapping"):
        Recipe.read(named)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (["StaticInt8", "FoldBatchNorm"], "Put FoldBatchNorm before StaticInt8"),
        (["StaticInt8", "L1Filters"], "Put L1Filters before StaticInt8"),
        (["StaticInt8", "DropBlocks"], "Put DropBlocks before StaticInt8"),
        (["Magnitude", "Svd"], "the Sparse forms that Magnitude makes. Put Svd before Magnitude"),
        (["StaticInt8", "Svd"], "Put Svd before StaticInt8"),
        (["BiasCorrection"], "no earlier step makes the Affine forms .* before BiasCorrection"),
        (["BiasCorrection", "StaticInt8"], "Put .*StaticInt8.* before BiasCorrection"),
        (["StaticInt8", "FineTune", "StaticInt8"], "Take one of the two out"),
    ],
)
def test_orders_that_make_no_sense(task: Task, steps: list[str], words: str):
    with pytest.raises(BadOrder, match=words) as caught:
        parse(*steps).check(task)
    assert caught.value.asked.startswith(
        f"apply {steps[-1] if 'Put .*' not in words else steps[0]}"
    )
    assert f"step {len(steps) if 'Put .*' not in words else 1}" in str(caught.value)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("Gptq", {"only": ["0"]}), ("Gptq", {"only": ["0", "3"]})),
        (("Gptq", {"only": ["0"]}), ("Hqq", {"only": ["0.1"]})),
        (("Gptq", {"only": ["0*"]}), ("Gptq", {"only": ["3"]})),
        (("Gptq", {}), ("Gptq", {"only": ["3"]})),
        (("Gptq", {"only": ["0"]}), ("Gptq", {})),
        # channels that are cut at 3 are cut in its neighbours
        (("Gptq", {"only": ["0"]}), ("L1Filters", {"only": ["3"]})),
    ],
)
def test_places_that_touch_are_not_apart(task, first, second):
    with pytest.raises(BadOrder):
        Recipe([catalog.technique(*step) for step in (first, second)]).check(task)


def test_all_steps_before_are_looked_at(task):
    steps = [catalog.technique("Gptq", {"only": [place]}) for place in ("0", "3", "0")]
    with pytest.raises(BadOrder, match=r"\(step 3\) after Gptq \(step 1\)"):
        Recipe(steps).check(task)


def test_places_apart_may_have_forms_of_their_own(task):
    steps = [("Gptq", {"only": ["0"], "bits": 8}), ("Gptq", {"only": ["3"], "bits": 3})]
    recipe = Recipe([catalog.technique(*step) for step in steps])
    recipe.check(task)
    work = Work(copy.deepcopy(task.model), task.model, task)
    for step in recipe.steps:
        step.apply(work)
    bits = {
        path.removesuffix(".weight"): affine(form).bits_wide for path, _, form in forms(work.model)
    }
    assert bits == {"0": 8, "3": 3}


def test_orders_that_make_sense(task: Task):
    for steps in (
        ["DropBlocks", "L1Filters", "Distill", "FoldBatchNorm", "StaticInt8", "BiasCorrection"],
        ["Svd", "Magnitude", "FineTune", "StaticInt8", "FineTune"],
        ["Magnitude", "Magnitude", "StaticInt8", "BiasCorrection", "BiasCorrection"],
        ["StaticInt8", "Magnitude"],
    ):
        parse(*steps).check(task)


@pytest.mark.parametrize(
    ("step", "gone", "words"),
    [
        ("Distill", ["train"], r"apply Distill \(step 2\): the task has no training batches"),
        ("FineTune", ["train"], "no training batches .*Add them to the task, or take the step out"),
        ("StaticInt8", ["train", "calibration"], "no calibration or training batches"),
        ("DropBlocks", ["validation"], "no validation batches"),
    ],
)
def test_data_that_the_task_lacks(task: Task, step: str, gone: list[str], words: str):
    lacking = dataclasses.replace(task, **dict.fromkeys(gone))
    with pytest.raises(BadInput, match=words):
        parse("Magnitude", step).check(lacking)
    parse("Magnitude", step).check(task)


def test_built_in_recipe_follows_the_data(task: Task):
    names = [step.name for step in built_in(task).steps]
    assert names[-2:] == ["StaticInt8", "BiasCorrection"]
    assert "Distill" in names
    untrained = built_in(dataclasses.replace(task, train=None))
    assert {catalog.family(type(step)) for step in untrained.steps} <= {"fuse", "quantize"}
    bare = Task(copy.deepcopy(task.model), task.example)
    assert [step.name for step in built_in(bare).steps] == ["FoldBatchNorm"]
    for each in (task, bare):
        built_in(each).check(each)
