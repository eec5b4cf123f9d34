"""The rung of distillation: teachers are asked once, losses add up, taps leave nothing behind."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from whet import catalog, fit
from whet.errors import BadInput, Refused
from whet.recipe import Recipe
from whet.rungs.teaching import divergence, stages
from whet.technique import Work
from whet.techniques.distill.attentiontransfer import AttentionTransfer
from whet.techniques.distill.distill import Distill
from whet.techniques.distill.finetune import FineTune
from whet.techniques.distill.fitnet import FitNet
from whet.testing import tiny_task


class Net(nn.Module):
    """Two stages; counts its calls."""

    def __init__(self, width, classes=4):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width))
        self.second = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(2 * width, classes)
        self.calls = []

    def forward(self, x):
        self.calls.append((self.training, torch.is_grad_enabled()))
        return self.head(self.second(self.first(x)).mean(dim=(2, 3)))


def work_with(*teachers, student=None):
    task = replace(tiny_task("plain_cnn"), model=student or Net(4), validation=None)
    return Work(copy.deepcopy(task.model), task.model, replace(task, teachers=teachers))


def test_stages_are_the_last_features_of_each_size():
    x = torch.randn(2, 3, 8, 8)
    assert stages(Net(4), (x,)) == {(8, 8): "first", (4, 4): "second"}
    model, example = tiny_task("transformer").model, tiny_task("transformer").example
    assert all(len(size) == 2 for size in stages(model, example))


def test_a_teacher_is_asked_once_for_all_losses():
    teacher = Net(8)
    work = work_with(teacher)
    calls = []
    lesson = FitNet(beside=(AttentionTransfer(), Distill())).objective(work)
    lesson.teachers[0][0].network.register_forward_hook(lambda *_: calls.append(1))
    inputs, labels = work.task.train[0]
    with lesson.student:
        lesson(inputs, labels, work.model(inputs))
    assert calls == [1]


def test_the_losses_add_up_with_their_weights():
    teacher = Net(4).eval()
    work = work_with(teacher)
    beside = (AttentionTransfer(weight=3.0, at={"second": "second"}),)
    technique = Distill(labels=0.5, weight=2.0, temperature=1.0, beside=beside)
    lesson = technique.objective(work)
    inputs, labels = work.task.train[0]
    with lesson.student:
        outputs = work.model.eval()(inputs)
        got = lesson(inputs, labels, outputs)
    with torch.no_grad():
        z_t, f_t = teacher(inputs), teacher.second(teacher.first(inputs))
        f_s = work.model.second(work.model.first(inputs))
    expected = 0.5 * F.cross_entropy(outputs, labels) + 2 * divergence(outputs, z_t, 1.0)
    expected = expected + 3 * AttentionTransfer().loss(f_s, f_t)
    torch.testing.assert_close(got, expected)


def test_of_several_teachers_the_mean_counts():
    teachers = Net(4).eval(), Net(8).eval()
    work = work_with(*teachers)
    inputs, labels = work.task.train[0]
    outputs = work.model.eval()(inputs)
    got = Distill(labels=0, weight=1).objective(work)(inputs, labels, outputs)
    with torch.no_grad():
        losses = [divergence(outputs, teacher(inputs), 4.0) for teacher in teachers]
    torch.testing.assert_close(got, sum(losses) / 2)


def test_teachers_answer_in_eval_mode_without_gradient_and_stay_as_they_are():
    teacher = Net(8).train()
    state = copy.deepcopy(teacher.state_dict())
    work = work_with(teacher)
    shared = teacher.calls
    lesson = FitNet(epochs=1).objective(work)
    network = lesson.teachers[0][0].network
    network.calls = []
    inputs, labels = work.task.train[0]
    with lesson.student:
        lesson(inputs, labels, work.model(inputs))
    assert network.calls == [(False, False)]
    assert shared == []
    assert teacher.training
    assert all(torch.equal(v, teacher.state_dict()[k]) for k, v in state.items())


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_nothing_is_left_on_the_student(interrupted):
    work = work_with(Net(8))
    FitNet(epochs=1).apply(work)
    assert hooks(work.model) == 0
    stopped = interrupted(work.task, FitNet(epochs=1))
    assert hooks(stopped.model) == 0


def test_a_student_that_is_asked_nothing_trains_as_without_a_teacher():
    work, plain = work_with(Net(8)), work_with()
    for technique, each in ((FitNet(weight=0, lr=0.05), work), (FineTune(lr=0.05), plain)):
        each.model.load_state_dict(plain.task.model.state_dict())
        torch.manual_seed(0)
        technique.apply(each)
    for a, b in zip(work.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_hints_bring_the_features_nearer():
    teacher = Net(8)
    task = tiny_task("plain_cnn")
    learn = lambda _, labels, outputs: F.cross_entropy(outputs, labels)  # noqa: E731
    fit.fit(teacher, task.train, learn, fit.Schedule(epochs=2, lr=0.05))
    work = work_with(teacher)
    inputs, labels = work.task.train[0]

    def gap(model):
        lesson = FitNet(labels=0).objective(replace(work, model=model))
        with lesson.student, torch.no_grad():
            return float(lesson(inputs, labels, model.eval()(inputs)))

    before = gap(work.model)
    FitNet(labels=0, epochs=6, lr=0.05).apply(work)
    assert gap(work.model) < 0.7 * before


def test_it_reads_and_writes_losses_beside_another():
    text = """
    steps:
      - FitNet: {at: {first: first}, epochs: 2, beside: [Distill: {temperature: 2}, Dkd]}
    """
    recipe = Recipe.parse(text)
    (step,) = recipe.steps
    assert [each.name for each in step.beside] == ["Distill", "Dkd"]
    assert step.beside[0].temperature == 2
    assert Recipe.parse(recipe.yaml()) == recipe
    assert Recipe.parse(recipe.yaml()).yaml() == recipe.yaml()


@pytest.mark.parametrize(
    ("beside", "text"),
    [
        (["StaticInt8"], "StaticInt8 is not a loss between a student and its teacher"),
        ([{"Dkd": {"epochs": 3}}], "Dkd beside another takes no epochs: the step has one"),
        (["Dkdd"], "did you mean Dkd"),
        ("Dkd", "it is 'Dkd'"),
        ([3], "a step is 3"),
        ([{"Dkd": 3}], "a step is {'Dkd': 3}"),
    ],
)
def test_what_is_no_loss_is_not_taken_beside_one(beside, text):
    with pytest.raises(BadInput, match=".*") as caught:
        catalog.technique("FitNet", {"beside": beside})
    assert text.lower() in str(caught.value).lower()


@pytest.mark.parametrize(
    ("technique", "teacher", "text"),
    [
        (FitNet(at={"third": "first"}), Net(8), "the network has no module 'third'"),
        (FitNet(at={"first": "third"}), Net(8), "the teacher has no module 'third'"),
        (FitNet(), nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), "of the size that one of"),
        (Distill(), Net(8, classes=7), "the student scores 4 classes, the teacher 7"),
        (Distill(), nn.Sequential(nn.Conv2d(3, 4, 1)), "the teacher's outputs are no class scores"),
    ],
)
def test_what_cannot_be_compared_is_refused(technique, teacher, text):
    work = work_with(teacher)
    before = copy.deepcopy(work.model.state_dict())
    with pytest.raises(Refused) as caught:
        technique.apply(work)
    assert text in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in work.model.state_dict().items())


def test_modules_that_are_not_called_are_refused():
    class Idle(Net):
        def __init__(self):
            super().__init__(4)
            self.idle = nn.Conv2d(1, 1, 1)

    with pytest.raises(Refused, match="'idle' gives no single tensor"):
        FitNet(at={"idle": "first"}).apply(work_with(Net(8), student=Idle()))
