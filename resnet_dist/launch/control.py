"""How a request to stop gets from a signal to the workers, and how their progress comes back.

A signal sets the driver's stop flag; twice a second the driver passes it to the `RunControl` actor; the workers ask the
actor (`ask_every_s`) and vote after every step (`training.loop`).

What the actor does and holds is bounded, however many workers there are: it gets at most `_MOST_ASKS_PER_S` calls a
second, keeps one address for each worker, and forgets what the driver has seen.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data_prep.shown import few
from resnet_dist.launch.ray_internals import NO_RESERVATION, Reservation, leaving_nodes

_LOOK_EVERY_S = 1.0
_MOST_ASKS_PER_S = 100
"""Of all workers together; a call takes 0.5 ms of CPU time on the driver's node (`resnet-dist bench control`)."""
_MOST_NAMED = 4
"""Nodes or workers in a warning: a line must not grow with the cluster."""
_MOST_WARNINGS = 16
"""So many different warnings of a worker group's ranks are shown."""


def ask_every_s(world_size: int) -> float:
    """How often each worker asks whether to stop: once a second, less often with more than a hundred workers.

    The workers ask in turns, so some worker still hears of a stop within a second. One is enough: they vote.
    """
    return max(1.0, world_size / _MOST_ASKS_PER_S)


@dataclass(frozen=True)
class WorkerStatus:
    """How far the run is, as rank 0 last reported."""

    attempt: int = 0
    """How many worker groups have started; more than one means a restart."""
    world_size: int = 0
    reservation: Reservation = NO_RESERVATION
    """The reservation of the newest worker group, since a controller that dies may leave it behind."""
    step: int = 0
    resumed_step: int | None = None
    """The step from which the newest worker group resumed, once that is known."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    lines: tuple[str, ...] = ()
    """What the workers tell the user, and the driver has not seen yet, in order."""
    evaluations: tuple[tuple[int, Mapping[str, float]], ...] = ()
    """Step and metrics of each evaluation that the driver has not seen yet, in order."""
    has_workers: bool = False
    """Whether a worker group has started since the newest Ray trainer started."""
    given_up: str | None = None
    """Why the run must end, if a worker has found that no restart would help."""
    mistake: str | None = None
    """A user's mistake found by a worker; the other workers may be waiting for that worker in a collective."""


