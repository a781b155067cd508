"""PowerSGD (Vogels et al. 2019, algorithm 1): workers send low-rank factors of the gradient instead of the gradient.

A layer's gradient, as a matrix [outputs, inputs x kernel], becomes P Q^T with P [outputs, rank] and Q [.., rank]: one
step of power iteration from the Q of the step before. What that loses is added to the next step's gradient.

Everything here is linear in the gradients, so only their sum over the workers counts, and so do the sum of what
the workers have kept: results are equal for any number of workers up to float rounding, one included. torch's own hook
keeps its memory by DDP bucket, loses it with the process, and does nothing where there is one worker; hence this.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resnet_dist.config.low_rank import RANK, matrix, sent_as_factors
from resnet_dist.training.stopwatch import Stopwatch


class PowerSgdReduction:
    """A `reduce.Reduction`. Sends after the backward pass, not during it."""

    def __init__(self, model: nn.Module, rank: int, world_size: int, num_micro_batches: int) -> None:
        self.forward = model
        self._is_first, self._world_size, self._scale = rank == 0, world_size, 1.0 / num_micro_batches
        self._groups: list[list[nn.Parameter]] = []
        """Parameters that are sent as factors, those of one shape together."""
        self._whole: list[nn.Parameter] = []
        by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}
        for parameter in (p for p in model.parameters() if p.requires_grad):
            if sent_as_factors(tuple(parameter.shape)):
                by_shape.setdefault(matrix(tuple(parameter.shape)), []).append(parameter)
            else:
                self._whole.append(parameter)
        self._groups = list(by_shape.values())
        first = next(model.parameters())
        self.wait = Stopwatch(first.device)
        draws = torch.Generator().manual_seed(0)
        self._queries: list[Tensor] = []
        """Q of every group: [layers, columns, rank], equal on all workers."""
        self._residuals: list[Tensor] = []
        """What this worker has kept of the gradient, [layers, rows, columns]; their sum over the workers counts."""
        for (rows, columns), group in by_shape.items():
            query = torch.randn((len(group), columns, RANK), generator=draws, dtype=first.dtype)
            self._queries.append(query.to(first.device))
            self._residuals.append(torch.zeros((len(group), rows, columns), dtype=first.dtype, device=first.device))

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor, micro_batch: int) -> None:
        (loss * self._scale).backward()

    @torch.no_grad()
    def finish(self) -> None:
        """Every parameter's `grad` becomes the step's, on all workers."""
        stacked = [torch.stack([_matrix(p) for p in group]) for group in self._groups]
        mine = [gradient + residual for gradient, residual in zip(stacked, self._residuals, strict=True)]
        whole = [gradient_of(p) for p in self._whole]
        sums = self._summed([m @ q for m, q in zip(mine, self._queries, strict=True)] + whole)
        bases = [torch.linalg.qr(p).Q for p in sums[: len(mine)]]
        shares = [m.mT @ b for m, b in zip(mine, bases, strict=True)]
        self._residuals = [m - b @ s.mT for m, b, s in zip(mine, bases, shares, strict=True)]
        self._queries = self._summed(shares)
        for group, basis, query in zip(self._groups, bases, self._queries, strict=True):
            for parameter, gradient in zip(group, basis @ query.mT, strict=True):
                parameter.grad = gradient.view_as(parameter)
        for parameter, gradient in zip(self._whole, sums[len(mine) :], strict=True):
            parameter.grad = gradient

    def settle(self) -> None:
        """The residuals of all workers become the first one's, which saves them. All workers call it together."""
        sums = self._summed(self._residuals)
        self._residuals = sums if self._is_first else [torch.zeros_like(residual) for residual in sums]

    def state_dict(self) -> dict[str, Any]:
        return {"queries": list(self._queries), "residuals": list(self._residuals)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._queries, self._residuals = list(saved["queries"]), list(saved["residuals"])
        if not self._is_first:
            self._residuals = [torch.zeros_like(residual) for residual in self._residuals]

    def _summed(self, tensors: list[Tensor]) -> list[Tensor]:
        """Over the workers, in one message."""
        if self._world_size == 1:
            return tensors
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self.wait.begin()
        dist.all_reduce(flat)
        self.wait.end()
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def gradient_of(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _matrix(parameter: nn.Parameter) -> Tensor:
    return gradient_of(parameter).reshape(len(parameter), -1)
