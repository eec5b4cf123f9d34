"""Policies: DAgger asks where the student goes, and so gets further with as many answers."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from whet.errors import BadInput
from whet.policies import BehaviourCloning, DAgger, Visits, actions_of, as_state, mean_return, visit
from whet.task import Task
from whet.technique import Work
from whet.techniques.distill.distill import Distill

SEGMENTS, LANES, LONGEST = 6, 7, 60
WHEELS = np.random.default_rng(5).integers(3, size=SEGMENTS * LANES)


class Road:
    """A round road of lanes; one step in ten a gust blows to either side. One point a step on it.

    In each place another one of the three actions steers to the left, straight on, to the right.
    """

    def __init__(self):
        self.state = np.zeros(SEGMENTS * LANES, dtype=np.float32)
        self.resets, self.taken = [], []

    def reset(self, *, seed):
        self.chance = np.random.default_rng(seed)
        self.segment, self.lane, self.time = 0, LANES // 2, 0
        self.resets.append(seed)
        return self._seen(), {}

    def step(self, action):
        self.taken.append(action)
        self.lane += (action + WHEELS[self.state.argmax()]) % 3 - 1
        if self.chance.random() < 0.1:
            self.lane += self.chance.choice((-1, 1))
        off = not 0 <= self.lane < LANES
        self.segment, self.lane = (self.segment + 1) % SEGMENTS, min(max(self.lane, 0), LANES - 1)
        self.time += 1
        return self._seen(), float(not off), off, self.time == LONGEST, {}

    def _seen(self):
        self.state[:] = 0  # one array for all, as environments may
        self.state[self.segment * LANES + self.lane] = 1
        return self.state


def expert(states):
    """Towards the lane in the middle."""
    place = states.argmax(dim=1)
    return (1 + (LANES // 2 - place % LANES).sign() - torch.from_numpy(WHEELS)[place]) % 3


def network(hidden=16):
    return nn.Sequential(nn.Linear(SEGMENTS * LANES, hidden), nn.ReLU(), nn.Linear(hidden, 3))


KNOBS = {"steps": 120, "batch": 32, "epochs": 10, "lr": 0.02, "optimizer": "adamw"}


def result(technique, seed):
    torch.manual_seed(seed)
    env, student = Road(), network()
    seen = technique.teach(env, expert, student)
    assert len(seen.states) == len(seen.actions) == KNOBS["steps"]
    assert len(env.taken) == KNOBS["steps"]
    torch.manual_seed(1000)  # the same episodes for all
    return mean_return(Road(), student, 12)


def test_with_as_many_labels_dagger_gets_further_than_behaviour_cloning():
    cloned = [result(BehaviourCloning(**KNOBS), seed) for seed in range(4)]
    grown = [result(DAgger(rounds=6, **KNOBS), seed) for seed in range(4)]
    assert sum(grown) / 4 > sum(cloned) / 4 + 5
    assert sum(g >= c for g, c in zip(grown, cloned, strict=True)) >= 3
    assert mean_return(Road(), expert, 5) == LONGEST


def test_one_round_of_dagger_is_behaviour_cloning():
    found = []
    for technique in (BehaviourCloning(**KNOBS), DAgger(rounds=1, **KNOBS)):
        torch.manual_seed(0)
        student = network()
        technique.teach(Road(), expert, student)
        found.append(student)
    for p, q in zip(*(each.parameters() for each in found), strict=True):
        assert torch.equal(p, q)


def test_the_expert_labels_every_state_whoever_acts():
    contrary = lambda states: (1 + expert(states)) % 3  # noqa: E731
    for beta in (0.0, 0.5, 1.0):
        env, seen = Road(), Visits(8)
        visit(env, expert, contrary, beta, 400, seen)
        assert torch.equal(torch.tensor(seen.actions), expert(torch.stack(seen.states)))
        own = [taken == wanted for taken, wanted in zip(env.taken, seen.actions, strict=True)]
        assert sum(own) / 400 == pytest.approx(beta, abs=0.08)
        assert {int(state.sum()) for state in seen.states} == {1}
        assert len({int(state.argmax()) for state in seen.states}) > 3


def test_the_share_of_the_expert_falls_by_a_power():
    assert BehaviourCloning().betas() == [1.0]
    assert DAgger(rounds=4).betas() == [1, 0, 0, 0]
    assert DAgger(rounds=4, beta=0.5).betas() == [1, 0.5, 0.25, 0.125]
    assert DAgger(rounds=3, beta=1).betas() == [1, 1, 1]


def test_each_round_adds_its_share_and_trains_on_all(monkeypatch):
    sizes, own = [], []

    def fit(student, seen, objective, schedule):
        sizes.append(len(seen.states))
        z, actions = torch.randn(5, 3), torch.arange(5) % 3
        own.append(float(objective(None, actions, z) - nn.functional.cross_entropy(z, actions)))

    monkeypatch.setattr("whet.policies.fit", fit)
    student, modes = network().train(), []
    student.register_forward_hook(lambda module, args, out: modes.append(module.training))
    DAgger(steps=10, rounds=4).teach(Road(), expert, student)
    assert modes == [False] * 8  # it acts in all rounds but the first
    assert sizes == [2, 5, 7, 10]
    assert own == [0, 0, 0, 0]
    assert student.training


def test_batches_are_all_visits_in_random_order():
    seen = Visits(4)
    for k in range(10):
        seen.states.append(torch.tensor([float(k)]))
        seen.actions.append(k)
    passes = [list(seen), list(seen)]
    for batches in passes:
        assert [len(x) for x, _ in batches] == [4, 4, 2]
        assert len(seen) == 3
        assert sorted(int(k) for _, y in batches for k in y) == list(range(10))
        assert all(torch.equal(x[:, 0].long(), y) for x, y in batches)
    assert not torch.equal(passes[0][0][1], passes[1][0][1])


def test_seeds_of_episodes_follow_torchs():
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        env = Road()
        mean_return(env, expert, 3)
        found.append(env.resets)
    assert found[0] == found[1] != found[2]
    assert len(set(found[0])) == 3


def test_the_return_is_the_mean_sum_of_rewards():
    class Counts:
        def reset(self, *, seed):
            self.time = 0
            return 0, {}

        def step(self, action):
            self.time += 1
            return self.time, action + 0.5, self.time == 3, False, {}

    assert mean_return(Counts(), lambda states: torch.ones(len(states)).long(), 4) == 4.5


def test_visits_and_expert_make_a_task():
    seen = BehaviourCloning(**KNOBS | {"epochs": 1}).teach(Road(), expert, network())
    teacher, student = network(64), network(4)
    task = Task(student, (seen.states[0][None],), train=seen, teachers=(teacher,))
    task.check()
    work = Work(copy.deepcopy(student), student, replace(task, validation=None))
    Distill(epochs=1).apply(work)


def test_states_are_copied_and_real_numbers_single():
    for given, kind in (
        (np.zeros(3), torch.float32),
        (np.arange(3), torch.int64),
        (2, torch.int64),
    ):
        assert as_state(given).dtype == kind
    mine = np.zeros(3, dtype=np.float32)
    kept = as_state(mine)
    mine[:] = 1
    assert not kept.any()


def test_actions_are_the_best_scores_or_what_the_policy_says():
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2]])
    assert actions_of(lambda s: scores, scores).tolist() == [1, 0]
    assert actions_of(lambda s: torch.tensor([3, 2]), scores).tolist() == [3, 2]


@pytest.mark.parametrize("said", [torch.zeros(3, 2), torch.zeros(2), 3, torch.zeros(2, 2, 2)])
def test_a_policy_that_says_something_else_is_told(said):
    with pytest.raises(BadInput, match=r"what to do in 2 states: it answers (\[.*\]|3). Give scor"):
        actions_of(lambda s: said, torch.zeros(2, 5))


class Old(Road):
    """As before gymnasium."""

    def step(self, action):
        return super().step(action)[:4]


class Older(Old):
    def reset(self, *, seed):
        return super().reset(seed=seed)[0]


@pytest.mark.parametrize(
    ("env", "text"),
    [
        (Old(), r"take the action \d in the environment: it gave tuple of 4. Give one with gym"),
        (Older(), r"reset the environment: it gave ndarray. Give one with gymnasium's interface"),
    ],
)
def test_another_interface_is_told(env, text):
    with pytest.raises(BadInput, match=text):
        DAgger().teach(env, expert, network())


@pytest.mark.parametrize("knobs", [{"beta": 1.5}, {"rounds": 0}, {"steps": 0}, {"batch": 0}])
def test_absurd_knobs_are_refused(knobs):
    with pytest.raises(ValueError, match=next(iter(knobs))):
        DAgger(**knobs)
