"""The rung of distillation between transformers: what their attentions see, layer by layer."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from whet.errors import Refused
from whet.graph import attending
from whet.rungs.teaching import DistillTechnique, Heard
from whet.technique import Work

Index = Annotated[int, Field(ge=0)]


class AttentionTechnique(DistillTechnique):
    """A rung: a loss between what attentions of a student and of its teacher see.

    They are counted from 0 in the order of the calls; `whet.graph.attending` says how they may be
    written.
    """

    shows: ClassVar[str] = "transformer"

    layers: Annotated[
        dict[Index, Index],
        Field(description="attentions to compare, the student's: the teacher's, counted from 0"),
    ] = {}

    def mapped(self, own: int, its: int) -> dict[int, int]:
        """Which attention is compared with which, of `own` and `its` that there are."""
        return self.layers

    def compared(
        self, work: Work, teacher: nn.Module
    ) -> tuple[list[str], list[str], dict[int, int]]:
        """The layers of the network and of the teacher, and which attentions are compared.

        Raises:
            Refused: there is none to compare, or one is named that is not there.
        """
        own, its = (attending.layers(model, work.task.example) for model in (work.model, teacher))
        pairs = self.mapped(len(own), len(its)) if own and its else {}
        if not pairs:
            raise Refused(
                self.name,
                f"{len(own)} attentions are seen in the network, {len(its)} in the teacher",
                "Use FitNet or Distill, or name the attentions to compare: layers.",
            )
        for whose, most, count in (
            ("the network", max(pairs), len(own)),
            ("the teacher", max(pairs.values()), len(its)),
        ):
            if most >= count:
                raise Refused(
                    self.name,
                    f"{whose} has no attention {most}: {count} are seen, counted from 0",
                    "Name others: layers.",
                )
        return own, its, pairs

    def must_fit(self, heard: Heard) -> None:
        """Refuse what differs in more than its width: in batch, heads or places."""
        for path, own in heard.shown.items():
            sizes = None if path.endswith("/scores") else -1
            one, other = (list(f.shape)[:sizes] for f in (own, heard.wanted[path]))
            if one != other:
                raise Refused(
                    self.name,
                    f"{path} is {one} in the network, {other} in the teacher",
                    "Compare attentions of as many heads and places: layers. Or use FitNet.",
                )


def attended(scores: Tensor) -> tuple[Tensor, Tensor]:
    """A = softmax(S), [..., queries, keys], and which keys anything looks at, [..., keys].

    A key that a mask hides from every query is padding.
    """
    shares = scores.softmax(dim=-1)
    return shares, shares.amax(dim=-2) > 0
