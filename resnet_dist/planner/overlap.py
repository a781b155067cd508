"""DDP's buckets on a time line: which part of the all-reduce the backward pass does not hide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resnet_dist.planner.constants import BUCKET_BYTES, CONTENTION, FIRST_BUCKET_BYTES
from resnet_dist.planner.network import Links, all_reduce


@dataclass(frozen=True)
class Produced:
    """A part of the net in the order of the backward pass."""

    seconds: float
    num_bytes: float


@dataclass(frozen=True)
class Exchange:
    total_s: float
    """All-reduce of all gradients."""
    exposed_s: float
    """What of it comes on top of the backward pass, contention included."""


def exchange(parts: Sequence[Produced], workers: int, links: Links, *, overlapped: bool = True) -> Exchange:
    """The gradients of one backward pass; not `overlapped`: one sum after it, of all of them."""
    if workers == 1:
        return Exchange(0.0, 0.0)
    if not overlapped:
        seconds = all_reduce(sum(p.num_bytes for p in parts), workers, links).seconds
        return Exchange(seconds, seconds)
    backward_s = sum(p.seconds for p in parts)
    free_at = total = between_nodes = 0.0
    for ready_at, num_bytes in buckets(parts):
        cost = all_reduce(num_bytes, workers, links)
        free_at = max(free_at, ready_at) + cost.seconds
        total += cost.seconds
        between_nodes += cost.net_s
    tail = max(0.0, free_at - backward_s)
    hidden_between_nodes = max(0.0, between_nodes - tail)
    return Exchange(total, tail + CONTENTION * hidden_between_nodes)


def buckets(parts: Sequence[Produced]) -> list[tuple[float, float]]:
    """(seconds from the start of the backward pass to the bucket's last gradient, its bytes)."""
    found: list[tuple[float, float]] = []
    filled, clock = 0.0, 0.0
    for part in parts:
        left = part.num_bytes
        while left > 0:
            room = (BUCKET_BYTES if found else FIRST_BUCKET_BYTES) - filled
            taken = min(room, left)
            filled += taken
            left -= taken
            clock += part.seconds * taken / part.num_bytes
            if taken == room:
                found.append((clock, filled))
                filled = 0.0
        if part.num_bytes == 0:
            clock += part.seconds
    if filled:
        found.append((clock, filled))
    return found
