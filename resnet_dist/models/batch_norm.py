"""Batch norm for several micro-batches in one launch, and control of its running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm


class BatchNorm2d(nn.BatchNorm2d):
    """torch's batch norm, for a batch of `num_groups` micro-batches one after the other.

    In training every micro-batch is normalised with its own statistics, as if each had run alone ("ghost batch norm";
    Hoffer et al. 2017, section 4), and only the first one moves the running statistics.

    >>> norm = BatchNorm2d(3)
    >>> norm.num_groups = 2
    >>> x, y = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    >>> both = norm(torch.cat([x, y]))
    >>> norm.num_groups = 1
    >>> torch.equal(both, torch.cat([norm(x), norm(y)]))
    True
    """

    num_groups = 1
    counts = True
    """Whether a forward pass adds one to `num_batches_tracked`, as torch's does."""
    is_frozen = False
    """Whether the norm stays in evaluation mode, whatever the mode of the net."""

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.is_frozen)

    def forward(self, x: Tensor) -> Tensor:
        """[num_groups * N, C, H, W] -> the same shape and type."""
        if not self.training:
            return super().forward(x)
        if self.counts and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = self.momentum or 0.0
        if self.num_groups == 1:
            return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, momentum, self.eps)
        if torch.compiler.is_compiling():
            return self._fused(x)
        result: Tensor = _Grouped.apply(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.num_groups, momentum, self.eps
        )
        return result

    def _fused(self, x: Tensor) -> Tensor:
        """The same for several groups, from reductions and elementwise operations over all, which a compiler fuses."""
        groups = x.unflatten(0, (self.num_groups, -1))
        groups = groups if x.dtype == torch.float64 else groups.float()
        var, mean = torch.var_mean(groups, (1, 3, 4), correction=0, keepdim=True)  # [num_groups, 1, C, 1, 1]
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                count, momentum = groups[0].numel() // self.num_features, self.momentum or 0.0
                # As torch does, the running variance is the unbiased one.
                self.running_mean.lerp_(mean[0].flatten().to(self.running_mean.dtype), momentum)
                self.running_var.lerp_((var[0].flatten() * (count / (count - 1))).to(self.running_var.dtype), momentum)
        shape = (1, 1, -1, 1, 1)
        normalised = (groups - mean) * torch.rsqrt(var + self.eps) * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(x.dtype).flatten(0, 1)


class _Grouped(torch.autograd.Function):
    """torch's kernel on one group after the other, each writing into its part of the output. That spares the copies and
    the additions of gradients that `chunk` and `cat` would bring. On a CPU with the same bits for each group."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_groups: int,
        momentum: float,
        eps: float,
    ) -> Tensor:
        out = torch.empty_like(x)
        mean = weight.new_empty((num_groups, len(weight)))
        inverse_std = torch.empty_like(mean)
        groups = zip(x.chunk(num_groups), out.chunk(num_groups), mean, inverse_std, strict=True)
        for x_part, out_part, mean_part, inverse_part in groups:
            torch.ops.aten.native_batch_norm.out(
                *(x_part, weight, bias, running_mean, running_var, True, momentum, eps),
                out=out_part,
                save_mean=mean_part,
                save_invstd=inverse_part,
            )
            running_mean = running_var = None  # only the first group moves them
        ctx.save_for_backward(x, weight, mean, inverse_std)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std = ctx.saved_tensors
        if x.is_contiguous(memory_format=torch.channels_last):
            # torch's kernel for NHWC needs both in that layout; the one for a mixture is many times slower.
            out_grad = out_grad.contiguous(memory_format=torch.channels_last)
        groups = zip(out_grad.chunk(len(mean)), x.chunk(len(mean)), mean, inverse_std, strict=True)
        gradients = [
            torch.ops.aten.native_batch_norm_backward(
                grad_part, x_part, weight, None, None, mean_part, inverse_part, True, ctx.eps, [True, True, True]
            )
            for grad_part, x_part, mean_part, inverse_part in groups
        ]
        x_grads, weight_grads, bias_grads = zip(*gradients, strict=True)
        weight_grad, bias_grad = torch.stack(weight_grads).sum(0), torch.stack(bias_grads).sum(0)
        return torch.cat(x_grads), weight_grad, bias_grad, None, None, None, None, None


def moving_norms(model: nn.Module) -> list[_BatchNorm]:
    """The model's batch norms whose running statistics training moves: all that are not frozen."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [norm for norm in norms if not getattr(norm, "is_frozen", False)]


class BatchNormStatistics:
    """The running statistics of a model's batch norms.

    The workers share a step's micro-batches, however many workers there are. Only micro-batch 0 may move the running
    statistics; then they do not depend on the number of workers. The others still normalise with their own statistics.
    Every forward pass in training moves the statistics, and what other micro-batches did to them is undone. So all
    launches are the same computation, which is compiled or captured once.
    """

    def __init__(self, model: nn.Module) -> None:
        """From now on, the model's norms leave `num_batches_tracked` to `count`."""
        self._norms = [norm for norm in moving_norms(model) if norm.track_running_stats]
        for norm in self._norms:
            norm.counts = False  # type: ignore[assignment]
            norm.num_groups = 1  # type: ignore[assignment]  # of its own, or a compiled net would see it appear later
        self._kept: list[Tensor] = []

    def _moving(self) -> list[Tensor]:
        pairs = [(norm.running_mean, norm.running_var) for norm in self._norms]
        return [buffer for pair in pairs for buffer in pair if buffer is not None]

    @torch.no_grad()
    def keep(self) -> None:
        """Keeps a copy of running means and variances for `restore`. A few kernels for all norms together."""
        moving = self._moving()
        if not self._kept:
            self._kept = [torch.empty_like(buffer) for buffer in moving]
        if moving:
            torch._foreach_copy_(self._kept, moving)

    @torch.no_grad()
    def restore(self) -> None:
        """Sets running means and variances to what they were at the last `keep`."""
        if self._kept:
            torch._foreach_copy_(self._moving(), self._kept)

    @torch.no_grad()
    def count(self) -> None:
        """Adds one to every norm's `num_batches_tracked`: one kernel, instead of one a norm."""
        counters = [norm.num_batches_tracked for norm in self._norms if norm.num_batches_tracked is not None]
        if counters:
            torch._foreach_add_(counters, 1)

    @contextmanager
    def in_groups(self, num_groups: int) -> Iterator[None]:
        """Within the context: batches consist of this many micro-batches."""
        if num_groups == 1:
            yield
            return
        for norm in self._norms:
            norm.num_groups = num_groups  # type: ignore[assignment]
        try:
            yield
        finally:
            for norm in self._norms:
                norm.num_groups = 1  # type: ignore[assignment]

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Within the context: forward passes see and move copies, which are then thrown away.

        For repeating a forward pass, in activation checkpointing.
        """
        kept = [dict(norm._buffers) for norm in self._norms]
        for norm in self._norms:
            norm._buffers.update({key: None if b is None else b.clone() for key, b in norm._buffers.items()})
        try:
            yield
        finally:
            for norm, buffers in zip(self._norms, kept, strict=True):
                norm._buffers.update(buffers)


def replace_batch_norm(net: nn.Module) -> nn.Module:
    """Swaps torch's BatchNorm2d layers for this project's, in place, with the same parameters and buffers."""
    for module in net.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = BatchNorm2d  # which adds no state of its own
    return net
