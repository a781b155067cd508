"""The recipe: everything that affects the numbers of a run, and nothing else, in the order of the YAML file.

A recipe names no host, path, worker count or GPU. Two runs of one recipe on one data set end with the same result on
any hardware. So its hash (`recipe_hash`) is in every checkpoint, and a checkpoint of another recipe is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import reduce
from math import floor
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from resnet_dist.config.base import Section, without_recorded_defaults
from resnet_dist.errors import UserError

Rate = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Pair = TypeVar("Pair", bound=tuple[float, float])


def _ascending(ends: Pair) -> Pair:
    if ends[0] > ends[1]:
        raise ValueError(f"must ascend, got {list(ends)}")
    return ends


Ascending = Annotated[Pair, AfterValidator(_ascending)]
"""The two ends of a range."""
ActivationOrder = Literal["original", "bn_after_addition", "relu_before_addition", "relu_only_pre", "pre"]


# ---- model -----------------------------------------------------------------------------------------------------------

Digest = Annotated[str, Field(pattern=r"^([a-z0-9_]+:)?[0-9a-f]{16,128}$")]


class InitConfig(Section):
    """Weights that the run starts from, instead of random ones; batch norm's statistics too."""

    weights: Annotated[str, Field(min_length=1)]
    """torchvision:resnet50.IMAGENET1K_V2, timm:resnet50.a1_in1k, a file (.pth, .pt, .safetensors), a run, a checkpoint,
    or models:/NAME/1. Of a run with a moving average, the average. It may move: `digest` says which weights these
    are."""
    head: Literal["keep", "new"] | None = None
    """The classifier. new: it starts at random, from the seed; null: new if the classes differ, in number or, where the
    source knows them, in names."""
    digest: Digest | None = None
    """Digest of the tensors; null: of those found at the start. Other weights are refused."""


class ModelConfig(Section):
    """The net."""

    name: str
    """A name of `resnet_dist.models.MODEL_NAMES`: resnet18 .. resnet200 (ImageNet), resnet20 .. resnet1202 (CIFAR),
    resnext50_32x4d .., wide_resnet50_2 .., plain18 .., vgg11 .. vgg19_bn, googlenet."""
    num_classes: PositiveInt
    """Must equal the number of classes in the betons' manifests."""
    zero_init_residual: bool = False
    """Initialise the last batch norm of every block with gamma = 0 (Goyal et al. 2017, section 5.1)."""
    shortcut: Literal["A", "B", "C"] | None = None
    """A zero-padding, B projection where dimensions grow, C all projections (He et al. 2015, section 3.3); null: the
    net's own default."""
    bottleneck_stride: Literal["3x3", "1x1"] = "3x3"
    """Which convolution of a bottleneck takes the stride: 3x3 as torchvision ("v1.5"), 1x1 as the paper."""
    groups: PositiveInt = 1
    """Groups of a bottleneck's 3x3 convolution (ResNeXt's cardinality; Xie et al. 2016)."""
    base_width: PositiveInt = 64
    """Channels of each of those groups in the first stage, doubled from stage to stage: 4 in ResNeXt 32x4d; without
    groups 128 in Wide ResNet-50-2."""
    activation_order: ActivationOrder = "original"
    """Position of batch norm and ReLU around a block's sum (He et al. 2016, "Identity Mappings", figure 4, a to e).
    pre: both before each convolution, the best of the five; the three in the middle are for comparison."""
    stem: Literal["conv7", "deep", "deep_tiered", "deep_strided"] = "conv7"
    """ImageNet nets: the paper's 7x7; deep, three 3x3 (ResNet-D); deep_tiered, of 24, 32 and 64 channels (timm's
    resnet50t); deep_strided, also a strided 3x3 instead of the maximum (ResNet-RS)."""
    pooled_projection: bool = False
    """Projections take their stride by a 2x2 average (ResNet-D)."""
    se_ratio: Rate = 0.0
    """Squeeze-and-excitation: width of the narrow layer as a share of the block's output channels; 0: none."""
    blur_pool: bool = False
    """A 3x3 binomial blur before every strided convolution of a block (Zhang 2019, as in ffcv-imagenet)."""
    drop_path: Rate = 0.0
    """Rate at which the last block's residual function is dropped for a sample; grows linearly from 0 at the first."""
    dropout: Rate = 0.0
    """Dropout rate of the pooled features, before the classifier."""
    gate: Literal["exclusive", "shortcut_only"] | None = None
    """g = sigmoid(Wx + b), 1x1 (He et al. 2016, table 1). exclusive: (1 - g) * shortcut + g * residual, as in highway
    networks; shortcut_only: (1 - g) * shortcut + residual."""
    gate_bias: float = 0.0
    """Initial value of b; below 0 the shortcut starts open."""
    shortcut_scale: Annotated[float, Field(ge=0)] = 1.0
    """Factor on the shortcut (He et al. 2016, table 1: 0.5)."""
    residual_scale: Annotated[float, Field(ge=0)] = 1.0
    """Factor on the residual function's output."""
    shortcut_dropout: Rate = 0.0
    """Dropout on the shortcut (He et al. 2016, table 1: 0.5, which fails)."""
    init: InitConfig | None = None
    """null: random weights, from the seed."""

    def build_options(self) -> dict[str, Any]:
        """The arguments of `models.build_model`."""
        return self.model_dump(exclude={"init"})


