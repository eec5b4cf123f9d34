"""CoDistill: shards are disjoint, copies are as old as they should be, workers change nothing."""

import copy
import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from masks import masks_of
from torch import nn

from whet.graph import surgery
from whet.task import evaluate
from whet.technique import Need, Work
from whet.techniques.distill.codistill import CoDistill, Lectures, Shards
from whet.techniques.distill.finetune import FineTune
from whet.techniques.prune.magnitude import Magnitude
from whet.testing import tiny_task

KNOBS = {"epochs": 3, "lr": 0.05, "precision": "float32", "exchange": 2, "burn_in": 1}


def work_of(task):
    return Work(copy.deepcopy(task.model), task.model, task)


@pytest.mark.parametrize("n", [2, 3])
def test_shards_are_disjoint_and_each_is_as_long(n):
    batches = [(torch.tensor([k]), torch.tensor([10 * k])) for k in range(8)]
    dealt = list(Shards(batches, n, range(n)))
    assert len(dealt) == len(Shards(batches, n, range(n))) == 8 // n
    seen = [[int(inputs[i]) for inputs, _ in dealt] for i in range(n)]
    assert seen == [list(range(i, n * (8 // n), n)) for i in range(n)]
    assert all(int(y) == 10 * int(x) for xs, ys in dealt for x, y in zip(xs, ys, strict=True))
    for i in range(n):
        mine = [int(x) for (x,), _ in Shards(batches, n, range(i, i + 1))]
        assert mine == seen[i]


def lectures(n=3, **knobs):
    task = tiny_task("plain_cnn")
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(192, 4)) for _ in range(n)]
    return Lectures(CoDistill(**knobs), task, networks, 0, n), task


def test_what_is_taught_is_the_mean_of_the_other_copies():
    lesson, task = lectures(burn_in=0, weight=0.7)
    inputs, labels = (
        [part for batch in task.train[:3] for part in batch[i : i + 1]] for i in (0, 1)
    )
    z = [torch.randn(16, 4).requires_grad_(True) for _ in range(3)]
    loss = lesson(inputs, labels, z)
    p = [[network(x).softmax(1).detach() for network in lesson.networks] for x in inputs]
    expected = 0
    for i in range(3):
        target = sum(p[i][j] for j in range(3) if j != i) / 2
        log_p = z[i].detach().log_softmax(1)
        expected += F.cross_entropy(z[i].detach(), labels[i])
        expected += 0.7 * (target * (target.log() - log_p)).sum(1).mean()
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    assert all(each.grad is not None for each in z)
    assert all(w.grad is None for m in (*lesson.networks, *lesson.stale) for w in m.parameters())


@pytest.mark.parametrize("exchange", [1, 2, 5])
@pytest.mark.parametrize("burn_in", [0, 3])
def test_the_copies_are_of_the_last_exchange(exchange, burn_in):
    lesson, task = lectures(exchange=exchange, burn_in=burn_in)
    inputs, labels = (
        [part for batch in task.train[:3] for part in batch[i : i + 1]] for i in (0, 1)
    )
    z = [torch.randn(16, 4).requires_grad_(True) for _ in range(3)]
    labels_alone = sum(F.cross_entropy(a, y) for a, y in zip(z, labels, strict=True))
    for step in range(12):
        with torch.no_grad():
            for network in lesson.networks:
                network[1].bias.fill_(step)
        loss = lesson(inputs, labels, z)
        if step < burn_in:
            torch.testing.assert_close(loss, labels_alone)
            assert not lesson.stale
            continue
        assert float((loss - labels_alone).detach()) > 0
        last = burn_in + (step - burn_in) // exchange * exchange
        assert all(bool((copied[1].bias == last).all()) for copied in lesson.stale)
        assert not any(copied.training for copied in lesson.stale)


def test_before_the_burn_in_is_over_each_is_alone_with_its_shard(apply):
    task = replace(tiny_task("plain_cnn"), validation=None)
    torch.manual_seed(0)
    work = apply(task, CoDistill(**KNOBS | {"burn_in": 100}))
    half = replace(task, train=task.train[::2])
    alone = apply(half, FineTune(epochs=3, lr=0.05, precision="float32")).model
    for a, b in zip(work.model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_it_learns_from_stale_peers(apply):
    task = tiny_task("plain_cnn")
    work = apply(task, CoDistill(**KNOBS | {"epochs": 8, "exchange": 4}))
    worth = evaluate(work.model, task.validation, task.measure)
    assert worth > evaluate(task.model, task.validation, task.measure) + 0.1
    assert f"-> {worth:.4f} " in work.notes[0]
    assert not work.model.training


def test_cuts_and_masks_stay(apply):
    task = tiny_task("residual_cnn")
    before = apply(task, Magnitude(amount=0.7))
    work = Work(copy.deepcopy(before.model), task.model, task)
    CoDistill(**KNOBS).apply(work)
    assert surgery.structure(work.model) == surgery.structure(before.model)
    for path, mask in masks_of(before.model).items():
        assert bool((work.model.get_submodule(path).weight[~mask] == 0).all())


def trained():
    """One state_dict, and what was noted."""
    task = tiny_task("plain_cnn")
    work = work_of(task)
    torch.manual_seed(0)
    CoDistill(**KNOBS).apply(work)
    return work.model.state_dict(), work.notes


def worker(rank, world, folder):
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # unset, accelerate makes it 2, and sums round otherwise
    # as `accelerate launch` has them: fit must not average the gradients of different networks
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save(trained(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_do_what_one_process_does(tmp_path):
    torch.multiprocessing.spawn(worker, (2, str(tmp_path)), nprocs=2)
    state, notes = trained()
    for rank in range(2):
        other, said = torch.load(tmp_path / f"{rank}.pt")
        assert said == notes
        assert other.keys() == state.keys()
        assert all(torch.equal(value, other[name]) for name, value in state.items())


def test_too_few_batches_and_no_scores_are_refused(refuses):
    task = tiny_task("plain_cnn")
    text = "CoDistill: 4 training batches do not go round among 6 peers. Make the batches smaller"
    refuses(task, CoDistill(peers=5), text)
    own = replace(task, loss=lambda z, y: z.square().mean())
    refuses(own, CoDistill(), "CoDistill: the task has a loss of its own")


def test_it_needs_training_data():
    assert CoDistill.needs == {Need.TRAIN}
