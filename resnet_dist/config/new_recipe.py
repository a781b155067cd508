"""What `resnet-dist new` writes: a commented recipe that fits a data set. Pure functions, from facts to YAML text.

Every number has its rule and reason in a comment of the recipe, because whoever reads it will change some.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from data_prep.shown import count_of, few, shown
from resnet_dist.config.recipe import Channels
from resnet_dist.errors import UserError

IMAGENET_MEAN: Channels = (123.675, 116.28, 103.53)
IMAGENET_STD: Channels = (58.395, 57.12, 57.375)
SMALL_PICTURE = 64
"""px. Up to here a CIFAR net, which shrinks pictures 4 times; above it an ImageNet net, which shrinks them 32 times."""
SMALL_SET, LARGE_SET = 20_000, 100_000
"""Images. Below the first a shallow net; from the second on the published ImageNet recipes apply."""
LOPSIDED = 3
"""From this lopsidedness on, rare classes are made up for."""
MOST_LEFT_OUT = 0.05
"""Largest share of the images that may be left out of an epoch."""


@dataclass(frozen=True)
class DataFacts:
    """What a recipe depends on, of a pair of betons."""

    dataset: str
    class_names: Sequence[str]
    class_counts: Sequence[int]
    """Training images of each class."""
    short_side: int
    """Median of the training images' shorter sides, px."""
    smallest_side: int
    largest_side: int
    """px, over the images of both betons."""
    has_statistics: bool = True
    """Whether the manifest has the mean and deviation of the training images."""

    @property
    def num_images(self) -> int:
        return sum(self.class_counts)

    @property
    def lopsidedness(self) -> float:
        """How many times the images of the smallest class the largest has; empty classes do not count."""
        return max(self.class_counts) / min(count for count in self.class_counts if count)


@dataclass(frozen=True)
class StartFacts:
    """The weights to begin from."""

    source: str
    """As `model.init.weights` takes it."""
    net: str | None = None
    """None: the weights do not say."""
    net_options: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the recipe's `model` section."""
    same_classes: bool = False
    """Whether its classes are the data's, so that the classifier can be kept."""
    mean: Channels | None = None
    std: Channels | None = None
    """None: the weights do not say; ImageNet's are taken, as for most published weights."""
    size: int | None = None
    resize: int | None = None
    """The crop that they are evaluated with, px; None: not known."""
    interpolation: str | None = None
    """That of `resize`; None: not known."""


def suggest_net(data: DataFacts) -> str:
    """The net for pictures of this size and number."""
    shallow = data.num_images < SMALL_SET
    if data.short_side <= SMALL_PICTURE:
        return "resnet20" if shallow else "resnet56"
    return "resnet18" if shallow else "resnet50"