# ---- data.train.augment ----------------------------------------------------------------------------------------------
# Applied after crop and flip, in the order written. Operations are torchvision's and Pillow's, on 8-bit RGB; randomness
# is a function of (seed, epoch, sample id).

Level = Annotated[int, Field(ge=0, le=255)]
AspectRatio = Annotated[float, Field(ge=0.05, le=20)]


class ColorJitter(Section):
    """Brightness, contrast, saturation and hue, in random order (torchvision's `ColorJitter`)."""

    kind: Literal["color_jitter"]
    brightness: NonNegativeFloat = 0.0
    """The factor is drawn from [max(0, 1 - brightness), 1 + brightness]."""
    contrast: NonNegativeFloat = 0.0
    """The factor of the contrast, drawn likewise."""
    saturation: NonNegativeFloat = 0.0
    """The factor of the saturation, drawn likewise."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """The turn is drawn from [-hue, hue], in full circles."""


class Lighting(Section):
    """Noise along the colours' principal components (Krizhevsky et al. 2012, section 4.1); ImageNet's components."""

    kind: Literal["lighting"]
    std: NonNegativeFloat = 0.1
    """Standard deviation of the three normal draws."""


class RandAugment(Section):
    """`ops` of 14 operations, all with one magnitude (Cubuk et al. 2019; torchvision's `RandAugment`)."""

    kind: Literal["rand_augment"]
    ops: Annotated[int, Field(ge=1, le=14)] = 2
    """Operations applied to each image, one after another."""
    magnitude: Annotated[int, Field(ge=0)] = 9
    """Strength of each operation, 0 to `bins` - 1."""
    bins: Annotated[int, Field(ge=2)] = 31
    """Number of strengths into which the range of each operation is divided."""
    probability: PositiveShare = 1.0
    """Probability of applying each operation, independently; timm's policies have 0.5."""

    @model_validator(mode="after")
    def _within_bins(self) -> RandAugment:
        if self.magnitude >= self.bins:
            raise ValueError(f"magnitude ({self.magnitude}) must be below bins ({self.bins})")
        return self


class TrivialAugmentWide(Section):
    """One of 14 operations with a random magnitude (Müller, Hutter 2021; torchvision's `TrivialAugmentWide`)."""

    kind: Literal["trivial_augment_wide"]
    bins: Annotated[int, Field(ge=2)] = 31
    """Number of strengths into which the range of each operation is divided."""


class RandomErasing(Section):
    """Covers a rectangle (Zhong et al. 2017; torchvision's `RandomErasing`)."""

    kind: Literal["random_erasing"]
    probability: Share = 0.5
    """Probability that a rectangle of an image is covered."""
    scale: Ascending[tuple[PositiveShare, PositiveShare]] = (0.02, 0.33)
    """Range of the rectangle's share of the image's area."""
    ratio: Ascending[tuple[AspectRatio, AspectRatio]] = (0.3, 3.3)
    """Range of its height / width; drawn log-uniformly."""
    fill: tuple[Level, Level, Level] = (124, 116, 104)
    """R, G, B. ImageNet's mean, so about 0 after normalisation, which is torchvision's default."""


Augmentation = Annotated[
    ColorJitter | Lighting | RandAugment | TrivialAugmentWide | RandomErasing, Field(discriminator="kind")
]


# ---- data ------------------------------------------------------------------------------------------------------------

FROM_DATA: Literal["from_data"] = "from_data"


def _levels_or_from_data(value: Any) -> Any:
    try:
        fits = value == FROM_DATA or len([float(level) for level in value]) == 3
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"should be three numbers, for R, G and B, or {FROM_DATA}, got {str(value)[:60]!r}")
    return value


Channels = tuple[float, float, float]
LevelsOrFromData = Annotated[Channels | Literal["from_data"], BeforeValidator(_levels_or_from_data)]
OnBadSample = Literal["error", "skip"]
Interpolation = Literal["bilinear", "bicubic"]
"""Pillow's filters, antialiased."""
MAX_SIZE = 16384
"""Largest side of what the net sees, px."""


