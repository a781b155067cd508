"""Measurements behind the figures in the docs. `results/` has their output and the commands."""

from __future__ import annotations
