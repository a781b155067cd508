"""Measurements behind the figures in the docs. `results/` keeps what came out, with the command."""

from __future__ import annotations