class TrainCrop(Section):
    """The keys that all training crops share."""

    size: Annotated[int, Field(gt=0, le=MAX_SIZE)]
    """Side of the square the net sees, px."""
    flip: bool = True
    """Mirror half of the images."""
    augment: tuple[Augmentation, ...] = ()
    """Applied after crop and flip, in this order."""


class RandomResizedCrop(TrainCrop):
    """A crop of random area and aspect ratio, resized to `size` (Szegedy et al. 2014)."""

    kind: Literal["random_resized_crop"]
    scale: Ascending[tuple[PositiveShare, PositiveShare]] = (0.08, 1.0)
    """Range of the crop's share of the image's area."""
    ratio: Ascending[tuple[PositiveFloat, PositiveFloat]] = (0.75, 4 / 3)
    """Range of the crop's width / height; drawn log-uniformly."""
    interpolation: Interpolation = "bilinear"
    """Filter of the resizing: bilinear, as torchvision's weights, or bicubic, as most of timm's."""


class ScaleCrop(TrainCrop):
    """Shorter side to a random length, then a random `size` x `size` of that (Simonyan, Zisserman 2014; He et al. 2015,
    section 3.4)."""

    kind: Literal["scale_crop"]
    shorter_side: tuple[PositiveInt, PositiveInt] = (256, 480)
    """Range of the shorter side, px, both ends included."""
    interpolation: Interpolation = "bilinear"
    """Filter of the resizing: bilinear or bicubic."""

    @model_validator(mode="after")
    def _range(self) -> ScaleCrop:
        low, high = self.shorter_side
        if not self.size <= low <= high <= MAX_SIZE:
            raise ValueError(f"shorter_side must ascend from size ({self.size}) or above, got {[low, high]}")
        return self


class PadCrop(TrainCrop):
    """Pad every side with zeros, then crop `size` x `size` at random (He et al. 2015, section 4.2).

    All images must be `size` x `size`.
    """

    kind: Literal["pad_crop"]
    pad: NonNegativeInt = 4
    """Zeros on every side, px."""


class CenterCrop(Section):
    """Shorter side to `resize`, then the central `size` x `size`: the 1-crop test protocol."""

    kind: Literal["center_crop"]
    size: Annotated[int, Field(gt=0, le=MAX_SIZE)]
    """Side of the square the net sees, px."""
    resize: Annotated[int, Field(gt=0, le=MAX_SIZE)]
    """Length to which the shorter side is resized before that, px."""
    interpolation: Interpolation = "bilinear"
    """Filter of the resizing: bilinear, as torchvision's weights, or bicubic, as most of timm's."""

    @model_validator(mode="after")
    def _fits(self) -> CenterCrop:
        if self.size > self.resize:
            raise ValueError(f"size ({self.size}) must not be larger than resize ({self.resize})")
        return self


TrainTransform = Annotated[RandomResizedCrop | ScaleCrop | PadCrop, Field(discriminator="kind")]


class Mixing(Section):
    """Mixes the images of a micro-batch in pairs, and their targets likewise; with both kinds, each is equally
    likely."""

    mixup_alpha: Annotated[float, Field(gt=0, le=2)] | None = None
    """Mixup (Zhang et al. 2017): an image's share is drawn from Beta(alpha, alpha)."""
    cutmix_alpha: Annotated[float, Field(gt=0, le=2)] | None = None
    """CutMix (Yun et al. 2019): an image's share, outside the rectangle taken from the other image, is drawn from
    Beta(alpha, alpha)."""
    probability: PositiveShare = 1.0
    """Probability that a micro-batch is mixed at all."""

    @model_validator(mode="after")
    def _any(self) -> Mixing:
        if self.mixup_alpha is None and self.cutmix_alpha is None:
            raise ValueError("set mixup_alpha, cutmix_alpha or both")
        return self


class ProgressiveSize(Section):
    """Smaller training images at first: `start_size` px, then growing epoch by epoch to `data.train.size` (as in
    ffcv-imagenet)."""

    start_size: PositiveInt
    """Side of the training images at first, px."""
    ramp: Ascending[tuple[Share, Share]]
    """Start and end of the growth, as shares of the run, rounded down to whole epochs."""
    multiple: PositiveInt = 32
    """Sizes between are multiples of this, px."""


class BalancedSampling(Section):
    """An epoch shows class c in proportion to n_c ** power, of n_c images."""

    kind: Literal["balanced"]
    power: Share = 0.0
    """0: all classes equally often; 0.5: square-root sampling (Mahajan et al. 2018); 1: as often as without sampling
    (Kang et al. 2020, "Decoupling", section 4.1)."""


class WeightedSampling(Section):
    """An epoch shows class c in proportion to weight_c * n_c, of n_c images."""

    kind: Literal["weighted"]
    weights: dict[str, NonNegativeFloat]
    """By class name; 1 for classes that are not named. 3: each of its images three times as often as one with weight 1;
    0: never."""


