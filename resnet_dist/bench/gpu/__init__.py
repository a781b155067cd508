"""`resnet-dist bench gpu`: proves on one GPU that what was written for GPUs is right there, and says how fast it is."""

from __future__ import annotations
