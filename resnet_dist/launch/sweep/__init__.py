"""Sweeps on Ray: Tune's search algorithms and schedulers, and the actors in which trials train."""

from __future__ import annotations