Sampling = Annotated[BalancedSampling | WeightedSampling, Field(discriminator="kind")]


class DataConfig(Section):
    """The data set, and what is done to an image before the net sees it."""

    dataset: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Folder under the profile's `data_root` that holds `train.beton` and `val.beton` with their manifests."""
    train: TrainTransform
    eval: CenterCrop
    mean: LevelsOrFromData
    """Per channel (R, G, B), in grey levels 0..255. from_data: the training data's, from its manifest; the numbers take
    its place before a run gets its identity."""
    std: LevelsOrFromData
    """The deviation, likewise."""
    decoder: Literal["native", "ffcv"] = "native"
    """Decoder of the stored images. native: Pillow's pixels, bit for bit. ffcv: stock ffcv's, which differ by a grey
    level or two."""
    mixing: Mixing | None = None
    """Mixup and CutMix, within every micro-batch."""
    progressive_size: ProgressiveSize | None = None
    sampling: Sampling | None = None
    """How often an epoch shows each class; null: every image once. An epoch has as many steps as without. A class gets
    its share of the epoch to within one image. Its images take turns, also from epoch to epoch: none comes again,
    augmented differently, before all others have. `on_bad_sample: skip` then replaces an image by one of its class."""
    augmentation_repeats: PositiveInt = 1
    """Repeated augmentation (Hoffer et al. 2020): a global batch holds each of its images this many times, augmented
    differently and in different micro-batches. An epoch has as many steps as without, so it shows fewer images."""
    shuffle: Literal["full", "page"] = "full"
    """full: any sample at any position of the epoch. page: the samples of a beton's page near each other, for betons
    that are larger than memory."""
    shuffle_window_pages: PositiveInt = 1024
    """page: how many pages are mixed at any time; twice as many should fit into memory. Two neighbours come from one
    page once in this many."""
    on_bad_sample: OnBadSample = "error"
    """When a training image cannot be decoded. error: the run ends and names it. skip: another image takes its place,
    chosen by (seed, epoch, sample id), and `data/replaced_samples` counts it. In evaluation it is always an error."""
    overfit_batch: bool = False
    """Every step trains on the first global batch of epoch 0, the same pixels each time: to see whether the net can
    learn at all (`train --overfit-batch`). Such a run registers no model."""

    allow_overlap: bool = False
    """Accept validation images that are training images too, to overfit on purpose; false: a run is refused if over 1 %
    are. It changes no result, so a run may be resumed with another value."""

    @model_validator(mode="after")
    def _grows(self) -> DataConfig:
        progressive = self.progressive_size
        if progressive is None:
            return self
        if isinstance(self.train, PadCrop):
            raise ValueError("progressive_size needs a crop that resizes; pad_crop does not")
        if progressive.start_size > self.train.size:
            raise ValueError(f"progressive_size.start_size must be train.size ({self.train.size}) or less")
        return self

    @model_validator(mode="after")
    def _has_the_interpolation(self) -> DataConfig:
        chosen = {"train": getattr(self.train, "interpolation", None), "eval": self.eval.interpolation}
        for part, interpolation in chosen.items():
            if self.decoder == "ffcv" and interpolation == "bicubic":
                raise ValueError(f"{part}.interpolation: bicubic needs decoder: native; ffcv's averages areas")
        return self

    @model_validator(mode="after")
    def _grey_levels(self) -> DataConfig:
        # Something valid in place of from_data: the other of the two is still checked.
        mean = (124.0,) if self.mean == FROM_DATA else self.mean
        std = (58.0,) if self.std == FROM_DATA else self.std
        found = f"mean {_shown(self.mean)} and std {_shown(self.std)}"
        if min(std) <= 0:
            raise ValueError(f"std must be positive, got {list(std)}")
        if 0 < max(mean) <= 1 or max(std) < 1:
            raise ValueError(f"{found} look like shares of 1; they are grey levels 0..255: multiply them by 255")
        if not 0 <= min(mean) <= max(mean) <= 255 or max(std) > 255:
            raise ValueError(f"{found} are not grey levels 0..255")
        return self


def train_size(data: DataConfig, epoch: int, total_epochs: int) -> int:
    """Side in px of the training images in `epoch` (from 0).

    `data.train.size`, unless `progressive_size` ramps up to it (ffcv-imagenet's ramp, in whole epochs).
    """
    ramp, end_size = data.progressive_size, data.train.size
    if ramp is None:
        return end_size
    # 0.29 * 100 is a little less than 29 in binary.
    first, last = (floor(share * total_epochs + 1e-9) for share in ramp.ramp)
    if epoch <= first:
        return ramp.start_size
    if epoch >= last:
        return end_size
    size = ramp.start_size + (epoch - first) / (last - first) * (end_size - ramp.start_size)
    return round(size / ramp.multiple) * ramp.multiple


