"""EarlyExit: a sample leaves at the first small head that is sure of it.

    leave at the first k with c(z_k) >= t_k,
    c(z) = max p   or   1 + sum p log p / log C,   p = softmax(z)

A head, pooling and one linear layer, stands behind each of the chosen blocks. The heads learn from
the network's own scores, T^2 KL(p^T || p_k^T), while the network stays as it is. The thresholds are
then set on validation data, the first exit's first: each is the lowest at which no more than its
share of `drop` is lost. A sample that has left is not computed further, alone or within a batch.

Papers: Teerapittayanon et al. 2016, BranchyNet, arXiv 1709.01686; Phuong and Lampert 2019,
    Distillation-Based Training for Multi-Exit Architectures (the last output teaches the exits).
    Departures: the network itself does not train; thresholds are searched for a drop.
Helps when: many samples are easy, and they come alone or in small batches.
Hurts when: all samples are hard, or the worst case counts: what stays has paid for the heads too.
    Time depends on the data, and a measured latency is that of the example alone. Networks whose
    parts stand in no row cannot bear it. Put it last: later steps know the example's way only.
Needs: training data; validation data for the thresholds; class scores of single images. A runtime
    with batches of any size, none included: ONNX Runtime and OpenVINO are.
Costs: a training of the heads, with a forward pass of the network; the heads in bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from whet import packed
from whet.errors import Refused
from whet.fit import Schedule, fit
from whet.graph import chain, surgery, trace
from whet.graph.exits import Exit, sure
from whet.graph.ledger import Grid
from whet.rungs.teachers import Teacher
from whet.rungs.teaching import divergence, must_score
from whet.task import Metric, as_arguments, evaluating
from whet.technique import Need, Technique, Work

CANDIDATES = 200  # thresholds that are tried for an exit, at quantiles of its confidences
ALWAYS, NEVER = -1.0, 2.0  # thresholds below and above all confidences
TOGETHER = 1e-4  # how far outputs may lie apart that are computed in another order, as a share


class Leave(NamedTuple):
    """An exit: the link that it stands behind, its head, and its threshold."""

    at: int
    head: nn.Module
    t: float


class EarlyExit(Technique, Schedule):
    """Add exits after blocks, teach them, and set their thresholds."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.TRAIN, Need.VALIDATION})
    spoils: ClassVar[frozenset[type]] = packed.COMPRESSED | {Grid}
    adds_bytes: ClassVar[bool] = True
    adds_operations: ClassVar[bool] = True
    tiny: ClassVar[dict[str, Any]] = {"drop": 0.2}

    after: Annotated[
        tuple[str, ...],
        Field(description="paths of blocks; empty for the last one of each size but the smallest"),
    ] = ()
    drop: Annotated[float, Field(ge=0, description="of the metric on validation, at most")] = 0.01
    by: Annotated[
        Literal["probability", "entropy"], Field(description="what confidence is taken from")
    ] = "probability"
    temperature: Annotated[float, Field(gt=0, le=100, description="T")] = 4.0

    def apply(self, work: Work) -> None:
        model, example, metric = work.model, work.task.example, work.task.measure
        with torch.no_grad(), evaluating(model):
            must_score(self.name, work.task, {"its outputs": model(*example)})
        links, at = self._places(model, example)
        exits = [Leave(k, head(links[k].shape[1], links[-1].shape[1]), NEVER) for k in at]
        self._check(model, example, links, exits)
        z, labels = self._taught(work, links, exits)
        t = thresholds(z, labels, metric, self.drop, self.by)
        where = leaving(z, t, self.by)
        used = [each._replace(t=least) for each, least in zip(exits, t, strict=True)]
        used = [each for each in used if each.t < NEVER]
        shares = [
            float((where == k).float().mean()) for k, t_k in enumerate([*t, 0]) if t_k < NEVER
        ]
        each = self._operations(model, example, links, used)
        before = trace.macs(model, example)[""]
        after = sum(share * count for share, count in zip(shares, each, strict=True))
        if not used or after >= before:
            raise Refused(
                f"EarlyExit(drop={self.drop:g})",
                f"the exits that keep it leave {after / before:.3f} of the operations",
                "Raise drop, name other blocks in `after`, or train the exits longer.",
            )
        place(work.model, links, used, self.by)
        for share, leave in zip(shares, used, strict=False):
            name = links[leave.at].name
            work.notes.append(f"{share:.1%} of validation leave after {name}, at {leave.t:.4f}.")
        values = [float(metric.measure(y, labels)) for y in (z[-1], chosen(z, where))]
        work.notes.append(
            f"{after / before:.3f} of the operations are expected, {each[-1] / before:.3f} where "
            f"none leaves; validation {metric.name} {values[0]:.4f} -> {values[1]:.4f}."
        )

    def _places(
        self, model: nn.Module, example: tuple[Any, ...]
    ) -> tuple[list[chain.Link], list[int]]:
        """The row of the network's parts, and those that get an exit."""
        image, todo = example[0] if len(example) == 1 else None, "Use Distill on a smaller network."
        if not torch.is_tensor(image) or image.ndim != 4:
            raise Refused(self.name, "it reads no single batch of images", todo)
        links, why = chain.chain(model, example)
        if why:
            raise Refused(self.name, f"the network's parts stand in no row: {why}", todo)
        fits = {
            link.name: k
            for k, (link, behind) in enumerate(pairwise(links))
            if not link.op and not behind.op and len(link.shape) == 4 and max(link.shape[2:]) > 1
            and all(map(keeps_scores, links[k + 1 :]))
        }  # fmt: skip
        if missing := [path for path in self.after if path not in fits]:
            found = f"no exit can stand after {missing[0]!r}"
            raise Refused(self.name, found, f"Name some of {', '.join(fits) or 'none'}.")
        last = {links[k].shape[2:]: k for k in fits.values()}
        at = sorted(fits[path] for path in self.after) or list(last.values())[:-1]
        if not at:
            found = "no block but those of the smallest size is followed by a module"
            raise Refused(self.name, found, "Name blocks: after.")
        return links, at

    def _check(
        self,
        model: nn.Module,
        example: tuple[Any, ...],
        links: list[chain.Link],
        exits: list[Leave],
    ) -> None:
        """Refuse where the network is another one, although no row leaves."""
        twin = copy.deepcopy(model)
        place(twin, links, exits, self.by)
        with torch.no_grad(), evaluating(twin), evaluating(model):
            got, want = twin(*example), model(*example)
        if got.shape != want.shape or not torch.allclose(got, want, TOGETHER, TOGETHER):
            raise Refused(
                self.name,
                "the network's own calls between modules do something else to scores",
                "Write them as modules.",
            )

    def _taught(
        self, work: Work, links: list[chain.Link], exits: list[Leave]
    ) -> tuple[Tensor, Tensor]:
        """Teach the heads; what they and the network say on validation data, and its labels."""
        assert work.task.train is not None  # `needs` was checked before any work
        assert work.task.validation is not None
        learner = Learner(work, [links[each.at].name for each in exits], exits)

        def loss(inputs: Any, labels: Any, z: Tensor) -> Tensor:
            return torch.stack([divergence(z_k, z[-1], self.temperature) for z_k in z[:-1]]).sum()

        fit(learner, work.task.train, loss, self, tell=work.tell)
        with torch.no_grad():
            said = [(learner(*as_arguments(x)), y) for x, y in work.task.validation]
        return torch.cat([z for z, _ in said], 1), torch.cat([y for _, y in said])

    def _operations(
        self,
        model: nn.Module,
        example: tuple[Any, ...],
        links: list[chain.Link],
        exits: list[Leave],
    ) -> list[int]:
        """Of a batch that leaves at each exit; the last of one that does not."""
        found = []
        for k in range(len(exits) + 1):
            twin = copy.deepcopy(model)
            certain = [e._replace(t=ALWAYS if j == k else NEVER) for j, e in enumerate(exits)]
            place(twin, links, certain, self.by)
            found.append(trace.macs(twin, example)[""])
        return found


