"""CartPole: a student asks an expert where the expert goes, or where it goes itself.

    python benchmarks/policies.py --labels 50 100 200 400

The expert is a linear controller. Behaviour cloning and DAgger ask it about as many states, show as
many to the student in training, and begin with the same weights in every seed; each policy is then
let act in the same episodes, which no training saw. gymnasium is needed: requirements.txt.
"""

from __future__ import annotations

import argparse
import statistics

import gymnasium
import measuring  # noqa: F401  finds whet beside it
import torch
from torch import Tensor, nn

from whet.measure.signature import signature
from whet.policies import BehaviourCloning, DAgger, Policy, mean_return

KNOBS = {"batch": 32, "lr": 5e-3, "optimizer": "adamw", "weight_decay": 0.0}
EPOCHS = 40  # of a round
JUDGED = 1_000_000  # the seed of the episodes that judge


def expert(states: Tensor) -> Tensor:
    """Push towards where the pole falls, and a little to the middle of the track."""
    gains = torch.tensor([0.1, 0.3, 1.0, 0.4])  # of place, speed, angle, its speed
    return (states @ gains > 0).long()


def network() -> nn.Module:
    """Scores of the two pushes."""
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def judged(policy: Policy, episodes: int) -> float:
    """Its mean return in the episodes that judge all."""
    torch.manual_seed(JUDGED)
    return mean_return(gymnasium.make("CartPole-v1"), policy, episodes)


def returned(technique: BehaviourCloning, seed: int, episodes: int) -> float:
    """The mean return of a student after its lessons."""
    torch.manual_seed(seed)
    student = network()
    technique.teach(gymnasium.make("CartPole-v1"), expert, student)
    return judged(student.eval(), episodes)


def main() -> None:
    """Print a row for each number of labels and each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--labels", type=int, nargs="+", default=[50, 100, 200, 400])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--episodes", type=int, default=20)
    options = parser.parse_args()
    print(f"The expert returns {judged(expert, options.episodes):.1f} of 500.\n")
    print("| labels | | return, mean | deviation of a seed | least | seeds DAgger is ahead |")
    print("|---|---|---|---|---|---|")
    for labels in options.labels:
        ways = {
            "behaviour cloning": BehaviourCloning(
                steps=labels, epochs=EPOCHS * (options.rounds + 1) / 2, **KNOBS
            ),
            "DAgger": DAgger(steps=labels, epochs=EPOCHS, rounds=options.rounds, **KNOBS),
        }
        found = {
            name: [returned(way, seed, options.episodes) for seed in options.seeds]
            for name, way in ways.items()
        }
        cloned, grown = found.values()
        ahead = sum(g > c for g, c in zip(grown, cloned, strict=True))
        for name, each in found.items():
            cells = f"{statistics.mean(each):.1f} | {statistics.stdev(each):.1f} | {min(each):.1f}"
            said = f"{ahead} of {len(each)}" if name == "DAgger" else ""
            print(f"| {labels} | {name} | {cells} | {said} |", flush=True)
    said = signature("torch", torch.get_num_threads(), options.seeds[0], 32, 1)
    print(
        f"\n{said['device']}, {said['threads']} threads, torch {said['versions']['torch']}, ",
        end="",
    )
    print(f"gymnasium {gymnasium.__version__}")


if __name__ == "__main__":
    main()