def steps_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Whole global batches in one epoch; the incomplete last one is dropped. UserError if there is not even one."""
    if num_samples < global_batch_size:
        raise UserError(
            f"train.global_batch_size ({global_batch_size}) is larger than the training set ({num_samples} samples): "
            f"an epoch would have no step; lower it to {num_samples} or below"
        )
    return num_samples // global_batch_size


# ---- train -----------------------------------------------------------------------------------------------------------


class DivergenceConfig(Section):
    """The response to a step whose loss is NaN, infinite or too large."""

    action: Literal["stop", "skip"] = "stop"
    """stop: end the run. skip: go back to the last checkpoint and leave that step's global batch out."""
    max_loss: PositiveFloat | None = None
    """A step's mean loss above this counts as diverged; null: only NaN and infinity do."""
    max_skips: PositiveInt = 10
    """Give up after this many skipped steps."""


def _balanced_or_numbers(value: object) -> object:
    if value is not None and value != "balanced" and not isinstance(value, list | tuple):
        raise ValueError("should be null, balanced, or a list with a number for each class")
    return value


class Loss(Section):
    """The keys that all losses share."""

    class_weights: Annotated[
        Literal["balanced"] | tuple[NonNegativeFloat, ...] | None, BeforeValidator(_balanced_or_numbers)
    ] = None
    """Factors on an image's loss by its class; balanced: n / (C * n_c) as in scikit-learn, for n images of C classes,
    n_c in class c. A mixed image has the mean of its classes' weights by their shares; label smoothing changes no
    weight. The sum of weighted losses is divided by the number of images, not by the sum of weights, so an image counts
    the same whatever else is in its micro-batch. Only in training: `val/loss` is not weighted."""


class CrossEntropy(Loss):
    """-sum over classes of target * log softmax(logits); mean over images."""

    kind: Literal["cross_entropy"]


class BinaryCrossEntropy(Loss):
    """Each class separately: binary cross-entropy of sigmoid(logits), mean over images and classes
    (Wightman et al. 2021, "ResNet strikes back")."""

    kind: Literal["bce"]
    target_threshold: Rate | None = None
    """Targets above this count as 1, all others as 0, so a mixed image has two labels; null: targets as they are."""


def _cross_entropy_by_default(value: object) -> object:
    """So that `--set train.loss.class_weights=balanced` needs no kind."""
    return {"kind": "cross_entropy", **value} if isinstance(value, dict) else value


class EarlyStopConfig(Section):
    """Ends the run when evaluations no longer get better. Decided by the exact evaluation, so it is the same for any
    number of workers. The last weights and the best ones are published, as at any run's end."""

    metric: Literal["val/loss", "val/top1", "val/balanced_top1"]
    """What must get better: a lower loss, or a higher accuracy."""
    patience: PositiveInt
    """The run ends after this many evaluations in a row without a new best."""
    min_delta: NonNegativeFloat = 0.0
    """By how much a new best must be better: nats of val/loss, points of the others."""


class EmaConfig(Section):
    """An exponential moving average of the weights, e = decay * e + (1 - decay) * w, batch norm's statistics included.

    It is evaluated, kept as the best, and registered; training continues with the weights themselves.
    """

    decay: Annotated[float, Field(gt=0, lt=1)]
    """Share of the old average that an update keeps."""
    every_steps: PositiveInt = 1
    """Steps between two updates."""
    start_epochs: NonNegativeFloat = 0.0
    """Until then an update copies the weights."""


