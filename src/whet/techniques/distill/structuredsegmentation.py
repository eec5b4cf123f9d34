"""StructuredSegmentation: class maps follow the teacher's: pixels, pairs of places, the whole.

    L = pixel L_pi + pair L_pa + holistic L_ho

    L_pi = mean_i KL(q_t,i || q_s,i)                     over pixels i, q = softmax(z)
    L_pa = mean_ij (a_s,ij - a_t,ij)^2                   a_ij = f_i.f_j / (|f_i| |f_j|)
    L_ho = E D(q_t | x) - E D(q_s | x)                   the Wasserstein distance, x the image

f_i are features averaged over the cells of a grid. D is a small network with an optimizer of its
own: each step it learns min_D E D(q_s | x) - E D(q_t | x) + 10 E (|grad D| - 1)^2, the gradient
taken between the two maps; it is thrown away.

Paper: Liu et al. 2019, Structured Knowledge Distillation for Semantic Segmentation (1903.04197).
Helps when: every pixel gets a class; the student's maps are ragged where the teacher's are whole.
Hurts when: outputs are not class maps (it refuses there), or the teacher's maps are poor.
Needs: training data. Costs: a forward pass of the teacher; nodes^4 products an image; with
    `holistic` a forward pass of D, and a step of it that is differentiated twice.

Departures: D has two convolutions and no attention, and looks at probabilities. The divergence is
    from the teacher's distribution, as in Distill. Both networks have the same number of nodes, so
    that their features need not be of one size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from whet.errors import Refused
from whet.graph.trace import baked
from whet.rungs.adversary import Adversary, discriminator
from whet.rungs.teaching import (
    FeatureTechnique,
    Heard,
    divergence,
    is_map,
    must_be_maps,
    must_match,
)
from whet.task import as_arguments
from whet.technique import Work


class StructuredSegmentation(FeatureTechnique):
    """Learn class maps by pixel, by pairs of places, and against a discriminator."""

    tiny: ClassVar[dict[str, Any]] = {"width": 8}
    shows: ClassVar[str] = "dense_cnn"

    at: Annotated[
        dict[str, str],
        Field(
            description="modules whose places are paired, the student's: the teacher's; "
            "by default the last one that gives a map of other channels than the classes"
        ),
    ] = {}
    pixel: Annotated[float, Field(ge=0, le=1e6, description="weight of L_pi")] = 10.0
    pair: Annotated[float, Field(ge=0, le=1e6, description="weight of L_pa")] = 10.0
    holistic: Annotated[float, Field(ge=0, le=1e6, description="weight of L_ho; 0: no D")] = 0.1
    nodes: Annotated[int, Field(ge=2, le=64, description="nodes in a row or column, at most")] = 8
    width: Annotated[int, Field(ge=1, description="channels of D's first layer")] = 32
    discriminator_lr: Annotated[float, Field(gt=0, le=10, description="of D, Adam")] = 1e-3

    def taps(self, work: Work, teacher: nn.Module) -> dict[str, str]:
        if not self.pair:
            return {}
        if self.at:
            return super().taps(work, teacher)
        own, its = (last_map(model, work.task.example) for model in (work.model, teacher))
        return {own: its} if own and its else {}

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        return pairwise(student, teacher, self.nodes)

    def between(self, work: Work, heard: Heard) -> Callable[[Heard], Tensor]:
        self.check(heard)
        judge = None
        if self.holistic:
            seen = heard.student.shape[1] + as_arguments(heard.inputs)[0].shape[1]
            judge = Judge(discriminator(seen, self.width), self.discriminator_lr)
        return partial(self.total, judge)

    def total(self, judge: Judge | None, heard: Heard) -> Tensor:
        """pixel L_pi + pair L_pa + holistic L_ho of one batch."""
        losses = [self.pixel * pixelwise(heard.student, heard.teacher)]
        if heard.shown:
            losses.append(self.pair * self.mean(heard))
        if judge is not None:
            q_s, q_t = (F.softmax(z, dim=1) for z in (heard.student, heard.teacher))
            losses.append(self.holistic * judge(q_s, q_t, as_arguments(heard.inputs)[0]))
        return torch.stack(losses).sum()

    def check(self, heard: Heard) -> None:
        """Refuse what is not class maps of one size, features that are no maps, or no one image."""
        for whose, z in (("its", heard.student), ("the teacher's", heard.teacher)):
            if not is_map(z) or z.shape[1] < 2:
                raise Refused(
                    self.name,
                    f"{whose} outputs are no class maps [batch, classes, height, width]",
                    "Use Distill, or a loss between features such as FitNet.",
                )
        todo = "Give them the same classes, heights and widths."
        must_match(self.name, "class maps", heard.student, heard.teacher, todo)
        if self.pair and not heard.shown:
            raise Refused(
                self.name,
                "no module in front of the class maps gives a map of features",
                "Name the modules whose places are paired: at. Or set pair: 0.",
            )
        must_be_maps(self.name, heard, "Name other modules: at. Or set pair: 0.")
        inputs = as_arguments(heard.inputs)
        if self.holistic and not (len(inputs) == 1 and is_map(inputs[0])):
            raise Refused(
                self.name,
                "the network does not read one batch of images, which the discriminator would see",
                "Set holistic: 0.",
            )


def last_map(model: nn.Module, example: tuple[Any, ...]) -> str | None:
    """The module that gives the last map of other channels than the outputs have, outermost."""
    twin = baked(model)[0]
    found: list[tuple[str, int]] = []

    def look(path: str, module: nn.Module, args: Any, out: Any) -> None:
        if is_map(out):
            found.append((path, out.shape[1]))

    for path, module in twin.named_modules():
        if path:
            module.register_forward_hook(partial(look, path))
    with torch.no_grad():
        outputs = twin(*example)
    if not is_map(outputs):
        return None
    return next((path for path, n in reversed(found) if n != outputs.shape[1]), None)


def pixelwise(z_s: Tensor, z_t: Tensor) -> Tensor:
    """L_pi = mean_i KL(q_t,i || q_s,i), of class maps [batch, classes, height, width]."""
    return divergence(z_s, z_t, 1.0) / z_s[0, 0].numel()


def affinity(f: Tensor, grid: tuple[int, int]) -> Tensor:
    """a_ij = f_i.f_j / (|f_i| |f_j|), f [batch, channels, height, width] -> [batch, n, n]."""
    nodes = F.normalize(F.adaptive_avg_pool2d(f, grid).flatten(2), dim=1)
    return nodes.transpose(1, 2) @ nodes


def pairwise(f_s: Tensor, f_t: Tensor, nodes: int) -> Tensor:
    """L_pa = mean_ij (a_s,ij - a_t,ij)^2, of maps of any channels, on at most nodes x nodes."""
    height, width = (min(nodes, *sides) for sides in zip(f_s.shape[2:], f_t.shape[2:], strict=True))
    grid = height, width
    return (affinity(f_s, grid) - affinity(f_t, grid)).square().mean()


def steepness(D: nn.Module, q_s: Tensor, q_t: Tensor, x: Tensor) -> Tensor:
    """E (|grad_q D(q | x)| - 1)^2 at q = e q_t + (1 - e) q_s, e ~ U(0, 1) for each image."""
    e = torch.rand(len(q_s), 1, 1, 1, device=q_s.device)
    q = (e * q_t + (1 - e) * q_s).requires_grad_()
    (slope,) = torch.autograd.grad(D(torch.cat([q, x], 1)).sum(), q, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


class Judge(Adversary):
    """L_ho; its D: [batch, classes + channels of the image, height, width] -> [batch, 1]."""

    betas: ClassVar[tuple[float, float]] = (0.5, 0.9)

    def __call__(self, q_s: Tensor, q_t: Tensor, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(x, (q_s.shape[2], q_s.shape[3]))
        # min_D E D(q_s | x) - E D(q_t | x) + 10 E (|grad D| - 1)^2
        own = q_s.detach()
        self.learn(
            lambda: 10 * steepness(self.D, own, q_t, x) - self.distance(own, q_t, x), q_s.device
        )
        return self.distance(q_s, q_t, x)

    def distance(self, q_s: Tensor, q_t: Tensor, x: Tensor) -> Tensor:
        """E D(q_t | x) - E D(q_s | x)."""
        return (self.D(torch.cat([q_t, x], 1)) - self.D(torch.cat([q_s, x], 1))).mean()
