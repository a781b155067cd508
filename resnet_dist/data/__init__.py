"""From a beton to batches: sample order, keyed random draws, crop geometry and decoding."""

from __future__ import annotations
