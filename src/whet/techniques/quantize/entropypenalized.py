"""EntropyPenalized: weights train as integers times a step, and pay for the bits that they take.

    W = s q,  q = round(Phi),   L = loss + rate * B / n,   B = sum of -log2 p(q) over all values
    p(k) = (|{i: q_i = k}| + 1/2) / (n_t + K / 2),   dB/dPhi = log2 p(floor Phi) - log2 p(ceil Phi)

Each tensor has an s of its own, which trains, and a table p of the K integers that it may take.
n is the number of all values and n_t that of one tensor, so `rate` is the price of one bit a value.
Most values end as 0, the others as small integers. The loss goes straight through the rounding to
Phi. B is the entropy of the codes, which an entropy coder reaches in model.whet.

Paper: Oktay, Balle, Singh and Shrivastava 2020, Scalable Model Compression by Entropy Penalized
    Reparameterization (1906.06624). Departures: p is counted anew at each step (the tables that
    gradient descent would go to) in place of a trained density, and bits grow linearly between
    integers in place of noise; the rate rises over the first part of the training; the loss has a
    part of the parent's.
Helps when: the file has to be as small as it can be, and there is data to train on.
Hurts when: speed is wanted: zeros lie anywhere, and the runtime multiplies floats as before.
Needs: training data; validation data to keep the best of the last weights.
Costs: training, with a few passes over all weights each step. After a pruning step only what that
    left is trained, and fewer epochs do.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from whet import numerics, packed
from whet.rungs.layers import LayerTechnique
from whet.rungs.training import TaughtTechnique
from whet.technique import Work


class EntropyPenalized(LayerTechnique, TaughtTechnique):
    """Train weights on a grid, with a price on the bits of their codes."""

    makes: ClassVar[frozenset[type]] = frozenset({packed.Affine})
    spoils: ClassVar[frozenset[type]] = packed.QUANTIZED
    ladder: ClassVar[dict[str, tuple[Any, ...]]] = {"rate": (1.0, 3.0, 10.0, 30.0)}

    rate: Annotated[float, Field(ge=0, le=1e4, description="loss for one bit a value")] = 10.0
    bits: Annotated[int, Field(ge=2, le=16, description="of a code, at most")] = 5
    step: Annotated[
        float, Field(gt=0, le=100, description="s at first, in RMS of a tensor's nonzero values")
    ] = 0.7
    ramp: Annotated[
        float, Field(ge=0, le=1, description="share of the steps in which the rate rises to full")
    ] = 0.3
    end: Annotated[
        float, Field(gt=0, le=1, description="share of the steps after which weights are kept")
    ] = 0.75
    biases: Annotated[bool, Field(description="the biases of these layers as well")] = True
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0, le=10)] = 0.002
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0

    def apply(self, work: Work) -> None:
        loss, forms = self.objective(work), self.install(work.model)
        n, price, late = sum(form.alive.numel() for *_, form in forms), 0.0, False

        def objective(inputs: Any, labels: Any, outputs: Any) -> Tensor:
            bits = torch.stack([form.bits_spent() for *_, form in forms]).sum()
            return loss(inputs, labels, outputs) + price * bits / n

        def tell(done: int, steps: int) -> None:
            nonlocal price, late
            price = self.rate * min(1.0, done / max(self.ramp * steps, 1))
            late = done >= self.end * steps
            work.tell(done, steps)

        self.train(work, objective, tell, ready=lambda: late)
        with torch.no_grad():
            spent = sum(float(form.bits_spent()) for *_, form in forms)
        for module, name, form in forms:
            settle(module, name, form)
        work.notes.append(f"{n} values as {spent / 8:.0f} bytes of codes, as their entropy has it.")

    def install(self, model: nn.Module) -> list[tuple[nn.Module, str, Reparametrized]]:
        """Put integers and steps in the place of weights; gives (module, name, form)."""
        found: list[tuple[nn.Module, str, Reparametrized]] = []
        top = numerics.integer_range(self.bits, symmetric=True)[1]
        for _, module in self.layers(model):
            for name in ("weight", "bias") if self.biases else ("weight",):
                if getattr(module, name) is None:
                    continue
                alive = packed.support_of(module, name)

                def pack(w: Tensor, name: str = name, alive: Tensor = alive) -> packed.Packed:
                    form = Reparametrized(w, alive, self.step, top)
                    found.append((module, name, form))  # noqa: B023  called at once
                    return form

                packed.rewrite(module, name, pack)
        return found


class Reparametrized(packed.Packed):
    """A weight while it trains: W = s round(Phi), s = s_0 e^gain, Phi = latent / s_0.

    Args:
        value: what it starts from.
        alive: a mask of the values that are not held at zero by a form above.
        share: s_0 as a multiple of the root mean square of the values that are not zero.
        top: the largest integer.
    """

    unit: Tensor
    alive: Tensor

    def __init__(self, value: Tensor, alive: Tensor, share: float, top: int) -> None:
        super().__init__()
        self.inner, self.top = packed.Dense(value * alive), top
        self.gain = nn.Parameter(value.new_zeros(()))
        self.register_buffer("unit", first_step(value[alive], share))
        self.register_buffer("alive", alive.clone())
        self.held = alive.numel() - int(alive.sum())

    def phi(self) -> Tensor:
        """Phi, of the weight's shape."""
        return self.inner.dense() / self.unit

    def step(self) -> Tensor:
        """s."""
        return self.unit * self.gain.exp()

    def codes(self) -> Tensor:
        """q, as floating-point integers of the weight's shape."""
        return self.phi().detach().round().clamp(-self.top, self.top) * self.alive

    def dense(self) -> Tensor:
        return Rounded.apply(self.phi()).clamp(-self.top, self.top) * self.step()

    def bits_spent(self) -> Tensor:
        """sum_i -log2 p(q_i), 0-d, with a gradient to the latent values that are alive."""
        u = self.phi()[self.alive] if self.held else self.phi().flatten()
        return Rate.apply(u, self.top, self.held)  # type: ignore[no-any-return]

    def support(self) -> Tensor | None:
        return None