class Learner(nn.ModuleList):
    """The heads on a network that does not train: inputs -> [exits + 1, batch, classes]."""

    def __init__(self, work: Work, paths: list[str], exits: list[Leave]) -> None:
        super().__init__(each.head for each in exits)
        self.paths, self.teacher = paths, Teacher(work.model, work.task.example, set(paths))

    def forward(self, *inputs: Any) -> Tensor:
        answers, shown = self.teacher(inputs, "EarlyExit")
        heads = zip(self, self.paths, strict=True)
        return torch.stack([*(each(shown[path]).float() for each, path in heads), answers])


def head(channels: int, classes: int) -> nn.Sequential:
    """[n, channels, h, w] -> [n, classes]."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def keeps_scores(link: chain.Link) -> bool:
    """Whether a call of the network's own does nothing to scores, as a map of one place."""
    harmless = link.op in chain.POOLS | chain.FLATTENS | {"dropout"}
    return not link.op or (harmless and chain.as_module(link) is not None)


def place(model: nn.Module, links: list[chain.Link], exits: list[Leave], by: str) -> None:
    """Put the exits into the network, the last one first: the others hold it."""
    stop, classes = len(links), links[-1].shape[1]
    for leave in reversed(exits):
        behind = links[leave.at + 1 : stop]
        parts: Any = [chain.as_module(x) if x.op else model.get_submodule(x.name) for x in behind]
        ends = [leave.head], parts
        if any(map(chain.flattens, links[leave.at + 1 :])):
            # the network flattens by a call of its own, which wants a map
            ends[0].append(nn.Unflatten(1, (classes, 1, 1)))
            parts += [nn.Unflatten(1, (classes, 1, 1))] if stop == len(links) else []
        sides = [nn.Sequential(*side) for side in ends]
        surgery.gather(model, behind[0].name, Exit(sides, leave.t, by))
        stop = leave.at + 2


