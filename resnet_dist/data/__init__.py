"""From a beton to batches: sample order, keyed random draws, crop geometry, decoding, and the one adapter on ffcv."""

from __future__ import annotations
