"""Training: one worker's side of a run. Read `loop.py` first. Knows a `RunContext`, not Ray."""

from __future__ import annotations
