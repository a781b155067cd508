"""torch for torchvision's transforms, with given draws in the place of its own, in double precision."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch


class Replayed:
    """Patch it over the name `torch` of torchvision's module. Keywords: the draws of each function, in order."""

    def __init__(self, **draws: Iterable[Any]) -> None:
        self._draws = {name: iter(values) for name, values in draws.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def randperm(self, _: int) -> torch.Tensor:
        return torch.tensor(next(self._draws["randperm"]))

    def rand(self, _: int) -> torch.Tensor:
        return torch.tensor([next(self._draws["rand"])], dtype=torch.float64)

    def empty(self, _: int) -> SimpleNamespace:
        u = next(self._draws["uniform"])
        return SimpleNamespace(uniform_=lambda a, b: torch.as_tensor(a + (b - a) * u, dtype=torch.float64))

    def randint(self, low: int, high: int, size: tuple[int]) -> SimpleNamespace:
        draw = low + int((high - low) * next(self._draws["randint"]))
        return SimpleNamespace(item=lambda: draw)

    def tensor(self, values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)
