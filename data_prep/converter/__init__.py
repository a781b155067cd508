"""Source -> beton: plan (fixed work units), encode (one unit, one part file), assemble (parts into pages)."""

from __future__ import annotations
