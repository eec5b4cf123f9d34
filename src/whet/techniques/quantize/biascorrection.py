"""BiasCorrection: the mean error that rounding the weights makes is taken out of the bias.

    b' = b + (W - W_hat) E[x]

Paper: Nagel et al. 2019, Data-Free Quantization through Weight Equalization and Bias Correction
    (section 4.2; here E[x] is measured, not derived).
Helps when: few bits, or depthwise layers, whose rounding errors do not average out.
Hurts when: hardly ever; at 8 bits it is often within noise. The mean is taken as if padding held
    it too, so it is not exact at the border.
Needs: a quantized network and calibration data. Costs: one pass over `examples` examples.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from whet import packed
from whet.errors import Refused
from whet.graph import statistics
from whet.rungs.layers import weights
from whet.technique import Need, Technique, Work

OPERATIONS = frozenset(["conv1d", "conv2d", "conv3d", "linear"])


class BiasCorrection(Technique):
    """Correct the bias of every quantized layer that has one."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.STATISTICS})
    wants: ClassVar[frozenset[type]] = frozenset({packed.Affine})

    examples: Annotated[int, Field(ge=1, description="calibration examples")] = 512

    @torch.no_grad()
    def apply(self, work: Work) -> None:
        batches = work.task.statistics()
        assert batches is not None  # `needs` was checked before any work
        means = statistics.input_means(work.model, batches, OPERATIONS, self.examples)
        corrected = 0
        for path, module in weights(work.model):
            form = packed.form_of(module)
            if form is None or not any(isinstance(m, packed.Affine) for m in form.modules()):
                continue
            if module.bias is None or path not in means:
                work.notes.append(f"{path} has no bias to correct.")
                continue
            error = latent(form) - form.dense()
            module.bias += mean_shift(error, means[path], getattr(module, "groups", 1))  # type: ignore
            corrected += 1
        if not corrected:
            raise Refused(
                "BiasCorrection", "no quantized layer has a bias", "Put FoldBatchNorm first."
            )
        work.notes.append(f"corrected {corrected} biases.")


def latent(form: packed.Packed) -> Tensor:
    """The weight before its grid, zeros of masks included."""
    if isinstance(form, packed.Affine):
        return form.inner.dense()
    if isinstance(form, packed.Sparse):
        return torch.where(form.mask, latent(form.inner), torch.zeros(()))
    return form.dense()


def mean_shift(error: Tensor, mean: Tensor, groups: int) -> Tensor:
    """(W - W_hat) E[x] for each output channel.

    Args:
        error: W - W_hat, [out, in / groups, ...].
        mean: E[x], [in].
        groups: of a grouped convolution.
    """
    taps = error.flatten(2).sum(dim=2) if error.ndim > 2 else error
    per_group = mean.reshape(groups, -1).repeat_interleave(len(taps) // groups, dim=0)
    return (taps * per_group).sum(dim=1)
