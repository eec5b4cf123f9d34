"""Tiny networks run fastest on one thread, and every test starts from the same random state."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from whet import fit
from whet.errors import Refused
from whet.graph import surgery, trace
from whet.rungs.layers import weights
from whet.task import Metric
from whet.technique import Work
from whet.testing import CLASSES, tiny_task

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def applied(task, *techniques):
    """What the techniques, one after the other, make of a copy of the task's network."""
    work = Work(copy.deepcopy(task.model), task.model, task)
    for technique in techniques:
        technique.apply(work)
    return work


@pytest.fixture
def apply():
    return applied


@pytest.fixture(scope="session")
def detector():
    """A trained detector and a narrow student that nothing has taught; no test changes them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        task = tiny_task("grid_cnn")
        learn = lambda _, labels, outputs: task.loss(outputs, labels)  # noqa: E731
        fit.fit(task.model, task.train, learn, fit.Schedule(epochs=20, lr=0.1))
        student = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Conv2d(8, 5 + CLASSES, 1),
        )
    task.model.zero_grad()
    return replace(task, model=student, teachers=(task.model.eval(),), validation=None)


@pytest.fixture
def falling():
    """A metric that is lower each time it is asked."""
    asked = []

    def measure(outputs, labels):
        asked.append(0)
        return -float(len(asked))

    return Metric("late", measure)


@pytest.fixture
def interrupted():
    """What is left when a technique that trains, the last one, is stopped at its first step."""

    def stop(task, *techniques):
        work = applied(task, *techniques[:-1])

        def broken(done, of):
            raise KeyboardInterrupt

        work.tell = broken
        with pytest.raises(KeyboardInterrupt):
            techniques[-1].apply(work)
        return work

    return stop


@pytest.fixture
def refuses():
    """Check that a technique refuses with a text and leaves the network as it was."""

    def check(task, technique, text, *before):
        work = applied(task, *before)
        state, structure = copy.deepcopy(work.model.state_dict()), surgery.structure(work.model)
        with pytest.raises(Refused, match=re.escape(text)) as caught:
            technique.apply(work)
        assert caught.value.todo.endswith(".")
        assert surgery.structure(work.model) == structure
        now = work.model.state_dict()
        assert state.keys() == now.keys()
        assert all(torch.equal(state[name], now[name]) for name in state)

    return check


@pytest.fixture
def factored():
    """(work, [(layer, its factors, how many weights these have)]) of a technique that factors.

    Every layer is factored or named with the reason, work falls by `saving` at least, and the edits
    replay on a fresh network to the same bits.
    """

    def call(task, technique):
        work = applied(task, technique)
        old, new = (trace.macs(model, task.example) for model in (task.model, work.model))
        pairs = []
        for path, module in weights(task.model):
            twin = work.model.get_submodule(path)
            said = (note.startswith(f"{path} stays") or f"'{path}'" in note for note in work.notes)
            named = any(said)
            assert isinstance(twin, nn.Sequential) != named, path
            if not named:
                assert new[path] <= (1 - technique.saving) * old[path]
                count = sum(p.numel() for p in twin.parameters() if p.ndim > 1)
                pairs.append((module, twin, count))
        assert pairs
        fresh = copy.deepcopy(task.model)
        surgery.replay(fresh, surgery.structure(work.model))
        fresh.load_state_dict(work.model.state_dict())
        with torch.no_grad():
            assert torch.equal(fresh(*task.example), work.model(*task.example))
        return work, pairs

    return call
