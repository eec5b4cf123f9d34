"""DataFree: the student learns from its teacher on images that a generator makes: no data.

    min_G  L_oh + alpha L_a + beta L_ie + gamma L_bn,   x = G(z)
    min_S  T^2 KL(p_t^T || p_s^T)   on the same x

    L_oh = CE(z_t, argmax z_t)       the teacher is sure of what it sees
    L_a  = -mean |f_t|               its features are strong
    L_ie = sum_c q_c log q_c         it sees all classes equally often, q = mean softmax(z_t)
    L_bn = mean KL(N(mu, s^2) || N(mu_t, s_t^2))   its BatchNorm layers see what they saw

f_t is what the teacher's last linear layer reads; mu and s^2 are a channel's mean and variance over
a batch in front of a BatchNorm, which remembers mu_t and s_t^2 of the real data. Each step makes
one batch, from which the student learns how the teacher answers; then the generator takes a step.

Papers: Chen et al. 2019, Data-Free Learning of Student Networks. L_bn after Yin et al. 2020,
Dreaming to Distill, who take distances of means and of variances.
Helps when: the training data is lost or secret, and the classes are few and balanced.
Hurts when: there is data, even unlabeled: Distill is better and cheaper. A student's BatchNorm
    learns the statistics of generated images, which are not those of the real ones.
Needs: nothing but the teacher; one batch of images in, class scores out. A teacher without
    BatchNorm has no L_bn.
Costs: a forward and backward pass of the generator and of the teacher on top of training; with L_bn
    the teacher's BatchNorms are not folded: a third more for a LeNet with two of them.

Departures: the student is trained like any other, with a schedule for its learning rate; L_a is the
mean over features, so that alpha does not depend on their number, as in the authors' code; L_bn is
the mean over channels and then over layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from whet.errors import Refused
from whet.fit import Schedule
from whet.rungs.teachers import Teacher
from whet.rungs.teaching import check_scores, divergence, image_of
from whet.rungs.training import train
from whet.task import evaluating
from whet.technique import Technique, Work


class DataFree(Technique):
    """Train on what the teacher says of generated images."""

    tiny: ClassVar[dict[str, Any]] = {"steps": 3, "batch": 8, "latent": 8, "width": 4}

    steps: Annotated[int, Field(ge=1, description="batches to make and learn from")] = 4000
    batch: Annotated[int, Field(ge=2, description="images in a batch")] = 128
    latent: Annotated[int, Field(ge=1, description="numbers that an image is made from")] = 100
    width: Annotated[int, Field(ge=1, description="channels of the generator")] = 32
    lr: Annotated[float, Field(gt=0, le=10, description="of the student, AdamW")] = 2e-3
    generator_lr: Annotated[float, Field(gt=0, le=10, description="of the generator, Adam")] = 1e-2
    alpha: Annotated[float, Field(ge=0, le=1e6, description="weight of strong features")] = 0.1
    beta: Annotated[float, Field(ge=0, le=1e6, description="weight of balanced classes")] = 5.0
    gamma: Annotated[
        float, Field(ge=0, le=1e6, description="weight of the statistics in front of BatchNorm")
    ] = 1.0
    temperature: Annotated[float, Field(gt=0, le=100, description="T")] = 1.0
    every: Annotated[
        int, Field(ge=1, description="steps between looks at validation data; 10,000 looks at most")
    ] = 200

    def apply(self, work: Work) -> None:
        image, example = image_of(self.name, work.task), work.task.example
        networks = work.task.teachers or (work.parent,)
        critics = [Critic(network, example, statistics=self.gamma > 0) for network in networks]
        with torch.no_grad(), evaluating(work.model):
            outputs = work.model(*example)
        for critic in critics:
            check_scores(self.name, work.task, outputs, critic(image).scores)
            if self.alpha and critic.last is None:
                raise Refused(
                    self.name,
                    "the teacher calls no nn.Linear whose input could be looked at",
                    "Set alpha: 0.",
                )
        made = Made(self, work.model, critics, image)
        schedule = Schedule(
            epochs=self.steps / len(made),
            lr=self.lr,
            optimizer="adamw",
            weight_decay=0.0,
        )

        def objective(inputs: Tensor, answers: list[Tensor], outputs: Tensor) -> Tensor:
            losses = [divergence(outputs, answer, self.temperature) for answer in answers]
            return torch.stack(losses).mean()

        train(work, made, objective, schedule, work.tell)


def sure(z: Tensor) -> Tensor:
    """L_oh = CE(z, argmax z), the mean over the batch; z [batch, classes]."""
    return F.cross_entropy(z, z.argmax(dim=1))


def strong(f: Tensor) -> Tensor:
    """L_a = -mean |f|."""
    return -f.abs().mean()


def balanced(z: Tensor) -> Tensor:
    """L_ie = sum_c q_c log q_c, q = mean_batch softmax(z); at the least -log classes."""
    q = F.softmax(z, dim=1).mean(dim=0)
    return -torch.special.entr(q).sum()


def familiar(x: Tensor, norm: BatchNorm) -> Tensor:
    """Mean over channels of KL(N(mu, s^2) || N(mu_t, s_t^2)); x [batch, channels, ...]."""
    assert norm.running_mean is not None and norm.running_var is not None
    rest = [k for k in range(x.ndim) if k != 1]
    mu, mu_t = x.mean(rest), norm.running_mean
    v, v_t = x.var(rest, unbiased=False) + norm.eps, norm.running_var + norm.eps
    # KL = ((mu - mu_t)^2 / s_t^2 + s^2 / s_t^2 - 1 - log(s^2 / s_t^2)) / 2
    return (((mu - mu_t).square() + v) / v_t - 1 - (v / v_t).log()).mean() / 2


def generator(image: Tensor, latent: int, width: int) -> nn.Sequential:
    """[n, latent] -> images of the size of `image`, each channel with mean 0 and variance 1."""
    channels, *size = image.shape[1:]
    quarter, half = (tuple(-(-side // by) for side in size) for by in (4, 2))
    return nn.Sequential(
        nn.Linear(latent, width * quarter[0] * quarter[1]),
        nn.Unflatten(1, (width, *quarter)),
        nn.BatchNorm2d(width),
        nn.Upsample(half),
        *(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.LeakyReLU(0.2)),
        nn.Upsample(tuple(size)),
        *(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(width, channels, 3, padding=1), nn.Tanh()),
        nn.BatchNorm2d(channels, affine=False),
    )


@dataclass(frozen=True)
class Heard:
    """What a teacher made of a batch.

    Args:
        scores: z_t, [batch, classes].
        features: f_t; None: no linear layer was called.
        unfamiliar: L_bn, 0-d; None: not asked for, or no BatchNorm was called.
    """

    scores: Tensor
    features: Tensor | None
    unfamiliar: Tensor | None


class Critic:
    """A teacher that says what it makes of images, and from which features; with a gradient.

    Args:
        network: the teacher; it is copied.
        example: one call's inputs.
        statistics: L_bn is wanted: its BatchNorm layers are not folded.
    """

    def __init__(self, network: nn.Module, example: tuple[Any, ...], *, statistics: bool) -> None:
        norms = {
            path
            for path, module in network.named_modules()
            if statistics and isinstance(module, BatchNorm) and module.track_running_stats
        }
        self.network = Teacher(network, example, norms).network
        self.last: nn.Module | None = None
        self.features: Tensor | None = None
        self.unfamiliar: list[Tensor] = []
        for path, module in self.network.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(self._note)
            elif path in norms:
                module.register_forward_pre_hook(self._compare)
        with torch.no_grad():
            self(example[0])

    def _note(self, module: nn.Module, args: Any) -> None:
        self.last, self.features = module, args[0]

    def _compare(self, module: Any, args: Any) -> None:
        self.unfamiliar.append(familiar(args[0], module))

    def __call__(self, images: Tensor) -> Heard:
        self.network.to(images.device)
        self.unfamiliar = []
        scores = self.network(images)
        unfamiliar = torch.stack(self.unfamiliar).mean() if self.unfamiliar else None
        return Heard(scores, self.features, unfamiliar)


class Made:
    """Batches of (images, what each teacher says of them); each one taken trains the generator.

    Args:
        knobs: of the step.
        student: images are made where it is.
        critics: the teachers.
        image: the shape of an image, one batch.
    """

    def __init__(
        self, knobs: DataFree, student: nn.Module, critics: list[Critic], image: Tensor
    ) -> None:
        self.knobs, self.student, self.critics = knobs, student, critics
        self.generator = generator(image, knobs.latent, knobs.width).train()
        self.generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.Adam(self.generator.parameters(), lr=knobs.generator_lr)

    def __len__(self) -> int:
        """Batches between two looks; a `Schedule` has at most 10,000 epochs."""
        return min(max(self.knobs.every, -(-self.knobs.steps // 10_000)), self.knobs.steps)

    def __iter__(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        device = next(self.student.parameters()).device
        self.generator.to(device)
        for _ in range(len(self)):
            yield self.step(torch.randn(self.knobs.batch, self.knobs.latent, device=device))

    def step(self, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images of `z` and the answers to them; then the generator takes a step."""
        images = self.generator(z)
        heard = [critic(images) for critic in self.critics]
        loss = torch.stack([self.loss(each) for each in heard]).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return images.detach(), [each.scores.detach() for each in heard]

    def loss(self, heard: Heard) -> Tensor:
        """L_oh + alpha L_a + beta L_ie + gamma L_bn, of one teacher."""
        parts = [sure(heard.scores), self.knobs.beta * balanced(heard.scores)]
        if heard.features is not None:
            parts.append(self.knobs.alpha * strong(heard.features))
        if heard.unfamiliar is not None:
            parts.append(self.knobs.gamma * heard.unfamiliar)
        return torch.stack(parts).sum()
