"""The nets of He et al. 2015 by name, the image classifier around one, and the switch of its batch-norm statistics."""

from __future__ import annotations

from resnet_dist.models.classifier import BatchNormStatistics, ImageClassifier
from resnet_dist.models.registry import MODEL_NAMES, Summary, build_model, summarise

__all__ = ["MODEL_NAMES", "BatchNormStatistics", "ImageClassifier", "Summary", "build_model", "summarise"]
