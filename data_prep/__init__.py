"""Image data sets -> `.beton` files with manifests. Start with README.md; imports nothing of `resnet_dist`."""

from __future__ import annotations