def first_step(values: Tensor, share: float) -> Tensor:
    """`share` times the root mean square of what is not zero; 1 where all is."""
    values = values[values != 0]
    step = share * values.square().mean().sqrt() if len(values) else values.new_zeros(())
    return torch.where(step > torch.finfo(step.dtype).tiny, step, torch.ones_like(step))


class Rounded(torch.autograd.Function):
    """round(u), with the gradient of u."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Any:
        return u.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g


class Rate(torch.autograd.Function):
    """sum_i -log2 p(q_i), q = clamp(round(u)), 0-d; as many more codes as `zeros` are 0.

    Its gradient is log2 p(floor u) - log2 p(ceil u), towards the shorter code.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, top: int, zeros: int = 0) -> Any:
        counts = torch.bincount(places(u.round(), top, top), minlength=2 * top + 1).float()
        counts[top] += zeros
        table = numerics.code_lengths(counts)
        ctx.save_for_backward(table.diff().index_select(0, places(u.floor(), top, top - 1)))
        return counts @ table

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        return g * ctx.saved_tensors[0], None, None


def places(u: Tensor, top: int, most: int) -> Tensor:
    """Where the integer u, clamped to -top .. most, stands in a table that begins at -top."""
    return u.clamp(-top, most).add_(top).int()


@torch.no_grad()
def settle(module: nn.Module, name: str, form: Reparametrized) -> None:
    """Put the codes on a grid of as few bits as they need; masks above let go of new zeros."""
    q = form.codes()
    s = form.step().detach()
    bits = max(2, int(q.abs().max()).bit_length() + 1)
    leaf = packed.Dense(q * s)
    grid = packed.Affine(leaf, s, torch.zeros_like(s), bits_wide=bits, symmetric=True, axis=None)
    above = packed.form_of(module, name)
    for part in above.modules() if above is not None else ():
        if isinstance(part, packed.Sparse):
            part.mask &= q != 0
    packed.exchange(module, name, form, grid)
