"""Deep gradient compression: workers send each other a thousandth of their gradients.

A communication hook of torch's DistributedDataParallel. For each weight tensor of each worker, with
g its gradient, m the momentum and N the number of workers,

    g <- g min(1, clip N^{-1/2} / |g|)            local clipping
    u_t = m u_{t-1} + g_t,   v_t = v_{t-1} + u_t  momentum correction
    s_t = v_t where |v_t| is among the largest share, else 0    what is sent
    u_t, v_t <- 0 where it is sent

and all workers step along mean_k s_t^k. Nothing is lost, only late: what is sent and what is left
are the values of v_{t-1} + u_t, bit for bit, so that over the steps of each worker

    sum_{t <= T} s_t + v_T = sum_{t <= T} u_t

with the u_t before zeroing. Where everything is sent this is plain gradient descent, because u is
zeroed as well (the paper's momentum factor masking).

Biases and other vectors go whole: u_t = m u_{t-1} + mean_k g_t^k.

Paper: Lin et al. 2018, Deep Gradient Compression.
Departures: each tensor is clipped by its own norm, as the hook sees one bucket at a time. The share
is met exactly, by sorting, where the paper estimates the threshold from a sample.
"""

# no `from __future__ import annotations`: DistributedDataParallel reads those of a hook
import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from whet.errors import BadInput

WARM_UP = (0.25, 0.0625, 0.015625, 0.004, 0.001)  # 75, 93.75, 98.4, 99.6, 99.9 % are not sent
WORD = 4  # bytes of an index, and of a value


class DeepGradientCompression:
    """What one worker remembers between steps; registered on its network.

    The momentum is here: the optimizer takes none. Let go of the network before you call
    `destroy_process_group`: where it outlives the group, torch waits with Python's lock for a
    thread of gloo's that may still need that lock, to let go of a hook's last call.

    Args:
        steps_per_epoch: of each worker.
        shares: of the values of a tensor that are sent, one for each epoch; the last one stays.
        momentum: m.
        clip: the largest norm of a tensor's gradient, as if for one worker; None does not clip.

    Attributes:
        sent: bytes that this worker has given to the exchange, indices and values.
        dense: bytes that it would have given uncompressed.
    """

    def __init__(
        self,
        steps_per_epoch: int,
        shares: tuple[float, ...] = WARM_UP,
        momentum: float = 0.9,
        clip: float | None = None,
    ) -> None:
        if not (steps_per_epoch >= 1 and shares and all(0 < share <= 1 for share in shares)):
            raise BadInput(
                "compress gradients",
                f"steps_per_epoch is {steps_per_epoch}, shares are {shares}",
                "Give at least one step, and shares above 0, up to 1.",
            )
        self.steps_per_epoch, self.shares = steps_per_epoch, shares
        self.momentum, self.clip = momentum, clip
        self.u: dict[Tensor, Tensor] = {}
        self.v: dict[Tensor, Tensor] = {}
        self.step = self.sent = self.dense = 0

    def register(self, network: DistributedDataParallel) -> None:
        """Let `network` exchange its gradients so, from now on.

        Raises:
            BadInput: some of them are not float32.
        """
        if other := {p.dtype for p in network.parameters() if p.requires_grad} - {torch.float32}:
            raise BadInput(
                "compress gradients",
                f"some are {other.pop()}",
                "Train in float32 or with autocast.",
            )
        network.register_comm_hook(self, exchange)

    @property
    def share(self) -> float:
        """The share that is sent at this step."""
        return self.shares[min(self.step // self.steps_per_epoch, len(self.shares) - 1)]

    def largest(self, weight: Tensor, grad: Tensor, workers: int) -> tuple[Tensor, Tensor]:
        """Take in the gradient of `weight`; the indices (int32) and values to send, flat."""
        u, v = (state.setdefault(weight, torch.zeros_like(grad)) for state in (self.u, self.v))
        if self.clip is not None:
            grad = clipped(grad, self.clip / math.sqrt(workers))
        # u = m u + g,  v = v + u
        u.mul_(self.momentum).add_(grad)
        v.add_(u)
        index = top(v, self.share)
        values = v.flatten()[index]
        for state in (u, v):
            state.view(-1)[index] = 0
        return index.to(torch.int32), values

    def whole(self, weight: Tensor, mean: Tensor) -> Tensor:
        """u = m u + g of a tensor whose mean gradient all workers know."""
        u = self.u.setdefault(weight, torch.zeros_like(mean))
        return u.mul_(self.momentum).add_(mean)


def clipped(grad: Tensor, norm: float) -> Tensor:
    """g min(1, norm / |g|)."""
    return grad * (norm / grad.norm().clamp(min=1e-30)).clamp(max=1)


def top(values: Tensor, share: float) -> Tensor:
    """Where the largest `share` of flat `values` lie, by size, at least one."""
    count = max(1, round(share * values.numel()))
    return values.flatten().abs().topk(count, sorted=False).indices


def exchange(
    state: DeepGradientCompression,
    bucket: dist.GradBucket,  # type: ignore[attr-defined]
) -> Future[Tensor]:
    """The hook: what each worker sends of a bucket, gathered by all and averaged.

    A worker sends one tensor of words: the indices, then the values, then what goes whole.
    """
    workers = dist.get_world_size()
    pairs = list(zip(bucket.parameters(), bucket.gradients(), strict=True))
    sparse = [(w, g.view(-1)) for w, g in pairs if w.ndim > 1]
    whole = [(w, g.view(-1)) for w, g in pairs if w.ndim <= 1]
    found = [state.largest(w, g, workers) for w, g in sparse]
    words = [i for i, _ in found] + [x.view(torch.int32) for _, x in found]
    sent = torch.cat([*words, *(g.view(torch.int32) for _, g in whole)])
    state.sent += WORD * sent.numel()
    state.dense += WORD * bucket.buffer().numel()
    counts = [len(i) for i, _ in found]
    if bucket.is_last():
        state.step += 1
    gathered = [torch.empty_like(sent) for _ in range(workers)]
    work = dist.all_gather(gathered, sent, async_op=True)
    assert work is not None

    def averaged(done: Future[list[Tensor]]) -> Tensor:
        bucket.buffer().zero_()
        for each in gathered:
            half = sum(counts)
            places = each[:half].long().split(counts)
            values = each[half : 2 * half].view(torch.float32).split(counts)
            for (_, g), at, x in zip(sparse, places, values, strict=True):
                g.index_add_(0, at, x)
            rest = each[2 * half :].view(torch.float32).split([g.numel() for _, g in whole])
            for (_, g), x in zip(whole, rest, strict=True):
                g.add_(x)
        bucket.buffer().div_(workers)
        for w, g in whole:
            g.copy_(state.whole(w, g))
        return bucket.buffer()

    return work.get_future().then(averaged)
