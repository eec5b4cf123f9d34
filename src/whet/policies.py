"""Policies: a small network learns to act as an expert does, where its own actions lead.

BehaviourCloning labels states that the expert visits; the student leaves them by its errors:

    min_pi E_{s ~ pi*} CE(pi*(s), pi(s))

DAgger labels those that the student comes to, round after round, and trains on all so far:

    D <- D + {(s, pi*(s)) : s ~ beta_i pi* + (1 - beta_i) pi_i},   beta_i = beta^i,   i = 0, 1, ...
    pi_{i+1} = argmin_pi E_{s ~ D} CE(pi*(s), pi(s))

Its errors grow with the length T of an episode, those of behaviour cloning with T^2.

    seen = DAgger(steps=1000, rounds=10).teach(env, expert, student)
    task = Task(student, (state,), train=seen, teachers=(expert,))    # for any step that trains

`env` is what gymnasium calls one: reset(seed=...) -> (state, info), step(action) -> (state, reward,
terminated, truncated, info); actions are numbered from 0. The expert is a network that scores
actions, or any function from states [n, ...] to actions [n].

Papers: Pomerleau 1991, Efficient Training of Artificial Neural Networks for Autonomous Navigation;
    Ross, Gordon and Bagnell 2011, A Reduction of Imitation Learning and Structured Prediction to
    No-Regret Online Learning (1011.0686).
Helps when: the expert, a large network or a search, is too slow to act itself, and can be asked.
Hurts when: a student's first actions must not be carried out, as on a real machine: take
    BehaviourCloning there, or a beta near 1.
Needs: an environment. Costs: `steps` answers of the expert; `rounds` trainings.

Departure: the student goes on from its weights in each round, and the last one stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from whet.errors import BadInput
from whet.fit import Schedule, fit
from whet.task import Batch, evaluating

Policy = Callable[[Tensor], Tensor]  # states [n, ...] -> scores [n, actions], or actions [n]


class Visits:
    """States with the expert's actions, a re-iterable of batches in random order.

    Args:
        batch: states in one.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.states: list[Tensor] = []
        self.actions: list[int] = []

    def __len__(self) -> int:
        return -(-len(self.states) // self.batch)

    def __iter__(self) -> Iterator[Batch]:
        states, actions = torch.stack(self.states), torch.tensor(self.actions)
        for rows in torch.randperm(len(states)).split(self.batch):
            yield states[rows], actions[rows]


class BehaviourCloning(Schedule):
    """Ask the expert where it goes itself, then train.

    Attributes:
        steps: states that are labeled.
        batch: states in a batch.
    """

    epochs: Annotated[float, Field(gt=0, le=10_000)] = 10.0
    steps: Annotated[int, Field(ge=1)] = 1000
    batch: Annotated[int, Field(ge=1)] = 64

    def betas(self) -> list[float]:
        """For each round, how likely the expert acts in a state."""
        return [1.0]

    def teach(self, env: Any, expert: Policy, student: nn.Module) -> Visits:
        """Train `student`, which scores actions, in place.

        Args:
            env: as gymnasium's.
            expert: it is asked about every state visited, `steps` in all.
            student: states [n, ...] -> scores [n, actions].

        Returns:
            What it was trained on.

        Raises:
            BadInput: the environment or the expert answers otherwise than described.
        """
        seen, betas = Visits(self.batch), self.betas()
        for i, beta in enumerate(betas):
            with evaluating(student):
                visit(env, expert, student, beta, self.steps * (i + 1) // len(betas), seen)
            fit(student, seen, lambda _, actions, z: F.cross_entropy(z, actions), self)
        return seen


class DAgger(BehaviourCloning):
    """Ask the expert where the student goes, round after round.

    Attributes:
        rounds: trainings; each begins with its share of the steps.
        beta: the expert acts with the probability beta^i in round i = 0, 1, ...: 0 leaves the
            first one to it, and no other.
    """

    rounds: Annotated[int, Field(ge=1)] = 10
    beta: Annotated[float, Field(ge=0, le=1)] = 0.0

    def betas(self) -> list[float]:
        return [self.beta**i for i in range(self.rounds)]


@torch.no_grad()
def actions_of(policy: Policy, states: Tensor) -> Tensor:
    """Actions [n] in states [n, ...]: those of the highest score, where it scores them."""
    said = policy(states)
    if torch.is_tensor(said) and said.shape[:1] == states.shape[:1]:
        if said.ndim == 2 and said.is_floating_point():
            return said.argmax(dim=1)
        if said.ndim == 1 and not said.is_floating_point():
            return said
    raise BadInput(
        f"ask {type(policy).__name__} what to do in {len(states)} states",
        f"it answers {list(said.shape) if torch.is_tensor(said) else said!r}",
        "Give scores [states, actions], or numbers of actions [states].",
    )


def visit(env: Any, expert: Policy, student: Policy, beta: float, total: int, seen: Visits) -> None:
    """Act, each time as the expert with the probability `beta`, until `seen` has `total` states."""
    while len(seen.states) < total:
        state, done = begun(env), False
        while not done and len(seen.states) < total:
            (wanted,) = actions_of(expert, state[None]).tolist()
            seen.states.append(state)
            seen.actions.append(wanted)
            own = float(torch.rand(())) >= beta
            (action,) = actions_of(student, state[None]).tolist() if own else [wanted]
            state, _, done = moved(env, action)


def mean_return(env: Any, policy: Policy, episodes: int) -> float:
    """The sum of rewards of an episode in which `policy` acts, the mean over `episodes`."""
    total = 0.0
    for _ in range(episodes):
        state, done = begun(env), False
        while not done:
            (action,) = actions_of(policy, state[None]).tolist()
            state, reward, done = moved(env, action)
            total += reward
    return total / episodes


def begun(env: Any) -> Tensor:
    """The first state of an episode, whose seed is drawn from torch's random numbers."""
    found = env.reset(seed=int(torch.randint(2**31, ())))
    if not (isinstance(found, tuple) and len(found) == 2):
        raise BadInput(
            "reset the environment",
            f"it gave {type(found).__name__}",
            "Give one with gymnasium's interface: reset(seed=...) -> (state, info).",
        )
    return as_state(found[0])


def moved(env: Any, action: int) -> tuple[Tensor, float, bool]:
    """The next state, the reward, and whether the episode is over."""
    found = env.step(action)
    if not (isinstance(found, tuple) and len(found) == 5):
        raise BadInput(
            f"take the action {action} in the environment",
            f"it gave {type(found).__name__}" + (f" of {len(found)}" if found else ""),
            "Give one with gymnasium's interface: step(action) -> "
            "(state, reward, terminated, truncated, info).",
        )
    state, reward, terminated, truncated, _ = found
    return as_state(state), float(reward), bool(terminated or truncated)


def as_state(state: Any) -> Tensor:
    """A copy as a tensor, real numbers in float32; environments reuse their arrays."""
    found = torch.as_tensor(state).clone()
    return found.float() if found.is_floating_point() else found
