"""Everything that knows Ray Train: connecting to a cluster, checking it, driving a run on it."""

from __future__ import annotations