class RunControl:
    """The actor's body, between the driver and its workers. It runs on the driver's node, so it lives and dies with the
    driver; if it is killed, it restarts empty, so both sides repeat what they tell it.
    """

    def __init__(self) -> None:
        self._stop = False
        self._status = WorkerStatus()
        self._ray_trainer = 0
        self._nodes: dict[int, tuple[str, str]] = {}
        """Rank -> address and id of its node."""
        self._asked_ray_s = 0.0
        self._warned: dict[str, set[int]] = {}
        """Warnings of the newest worker group -> the first two ranks that had it."""

    def poll(self, ray_trainer: int, *, stop: bool, evaluated_step: int = 0, seen: Sequence[str] = ()) -> WorkerStatus:
        """The driver calls it twice a second: passes whether the workers should stop, and gets the status.

        Args:
            ray_trainer: number of the driver's Ray trainer. When a new one starts, no worker of the last one is left.
            evaluated_step: the newest evaluation that the driver has seen. It and those before are forgotten.
            seen: the lines of the last status that the driver has seen. They are forgotten.
        """
        # Only what the driver confirms is forgotten: an answer may not have reached it.
        evaluations = tuple(item for item in self._status.evaluations if item[0] > evaluated_step)
        lines = self._status.lines
        if lines[: len(seen)] == tuple(seen):  # not if this actor restarted since
            lines = lines[len(seen) :]
        self._status = replace(self._status, evaluations=evaluations, lines=lines)
        if ray_trainer != self._ray_trainer:
            self._ray_trainer, self._stop = ray_trainer, False
            self._nodes.clear()
            self._status = replace(self._status, has_workers=False)
        self._stop |= stop
        return self._status

    def should_stop(self, rank: int, address: str, node_id: str) -> bool:
        """Every worker calls it every `ask_every_s`: passes where it runs, and gets whether to stop.

        Workers stop when the driver asks for it, and when a node that one of them runs on is about to leave.
        """
        self._nodes[rank] = (address, node_id)
        self._status = replace(self._status, has_workers=True)
        if not self._stop and time.monotonic() - self._asked_ray_s >= _LOOK_EVERY_S:
            self._asked_ray_s = time.monotonic()
            announced = leaving_nodes()
            leaving = sorted({address for address, node in self._nodes.values() if node in announced})
            if leaving:
                self._stop = True
                nodes = few(leaving, most=_MOST_NAMED)
                self.warn(f"node {nodes} is about to leave: the workers save and resume without it")
        return self._stop

    def workers_started(self, world_size: int, reservation: Reservation) -> None:
        """Rank 0 of a new worker group reports its start."""
        self._nodes.clear()  # of the group before, which may have run elsewhere
        self._warned.clear()
        attempt = self._status.attempt + 1
        self._status = replace(
            self._status,
            attempt=attempt,
            has_workers=True,
            world_size=world_size,
            reservation=reservation,
            resumed_step=None,
        )

    def progressed(self, step: int, metrics: Mapping[str, float]) -> None:
        status = self._status
        self._status = replace(
            status,
            step=step,
            resumed_step=step if status.resumed_step is None else status.resumed_step,
            metrics={**status.metrics, **metrics},
        )

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Rank 0 reports an evaluation. Kept until the driver has seen it, for they may come faster than it looks."""
        self.progressed(step, metrics)
        self._status = replace(self._status, evaluations=(*self._status.evaluations, (step, metrics)))

    def report_stragglers(self, slow: Mapping[int, float], *, all_have_curves: bool) -> None:
        """Rank 0 reports workers that slow the others down, and how many times as slow they are.

        Args:
            all_have_curves: whether every worker has curves of its own, and not only the first slow ones.
        """
        slowest_first = sorted(slow, key=lambda rank: -slow[rank])
        named = []
        for rank in slowest_first:
            address, _ = self._nodes.get(rank, ("unknown", ""))
            named.append(f"rank {rank} on node {address} ({slow[rank]:.1f} times as slow)")
        curves = f"worker/{slowest_first[0]}/step_s, data_wait_s and all_reduce_wait_s"
        if not all_have_curves:
            curves = "workers/slowest/* and workers/step_s/*"
        self.warn(f"slower than the other workers for a while: {few(named, most=_MOST_NAMED)}; see {curves} in MLflow")

    def warn(self, warning: str) -> None:
        self.log(f"warning: {warning}")

    def warn_of_rank(self, rank: int, warning: str) -> None:
        """A worker warns. The same warning of all ranks is two lines, so that one rank differs from several."""
        if warning not in self._warned and len(self._warned) == _MOST_WARNINGS:
            return
        ranks = self._warned.setdefault(warning, set())
        if rank in ranks or len(ranks) == 2:
            return
        self.warn(f"rank {rank}{' too, and maybe more' if ranks else ''}: {warning}")
        ranks.add(rank)

    def log(self, line: str) -> None:
        self._status = replace(self._status, lines=(*self._status.lines, line))

    def give_up(self, reason: str) -> None:
        """A worker found that no restart would help."""
        self._status = replace(self._status, given_up=self._status.given_up or reason)

    def has_begun(self) -> bool:
        """Whether a worker group has reached the training loop, so that later groups resume."""
        return self._status.attempt > 1 or self._status.resumed_step is not None

    def report_mistake(self, what: str) -> None:
        """Only before the first step. Later a node may only not be ready yet: then its group fails and another one
        starts."""
        if self.has_begun():
            return
        self._status = replace(self._status, mistake=self._status.mistake or what)


def start_control() -> Any:
    """Starts the actor on this node and returns its handle."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(RunControl).options(num_cpus=0, scheduling_strategy=here, max_restarts=-1).remote()
