"""A recipe's train section: what one optimizer step is made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from resnet_dist.config.base import Section


class DivergenceConfig(Section):
    """What to do with a step whose loss is NaN or infinite, or too large."""

    action: Literal["stop", "skip"] = "stop"
    """stop: end the run. skip: go back to the last checkpoint and leave that step's global batch out."""
    max_loss: PositiveFloat | None = None
    """A step's mean loss above this counts as diverged; null: only NaN and infinity do."""
    max_skips: PositiveInt = 10
    """Give up after this many skipped steps."""


class CrossEntropy(Section):
    """-sum over classes of target * log softmax(logits); mean over images."""

    kind: Literal["cross_entropy"]


class BinaryCrossEntropy(Section):
    """Every class a question of its own: binary cross-entropy of sigmoid(logits), mean over images and classes
    (Wightman et al. 2021, "ResNet strikes back")."""

    kind: Literal["bce"]
    target_threshold: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Targets above it count as 1, the others as 0, so a mixed image has two labels; null: targets as they are."""


class EmaConfig(Section):
    """An exponential moving average of the weights, e = decay * e + (1 - decay) * w, batch norm's statistics included.

    It is what is evaluated, kept as the best, and registered; training goes on with the weights themselves.
    """

    decay: Annotated[float, Field(gt=0, lt=1)]
    every_steps: PositiveInt = 1
    """Steps between two updates."""
    start_epochs: NonNegativeFloat = 0.0
    """Until then an update makes it the weights themselves."""


class TrainConfig(Section):
    global_batch_size: PositiveInt
    """Images per optimizer step, over all workers."""
    micro_batch_size: PositiveInt
    """Images per forward pass: the unit of batch-norm statistics and of data order; workers share a step's."""
    total_epochs: PositiveInt
    max_steps: PositiveInt | None = None
    """End the run after this many steps; the schedule still runs over `total_epochs`."""
    precision: Literal["fp32", "tf32", "bf16", "fp16", "fp64"] = "fp32"
    """bf16: autocast with fp32 weights. fp16: so too, with the loss scaled; a step whose gradient overflows is not
    taken, and counts. tf32: fp32 whose products GPUs may round to 10 bits. fp64: everything in double, to prove
    equalities."""
    reduction: Literal["fast", "exact"] = "fast"
    """fast: DDP's bucketed all-reduce; equal across worker counts up to float rounding. exact: micro-batches' gradients
    summed in one fixed order, deterministic kernels: the same bits for any worker count on one kind of hardware."""
    gradient_compression: Literal["none", "bf16", "fp16", "powersgd"] = "none"
    """What workers send each other, with `reduction: fast`. bf16 (has the range), fp16 (has the digits): half the
    bytes. Each worker's part of the gradient is rounded to the format and summed in it, so results are equal across
    worker counts up to its rounding, no longer float32's. powersgd: factors of rank 4 (Vogels et al. 2019), equal
    across worker counts up to float rounding; a fiftieth of the bytes, but after the backward pass, and twice the
    memory.
    """
    compile: bool = False
    """torch.compile of the training forward and backward pass. Fused kernels round otherwise, so it belongs to the
    mathematics. The first steps take minutes."""
    divergence: DivergenceConfig = DivergenceConfig()
    loss: Annotated[CrossEntropy | BinaryCrossEntropy, Field(discriminator="kind")] = CrossEntropy(kind="cross_entropy")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """s: targets become (1 - s) * target + s / number of classes, before a threshold is asked."""
    ema: EmaConfig | None = None
    bn_statistics_steps: PositiveInt | None = None
    """After the last step batch norm's running statistics become the plain average over the micro-batches of this many
    further steps, an epoch's at most (He et al. 2015, their released models); null: they stay a moving average."""
    channels_last: bool = True
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
            raise ValueError("gradient_compression: powersgd keeps what it loses, infinities too: set precision: bf16")
        return self

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> TrainConfig:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple "
                f"of micro_batch_size ({self.micro_batch_size})"
            )
        return self
