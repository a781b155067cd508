"""From recipe to model and optimizer: network, number formats, backends, activation checkpointing, weight decay."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resnet_dist.config.recipe import OptimConfig, Recipe, TrainConfig
from resnet_dist.errors import Fault, UserError
from resnet_dist.models import build_model, stage_of, stages_of
from resnet_dist.models.batch_norm import BatchNorm2d, BatchNormStatistics
from resnet_dist.models.classifier import ImageClassifier
from resnet_dist.models.keyed_noise import KeyedModule
from resnet_dist.models.resnet import ResidualBlock

_RECOMPILE_LIMIT = 64
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
LR_FACTOR = "lr_factor"
"""Key of an optimizer's group: what the schedule's learning rate is multiplied by. Missing: 1."""
DECAYED_MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def compile_model(model: nn.Module) -> nn.Module:
    """`model` compiled, with the same parameters."""
    # Every image size gets its own graph: one for all sizes would depend on the size at which the run was resumed. So
    # does every number of merged micro-batches. Above its limit torch would run uncompiled.
    torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    result: nn.Module = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    return result


@contextmanager
def compile_cache(folder: Path) -> Iterator[None]:
    """Within the context, what torch.compile makes is kept in `folder`, unless the environment names another."""
    key = "TORCHINDUCTOR_CACHE_DIR"
    if key in os.environ:
        yield
        return
    os.environ[key] = str(folder)
    try:
        yield
    finally:
        del os.environ[key]


def build_classifier(recipe: Recipe) -> ImageClassifier:
    """The recipe's network with its first weights, a function of `recipe.seed` alone, and frozen where the recipe says.

    Raises UserError on a net, an option of it or a stage that does not exist.
    """
    torch.manual_seed(recipe.seed)
    net = build_model(**recipe.model.build_options())
    freeze(net, recipe)
    return classifier_around(net, recipe)


def freeze(net: nn.Module, recipe: Recipe) -> None:
    """Freezes stages and batch norms as the recipe says, `optim.freeze` and `train.freeze_bn_statistics`, for good.

    Raises UserError if the net lacks a stage that the recipe names, or if nothing were left to train.
    """
    optim, stages, name = recipe.optim, stages_of(net), recipe.model.name
    for key, named in (("freeze", optim.freeze), ("lr_factors", optim.lr_factors)):
        if unknown := [stage for stage in named if stage not in stages]:
            raise UserError(
                f"optim.{key}: {name} has no stage {', '.join(unknown)}; its stages are {', '.join(stages)}"
            )
    if set(optim.freeze) == set(stages):
        raise UserError(f"optim.freeze names all stages of {name}, so nothing is trained; leave out head at least")
    for key, parameter in net.named_parameters():
        parameter.requires_grad_(stage_of(net, key) not in optim.freeze)
    for key, module in net.named_modules():
        if isinstance(module, BatchNorm2d | KeyedModule):
            of_frozen_stage = stage_of(net, key) in optim.freeze
            all_norms = recipe.train.freeze_bn_statistics and isinstance(module, BatchNorm2d)
            module.is_frozen = of_frozen_stage or all_norms
            module.train(net.training)


def classifier_around(net: nn.Module, recipe: Recipe) -> ImageClassifier:
    """The recipe's classifier around `net`, on the net's device and in its number format."""
    mean, std = recipe.data.mean, recipe.data.std
    if isinstance(mean, str) or isinstance(std, str):
        raise UserError(
            "data.mean or data.std is from_data, and here is no training data to take it from; set the numbers that "
            "`data-prep statistics train.beton` shows"
        )
    classifier = ImageClassifier(net, mean=mean, std=std, channels_last=recipe.train.channels_last)
    parameter = next(net.parameters())
    return classifier.to(parameter.device, parameter.dtype)


@dataclass(frozen=True)
class Precision:
    """What `train.precision` means for weights, forward pass and the scale of the loss."""

    name: Literal["fp32", "tf32", "bf16", "fp16", "fp64"]

    @property
    def weights(self) -> torch.dtype:
        return torch.float64 if self.name == "fp64" else torch.float32

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        """A context around the forward pass and the loss."""
        dtype = _AUTOCAST.get(self.name)
        return torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """Keeps small gradients within fp16's range. Does nothing for the other formats: bf16 has fp32's range."""
        return torch.amp.GradScaler(device.type, enabled=self.name == "fp16")


def set_backends(train: TrainConfig) -> None:
    """Fixes what PyTorch's libraries would otherwise choose and results depend on. Call it before any GPU work."""
    torch.set_num_threads(train.cpu_threads)  # sums on a CPU depend on it
    # TF32 rounds products to 10 bits, and PyTorch lets cuDNN's convolutions use it by default. Here fp32 means fp32.
    torch.backends.cudnn.allow_tf32 = train.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = train.precision == "tf32"
    exact = train.reduction == "exact"
    if exact:
        # Kernels whose sums have a fixed order. An operation that has none raises (`name_nondeterministic_operation`);
        # the nets of the registry have no such operation.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read at the first matrix product on a GPU
    torch.use_deterministic_algorithms(exact)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a pass over memory
    torch.backends.cudnn.deterministic = exact
    # `fast`: cuDNN times its convolution algorithms once for each shape: some seconds for each image size. All launches
    # of a size have the same few shapes, and a progressive size takes few values.
    torch.backends.cudnn.benchmark = not exact


