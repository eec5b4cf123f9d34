"""WaveletInput: the trunk runs on the image's low frequencies, a light net on its details.

    I_L = (a + b + c + d) / 2        I_H = (a + b - c - d,  a - b + c - d,  a - b - c + d) / 2
    z = head(trunk(I_L / 2) + light(I_H))

of every 2x2 pixels a, b over c, d: the Haar wavelet, which loses nothing. The trunk is all that
stands before the first linear layer; a quarter of its operations is left. The light net is two
convolutions of `width` and 2 `width` channels, pooled, with a linear layer that starts at zero: at
first the network is the old one on an image of half the size. Then all of it is distilled.

Paper: Chen et al. 2017, Learning a Wavelet-like Auto-Encoder to Accelerate Deep Neural Networks,
    arXiv 1712.07493. Departures: the paper learns the encoder, with |I_H|^2 small; here it is the
    Haar wavelet, so the trunk's weights fit what they read from the first step on. The trunk is
    trained with the rest.
Helps when: images show more than the task needs, and the task needs some of their detail.
Hurts when: little training follows: objects have half their size for the trunk. Networks whose
    parts stand in no row (several inputs, long skip connections), and those that flatten their map
    before they pool it, cannot bear it. A ReLU that the network calls itself, and not as a module,
    acts on the sum as well.
Needs: training data; class scores; calibration or training data for BatchNorm statistics.
Costs: a training with a forward pass of the parent. The light net is added in bytes.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from whet import packed
from whet.errors import Refused
from whet.graph import chain, surgery, trace
from whet.graph.ledger import Grid
from whet.graph.placeable import Sum
from whet.rungs.channels import refresh_batchnorm
from whet.rungs.teaching import LogitTechnique, divergence
from whet.task import evaluating, tensors_in
from whet.technique import Work

TOGETHER = 1e-4  # how far sums in another order may lie apart, as a share
HAAR = torch.tensor(
    [[[1, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]]
) / 2  # fmt: skip


class WaveletInput(LogitTechnique):
    """Halve the image for the trunk, add a light net on what that leaves out, and distill."""

    spoils: ClassVar[frozenset[type]] = packed.COMPRESSED | {Grid}
    adds_bytes: ClassVar[bool] = True
    tiny: ClassVar[dict[str, Any]] = {"width": 4}

    width: Annotated[int, Field(ge=1, le=1024, description="channels of the light net")] = 16
    labels: Annotated[float, Field(ge=0, le=1e6, description="weight of the task's own loss")] = 0.1
    weight: Annotated[float, Field(ge=0, le=1e6, description="weight of the teacher's part")] = 0.9
    temperature: Annotated[float, Field(gt=0, le=100, description="T")] = 4.0
    calibrate: Annotated[int, Field(ge=0, description="examples for BatchNorm statistics")] = 2048

    def apply(self, work: Work) -> None:
        example = work.task.example
        trial = replace(work, model=copy.deepcopy(work.model), notes=[])
        self._divide(trial.model, example)
        why = misfit(trial.model, work.model, example)
        if why:
            raise Refused(self.name, why, "Use Distill on a smaller network instead.")
        self.objective(trial)  # what refuses does so before anything has changed
        before = trace.macs(work.model, example)[""]
        self._divide(work.model, example)
        after = trace.macs(work.model, example)[""]
        work.notes.append(f"{before:,} operations became {after:,}.")
        refresh_batchnorm(work, self.calibrate)
        super().apply(work)

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return divergence(student, teacher, self.temperature)

    def _divide(self, model: nn.Module, example: tuple[Any, ...]) -> None:
        """Put the trunk and the light net side by side in the place of the first module."""
        links, parts, head = self._trunk(model, example)
        fine = light(example[0].shape[1], self.width, head.in_features).to(head.weight)
        module: nn.Module = Sum([nn.Sequential(nn.AvgPool2d(2), *parts), fine])
        if any(map(chain.flattens, links)):
            # the network flattens by a call of its own, which wants a map
            module = nn.Sequential(module, nn.Unflatten(1, (head.in_features, 1, 1)))
        surgery.gather(model, links[0].name, module)

    def _trunk(
        self, model: nn.Module, example: tuple[Any, ...]
    ) -> tuple[list[chain.Link], list[nn.Module], nn.Linear]:
        """What stands before the first linear layer, as modules, and that layer."""
        image, todo = example[0] if len(example) == 1 else None, "Use InputResolution, or Distill."
        if not torch.is_tensor(image) or image.ndim != 4 or any(s % 2 for s in image.shape[2:]):
            found = "it reads no single batch of images of even height and width"
            raise Refused(self.name, found, todo)
        links, why = chain.chain(model, example)
        if why:
            raise Refused(self.name, f"the network's parts stand in no row: {why}", todo)
        parts: list[nn.Module] = []
        for link in links:
            part = chain.as_module(link) if link.op else model.get_submodule(link.name)
            if isinstance(part, nn.Linear) and parts:
                return links[: len(parts)], parts, part
            if part is None or (link.op and not parts):
                found = f"{link.name} is a call of the network's own, which cannot move"
                raise Refused(self.name, found, todo)
            parts.append(part)
        raise Refused(self.name, "no linear layer reads what is made of the image", todo)


def haar(x: Tensor) -> Tensor:
    """The sub-bands of each channel: [n, c, h, w] -> [n, c, 4, h / 2, w / 2], the low one first."""
    squares = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return torch.einsum("bij,nchiwj->ncbhw", HAAR.to(x), squares)


def inverse(bands: Tensor) -> Tensor:
    """What `haar` was given: the transform is orthogonal."""
    squares = torch.einsum("bij,ncbhw->nchiwj", HAAR.to(bands), bands)
    return squares.flatten(4, 5).flatten(2, 3)


def details(channels: int) -> nn.Conv2d:
    """I_H of each channel, as a convolution that does not train: [n, c, h, w] -> [n, 3 c, ...]."""
    layer = nn.Conv2d(channels, 3 * channels, 2, stride=2, groups=channels, bias=False)
    layer.weight = nn.Parameter(HAAR[1:].repeat(channels, 1, 1)[:, None], requires_grad=False)
    return layer


def light(channels: int, width: int, outputs: int) -> nn.Sequential:
    """[n, channels, h, w] -> [n, outputs], from the details alone; zero at first."""
    last = nn.Linear(2 * width, outputs, bias=False)
    nn.init.zeros_(last.weight)
    return nn.Sequential(
        details(channels),
        *(nn.Conv2d(3 * channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)),
        nn.ReLU(),
        *(nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * width)),
        nn.ReLU(),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        last,
    )


@torch.no_grad()
def misfit(divided: nn.Module, model: nn.Module, example: tuple[Any, ...]) -> str:
    """Why the divided network is not the old one on half the image, or ""."""
    with evaluating(divided), evaluating(model):
        try:
            got, want = divided(*example), model(F.avg_pool2d(example[0], 2))
        except (RuntimeError, ValueError, IndexError) as error:
            return f"it cannot run on half the image ({str(error).splitlines()[0]})"
    pairs = list(zip(tensors_in(got), tensors_in(want), strict=True))
    if all(a.shape == b.shape and torch.allclose(a, b, TOGETHER, TOGETHER) for a, b in pairs):
        return ""
    return "its own calls between modules do something else to the sum"