class TrainConfig(Section):
    """Batches, length, number formats and the loss."""

    global_batch_size: PositiveInt
    """Images per optimizer step, over all workers."""
    micro_batch_size: PositiveInt
    """Images per forward pass: the unit of batch-norm statistics and of data order. Workers share a step's
    micro-batches."""
    total_epochs: PositiveInt
    """Length of the run, and of its schedule."""
    max_steps: PositiveInt | None = None
    """End the run after this many steps; the schedule still runs over `total_epochs`."""
    precision: Literal["fp32", "tf32", "bf16", "fp16", "fp64"] = "fp32"
    """bf16: autocast with fp32 weights. fp16: likewise, with the loss scaled; a step whose gradient overflows changes
    no weight but counts as a step. tf32: fp32 whose products GPUs may round to 10 bits. fp64: everything in double
    precision, for tests of equality."""
    reduction: Literal["fast", "exact"] = "fast"
    """fast: an all-reduce in buckets; equal across worker counts up to float rounding. exact: micro-batches' gradients
    summed in one fixed order, deterministic kernels: the same bits for any worker count on one kind of hardware."""
    gradient_compression: Literal["none", "bf16", "fp16", "powersgd"] = "none"
    """Format of the gradients that workers exchange; needs `reduction: fast`. bf16 (more range), fp16 (more digits):
    half the bytes; gradients are rounded to the format and summed in it, so results are equal across worker counts up
    to its rounding instead of float32's. powersgd: factors of rank 4 (Vogels et al. 2019), equal across worker counts
    up to float rounding; a fiftieth of the bytes, but sent after the backward pass, and twice the memory."""
    compile: bool = False
    """torch.compile of the training forward and backward pass. Fused kernels round differently, so it belongs to
    the mathematics. The first steps take minutes."""
    divergence: DivergenceConfig = DivergenceConfig()
    loss: Annotated[
        CrossEntropy | BinaryCrossEntropy, Field(discriminator="kind"), BeforeValidator(_cross_entropy_by_default)
    ] = CrossEntropy(kind="cross_entropy")
    label_smoothing: Rate = 0.0
    """s: targets become (1 - s) * target + s / number of classes, before `loss.target_threshold` is applied."""
    ema: EmaConfig | None = None
    bn_statistics_steps: PositiveInt | None = None
    """After the last step batch norm's running statistics become the plain average over the micro-batches of this many
    further steps, an epoch's at most (He et al. 2015, their released models); null: they stay a moving average."""
    freeze_bn_statistics: bool = False
    """Every batch norm normalises with its running statistics, which stay as they are, in training too; its weight and
    bias are trained. For weights that were trained before (`optim.freeze` does so for the stages that it names)."""
    early_stop: EarlyStopConfig | None = None
    channels_last: bool = True
    """Keep images and activations in memory channel by channel of each pixel (NHWC), which GPUs' tensor cores read
    directly. Kernels for the two layouts round differently, so it belongs to the mathematics."""
    cpu_threads: PositiveInt = 1
    """Intra-op threads on CPUs. A CPU kernel's sums depend on it, so it belongs to the mathematics."""

    @property
    def num_micro_batches(self) -> int:
        return self.global_batch_size // self.micro_batch_size

    @model_validator(mode="after")
    def _compressible(self) -> TrainConfig:
        if self.gradient_compression != "none" and self.reduction == "exact":
            raise ValueError(f"gradient_compression: {self.gradient_compression} needs reduction: fast")
        if self.gradient_compression == "powersgd" and self.precision == "fp16":
            raise ValueError(
                "gradient_compression: powersgd carries errors over to later steps, infinities too: set precision: bf16"
            )
        return self

    @model_validator(mode="after")
    def _batch_norm_statistics(self) -> TrainConfig:
        if self.freeze_bn_statistics and self.bn_statistics_steps:
            raise ValueError("freeze_bn_statistics and bn_statistics_steps exclude each other: leave one of them out")
        if self.early_stop and self.bn_statistics_steps:
            raise ValueError(
                "early_stop and bn_statistics_steps exclude each other, since the last step is not known: leave one of "
                "them out"
            )
        return self

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> TrainConfig:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple "
                f"of micro_batch_size ({self.micro_batch_size})"
            )
        return self


# ---- optim, schedule, eval -------------------------------------------------------------------------------------------


