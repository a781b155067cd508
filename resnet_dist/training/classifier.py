"""The recipe's network: built, compiled, and wrapped as a classifier."""

from __future__ import annotations

import torch
from torch import nn

from resnet_dist.config.recipe import Recipe
from resnet_dist.models import build_model
from resnet_dist.models.classifier import ImageClassifier

_RECOMPILE_LIMIT = 64


def compiled(model: nn.Module) -> nn.Module:
    """`model` compiled, over the same parameters. For every size of images anew: a graph for all sizes would be another
    one in a run that was resumed at the second size than in a run that began with the first.
    """
    # Each size takes two graphs, with running statistics and without. Past its limit torch would go on uncompiled.
    torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    result: nn.Module = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    return result


def build_classifier(recipe: Recipe) -> ImageClassifier:
    """The recipe's network with its first weights, a function of `recipe.seed` alone."""
    torch.manual_seed(recipe.seed)
    return around(build_model(**recipe.model.build_options()), recipe)


def around(net: nn.Module, recipe: Recipe) -> ImageClassifier:
    """The recipe's classifier around `net`, where the net is and in its format."""
    classifier = ImageClassifier(
        net, mean=recipe.data.mean, std=recipe.data.std, channels_last=recipe.train.channels_last
    )
    parameter = next(net.parameters())
    return classifier.to(parameter.device, parameter.dtype)
