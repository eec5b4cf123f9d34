"""Cosine sees directions alone; with Distill it is DistilBERT's loss."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from whet.rungs.teaching import divergence
from whet.technique import Work
from whet.techniques.distill.cosine import Cosine, turned
from whet.techniques.distill.distill import Distill
from whet.testing import tiny_task


@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 6, 4, 4)])
def test_lengths_are_nothing_and_directions_all(shape):
    f = torch.randn(shape)
    dim = 2 if f.ndim == 3 else 1
    for other, cost in ((f, 0), (-f, 2)):
        longer = other * torch.rand(shape).amax(dim, keepdim=True).add(0.5)
        assert float(turned(longer, f)) == pytest.approx(cost, abs=1e-5)
    across = torch.zeros_like(f).movedim(dim, 0)
    across[0], across[1] = -f.movedim(dim, 0)[1], f.movedim(dim, 0)[0]
    assert float(turned(across.movedim(0, dim), f)) == pytest.approx(1, abs=1e-5)


def test_it_is_the_cosine_embedding_loss_of_pairs_that_belong_together():
    f_s, f_t = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    expected = F.cosine_embedding_loss(f_s.flatten(0, 1), f_t.flatten(0, 1), torch.ones(6))
    torch.testing.assert_close(turned(f_s, f_t), expected)


def test_beside_distill_it_is_the_triple_loss():
    task = replace(tiny_task("transformer"), validation=None)
    other = tiny_task("transformer").model
    for weight in other.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    work = Work(task.model, task.model, replace(task, teachers=(other,)))
    at = {"layers.1": "layers.1"}
    triple = Distill(weight=5, labels=2, temperature=2, beside=[Cosine(at=at)])
    lesson = triple.objective(work)
    inputs, labels = task.train[0]
    states = []
    for model in (task.model, other):
        model.layers[1].register_forward_hook(lambda *args: states.append(args[2]))
    with lesson.student, torch.no_grad():
        z = task.model(inputs)
        got = lesson(inputs, labels, z)
        z_t = other(inputs)
    h_s, h_t = states[0], states[-1]
    cosine = 1 - F.cosine_similarity(h_s, h_t, dim=-1).mean()
    expected = 5 * divergence(z, z_t, 2.0) + 2 * F.cross_entropy(z, labels) + cosine
    torch.testing.assert_close(got, expected)


def test_other_widths_are_refused(refuses):
    task = tiny_task("plain_cnn")
    teacher = nn.Sequential(nn.Conv2d(3, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    technique = Cosine(at={"0": "0"})
    text = "'0' has 16 channels, what it is compared with 5"
    refuses(replace(task, teachers=(teacher,)), technique, text)
