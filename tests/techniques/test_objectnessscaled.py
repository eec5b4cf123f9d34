"""ObjectnessScaled teaches boxes and classes as far as the teacher is sure of an object."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from whet.task import evaluate
from whet.technique import Work
from whet.techniques.distill.distill import Distill
from whet.techniques.distill.finetune import FineTune
from whet.techniques.distill.objectnessscaled import (
    Detections,
    ObjectnessScaled,
    objectness_scaled,
    thinned,
)
from whet.testing import tiny_task


def outputs(batch=2, boxes=3, classes=4, rows=4, columns=5):
    return torch.randn(batch, boxes * (5 + classes), rows, columns)


def test_the_map_is_read_box_by_box():
    z = outputs()
    seen = Detections.read(z, 3)
    for box in range(3):
        own = z[:, 9 * box : 9 * box + 9]
        torch.testing.assert_close(seen.b[:, box, :2], own[:, :2].sigmoid())
        torch.testing.assert_close(seen.b[:, box, 2:], own[:, 2:4])
        torch.testing.assert_close(seen.o[:, box], own[:, 4].sigmoid())
        torch.testing.assert_close(seen.z[:, box], own[:, 5:])


def of_other_classes(seen):
    """The same with another class for each box of a cell: none stands in the way of another."""
    z = 0.1 * seen.z
    for box in range(3):
        z[:, box, box] += 5.0
    return seen._replace(z=z)


def test_it_is_the_sum_of_the_paper_written_out():
    student, teacher = (Detections.read(outputs(), 3) for _ in range(2))
    teacher = of_other_classes(teacher)
    assert torch.equal(thinned(teacher, 1), teacher.o)
    total = 0.0
    for n in range(2):
        for box in range(3):
            for i in range(4):
                for j in range(5):
                    at = n, box, ..., i, j
                    o, own = (float(d.o[n, box, i, j]) for d in (teacher, student))
                    p, q = (d.z[at].softmax(dim=0) for d in (teacher, student))
                    away = float((teacher.b[at] - student.b[at]).square().sum())
                    apart = float((p * (p / q).log()).sum())
                    total += (o - own) ** 2 + o * (apart + away)
    assert float(objectness_scaled(student, teacher, 1)) == pytest.approx(total / 2, rel=1e-5)


def test_where_the_teacher_sees_nothing_boxes_and_classes_are_free():
    z_t, z_s = outputs(boxes=1), outputs(boxes=1).requires_grad_()
    z_t[:, 4] = -math.inf
    z_t[:, 4, 1, 2] = 3.0
    loss = objectness_scaled(Detections.read(z_s, 1), Detections.read(z_t, 1), 3)
    loss.backward()
    taught = z_s.grad.abs() > 0
    others = [c for c in range(9) if c != 4]
    only = torch.zeros(4, 5, dtype=torch.bool)
    only[1, 2] = True
    assert bool(taught[:, 4].all())
    for channel in others:
        assert torch.equal(taught[:, channel], only.expand(2, 4, 5))


def test_of_neighbours_of_one_class_only_the_surest_is_taught():
    o = torch.tensor([[0.2, 0.9, 0.8, 0.1, 0.7]])[None, None]
    same = torch.zeros(1, 1, 2, 1, 5)
    b = torch.zeros(1, 1, 4, 1, 5)
    seen = Detections(b, o, same)
    assert thinned(seen, 3).flatten().tolist() == pytest.approx([0, 0.9, 0, 0, 0.7])
    assert thinned(seen, 1).flatten().tolist() == pytest.approx(o.flatten().tolist())
    other = same.clone()
    other[:, :, 1, :, 2] = 1.0  # the third cell is of another class than its neighbours
    assert thinned(seen._replace(z=other), 3).flatten().tolist() == pytest.approx(
        [0, 0.9, 0.8, 0, 0.7]
    )


def test_a_duplicate_is_taught_as_no_object():
    o = torch.tensor([[0.9, 0.8]])[None, None]
    seen = Detections(torch.zeros(1, 1, 4, 1, 2), o, torch.zeros(1, 1, 2, 1, 2))
    assert float(objectness_scaled(seen, seen, 3)) == pytest.approx(0.8**2)
    assert float(objectness_scaled(seen, seen, 1)) == 0


def test_boxes_of_one_cell_compete_within_a_class():
    o = torch.tensor([0.6, 0.5, 0.4]).reshape(1, 3, 1, 1)
    z = torch.zeros(1, 3, 2, 1, 1)
    z[:, 2, 1] = 1.0
    kept = thinned(Detections(torch.zeros(1, 3, 4, 1, 1), o, z), 3)
    assert kept.flatten().tolist() == pytest.approx([0.6, 0, 0.4])


def test_one_class_needs_no_scores():
    z = outputs(classes=0)
    seen = Detections.read(z, 3)
    assert seen.z.shape == (2, 3, 1, 4, 5)
    loss = objectness_scaled(seen, Detections.read(outputs(classes=0), 3), 3)
    assert bool(loss.isfinite())
    assert float(objectness_scaled(seen, seen, 1)) >= 0


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    seen = of_other_classes(Detections.read(outputs(), 3))
    assert float(objectness_scaled(seen, seen, 1)) == 0


def test_the_weights_count(detector):
    work = Work(copy.deepcopy(detector.model), detector.model, detector)
    (inputs, labels), *_ = detector.train
    objective = ObjectnessScaled(labels=0.5, weight=2.0).objective(work)
    with torch.no_grad():
        z_s, z_t = work.model(inputs), detector.teachers[0](inputs)
        got = objective(inputs, labels, z_s)
    parts = (Detections.read(z, 1) for z in (z_s, z_t))
    expected = 0.5 * detector.loss(z_s, labels) + 2 * objectness_scaled(*parts, 3)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


def test_it_comes_nearer_to_its_teacher_than_by_labels(apply, detector):
    knobs = {"epochs": 6, "lr": 0.02}
    taught = apply(detector, ObjectnessScaled(**knobs, labels=1.0, weight=0.1)).model
    plain = apply(detector, FineTune(**knobs)).model

    def apart(model):
        with torch.no_grad():
            seen = [
                tuple(Detections.read(m.eval()(x), 1) for m in (model, detector.teachers[0]))
                for x, _ in detector.test
            ]
        return sum(float(objectness_scaled(own, its, 3)) for own, its in seen)

    assert apart(taught) < 0.8 * apart(plain)
    assert evaluate(taught, detector.test, detector.measure) > 0.7


def test_what_are_no_boxes_is_refused(refuses, detector):
    text = "no map of 1 boxes a cell, each of 5 channels and its classes"
    for name in ("plain_cnn", "rnn", "transformer", "dense_cnn"):
        refuses(tiny_task(name), ObjectnessScaled(), text)
    refuses(detector, ObjectnessScaled(boxes=2), "its outputs, 9 x 4 x 4, are no map of 2 boxes")
    refuses(
        detector,
        ObjectnessScaled(neighbourhood=4),
        "a neighbourhood of 4 cells has no middle",
    )
    wide = nn.Conv2d(3, 10, 2, 2)
    text = "the student's outputs are 9 x 4 x 4, the teacher's 10 x 4 x 4"
    refuses(replace(detector, teachers=(wide,)), ObjectnessScaled(), text)


def test_losses_between_scores_refuse_boxes(refuses, detector):
    refuses(detector, Distill(), "the task has a loss of its own")
