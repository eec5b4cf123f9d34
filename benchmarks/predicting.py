"""What a search predicts of plans that it has not timed, beside what the runtime takes for them.

    WHET_DATA=... python benchmarks/predicting.py vgg16 --weights vgg16.safetensors
    WHET_DATA=... python benchmarks/predicting.py 56 --target openvino

All that a search does before its first plan is done here but for lessons: they say nothing of
time. Then plans are drawn at random, by another seed than those the search times itself, from few
changes to many, and each is predicted and measured. Behind them stands the correlation of ranks.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

from search import network
from whet import runner
from whet.engine import engine
from whet.measure.signature import signature
from whet.probe import rank_correlation
from whet.search import plan as plans
from whet.search.run import Search
from whet.search.wish import FINISHES, Wish, duration


def main() -> None:
    """A row for each plan."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=["20", "56", "vgg16"])
    parser.add_argument("--weights", type=Path, help="VGG-16's; written where it is not there")
    parser.add_argument("--epochs", type=float, default=8, help="of VGG-16's own training")
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--time", default="30m", help="of the search: a share is for tries")
    parser.add_argument("--plans", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    task = dataclasses.replace(network(options), train=None)
    with tempfile.TemporaryDirectory() as folder, engine("local", None) as workers:
        settings = runner.settings_of(
            {
                "drop": "0.5pp",
                "target": options.target,
                "seed": options.seed,
                "workspace": f"{folder}/work",
            }
        )
        goals, time = settings.goals, duration(options.time)
        wish = Wish(goals, "latency", 1, 0, 1.0, time, None, tuple(FINISHES))
        search = Search(task, wish, settings, workers)
        [menu], costs = search.offered()
        print(f"{search.way}, {len(costs.profiles)} networks timed")
        print("| places | MACs | latency, predicted | measured |\n|---|---|---|---|", flush=True)
        found: list[tuple[float, float]] = []
        for offers in plans.drawn(menu, options.plans, options.seed + 1):
            profile = search.bench.profile(plans.steps(offers), search.way)
            if profile is None:
                continue  # the runtime fails on it
            said = costs.predict(offers)
            found.append((said["latency"], profile.latency))
            cells = [f"{x:.3f}" for x in (said["macs"], *found[-1])]
            print(f"| {len(offers)} | {' | '.join(cells)} |", flush=True)
    print(f"\nrank correlation {rank_correlation(found):.3f}")
    said = signature(options.target, 1, options.seed, 1, 20)
    print(f"{said['device']} with {', '.join(said['features'])}, load {said['load']}")


if __name__ == "__main__":
    main()