@contextmanager
def name_nondeterministic_operation() -> Iterator[None]:
    """Turns torch's error about an operation without a deterministic kernel into a Fault."""
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"(\S+) does not have a deterministic implementation", str(error))
        if found is None:
            raise
        raise Fault(
            f"train.reduction: exact promises the same bits in every run, and torch has no deterministic kernel for "
            f"{found[1]} on this device; take a net or a loss without that operation, or train.reduction: fast"
        ) from error


def recompute_blocks(model: nn.Module) -> None:
    """Activation checkpointing (Chen et al. 2016): forward passes keep only the input of each residual block, backward
    passes compute its inside again. Less memory, about a third more computing, the same bits.

    Replaces the blocks' `forward`, which a deep copy would share: copy first.
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
            preserve_rng_state=False,  # masks of drop-path and dropout come from keys
            # The second pass must not move batch norm's running statistics again.
            context_fn=lambda: (nullcontext(), statistics.set_aside()),
        )
        return result

    block.forward = recomputed


def lr_factors(stages: Sequence[str], config: OptimConfig) -> dict[str, float]:
    """By stage, of a net with these stages: `layer_decay ** (n - i)` for stage i of 0 .. n, times its factor.

    >>> config = OptimConfig(name="sgd", lr=0.1, weight_decay=0, layer_decay=0.5, lr_factors={"head": 10})
    >>> lr_factors(["stem", "layer1", "head"], config)
    {'stem': 0.25, 'layer1': 0.5, 'head': 10.0}
    """
    last = len(stages) - 1
    return {
        stage: config.layer_decay ** (last - i) * config.lr_factors.get(stage, 1.0) for i, stage in enumerate(stages)
    }


def parameter_groups(net: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """What is trained, in two groups: the weights of convolutions and linear layers, with weight decay; biases and
    batch norms, without it or (`decay: all`) with it. Where stages have different learning rates, two groups for each.

    In the order of `net.modules()`, so optimizer states are interchangeable between processes.
    """
    by_stage = lr_factors(stages_of(net), config) if config.lr_factors or config.layer_decay < 1 else {}
    groups: dict[float, tuple[list[nn.Parameter], list[nn.Parameter]]] = {} if by_stage else {1.0: ([], [])}
    for module_name, module in net.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                factor = by_stage[stage_of(net, f"{module_name}.{name}")] if by_stage else 1.0
                decayed, undecayed = groups.setdefault(factor, ([], []))
                # By the type of the module, because names mislead: `downsample.1` is a norm.
                is_weight = name == "weight" and isinstance(module, DECAYED_MODULES)
                (decayed if is_weight else undecayed).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay} | ({LR_FACTOR: factor} if by_stage else {})
        for factor, pair in groups.items()
        for parameters, weight_decay in zip(
            pair, (config.weight_decay, config.weight_decay if config.decay == "all" else 0.0), strict=True
        )
    ]


def build_optimizer(net: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD as torch defines it: v = momentum * v + g, w = w - lr * v, with weight decay added to g (coupled L2); or
    timm's LAMB. Gradients are clipped before either (`step.py`), so LAMB's own clipping is off.

    The learning rate is `config.lr` until the first step writes its own (`schedule.lr_at`) into the groups, times the
    factor of the group.
    """
    groups = parameter_groups(net, config)
    if config.name == "lamb":
        from timm.optim.lamb import Lamb  # here, because timm takes seconds to import

        return Lamb(groups, lr=config.lr, max_grad_norm=None)
    return Sgd(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)


class Sgd(torch.optim.SGD):
    """On CUDA in one fused kernel; gradients must have their parameters' strides. It also skips a step whose gradient
    overflowed, so with fp16 nothing waits for the device. On a CPU as torch does by default."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        self._on_gpu = any(parameter.is_cuda for group in groups for parameter in group["params"])
        super().__init__(groups, fused=self._on_gpu or None, **options)
        self._start_momentum()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["fused"] = self._on_gpu or None  # a checkpoint has that of the device that wrote it
        self._start_momentum()

    def _start_momentum(self) -> None:
        # torch leaves the memory of a fused first step uninitialised. If that step is skipped, so it stays; with zeros
        # the first step gives 0 * momentum + gradient, as it should.
        for group in self.param_groups if self._on_gpu else ():
            for parameter in group["params"] if group["momentum"] else ():
                # In the parameter's memory order, as the kernel needs it: checkpoints of earlier versions have others.
                own, given = torch.zeros_like(parameter), self.state[parameter].get("momentum_buffer")
                self.state[parameter]["momentum_buffer"] = own if given is None else own.copy_(given)
