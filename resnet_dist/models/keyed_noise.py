"""Dropout and drop-path without a random generator: every mask is a pure function of one key per layer.

A key is a hash of (seed, step, micro-batch, layer), and `LaunchNoise` sets it before the forward pass. So masks do not
depend on the number of workers, restarts, the device, or activation checkpointing, which repeats a forward pass.
Integer arithmetic only: the same bits on CPU and GPU.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST_FACTOR = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND_FACTOR = 0x94D049BB133111EB - (1 << 64)


def keyed_uniform(keys: Tensor, num_draws: int) -> Tensor:
    """Draws 0 .. num_draws-1 of each int64 key [...]: float64 [..., num_draws] in [0, 1), on the keys' device.

    The outputs of splitmix64 seeded with the key, as `data.keyed_random.uniform` gives them. torch's int64 wraps as
    uint64 does; only its right shift differs.
    """
    z = keys.unsqueeze(-1) + (torch.arange(num_draws, device=keys.device) + 1) * _GOLDEN_GAMMA
    z = (z ^ _shift(z, 30)) * _FIRST_FACTOR
    z = (z ^ _shift(z, 27)) * _SECOND_FACTOR
    return _shift(z ^ _shift(z, 31), 11).double() * 2.0**-53


def _shift(z: Tensor, bits: int) -> Tensor:
    """z >> bits as if z were unsigned."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


class KeyedModule(nn.Module):
    """A layer with random masks. `keys` is a buffer, so that a compiled or captured graph sees it change."""

    keys: Tensor
    """int64 [k], one for each of the k micro-batches that the layer's input consists of."""
    is_frozen = False
    """Whether the layer stays in evaluation mode, whatever the mode of the net."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("keys", torch.zeros(1, dtype=torch.int64), persistent=False)

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.is_frozen)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"

    def mask(self, x: Tensor, num_draws: int) -> Tensor:
        """0 with probability `rate`, else 1 / (1 - rate): [num_draws], of x's type; a k-th of it from each key."""
        draws = keyed_uniform(self.keys, num_draws // len(self.keys)).flatten()
        return ((draws >= self.rate) / (1.0 - self.rate)).to(x.dtype)


class DropPath(KeyedModule):
    """In training, drops the whole residual function for some samples of a micro-batch (Huang et al. 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        return x * self.mask(x, len(x)).view(-1, 1, 1, 1)


class KeyedDropout(KeyedModule):
    """In training, drops single values (Srivastava et al. 2014)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        return x * self.mask(x, x.numel()).view(x.shape)


class LaunchNoise:
    """The keyed layers of a model, in the order of `model.modules()`."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, KeyedModule)]
        self._held: dict[int, tuple[Tensor, list[Tensor]]] = {}
        """By number of micro-batches k: int64 [layers, k], always the same memory, and each layer's view of it."""

    def __len__(self) -> int:
        return len(self._layers)

    def set_keys(self, keys: Tensor) -> None:
        """int64 [layers, k]: layer i gets keys[i] for a batch of k micro-batches. One copy for all layers."""
        if not self._layers:
            return
        num_micro_batches = keys.shape[1]
        if num_micro_batches not in self._held:
            held = torch.empty_like(keys, device=self._layers[0].keys.device)
            self._held[num_micro_batches] = held, list(held)
        held, views = self._held[num_micro_batches]
        held.copy_(keys)
        for layer, own in zip(self._layers, views, strict=True):
            layer.keys = own


def replace_dropout(net: nn.Module) -> nn.Module:
    """Swaps torch's Dropout layers, which draw from a global generator, for keyed ones, in place."""
    for name, child in net.named_children():
        if isinstance(child, nn.Dropout):
            setattr(net, name, KeyedDropout(child.p))
        else:
            replace_dropout(child)
    return net