def leaving(z: Tensor, t: Sequence[float], by: str) -> Tensor:
    """The exit that each sample leaves at, [examples]; len(t) where it does not.

    Args:
        z: scores of the exits and of the network, [exits + 1, examples, classes].
        t: thresholds of the exits.
        by: what confidence is taken from.
    """
    where = torch.full(z.shape[1:2], len(t))
    for k in reversed(range(len(t))):
        where[sure(z[k], by) >= t[k]] = k
    return where


def chosen(z: Tensor, where: Tensor) -> Tensor:
    """What each sample is answered, [examples, classes]."""
    return z[where, torch.arange(len(where))]


def thresholds(z: Tensor, labels: Tensor, metric: Metric, drop: float, by: str) -> list[float]:
    """The lowest thresholds within the drop; exit k of K may use k / K of it with those before.

    Args:
        z: as `leaving` takes it.
        labels: of the examples.
        metric: what may drop.
        drop: by how much at most.
        by: what confidence is taken from.
    """
    K = len(z) - 1
    before = float(metric.measure(z[-1], labels))
    t = [NEVER] * K
    for k in range(K):
        here = leaving(z, t, by) == K
        c = sure(z[k], by)[here].sort().values
        for place in torch.linspace(0, len(c) - 1, min(CANDIDATES, len(c))).round().int().tolist():
            # between two samples, so that no rounding decides
            least = float(c[max(place - 1, 0) : place + 1].mean())
            tried = [*t[:k], least, *t[k + 1 :]]
            after = float(metric.measure(chosen(z, leaving(z, tried, by)), labels))
            if metric.drop(before, after) <= drop * (k + 1) / K:
                t = tried
                break
    return t
