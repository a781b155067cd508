"""What a training worker knows of tracking: five methods, none of which waits for a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

CONFUSION = "evaluation/confusion.json"
"""The text that holds the last evaluation's confusion matrix: {"num_classes": C, "counts": [[true class, answer,
samples], ...]}, only where there are samples."""


class Tracker(Protocol):
    """Rank 0 holds a `SpoolTracker`, every other rank a `NullTracker`."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Points of curves; `step` counts optimizer steps. A (key, step) that was logged before is left out."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Tags of the run; a later value replaces an earlier one."""

    def text(self, artifact_path: str, content: str) -> None:
        """A small text artifact, for example `recipe.yaml`; a later one replaces an earlier one of the same path."""

    def flush(self, timeout_s: float) -> bool:
        """Waits until everything has arrived at the server, at most `timeout_s`. True when it has."""

    def close(self) -> None:
        """Ends the tracker. What has not arrived by then stays in storage for `resnet-dist tracking sync`."""


class NullTracker:
    """Keeps nothing: the tracker of every rank but 0."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        pass

    def tags(self, values: Mapping[str, str]) -> None:
        pass

    def text(self, artifact_path: str, content: str) -> None:
        pass

    def flush(self, timeout_s: float) -> bool:
        return True

    def close(self) -> None:
        pass