def new_recipe(
    data: DataFacts, net: str, start: StartFacts | None, *, for_cifar: bool, command: str
) -> tuple[str, list[str]]:
    """The text of a recipe, and warnings. UserError for fewer than two training images.

    Args:
        net: the net's name.
        for_cifar: whether it is one of the CIFAR nets.
        command: trains the recipe; shown at its top.
    """
    tuning = start is not None
    full_batch, largest_micro_batch = (128, 64) if for_cifar else (256, 32)
    batch, micro_batch = choose_batch(data.num_images, full_batch, largest_micro_batch)
    num_micro_batches = batch // micro_batch
    steps, left_out = divmod(data.num_images, batch)
    epochs, why_epochs = _choose_epochs(steps, fine_tuning=tuning)
    crops = _choose_crops(data, start, for_cifar=for_cifar)
    sampling, class_weights = _choose_weights(data, batch)
    how = "from nothing" if start is None else f"from {shown(start.source)}"
    classes = count_of(len(data.class_counts), "class", "classes")
    sections = [
        [
            *_comment(
                f"{shown(net)} on {data.num_images:,} pictures of {classes}, {how}. By resnet-dist new; edit it."
            ),
            "#",
            f"#   {command}",
            "#",
            *_comment(f"Data       {_classes(data)}", hanging=11),
            f"# Hardware   1 to {num_micro_batches} workers ({num_micro_batches} micro-batches a step), CPUs or GPUs",
            f"# Length     {count_of(epochs, 'epoch')} of {count_of(steps, 'step')}",
        ],
        ["seed: 0"],
        ["model:", f"  name: {_yaml(net)}", f"  num_classes: {len(data.class_counts)}", *_weights(start)],
        [
            "data:",
            f"  dataset: {_yaml(data.dataset)}",
            *_comment(crops.why, indent=2),
            "  # flip mirrors half of them; false where left and right matter, as in digits and letters.",
            f"  train: {crops.train}",
            f"  eval: {crops.test}",
            *_normalisation(data, start),
            *sampling,
        ],
        [
            "train:",
            *_comment(_why_batch(data.num_images, batch, full_batch, steps, left_out), indent=2),
            f"  global_batch_size: {batch}",
            "  # Batch norm sees this many images, and every worker needs one micro-batch of a step.",
            f"  micro_batch_size: {micro_batch}",
            *_batch_norm(micro_batch, fine_tuning=tuning),
            *_comment(why_epochs, indent=2),
            f"  total_epochs: {epochs}",
            _precision(data),
            *class_weights,
        ],
        _optimizer(data, batch, full_batch, fine_tuning=tuning, new_head=start is not None and not start.same_classes),
        [
            "# The rate rises during the warm-up, because the first steps are the wildest, and then falls to 0.",
            f"schedule: {{kind: cosine, warmup: {{epochs: {epochs // 20}}}}}",
        ],
        _evaluation(data, epochs),
    ]
    warnings = [*crops.warnings, *_net_warnings(data, net, start, for_cifar=for_cifar)]
    if left_out > MOST_LEFT_OUT * data.num_images:
        warnings.append(
            f"{left_out} of the {data.num_images} training images are left out of each epoch, different ones each "
            "time, because no fitting batch size divides their number; one picture more or less would help"
        )
    if start is not None and start.mean is None:
        warnings.append(
            f"{start.source} does not say which mean and std it was trained with; ImageNet's are in the recipe, as for "
            "most published weights: change data.mean and data.std if you know better"
        )
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n", warnings


# ---- decisions -------------------------------------------------------------------------------------------------------


