"""Distributed training of ResNets whose results depend on the recipe alone.

    load_recipe(path, overrides)      what to compute            Recipe
    load_profile(path, overrides)     on what hardware           Profile
    train(recipe, profile, name)      train, or resume           RunResult
    load_model(source)                a trained model            TrainedModel
    evaluate(model, data, protocol)   test it                    Evaluated

These are the functions behind the `resnet-dist` command; docs/python.md uses all of them. Errors: `UserError` (a
mistake the caller can fix) and `Fault` (something broke), both with one readable line. Everything else is private.

>>> import resnet_dist
>>> recipe = resnet_dist.load_recipe("resnet_dist/recipes/digits_resnet20.yaml", ["optim.lr=0.05"])
>>> recipe.model.name, recipe.optim.lr
('resnet20', 0.05)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resnet_dist.config.loading import load_profile, load_recipe
    from resnet_dist.config.profile import Profile
    from resnet_dist.config.recipe import Recipe
    from resnet_dist.errors import Fault, UserError
    from resnet_dist.evaluation.evaluate import Evaluated, evaluate
    from resnet_dist.evaluation.protocols import Protocol
    from resnet_dist.launch.publish import RunResult
    from resnet_dist.launch.train import train
    from resnet_dist.weights.source import TrainedModel, load_model

__all__ = [
    "Evaluated",
    "Fault",
    "Profile",
    "Protocol",
    "Recipe",
    "RunResult",
    "TrainedModel",
    "UserError",
    "evaluate",
    "load_model",
    "load_profile",
    "load_recipe",
    "train",
]
_MODULES = {
    "config.loading": ("load_profile", "load_recipe"),
    "config.profile": ("Profile",),
    "config.recipe": ("Recipe",),
    "errors": ("Fault", "UserError"),
    "evaluation.evaluate": ("Evaluated", "evaluate"),
    "evaluation.protocols": ("Protocol",),
    "launch.publish": ("RunResult",),
    "launch.train": ("train",),
    "weights.source": ("TrainedModel", "load_model"),
}


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used: `import resnet_dist` loads neither torch nor Ray."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"resnet_dist.{module}"), name)
    raise AttributeError(f"module 'resnet_dist' has no attribute {name!r}")
