"""The nets of He et al. 2015 by name, and the image classifier around one. README.md lists them with their sizes."""

from __future__ import annotations

from resnet_dist.models.batch_norm import BatchNormStatistics
from resnet_dist.models.classifier import ImageClassifier
from resnet_dist.models.registry import MODEL_NAMES, build_model
from resnet_dist.models.stages import stage_of, stages_of
from resnet_dist.models.summary import Summary, summarise

__all__ = [
    "MODEL_NAMES",
    "BatchNormStatistics",
    "ImageClassifier",
    "Summary",
    "build_model",
    "stage_of",
    "stages_of",
    "summarise",
]