class OptimConfig(Section):
    """The optimizer."""

    name: Literal["sgd", "lamb"]
    """sgd: torch's. lamb: timm's (You et al. 2019), with which the "ResNet strikes back" recipes were trained."""
    lr: PositiveFloat
    """Peak learning rate, for the whole global batch."""
    momentum: Rate = 0.9
    """sgd only."""
    nesterov: bool = False
    """sgd only."""
    weight_decay: NonNegativeFloat
    """Coupled: `weight_decay * w` is added to the gradient (sgd), or to the update before it is scaled (lamb)."""
    decay: Literal["weights", "all"] = "weights"
    """weights: only those of convolutions and linear layers decay. all: biases and batch norms too (torchvision V1)."""
    clip_grad_norm: PositiveFloat | None = None
    """A gradient whose norm over all parameters is larger is scaled down to this; null: no clipping. The "ResNet
    strikes back" recipes clip at 1 (timm's LAMB does so by default; here only this key does)."""
    freeze: tuple[str, ...] = ()
    """Stages that stay as they are, `[stem, layer1]`: their weights have no gradient, weight decay or momentum, and
    their batch norm, drop-path and dropout behave as in evaluation. If they are a net's first stages, their backward
    pass is saved too. The stages are `stem`, `layer1` .., `head` (`models/stages.py`; VGG has no stem)."""
    lr_factors: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Factors on the learning rate by stage, `{layer1: 0.1, head: 10}`; a stage that is not named has factor 1."""
    layer_decay: PositiveShare = 1.0
    """Layer-wise decay of the learning rate (Bao et al. 2021, "BEiT"; timm's `layer_decay`, here by stage): of a net's
    stages 0 .. n, the head last, stage i has `layer_decay ** (n - i)` times the rate; `lr_factors` come on top."""

    @model_validator(mode="after")
    def _frozen_stages_have_no_rate(self) -> OptimConfig:
        if rates := sorted(self.lr_factors.keys() & set(self.freeze)):
            raise ValueError(f"lr_factors names {', '.join(rates)}, which freeze keeps as it is: leave one of them out")
        if len(set(self.freeze)) < len(self.freeze):
            raise ValueError(f"freeze names a stage twice: {', '.join(self.freeze)}")
        return self

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> OptimConfig:
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError("nesterov needs name: sgd and a momentum above 0")
        return self


class Warmup(Section):
    """From `start_factor * lr` to `lr`."""

    epochs: NonNegativeFloat = 0.0
    """Length of the warm-up; 0: none."""
    start_factor: Share = 0.0
    """The first rate, as a share of `optim.lr`."""
    shape: Literal["linear", "constant"] = "linear"
    """linear: in equal steps (Goyal et al. 2017, section 2.2). constant: `start_factor * lr` until it ends (He et al.
    2015, section 4.2, for 110 layers)."""


class StepSchedule(Section):
    """The rate drops at fixed times (He et al. 2015)."""

    kind: Literal["step"]
    milestone_fractions: tuple[Annotated[float, Field(gt=0, lt=1)], ...]
    """Times at which the rate drops, as shares of the run, ascending."""
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Factor on the rate at each drop."""
    warmup: Warmup = Warmup()

    @model_validator(mode="after")
    def _ascending(self) -> StepSchedule:
        if list(self.milestone_fractions) != sorted(set(self.milestone_fractions)):
            raise ValueError(f"milestone_fractions must ascend, got {list(self.milestone_fractions)}")
        return self


class PlateauSchedule(Section):
    """The rate drops when the validation error stops falling (He et al. 2015, section 3.4).

    Decided by the exact evaluation, so it is the same for any number of workers.
    """

    kind: Literal["plateau"]
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Factor on the rate at each drop."""
    patience: PositiveInt = 5
    """The rate drops after this many evaluations in a row without a new best."""
    min_improvement: NonNegativeFloat = 0.1
    """By how many points of top-1 error, in percent, a new best must be better."""
    max_drops: PositiveInt = 3
    """The rate drops this many times at most."""
    warmup: Warmup = Warmup()


class CosineSchedule(Section):
    """From `optim.lr` down half a cosine (Loshchilov, Hutter 2016)."""

    kind: Literal["cosine"]
    final_factor: Share = 0.0
    """The last rate, as a share of `optim.lr`."""
    warmup: Warmup = Warmup()


class LinearSchedule(Section):
    """From `optim.lr` down in equal steps."""

    kind: Literal["linear"]
    final_factor: Share = 0.0
    """The last rate, as a share of `optim.lr`."""
    warmup: Warmup = Warmup()


ScheduleConfig = Annotated[
    StepSchedule | PlateauSchedule | CosineSchedule | LinearSchedule, Field(discriminator="kind")
]


BestBy = Literal["top1", "balanced_top1", "loss"]


class EvalConfig(Section):
    """How often, and with what batches, the validation set is evaluated."""

    batch_size: PositiveInt
    """Images per forward pass; on a GPU the largest multiple of it up to 256. It fixes the batches, so the loss does
    not depend on the worker count."""
    every_epochs: PositiveInt = 1
    """Evaluate after every this many epochs, and always after the last step."""
    best_by: BestBy = "top1"
    """Which weights are kept in `best/`, and registered if they are better than the last: those with the highest
    `val/top1` or `val/balanced_top1`, or the lowest `val/loss`. A champion falls only to a run that is better by the
    same metric."""


# ---- fork ------------------------------------------------------------------------------------------------------------


class ForkConfig(Section):
    """The checkpoint of another run that this run continues, optimizer state and steps done included."""

    checkpoint: Annotated[str, Field(min_length=1)]
    """A run, as path, URL or name beside this one, with `@EPOCH` for another checkpoint than its newest; or a
    checkpoint. It may move: `digest` says which one it is."""
    schedule: Literal["whole", "rest", "cooldown"] = "whole"
    """whole: the schedule runs over `train.total_epochs` from the parent's start, so the rate continues where such a
    run would be. rest: it begins at the fork, warm-up included, and runs over the epochs that are left. cooldown: the
    rate goes linearly from what `whole` has at the fork to zero, and the run ends there, with an evaluation."""
    cooldown: PositiveShare | None = None
    """Steps of a cooldown, as a share of the parent's: n = max(1, round(cooldown * step)). Step i of them has
    (1 - i / n) times the rate at the fork. `train.max_steps` and `train.early_stop` do not count."""
    digest: Digest | None = None
    """Digest of the checkpoint's state; null: of the one found at the start."""
    step: NonNegativeInt | None = None
    """Steps that the parent had done; filled in at the start."""

    @model_validator(mode="after")
    def _with_its_length(self) -> ForkConfig:
        if self.schedule == "cooldown" and self.cooldown is None:
            raise ValueError("schedule: cooldown needs cooldown, its length as a share of the parent's steps, say 0.2")
        if self.schedule != "cooldown" and self.cooldown is not None:
            raise ValueError(f"cooldown ({self.cooldown:g}) needs schedule: cooldown, got {self.schedule}")
        return self


def cooldown_steps(cooldown: float, steps: float) -> int:
    """Steps of a cooldown that is `cooldown` of the `steps` before it.

    >>> cooldown_steps(0.2, 31), cooldown_steps(0.2, 1)
    (6, 1)
    """
    return max(1, round(cooldown * steps))


# ---- the recipe, and its identity ------------------------------------------------------------------------------------


class Recipe(Section):
    """The mathematics of a run. Its hash (`recipe_hash`) says what was trained."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    """Decides the initial weights, the order of the images, and all that is random."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    """The learning rate during the run, as factors on `optim.lr`."""
    eval: EvalConfig
    fork: ForkConfig | None = None
    """Continue another run with other settings: `train --fork RUN@EPOCH` sets it."""

    @model_validator(mode="after")
    def _class_weights(self) -> Recipe:
        weights, num_classes = self.train.loss.class_weights, self.model.num_classes
        if weights == "balanced" and self.data.sampling is not None:
            raise ValueError(
                "data.sampling and train.loss.class_weights: balanced would both make up for rare classes; set one to "
                "null"
            )
        if isinstance(weights, tuple) and len(weights) != num_classes:
            raise ValueError(
                f"train.loss.class_weights has {len(weights)} numbers, expected one for each of the {num_classes} "
                "classes (model.num_classes)"
            )
        if isinstance(weights, tuple) and not any(weights):
            raise ValueError("train.loss.class_weights: at least one must be above 0")
        return self


_UNSET = object()
RECORDED_DEFAULTS: Mapping[str, Any] = {
    "data.allow_overlap": False,
    "data.train.interpolation": "bilinear",
    "data.eval.interpolation": "bilinear",
    "model.groups": 1,
    "model.base_width": 64,
    "optim.freeze": [],
    "optim.lr_factors": {},
    "optim.layer_decay": 1.0,
    "train.freeze_bn_statistics": False,
    "model.init": None,
    "fork": None,
    "fork.cooldown": None,
    "train.early_stop": None,
    "data.overfit_batch": False,
    "data.sampling": None,
    "train.loss.class_weights": None,
    "eval.best_by": "top1",
}
"""Keys that were added after recipes were first hashed, see `without_recorded_defaults`."""
_DECIDES_NO_NUMBER = ("data.allow_overlap",)
"""Keys that change no result: a run may be resumed with another value."""
_LOCATIONS = {"model.init": "weights", "fork": "checkpoint"}
"""Sections that name a place. Once they have the digest of what is there, the place changes no result."""


def recipe_hash(recipe: Recipe) -> str:
    """16 hex digits of the SHA-256 of the recipe's canonical JSON: sorted keys, without those at a recorded default."""
    hashed = _hashed(recipe.model_dump(mode="json"))
    canonical = json.dumps(hashed, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def recipe_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The keys that differ between two dumped recipes, recorded defaults aside.

    >>> recipe_changes({"optim": {"lr": 0.05}}, {"optim": {"lr": 0.02}})
    ['optim.lr 0.05 -> 0.02']
    """
    return _changes(_hashed(before), _hashed(after), "")


def _hashed(dumped: Mapping[str, Any]) -> Any:
    hashed = without_recorded_defaults(dumped, RECORDED_DEFAULTS)
    for path in _DECIDES_NO_NUMBER:
        outer, _, key = path.rpartition(".")
        _section(hashed, outer).pop(key, None)
    for path, key in _LOCATIONS.items():
        if (section := _section(hashed, path)).get("digest") is not None:
            section.pop(key, None)
    return hashed


def _section(tree: Any, path: str) -> dict[str, Any]:
    """The section at the dotted path; an empty one if there is none."""
    return reduce(lambda outer, name: outer.get(name) or {}, path.split("."), tree)


def _changes(before: Any, after: Any, path: str) -> list[str]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        keys = {**before, **after}
        found = [_changes(before.get(k, _UNSET), after.get(k, _UNSET), f"{path}.{k}".removeprefix(".")) for k in keys]
        return [change for changes in found for change in changes]
    return [] if before == after else [f"{path} {_shown(before)} -> {_shown(after)}"]


def _shown(value: Any) -> str:
    return "unset" if value is _UNSET else json.dumps(value)[:60]
