"""InputResolution: the network runs on a smaller image, as small as validation allows.

    operations ~ rho^2,   rho = 4/8, 5/8, 6/8, 7/8

The smallest rho of these whose loss of the metric on validation is at most `drop` is taken. The
image is resized in front of the first convolution, bilinearly; at rho = 1/2 that is the mean of
2 x 2 pixels. BatchNorm statistics are estimated anew, as objects have other sizes now.

Papers: Howard et al. 2017, MobileNets (the resolution multiplier); Touvron et al. 2019, Fixing the
    train-test resolution discrepancy (why statistics have to follow the size).
Helps when: images show more than the task needs; time falls in every runtime and precision.
Hurts when: what matters is small in the image. Networks that flatten their map, and those whose
    outputs have the size of their inputs, cannot bear it.
Needs: validation data; calibration data for the statistics. Costs: up to five passes over
    `examples` validation examples.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from whet import packed
from whet.errors import Refused
from whet.graph import placeable, sites, statistics, surgery
from whet.graph.ledger import Grid
from whet.task import Batches, evaluate, evaluating, limited, tensors_in
from whet.technique import Need, Technique, Work

SCALES = (0.5, 0.625, 0.75, 0.875)


class InputResolution(Technique):
    """Resize the image in front of the first convolution, by `scale` or the least that serves."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.VALIDATION})
    spoils: ClassVar[frozenset[type]] = packed.COMPRESSED | {Grid}
    tiny: ClassVar[dict[str, Any]] = {"scale": 0.5}

    scale: Annotated[
        float | None, Field(ge=0.5, lt=1, description="rho; searched where it is not given")
    ] = None
    drop: Annotated[
        float, Field(ge=0, description="of the metric on validation, for the search")
    ] = 0.01
    examples: Annotated[int, Field(ge=1, description="validation examples for each look")] = 5000
    calibrate: Annotated[int, Field(ge=0, description="examples for BatchNorm statistics")] = 2048

    def apply(self, work: Work) -> None:
        assert work.task.validation is not None  # `needs` was checked before any work
        asked = f"InputResolution(scale={self.scale}, drop={self.drop:g})"
        path, size = stem(work.model, work.task.example, asked)
        measure, held = work.task.measure, list(limited(work.task.validation, self.examples))
        before, reasons = evaluate(work.model, held, measure), []
        for scale in SCALES if self.scale is None else (self.scale,):
            smaller = f"{int(size[0] * scale)}x{int(size[1] * scale)}"
            twin = copy.deepcopy(work.model)
            resize(twin, path, scale)
            reason = misfit(twin, work.model, work.task.example)
            if reason is None:
                self._adapt(twin, work.task.statistics())
                after = evaluate(twin, held, measure)
                told = f"validation {measure.name} {before:.4f} -> {after:.4f}"
                if self.scale is not None or measure.drop(before, after) <= self.drop:
                    resize(work.model, path, scale)
                    work.model.load_state_dict(twin.state_dict())
                    work.notes.append(f"{size[0]}x{size[1]} images become {smaller}: {told}.")
                    return
                reason = told
            reasons.append(f"{smaller}: {reason}")
        raise Refused(asked, "; ".join(reasons), "Raise drop, or give a scale and train after it.")

    def _adapt(self, model: nn.Module, batches: Batches | None) -> None:
        if batches is not None and self.calibrate:
            statistics.reestimate_batchnorm(model, batches, self.calibrate)


def stem(model: nn.Module, example: tuple[Any, ...], asked: str) -> tuple[str, tuple[int, ...]]:
    """The convolution that alone reads the image, and the image's height and width.

    Raises:
        Refused: there is none.
    """
    calls = sites.calls(model, example)
    images = [call for call in calls if call.op == "input" and len(call.shape) == 4]
    found = f"{len(images)} of its inputs are images"
    if len(images) == 1:
        readers = [call for call in calls if images[0].site in call.sources]
        found = f"the image is read by {', '.join(call.site for call in readers)}"
        if len(readers) == 1 and readers[0].op == "conv2d":
            path = readers[0].path
            runs = sum(call.path == path and call.op == "conv2d" for call in calls)
            if runs == 1 and path and placeable.plain(model.get_submodule(path)):
                return path, images[0].shape[2:]
    raise Refused(asked, f"{found}, not by one convolution", "Resize the images yourself.")


def resize(model: nn.Module, path: str, scale: float) -> None:
    """Put a bilinear resize in front of the convolution `path`."""
    smaller = nn.Upsample(scale_factor=scale, mode="bilinear")
    surgery.replace(model, path, nn.Sequential(smaller, model.get_submodule(path)))


@torch.no_grad()
def misfit(model: nn.Module, original: nn.Module, example: tuple[Any, ...]) -> str | None:
    """Why the network cannot run on the smaller image, or None."""
    with evaluating(model), evaluating(original):
        try:
            outputs = model(*example)
        except (RuntimeError, ValueError, IndexError) as error:
            return f"the network cannot run on it ({str(error).splitlines()[0]})"
        shapes = [[t.shape for t in tensors_in(each)] for each in (outputs, original(*example))]
    return None if shapes[0] == shapes[1] else "its outputs change their size"
