"""What no plan weighs place by place: how a cut network is trained, found by short trainings.

    score(x) = log l(x) - log g(x)        l of the best of what was measured, g of the rest

Optuna asks for the knobs whose score is the highest among some drawn from l (a tree-structured
Parzen estimator: Bergstra et al. 2011, Algorithms for Hyper-Parameter Optimization).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

# of `Distill`
KNOBS: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(5e-4, 0.2, log=True),
    "labels": CategoricalDistribution((0.0, 0.1, 0.5)),
    "temperature": CategoricalDistribution((1.0, 2.0, 4.0)),
}
FIRST: tuple[dict[str, Any], ...] = tuple(
    {"lr": lr, "labels": 0.1, "temperature": 4.0} for lr in (0.02, 0.006, 0.002)
)
MOST = 50  # trainings


def steered(
    probe: Callable[[int, dict[str, Any]], tuple[float, float]], seconds: float, seed: int
) -> dict[str, Any]:
    """The best knobs of FIRST and of those that Optuna asks for while there is time.

    Args:
        probe: (how many were before, knobs) -> how good the network is after a short training, and
            the seconds it took. The same answers lead to the same questions.
        seconds: for all of them.
        seed: of what is asked for.
    """
    sampler = optuna.samplers.TPESampler(n_startup_trials=len(FIRST), seed=seed)
    loud = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    optuna.logging.set_verbosity(loud)
    for knobs in FIRST:
        study.enqueue_trial(knobs)
    done, spent, longest = 0, 0.0, 0.0
    while done < len(FIRST) or (done < MOST and spent + longest <= seconds):
        trial = study.ask(KNOBS)
        worth, took = probe(done, trial.params)
        study.tell(trial, worth)
        done, spent, longest = done + 1, spent + took, max(longest, took)
    return study.best_params