def choose_batch(num_images: int, full_batch: int, largest_micro_batch: int) -> tuple[int, int]:
    """(global batch, micro-batch). UserError for fewer than two images.

    Wanted: `full_batch`, or a smaller power of two (16 or more) if an epoch would have fewer than 20 steps. Chosen: the
    size nearest to that which leaves at most `MOST_LEFT_OUT` of the images out of an epoch, or else the fewest; of two
    micro-batches or more, so that two workers can share a step.

    >>> choose_batch(1_281_167, 256, 32), choose_batch(400, 128, 64), choose_batch(31, 128, 64)
    ((256, 32), (16, 8), (15, 5))
    """
    if num_images < 2:
        raise UserError(f"the training set has {num_images} image; a recipe needs two or more")
    wanted = min(full_batch, max(16, 1 << (num_images // 20).bit_length() - 1)) if num_images >= 20 else 16
    candidates = [
        (count * micro, micro)
        for micro in range(min(3, num_images // 2), largest_micro_batch + 1)
        for count in range(2, 9)
        if count * micro <= min(num_images, full_batch)
    ]

    def unfitness(candidate: tuple[int, int]) -> tuple[float, float, int]:
        batch, micro = candidate
        left_out = num_images % batch / num_images
        return (left_out if left_out > MOST_LEFT_OUT else 0.0, abs(math.log(batch / wanted)), -micro)

    return min(candidates, key=unfitness)


def _why_batch(num_images: int, batch: int, full_batch: int, steps: int, left_out: int) -> str:
    why = (
        "The size that published trainings use."
        if batch == full_batch
        else f"Smaller than the usual {full_batch}, so that an epoch has more steps: a small set needs steps."
    )
    rest = f"; {left_out} left out, different ones each time" if left_out else ""
    return f"{why} {num_images:,} images: {count_of(steps, 'step')} an epoch{rest}."


def _choose_epochs(steps: int, *, fine_tuning: bool) -> tuple[int, str]:
    if fine_tuning:
        wanted, least, most = 1_000, 10, 60
        why = "Trained weights need few steps, and more make a small set overfit"
    else:
        wanted, least, most = 20_000, 90, 200
        why = "A net from nothing needs many steps, and 90 epochs is ImageNet's usual length"
    epochs = min(most, max(least, -(-wanted // steps)))
    return epochs, f"{why}: {wanted:,} steps, but {least} to {most} epochs."


def _optimizer(data: DataFacts, batch: int, full_batch: int, *, fine_tuning: bool, new_head: bool) -> list[str]:
    peak, decay = (0.03, 1e-4) if fine_tuning else (0.1, 5e-4)
    factors = ", lr_factors: {head: 10}" if new_head else ""
    why_peak, why_decay = "the usual rate from nothing", "five times ImageNet's, because a smaller set overfits sooner"
    if fine_tuning:
        why_peak, why_decay = "a third of that from nothing", "as ImageNet's weights were trained"
    elif data.num_images >= LARGE_SET:
        decay, why_decay = 1e-4, "ImageNet's usual"
    why = (
        f"lr: {peak:g} for {full_batch} images, {why_peak}, and in proportion for other batches (Goyal et al. 2017). "
        f"weight_decay: {why_decay}."
    )
    if new_head:
        why += " The new classifier learns faster than the layers below."
    if fine_tuning:
        why += " Layers that stay as they are (freeze: [stem, layer1]) save time and cannot overfit."
    settings = f"lr: {peak * batch / full_batch:.3g}, momentum: 0.9, weight_decay: {decay:g}{factors}"
    return [*_comment(why), f"optim: {{name: sgd, {settings}}}"]


def _precision(data: DataFacts) -> str:
    if data.num_images >= LARGE_SET:
        return "  precision: bf16          # twice the speed on GPUs since the A100; fp32 for CPUs and older ones"
    return "  precision: fp32          # bf16 is twice as fast on GPUs since the A100"


def _batch_norm(micro_batch: int, *, fine_tuning: bool) -> list[str]:
    if not fine_tuning or micro_batch >= 16:
        return []
    why = (
        f"Batch norm keeps the means and variances that came with the weights: those of {micro_batch} images are noise."
    )
    return [*_comment(why, indent=2), "  freeze_bn_statistics: true"]


def _weights(start: StartFacts | None) -> list[str]:
    if start is None:
        return []
    head, why = "new", "The weights are of other classes: the classifier starts at random, all layers below from them."
    if start.same_classes:
        head, why = "keep", "All layers start from them, the classifier too, because the classes are the same."
    return [
        *(f"  {key}: {_yaml(value)}" for key, value in start.net_options.items()),
        f"  # {why}",
        f"  init: {{weights: {_yaml(start.source)}, head: {head}}}",
    ]


def _normalisation(data: DataFacts, start: StartFacts | None) -> list[str]:
    if start is None and data.has_statistics:
        return ["  mean: from_data         # those of the training images, from their manifest", "  std: from_data"]
    if start is not None and start.mean is not None and start.std is not None:
        return [
            f"  mean: {list(start.mean)}    # as the weights were trained, whatever the data",
            f"  std: {list(start.std)}",
        ]
    return [f"  mean: {list(IMAGENET_MEAN)}    # ImageNet's", f"  std: {list(IMAGENET_STD)}"]


def _choose_weights(data: DataFacts, batch: int) -> tuple[list[str], list[str]]:
    """What makes up for rare classes: lines of the sections data and train."""
    if data.lopsidedness < LOPSIDED:
        return [], []
    ratio = f"The largest class has {data.lopsidedness:,.0f} times the images of the smallest"
    if batch * max(data.class_counts) >= data.num_images * data.lopsidedness:  # one image of the smallest, on average
        why = f"{ratio}, but a batch has some of each, so weights in the loss can make up for it."
        return [], [*_comment(why, indent=2), "  loss: {kind: cross_entropy, class_weights: balanced}"]
    why = (
        f"{ratio}, of which most batches have none, so rare classes are shown more often. power: 0 would show all "
        "classes equally often, 1 each as often as it is; between them, rare images are not repeated too much."
    )
    return [*_comment(why, indent=2), "  sampling: {kind: balanced, power: 0.5}"], []


def _evaluation(data: DataFacts, epochs: int) -> list[str]:
    why = "batch_size: images per forward pass, a matter of speed. Evaluations take time; 50 make a smooth curve."
    best_by = ""
    if data.lopsidedness >= LOPSIDED:
        why += " best_by: the accuracy of each class counts the same; in val/top1 rare classes hardly count."
        best_by = ", best_by: balanced_top1"
    return [*_comment(why), f"eval: {{batch_size: 64, every_epochs: {max(1, epochs // 50)}{best_by}}}"]


@dataclass(frozen=True)
class _Crops:
    train: str
    test: str
    why: str
    warnings: tuple[str, ...] = ()


def _choose_crops(data: DataFacts, start: StartFacts | None, *, for_cifar: bool) -> _Crops:
    """Never larger than the median picture, except for pictures of a few px."""
    side = data.short_side
    if data.smallest_side == data.largest_side <= 96:
        return _Crops(
            train=f"{{kind: pad_crop, size: {side}, pad: {max(1, side // 8)}, flip: true}}",
            test=f"{{kind: center_crop, size: {side}, resize: {side}}}",
            why=f"All pictures have {side} x {side} px: shifted by an eighth of that in training, never resized.",
        )
    # Sizes are usually multiples of 16; for pictures of a few px that would cut most of each away.
    multiple = 4 if for_cifar or side < 112 else 16
    usual_size, usual_resize = (64, 64) if for_cifar else (224, 256)
    resampling = ""
    if start is not None and start.size and start.resize:
        usual_size, usual_resize = start.size, start.resize
        resampling = f", interpolation: {start.interpolation}" if start.interpolation else ""
    resize = max(multiple, min(side, usual_resize))
    share = usual_size / usual_resize
    size = usual_size if resize == usual_resize else max(multiple, int(resize * share) // multiple * multiple)
    area = 0.08 if data.num_images >= LARGE_SET else 0.35
    why = (
        f"The shorter sides of the pictures have {side} px in the median. The net sees {size} px: in evaluation the "
        f"centre of a picture resized to {resize} px, in training a random part of its area, {100 * area:.0f} % or more"
        f" ({'as on ImageNet' if area < 0.1 else '8 % on ImageNet, which small sets do not need'})."
    )
    if data.smallest_side < resize:
        why += f" Pictures below {resize} px, down to {data.smallest_side}, are enlarged."
    return _Crops(
        train=f"{{kind: random_resized_crop, size: {size}, scale: [{area}, 1.0], flip: true{resampling}}}",
        test=f"{{kind: center_crop, size: {size}, resize: {resize}{resampling}}}",
        why=why,
        warnings=(f"half of the pictures have {side} px or less and are enlarged to {resize}",)
        if side < resize
        else (),
    )


def _net_warnings(data: DataFacts, net: str, start: StartFacts | None, *, for_cifar: bool) -> list[str]:
    side, other = data.short_side, suggest_net(data)
    if for_cifar and side > 2 * SMALL_PICTURE:
        return [f"{net} is for small pictures, and these have {side} px; --net {other} sees more of them"]
    enlarge = (
        "enlarge them on purpose: random_resized_crop of size 112 in data.train, size 112 of resize 128 in data.eval"
    )
    if start is not None and start.size and side < start.size / 2:
        return [f"the weights are for {start.size} px, and these pictures have {side} px: you may have to {enlarge}"]
    if not for_cifar and side <= SMALL_PICTURE:
        return [
            f"{net} shrinks pictures 32 times, and these have {side} px: take a net for small ones, such as --net "
            f"{other}, or {enlarge}"
        ]
    return []


# ---- text ------------------------------------------------------------------------------------------------------------


def _classes(data: DataFacts) -> str:
    named = [f"{shown(name, 40)} {count:,}" for name, count in zip(data.class_names, data.class_counts, strict=True)]
    return f"{data.dataset}: {few(named, most=10)}"


def _comment(text: str, *, indent: int = 0, hanging: int = 0) -> list[str]:
    prefix = " " * indent + "# "
    return textwrap.wrap(text, 120, initial_indent=prefix, subsequent_indent=prefix + " " * hanging)


def _yaml(value: Any) -> str:
    """On one line; quoted if it has to be."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()
