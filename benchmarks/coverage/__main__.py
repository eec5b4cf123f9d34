"""Which architectures channel pruning handles, and that what it does to them is exact.

python benchmarks/coverage [part of a name ...] [--json FILE]

Half of the units of every free group are removed at random. The network must then compute what it
does when nobody reads those units, run, give gradients, come back from a file, and agree with ONNX
Runtime; a cut of nine tenths and a second cut of the cut network must be as exact. A network that
fails is a row like the others. Those of `transformers` are skipped where it is not installed.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import attention
import cnn
import dense
import library
import mobile
import numpy as np
import onnxruntime
import sequence
import torch
import traps
from making import Maker
from torch import Tensor, nn

from whet import artifact, catalog
from whet.errors import WhetError
from whet.graph import surgery, trace
from whet.graph.channels import Group, cut, find_groups
from whet.targets.onnxfile import Deployable, as_arrays
from whet.task import tensors_in

EXACT, RUNTIME = 1e-5, 1e-3  # largest differences, relative to the largest output
DEEP = 0.9  # share of the units that go in a deep cut
ALIVE = 1e-3  # the cut has to change the output by at least this, or nothing was tested
MOST, STIFF = 0.95, 0.6  # of the units of a kind, at the deepest cut; MACs that are left too many
FAMILIES = (cnn, mobile, attention, dense, sequence, library, traps)


@dataclass
class Row:
    """What was found about one network.

    Args:
        name: of the network.
        verdict: "complete", "refused", "wrong", "failed" or "skipped".
        free, left: how many groups can be cut, and how many are left alone.
        units: how many units the free groups have.
        reasons: how many groups each reason leaves alone, by reason.
        parameters, macs: before and after half of the units are gone.
        error: of the cut network against the masked one, relative.
        change: of the masked network against the whole one, relative.
        amount, kept: the share of units whose removal halves the MACs, and the MACs then.
        find_s, cut_s: seconds.
        problems: what did not work.
    """

    name: str
    verdict: str = "failed"
    free: int = 0
    left: int = 0
    units: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)
    macs: tuple[int, int] = (0, 0)
    error: float | None = None
    change: float | None = None
    amount: float | None = None
    kept: float | None = None
    find_s: float = 0.0
    cut_s: float = 0.0
    problems: list[str] = field(default_factory=list)


def chosen(group: Group, amount: float, seed: int) -> np.ndarray:
    """Which units stay when this share of each kind goes, at least one of each."""
    chance, kept = np.random.default_rng(seed), np.ones(group.units, dtype=bool)
    for kind in np.unique(group.kinds):
        mine = np.flatnonzero(group.kinds == kind)
        gone = min(round(amount * len(mine)), len(mine) - 1)
        kept[chance.permutation(mine)[:gone]] = False
    return kept


def offers(group: Group) -> bool:
    """Whether some kind has a unit to spare."""
    return group.units > len(np.unique(group.kinds))


def smaller(model: nn.Module, groups: Iterable[Group], amount: float) -> nn.Module:
    """A copy without that share of the units."""
    twin = copy.deepcopy(model)
    for seed, group in enumerate(groups):
        cut(twin, group, chosen(group, amount, seed))
    return twin


@torch.no_grad()
def masked(model: nn.Module, groups: Iterable[Group], amount: float) -> nn.Module:
    """A copy in which nobody reads those units."""
    twin = copy.deepcopy(model)
    for seed, group in enumerate(groups):
        kept = chosen(group, amount, seed)
        for member in group.members:
            if member.reads:
                gone = sorted(set(range(len(member.units))) - set(member.positions(kept)))
                weight = surgery.tensor_of(twin, member.name)
                weight.index_fill_(member.dim, torch.tensor(gone, dtype=torch.long), 0.0)
    return twin


@torch.no_grad()
def outputs(model: nn.Module, example: tuple[Any, ...]) -> list[Tensor]:
    """Every tensor that a call gives."""
    return list(tensors_in(model(*example)))


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest one of all tensors, relative to the largest value of each."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        raise ValueError(f"{[tuple(t.shape) for t in found]} in place of {expected[0].shape} ...")
    apart = [
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-9))
        for a, b in zip(found, expected, strict=True)
    ]
    return float("inf") if any(value != value for value in apart) else max(apart)


def first_line(error: BaseException) -> str:
    """The name of an error and the beginning of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:240] if lines else type(error).__name__


