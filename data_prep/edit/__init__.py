"""Betons from betons, without re-encoding: merge, subset. The stored bytes are copied as they are."""

from __future__ import annotations
