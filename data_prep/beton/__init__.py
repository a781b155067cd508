"""The `.beton` file and its manifest: layout, packing, writing, reading, checking. No torch, ray, ffcv."""

from __future__ import annotations