def gradients(model: nn.Module, small: nn.Module, example: tuple[Any, ...]) -> str:
    """Train's way back through the cut network, or what is wrong with it."""
    reached = []
    for network in (model, copy.deepcopy(small)):
        network.requires_grad_(True).zero_grad()
        found = [t for t in tensors_in(network(*example)) if t.requires_grad]
        sum((t.square().mean() for t in found), torch.zeros(())).backward()
        named = dict(network.named_parameters())
        reached.append({name for name, p in named.items() if p.grad is not None})
        for name in reached[-1]:
            grad = named[name].grad
            assert grad is not None
            if grad.shape != named[name].shape or not bool(grad.isfinite().all()):
                return f"the gradient of {name} is not sound"
        network.zero_grad()
    lost = sorted(reached[0] - reached[1])
    return f"no gradient for {lost[0]}" if lost else ""


def saved(small: nn.Module, fresh: nn.Module, example: tuple[Any, ...]) -> str:
    """The network from its file, with its class and without."""
    data, expected = artifact.encode(small, example), outputs(small, example)
    for way, back in (("graph", artifact.decode(data)), ("class", artifact.decode(data, fresh))):
        apart = difference(outputs(back.eval(), example), expected)
        if apart > EXACT:
            return f"loaded into its {way}, it is off by {apart:.1e}"
    return ""


