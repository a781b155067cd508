"""A look at a source before anything is written: what is in it, and what is odd about it."""

from __future__ import annotations
