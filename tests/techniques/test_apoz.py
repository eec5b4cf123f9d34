"""Apoz removes the channels that are zero most often where they are read."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from whet.graph.channels import find_groups
from whet.technique import Need, Work
from whet.techniques.prune.apoz import Apoz
from whet.testing import tiny_task


def scores(task, **knobs):
    technique = Apoz(**knobs)
    groups = [g for g in find_groups(task.model, task.example) if not g.fixed]
    evidence = technique.evidence(Work(task.model, task.model, task), groups)
    return {group.name: technique.unit_scores(group, evidence) for group in groups}


def nonzero(x, threshold=0.0):
    return (x.detach().abs() > threshold).double().mean((0, 2, 3)).numpy()


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_zeros_are_counted_behind_the_activation(threshold):
    task = tiny_task("plain_cnn")
    found = scores(task, threshold=threshold)
    x = torch.cat([inputs for inputs, _ in task.calibration])
    for name, stop in (("0", 3), ("3", 7)):
        np.testing.assert_allclose(found[name], nonzero(task.model[:stop](x), threshold))
    assert found["0"].min() < found["0"].max() < 1


def test_a_map_that_is_flattened_counts_with_all_its_places():
    task = tiny_task("flatten_cnn")
    x = torch.cat([inputs for inputs, _ in task.calibration])
    np.testing.assert_allclose(scores(task)["3"], nonzero(task.model[:6](x)))


def test_several_readers_count_by_their_mean():
    task = tiny_task("residual_cnn")
    x = torch.cat([inputs for inputs, _ in task.calibration])
    stem, trunk = task.model[:3](x), task.model[:4](x)
    block = task.model[4]  # its first convolution and its projection read the trunk
    assert block.downsample is not None
    expected = (nonzero(stem) + 2 * nonzero(trunk)) / 3
    np.testing.assert_allclose(scores(task)["0 (+1)"], expected)


def test_a_grouped_reader_sees_a_channel_of_each_group():
    task = tiny_task("grouped_cnn")
    x = torch.cat([inputs for inputs, _ in task.calibration])
    inside = nonzero(task.model[3].reduce(task.model[:3](x)))
    found = scores(task)
    assert any(
        len(each) == 16 and np.allclose(each, inside.reshape(4, 16).mean(axis=0))
        for each in found.values()
    )


def test_dead_channels_go_first_and_the_output_stays(apply):
    task = tiny_task("plain_cnn")
    dead = [2, 3, 10, 12]
    task.model[1].bias.data[dead] = -100
    knobs = Apoz(amount=0.25, amounts={"3": 0, "7": 0}, multiple_of=1, calibrate=0)
    model = apply(task, knobs).model
    assert model[0].out_channels == 12
    assert float(model[1].bias.detach().min()) > -100
    with torch.no_grad():
        torch.testing.assert_close(model(*task.example), task.model(*task.example))


def test_channels_without_a_zero_are_left_alone(apply):
    layers = [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    work = apply(tiny_task(model), Apoz(multiple_of=1))
    assert [work.model[k].out_channels for k in (0, 1, 3)] == [8, 4, 8]
    for name in ("0", "3"):
        assert f"{name} is left alone: no layer reads a zero from it." in work.notes


def test_a_network_without_zeros_is_refused(refuses):
    layers = [nn.Conv2d(3, 8, 1), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    task = tiny_task(nn.Sequential(*layers, nn.Linear(8, 4)).eval())
    refuses(task, Apoz(), "Apoz(amount=0.5, multiple_of=8): no channel group can lose a channel")


def test_what_is_counted_ends_with_the_examples():
    task = tiny_task("plain_cnn")
    first = task.calibration[0][0][:5]
    np.testing.assert_allclose(scores(task, examples=5)["0"], nonzero(task.model[:3](first)))


def test_it_needs_statistics():
    assert Apoz.needs == {Need.STATISTICS}


@pytest.mark.parametrize("knobs", [{"threshold": -0.1}, {"examples": 0}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValidationError):
        Apoz(**knobs)
