"""Cosine: the student's features point where its teacher's do, however long they are.

    L = 1 - mean cos(f_s, f_t)

f are the channels at each place of an image or of a sequence. Of the last layers, beside Distill,
it makes the loss of DistilBERT: `Distill: {weight: 5, labels: 2, temperature: 2, beside: ..}`.

Paper: Sanh et al. 2019, DistilBERT, a distilled version of BERT (1910.01108).
Helps when: the student is as wide as its teacher, and a LayerNorm follows: lengths are nothing.
Hurts when: it is narrower (it refuses there), or lengths matter.
Needs: training data; modules of both networks with as many channels.
Costs: a forward pass of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from whet.errors import Refused
from whet.rungs.teaching import FeatureTechnique, Heard, same_size
from whet.technique import Work


class Cosine(FeatureTechnique):
    """One less the cosine of the features at each place."""

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        return turned(*same_size(student, teacher))

    def between(self, work: Work, heard: Heard) -> Callable[[Heard], Tensor]:
        for path, features in heard.shown.items():
            own, its = (f.shape[along(f)] for f in (features, heard.wanted[path]))
            if own != its:
                raise Refused(
                    self.name,
                    f"{path!r} has {own} channels, what it is compared with {its}",
                    "Name modules of one width: at. Or use FitNet, which learns a map.",
                )
        return self.mean


def along(features: Tensor) -> int:
    """Where the channels are: [batch, channels, ...] or [batch, places, channels]."""
    return -1 if features.ndim == 3 else 1


def turned(f_s: Tensor, f_t: Tensor) -> Tensor:
    """1 - mean cos(f_s, f_t) over all places, 0-d."""
    return 1 - F.cosine_similarity(f_s, f_t, dim=along(f_s)).mean()
