"""The rungs of techniques that make weights share values: codes, and the table they point into."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from whet import packed
from whet.errors import Refused
from whet.graph import sites
from whet.rungs.layers import LayerTechnique, weights
from whet.rungs.rounding import RoundingTechnique
from whet.rungs.training import TaughtTechnique
from whet.technique import Work

Tables = dict[str, packed.Lookup]
Ends = Annotated[bool, Field(description="the first and the last layer as well")]


class TableTechnique(LayerTechnique):
    """A rung: one weight in, its codes and its table out.

    A layer that would not get smaller, as its table is as large as what it saves, is left alone.
    """

    makes: ClassVar[frozenset[type]] = frozenset({packed.Lookup})
    spoils: ClassVar[frozenset[type]] = packed.QUANTIZED

    @abstractmethod
    def share(self, rows: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [out, d / width] and table [1 or out, size, width].

        Args:
            rows: the weight, [out, d], zero where gone before.
            alive: the mask of what is not gone, [out, d].
        """

    def apply(self, work: Work) -> None:
        self.install(work, work.tell)

    def install(
        self, work: Work, tell: Callable[[int, int], None] = lambda done, of: None
    ) -> Tables:
        """Put a table on every layer that gets smaller; they are returned by path.

        Raises:
            Refused: no layer would get smaller.
        """
        made: Tables = {}
        for path, (codes, table) in self.tables(work, tell).items():

            def pack(w: Tensor, path: str = path, c: Tensor = codes, t: Tensor = table) -> Any:
                made[path] = packed.Lookup(packed.Dense(w), c, t)
                return made[path]

            packed.rewrite(work.model.get_submodule(path), "weight", pack)
        return made

    def tables(
        self, work: Work, tell: Callable[[int, int], None] = lambda done, of: None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Codes and table of every layer that they make smaller, by path; the model stays.

        Raises:
            Refused: there is none.
        """
        layers, left = self.layers(work.model), []
        shared: dict[str, tuple[Tensor, Tensor]] = {}
        for done, (path, module) in enumerate(layers):
            codes, table = self.share(*rows_of(module))
            if saves(module, codes, table):
                shared[path] = codes, table
            else:
                left.append(path)
            tell(done + 1, len(layers))
        if not shared:
            raise Refused(
                self.name,
                "the tables would be as large as what they save, in every layer",
                "Choose smaller tables, or drop the step.",
            )
        if left:
            work.notes.append(f"left alone, as they would not get smaller: {left}.")
        return shared


def rows_of(module: nn.Module) -> tuple[Tensor, Tensor]:
    """The weight of a layer, [out, d], zeros of masks included, and the mask of what is alive."""
    alive = packed.support_of(module)
    weight: Any = module.weight
    return (weight.detach() * alive).flatten(1), alive.flatten(1)


def saves(module: nn.Module, codes: Tensor, table: Tensor) -> bool:
    """Whether codes and table take fewer bits than the values that they stand for."""
    alive, leaf = packed.support_of(module), packed.Dense(module.weight.detach())  # type: ignore
    forms = packed.Lookup(leaf, codes, table), leaf
    new, old = (
        sum(part.numel() * bits for part, bits in form.payload(alive).values()) for form in forms
    )
    return new < old


def inner(technique: TableTechnique | RoundingTechnique, work: Work) -> tuple[str, ...]:
    """`skip`, and the first and the last linear or convolutional layer that runs.

    Raises:
        Refused: no other layer is left.
    """
    layers = {path for path, _ in weights(work.model)}
    ran = [call.path for call in sites.calls(work.model, work.task.example) if call.path in layers]
    outer = tuple(dict.fromkeys((*ran[:1], *ran[-1:])))
    skip = technique.skip + outer
    if not any(True for _ in weights(work.model, skip, technique.only)):
        raise Refused(
            f"{technique.name}(ends=False)",
            "no layer but the first and the last is left to work on",
            "Set ends, or drop the step.",
        )
    work.notes.append(f"the first and the last layer stay as they are: {list(outer)}.")
    return skip


@contextmanager
def latents(tables: Iterable[packed.Lookup]) -> Iterator[None]:
    """Let the latent weights under tables train as well, meanwhile."""
    tables = list(tables)
    try:
        for table in tables:
            table.inner.requires_grad_(True)
        yield
    finally:
        for table in tables:
            table.inner.requires_grad_(False)


class TrainedTableTechnique(TableTechnique, TaughtTechnique):
    """A rung: tables that are trained."""