def deployed(small: nn.Module, example: tuple[Any, ...]) -> str:
    """ONNX Runtime's answer beside PyTorch's."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        Deployable(small, example, catalog.target("onnxruntime")).write(path)
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]
        answer = session.run(None, dict(zip(names, as_arrays(example), strict=True)))
    apart = difference([torch.from_numpy(np.asarray(a)) for a in answer], outputs(small, example))
    return "" if apart <= RUNTIME else f"off by {apart:.1e}"


def exact(model: nn.Module, groups: list[Group], example: tuple[Any, ...], amount: float) -> str:
    """Whether the cut network and the masked one agree."""
    mask = outputs(masked(model, groups, amount), example)
    apart = difference(outputs(smaller(model, groups, amount), example), mask)
    return "" if apart <= EXACT else f"off by {apart:.1e}"


def again(small: nn.Module, example: tuple[Any, ...]) -> str:
    """A cut network is a network like any other."""
    groups = [group for group in find_groups(small, example) if not group.fixed and offers(group)]
    return exact(small, groups, example, 0.5)


def halved(model: nn.Module, example: tuple[Any, ...], groups: list[Group]) -> tuple[float, float]:
    """The share of units whose removal leaves about half of the MACs, and what it leaves."""
    whole = trace.macs(model, example)[""]

    def kept(amount: float) -> float:
        return trace.macs(smaller(model, groups, amount), example)[""] / whole

    low, high = 0.0, MOST
    best = (MOST, kept(MOST))
    if best[1] > 0.5:
        return best
    for _ in range(6):
        amount = (low + high) / 2
        share = kept(amount)
        best = min(best, (amount, share), key=lambda pair: abs(pair[1] - 0.5))
        low, high = (amount, high) if share > 0.5 else (low, amount)
    return best


def measure(row: Row, make: Maker) -> None:
    """Fill the row of one network."""
    model, example = make()
    began = time.perf_counter()
    whole = outputs(model, example)
    unfolded = surgery.plain_weights(model) + surgery.unfold_attention(model)
    if unfolded and difference(outputs(model, example), whole) > EXACT:
        row.problems.append(f"{unfolded} in layers of their own compute something else")
    groups = find_groups(model, example)
    row.find_s = time.perf_counter() - began
    free = [group for group in groups if not group.fixed and offers(group)]
    row.free, row.left = len(free), len(groups) - len(free)
    single = "one channel of each kind"
    left = Counter(g.fixed or single for g in groups if g.fixed or not offers(g))
    row.reasons = dict(left.most_common())
    row.units = sum(group.units for group in free)
    if not free:
        row.verdict = "refused" if row.reasons else "failed"
        return
    began = time.perf_counter()
    small = smaller(model, free, 0.5)
    row.cut_s = time.perf_counter() - began
    row.parameters = (_size(model), _size(small))
    mask = outputs(masked(model, free, 0.5), example)
    row.change = difference(mask, whole)
    row.error = difference(outputs(small, example), mask)
    if row.error > EXACT:
        row.verdict = "wrong"
        row.problems += [
            f"off by {row.error:.1e}: {text}" for text in _culprits(model, example, free)
        ]
    if row.change < ALIVE:
        row.problems.append("the cut changes nothing, so that nothing was tested")
    row.macs = (trace.macs(model, example)[""], trace.macs(small, example)[""])
    if row.macs[0]:
        row.amount, row.kept = halved(model, example, free)
    checks: dict[str, Callable[[], str]] = {
        "deep cut": lambda: exact(model, free, example, DEEP),
        "second cut": lambda: again(small, example),
        "backward": lambda: gradients(model, small, example),
        "save and load": lambda: saved(small, make()[0], example),
        "ONNX Runtime": lambda: deployed(small, example),
    }
    for name, check in checks.items():
        problem = _tried(check)
        if problem:
            row.problems.append(f"{name}: {problem}")
            inexact = name in ("deep cut", "second cut") and problem.startswith("off by")
            row.verdict = "wrong" if inexact else row.verdict
    if row.verdict != "wrong":
        row.verdict = "failed" if row.problems else "complete"


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _tried(check: Callable[[], str]) -> str:
    try:
        return check()
    except Exception as error:
        return first_line(error)


def _culprits(model: nn.Module, example: tuple[Any, ...], free: list[Group]) -> list[str]:
    """The groups that are wrong when they are cut alone."""
    found = []
    for group in free:
        mask = outputs(masked(model, [group], 0.5), example)
        if difference(outputs(smaller(model, [group], 0.5), example), mask) > EXACT:
            found.append(group.name)
    return found or ["several groups together"]


def row_of(name: str, make: Maker) -> Row:
    """Measure one network; whatever it raises is written down."""
    row = Row(name)
    try:
        measure(row, make)
    except WhetError as error:
        missing = "not installed" in str(error)
        row.verdict = "skipped" if missing else "refused"
        row.problems.append(first_line(error))
    except Exception as error:
        row.problems.append(first_line(error))
    return row


def line(row: Row) -> str:
    """One row of the table."""

    def pair(before: float, after: float, unit: float) -> str:
        if not before:
            return "–"
        return f"{before / unit:,.2f} → {after / unit:,.2f} ({after / before:.0%})"

    error = "–" if row.error is None else f"{row.error:.0e}"
    amount = "–"
    if row.amount is not None and row.kept is not None:
        amount = f"{row.amount:.0%} → {row.kept:.0%}"
    cells = [
        row.name,
        row.verdict,
        f"{row.free} / {row.left}",
        str(row.units),
        pair(*row.parameters, 1e3),
        pair(*row.macs, 1e6),
        amount,
        error,
        f"{row.find_s:.2f}",
        f"{row.cut_s:.2f}",
        "; ".join(row.problems).replace("|", "/"),
    ]
    return f"| {' | '.join(cells)} |"


HEAD = """\
| network | verdict | groups free / left alone | units | parameters, thousands | MACs, millions \
| units cut → MACs kept | cut vs masked | find s | cut s | problems |
|---|---|---|---|---|---|---|---|---|---|---|"""


def refusals(rows: Iterable[Row]) -> str:
    """Why groups are left alone, by network."""
    lines = []
    for row in rows:
        texts = [f"{text} ({count})" for text, count in row.reasons.items()]
        if texts:
            lines.append(f"- {row.name}: {'; '.join(texts)}")
    return "\n".join(lines)


def main(names: list[str], file: Path | None) -> int:
    """Print the table; 1 if anything is wrong or failed."""
    networks = {name: make for family in FAMILIES for name, make in family.NETWORKS.items()}
    picked = {
        name: make
        for name, make in networks.items()
        if not names or any(part.lower() in name.lower() for part in names)
    }
    print(HEAD)
    rows = []
    for name, make in picked.items():
        rows.append(row_of(name, make))
        print(line(rows[-1]), flush=True)
    verdicts = Counter(row.verdict for row in rows)
    print(f"\nGroups left alone, and why:\n\n{refusals(rows)}\n")
    print(f"{len(rows)} networks: " + ", ".join(f"{n} {text}" for text, n in verdicts.items()))
    print(f"silent wrong answers: {verdicts['wrong']}")
    stiff = [f"{r.name} ({r.kept:.0%})" for r in rows if r.kept is not None and r.kept > STIFF]
    print(f"cannot lose half of their MACs: {', '.join(stiff) or 'none'}")
    if file is not None:
        file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 1 if verdicts["wrong"] + verdicts["failed"] else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only networks whose name has this in it")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    given = parser.parse_args()
    sys.exit(main(given.names, given.json))
