"""The work in a recipe: per image, per launch, per step and in total."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from resnet_dist.config.low_rank import numbers_sent
from resnet_dist.config.profile import Profile
from resnet_dist.config.recipe import Recipe, steps_per_epoch, train_size
from resnet_dist.errors import UserError
from resnet_dist.models.summary import Summary, summarise

DATASETS = {"imagenet": (1_281_167, 50_000), "cifar10": (50_000, 10_000), "digits": (1_442, 355)}
"""Training and validation images."""
SLOTS_PER_OPTIMIZER = {"sgd": 1, "lamb": 2}


@dataclass(frozen=True)
class Phase:
    """The part of a run with training images of one size."""

    image_px: int
    share: float
    """Share of the run's steps."""
    net: Summary


@dataclass(frozen=True)
class Workload:
    net: Summary
    """At the images' largest size."""
    phases: tuple[Phase, ...]
    """By image size; more than one with `data.progressive_size`. Shares add up to 1."""
    precision: str
    micro_batch_size: int
    micro_batches_per_step: int
    steps: int
    train_images: int
    val_images: int
    evaluations: int
    state_bytes: int
    """Weights, their moving average and the optimizer's moments in fp32: one checkpoint."""
    gradient_bytes: int
    """Bytes of one gradient value on the network: fp32 in every precision, unless `train.gradient_compression` halves
    it."""
    messages_bytes: tuple[int, ...] | None
    """Messages in which a step's gradients are sent after the backward pass; None: in buckets, during it."""
    decoder: str
    optimizer: str
    reduction: Literal["fast", "exact", "powersgd"]
    compiled: bool
    """`train.compile`."""
    cuda_graphs: bool
    """The profile's."""
    micro_batches_per_launch: int | None
    """The profile's; None: auto."""
    recomputes: bool
    """The profile's `recompute_activations`."""

    @property
    def half(self) -> bool:
        """True if it runs on tensor cores in half precision. tf32 is counted as fp32, which is slower."""
        return self.precision in {"bf16", "fp16"}

    @property
    def uses_graphs(self) -> bool:
        """Whether launches are CUDA graphs."""
        return self.cuda_graphs and self.reduction == "fast"

    @property
    def most_merged(self) -> int | None:
        """Micro-batches in a launch, at most; None: as many as is fastest."""
        return 1 if self.reduction == "exact" else self.micro_batches_per_launch

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.micro_batches_per_step


def workload_of(recipe: Recipe, profile: Profile | None = None, *, images: tuple[int, int] | None = None) -> Workload:
    """Raises UserError.

    Args:
        profile: says how micro-batches are launched; None: the default of each key.
        images: training and validation images; by default those of the known data sets.
    """
    found = images or DATASETS.get(recipe.data.dataset)
    if found is None:
        raise UserError(
            f"data.dataset {recipe.data.dataset}: its size is not known; give --images N (known: {', '.join(DATASETS)})"
        )
    train_images, val_images = found
    train = recipe.train
    per_epoch = steps_per_epoch(train_images, train.global_batch_size)
    steps = per_epoch * train.total_epochs
    steps = min(steps, train.max_steps or steps)
    phases = _phases(recipe, steps, per_epoch)
    net = phases[-1].net
    most = profile.micro_batches_per_launch if profile else "auto"
    return Workload(
        net=net,
        phases=phases,
        precision=train.precision,
        micro_batch_size=train.micro_batch_size,
        micro_batches_per_step=train.num_micro_batches,
        steps=steps,
        train_images=train_images,
        val_images=val_images,
        evaluations=-(-train.total_epochs // recipe.eval.every_epochs),
        state_bytes=4 * net.parameters * (1 + SLOTS_PER_OPTIMIZER.get(recipe.optim.name, 2) + (train.ema is not None)),
        gradient_bytes=2 if train.gradient_compression in {"bf16", "fp16"} else 4,
        messages_bytes=_messages(recipe, net),
        decoder=recipe.data.decoder,
        optimizer=recipe.optim.name,
        reduction="powersgd" if train.gradient_compression == "powersgd" else train.reduction,
        compiled=train.compile,
        cuda_graphs=profile is None or profile.cuda_graphs,
        micro_batches_per_launch=None if most == "auto" else most,
        recomputes=profile is not None and profile.recompute_activations,
    )


def _phases(recipe: Recipe, steps: int, per_epoch: int) -> tuple[Phase, ...]:
    sizes: Counter[int] = Counter()
    for first in range(0, steps, per_epoch):
        size = train_size(recipe.data, first // per_epoch, recipe.train.total_epochs)
        sizes[size] += min(per_epoch, steps - first)
    options = recipe.model.build_options()
    name = options.pop("name")
    return tuple(Phase(px, sizes[px] / steps, summarise(name, side=px, **options)) for px in sorted(sizes))


def _messages(recipe: Recipe, net: Summary) -> tuple[int, ...] | None:
    if recipe.train.gradient_compression == "powersgd":
        return tuple(4 * numbers for numbers in numbers_sent(tuple(s for part in net.parts for s in part.shapes)))
    return (4 * net.parameters,) if recipe.train.reduction == "exact" else None
