"""From events to requests: what fits into one call, in order, without what the server has already. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from resnet_dist.tracking.events import Event, Metrics, Tags, Text, unseen

# MLflow takes 1000 entities of a run per call, at most 100 of them tags.
MAX_POINTS = 900
MAX_TAGS = 100


@dataclass(frozen=True)
class Point:
    key: str
    value: float
    time_ms: int
    step: int


@dataclass(frozen=True)
class Batch:
    """One call: points and tags together, or one text."""

    points: tuple[Point, ...] = ()
    tags: tuple[tuple[str, str], ...] = ()
    text: Text | None = None

    def __bool__(self) -> bool:
        return bool(self.points or self.tags or self.text)


def next_points(events: Sequence[Event], server_steps: Mapping[str, int]) -> tuple[Batch, int]:
    """The points and tags that start `events`, and how many events that covers (at least one, if there are any).

    Texts are passed over; points that `server_steps` knows already (`unseen`) are left out. A single event that is
    larger than a call makes a batch larger than a call: `halves` cuts it.
    """
    points: list[Point] = []
    tags: dict[str, str] = {}
    num_events = 0
    for event in events:
        num_points = len(points) + (len(event.values) if isinstance(event, Metrics) else 0)
        num_tags = len(tags) + (len(event.values) if isinstance(event, Tags) else 0)
        if num_events and (num_points > MAX_POINTS or num_tags > MAX_TAGS):
            break
        if isinstance(event, Metrics):
            values = unseen(event.values, event.step, server_steps)
            points += [Point(key, value, event.time_ms, event.step) for key, value in values.items()]
        elif isinstance(event, Tags):
            tags |= event.values
        num_events += 1
    return Batch(tuple(points), tuple(tags.items())), num_events


def next_text(events: Sequence[Event]) -> tuple[Batch, int]:
    """The first text of `events`, and how many events that covers; points and tags are passed over."""
    for num_before, event in enumerate(events):
        if isinstance(event, Text):
            return Batch(text=event), num_before + 1
    return Batch(), len(events)


def too_large(batch: Batch) -> bool:
    return len(batch.points) > MAX_POINTS or len(batch.tags) > MAX_TAGS


def halves(batch: Batch) -> tuple[Batch, Batch] | None:
    """The batch in two parts, in order; None if it holds a single thing."""
    if batch.points and batch.tags:
        return Batch(points=batch.points), Batch(tags=batch.tags)
    if len(batch.points) > 1:
        middle = len(batch.points) // 2
        return Batch(points=batch.points[:middle]), Batch(points=batch.points[middle:])
    if len(batch.tags) > 1:
        middle = len(batch.tags) // 2
        return Batch(tags=batch.tags[:middle]), Batch(tags=batch.tags[middle:])
    return None
