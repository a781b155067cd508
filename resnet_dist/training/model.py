"""The recipe's network: built, compiled, and wrapped as a classifier."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resnet_dist.config.recipe import OptimConfig, Recipe, TrainConfig
from resnet_dist.models import build_model
from resnet_dist.models.classifier import BatchNormStatistics, ImageClassifier
from resnet_dist.models.resnet import ResidualBlock

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


# Number formats: what `train.precision` means for weights, for the forward pass and for the scale of the loss.


_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    name: Literal["fp32", "tf32", "bf16", "fp16", "fp64"]

    @property
    def weights(self) -> torch.dtype:
        return torch.float64 if self.name == "fp64" else torch.float32

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        """Around the forward pass and the loss."""
        dtype = _AUTOCAST.get(self.name)
        return torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """Keeps small gradients within fp16's range. Does nothing for the others: bf16's range is fp32's."""
        return torch.amp.GradScaler(device.type, enabled=self.name == "fp16")


# What the libraries below PyTorch may choose on their own, taken from them: their choices would change results.


def set_backends(train: TrainConfig) -> None:
    """Sets this process up for a recipe; call it before anything runs on a GPU.

    - Sums on a CPU depend on the number of threads: the recipe's `cpu_threads`.
    - TF32 rounds products to 10 bits; PyTorch lets cuDNN's convolutions use it by default: only `precision: tf32`
      asks for it, fp32 means fp32.
    - `exact`: kernels whose sums have a fixed order, and no timing of kernels to choose one by. PyTorch has none for a
      few operations on CUDA (the backward pass of max pooling): it warns and names them. Not run on a GPU.
    """
    torch.set_num_threads(train.cpu_threads)
    torch.backends.cudnn.allow_tf32 = train.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = train.precision == "tf32"
    exact = train.reduction == "exact"
    if exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when its handle is made
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = exact
    torch.use_deterministic_algorithms(exact, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a pass over memory


# Activation checkpointing (Chen et al. 2016): less memory, about a third more computing, the same numbers.


def recompute_blocks(model: nn.Module) -> None:
    """From now on the backward pass computes what is inside a residual block anew; forward passes keep its input only.

    Changes no bit: masks are keyed, and the second pass leaves batch norm's running statistics alone. Writes to the
    blocks' `forward`, which a deep copy would share: copy first.
    """
    for block in model.modules():
        if isinstance(block, ResidualBlock):
            _recompute(block)


def _recompute(block: ResidualBlock) -> None:
    forward, statistics = block.forward, BatchNormStatistics(block)

    def recomputed(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(x)
        result: Tensor = checkpoint(
            forward,
            x,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), statistics.set_aside()),
        )
        return result

    block.forward = recomputed


# The optimizer, and which parameters it decays.


DECAYED_MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def parameter_groups(
    model: nn.Module, weight_decay: float, decay: Literal["weights", "all"] = "weights"
) -> list[dict[str, Any]]:
    """Two groups: the weights of convolutions and linear layers, decayed; biases and batch norms, not or (`all`) too.

    Chosen by the type of the module, because names mislead (`downsample.1` is a norm). Parameters stand in the order of
    `model.modules()`, so optimizer states are interchangeable between processes.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_weight = name == "weight" and isinstance(module, DECAYED_MODULES)
            (decayed if is_weight else undecayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": undecayed, "weight_decay": weight_decay if decay == "all" else 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD as torch defines it: v = momentum * v + g, w = w - lr * v, with weight decay added to g (coupled L2); or
    timm's LAMB. Gradients are clipped before either (`update.py`), so LAMB's own clipping is off.

    The learning rate is `config.lr` until `Update` writes `lr_at(step)` into the groups.
    """
    groups = parameter_groups(model, config.weight_decay, config.decay)
    if config.name == "lamb":
        from timm.optim.lamb import Lamb  # here, because timm takes seconds to import

        return Lamb(groups, lr=config.lr, max_grad_norm=None)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
