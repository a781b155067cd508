"""Trained weights: where they come from (`source.py`), and where they go (`export.py`)."""

from __future__ import annotations
