"""What a run has to remember: weights, their moving average, optimizer, counters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from resnet_dist.config.recipe import EmaConfig
from resnet_dist.training.reduce import PowerSgdReduction
from resnet_dist.training.schedule import EarlyStop, Plateau

_AVERAGE = "average"


class MovingAverage:
    """The exponential moving average of a net, which is evaluated and registered in its place.

    e = decay * e + (1 - decay) * w, for weights and batch norm's running statistics; its counters are copied.
    """

    def __init__(self, net: nn.Module, config: EmaConfig, steps_per_epoch: int) -> None:
        self.net = deepcopy(net).requires_grad_(False)
        self._every_steps = config.every_steps
        self._start_step = round(config.start_epochs * steps_per_epoch)
        self._weight = 1 - config.decay
        # Once, because they stay the same tensors: a state dict costs milliseconds.
        pairs = list(zip(self.net.state_dict().values(), net.state_dict().values(), strict=True))
        self._averages, self._currents = _unzipped(pair for pair in pairs if pair[0].is_floating_point())
        self._counters, self._current_counters = _unzipped(pair for pair in pairs if not pair[0].is_floating_point())

    @torch.no_grad()
    def update(self, num_steps: int) -> None:
        """Call it after every optimizer step, with the number of steps done. Does nothing if no update is due."""
        if num_steps % self._every_steps:
            return
        if num_steps > self._start_step:
            torch._foreach_lerp_(self._averages, self._currents, self._weight)
        else:
            torch._foreach_copy_(self._averages, self._currents)
        if self._counters:
            torch._foreach_copy_(self._counters, self._current_counters)


def _unzipped(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    pairs = list(pairs)
    return [a for a, _ in pairs], [b for _, b in pairs]


class HostCopies:
    """Copies of a nested state in the host's memory. Those of a GPU's tensors are in pinned memory, to which copies are
    several times as fast. It is used again by the copy after the next, so at most two may be in use."""

    def __init__(self) -> None:
        self._pinned: list[dict[str, Tensor]] = [{}, {}]
        """By the place in the state."""

    def take(self, state: dict[str, Any]) -> dict[str, Any]:
        self._pinned.reverse()
        copied: dict[str, Any] = self._copied(state, "")
        if self._pinned[0]:
            # The copies follow what the current stream did before; training continues when they have ended.
            torch.cuda.current_stream().synchronize()
        return copied

    def _copied(self, value: Any, place: str) -> Any:
        if isinstance(value, dict):
            return {key: self._copied(item, f"{place}/{key}") for key, item in value.items()}
        if isinstance(value, list):
            return [self._copied(item, f"{place}/{index}") for index, item in enumerate(value)]
        if not isinstance(value, Tensor) or not value.is_cuda:
            return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        pinned = self._pinned[0].get(place)
        if pinned is None or (pinned.shape, pinned.dtype) != (value.shape, value.dtype):
            pinned = self._pinned[0][place] = torch.empty_like(value, device="cpu", pin_memory=True)
        return pinned.copy_(value.detach(), non_blocking=True)


@dataclass
class TrainState:
    """The fields are the checkpoint's keys. `net` is the bare network: its keys are torchvision's.

    No RNG state and no loader state: what is random or shuffled is a function of the seed and the step.
    """

    net: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    """Optimizer steps done."""
    evaluated_step: int = 0
    """The step of the last evaluation; a resumed run does a missing one before it trains further."""
    skipped: set[int] = field(default_factory=set)
    """Steps whose global batch is left out because training diverged on it; a resumed run leaves them out too."""
    plateau: Plateau = field(default_factory=Plateau)
    early_stop: EarlyStop | None = None
    """None unless the recipe has one."""
    average: MovingAverage | None = None
    gradient_memory: PowerSgdReduction | None = None
    """The reduction, if it has state from step to step."""
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))
    _copies: HostCopies = field(default_factory=HostCopies, init=False, repr=False)

    @property
    def evaluated_net(self) -> nn.Module:
        """The net that is evaluated and published: the moving average, if the recipe has one."""
        return self.net if self.average is None else self.average.net

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters, in the optimizer's order."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def is_finite(self) -> bool:
        """Whether weights and batch norm's running statistics are finite. Waits for the device."""
        # A step's loss shows neither: it is computed before the step's update, and from the batch's own statistics.
        weights = get_total_norm([parameter.detach() for parameter in self.parameters])
        buffers = [buffer for buffer in self.net.buffers() if buffer.is_floating_point()]
        # The largest, not the root of the sum of squares: a variance of 1e20 is bad but finite.
        statistics = get_total_norm(buffers, norm_type=math.inf) if buffers else weights
        return bool(weights.isfinite() & statistics.isfinite())

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "evaluated_step": self.evaluated_step,
            "skipped": sorted(self.skipped),
            "plateau": asdict(self.plateau),
            **({} if self.early_stop is None else {"early_stop": asdict(self.early_stop)}),
            **({} if self.average is None else {_AVERAGE: self.average.net.state_dict()}),
            **({} if self.gradient_memory is None else {"gradient_memory": self.gradient_memory.state_dict()}),
            **({"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}),
        }

    def snapshot(self) -> dict[str, Any]:
        """A copy of the state dict in CPU memory: another thread may write it while training continues. On a GPU the
        snapshot after the next one overwrites it."""
        return self._copies.take(self.state_dict())

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.net.load_state_dict(saved["net"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["step"]
        self.evaluated_step = saved["evaluated_step"]
        self.skipped = set(saved.get("skipped", ()))  # older checkpoints have none
        self.plateau = Plateau(**saved.get("plateau", {}))
        if self.early_stop is not None:
            self.early_stop = EarlyStop(**saved["early_stop"])
        if self.average is not None:
            self.average.net.load_state_dict(saved[_AVERAGE])
        if self.gradient_memory is not None:
            self.gradient_memory.load_state_dict(saved["gradient_memory"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])

    def start_from(self, saved: Mapping[str, Any], *, new_schedule: bool) -> None:
        """Starts from weights alone (`{"net": ...}`), or from another run's whole state.

        What the other run had not (a moving average, a scaler) starts as in any run. Settings such as weight decay are
        this run's own. Raises KeyError, ValueError or RuntimeError if it does not fit.
        """
        if "optimizer" not in saved:
            self.net.load_state_dict(saved["net"])
            if self.average is not None:
                self.average.net.load_state_dict(saved["net"])
            return
        own, theirs = self.optimizer.state_dict()["param_groups"], saved["optimizer"]["param_groups"]
        if [len(group["params"]) for group in own] != [len(group["params"]) for group in theirs]:
            raise ValueError("its optimizer has other groups of parameters")
        missing = {} if _AVERAGE in saved else {_AVERAGE: saved["net"]}
        optimizer = {**saved["optimizer"], "param_groups": own}
        self.load_state_dict({**self.state_dict(), **saved, **missing, "optimizer": optimizer})
        if new_schedule:
            self.plateau = Plateau()
        if self.early_stop is not None:
            self.early_stop = EarlyStop()  # with other settings, worse evaluations count from here


def evaluated_weights(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict of the net that was evaluated, from a checkpoint's state or from best weights."""
    weights: Mapping[str, Any] = saved.get(_AVERAGE, saved["net"])
    return weights
