"""The training loop. Read this file first.

One optimizer step is defined on the global batch, cut into micro-batches. The workers share a step's micro-batches;
each runs its own one after the other and their gradients become one gradient (`reduce.py`). Everything random is a
function of (seed, epoch, sample id), everything scheduled a function of the step: so the loop can be left and entered
again at any step, on any number of workers, and goes on as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import get_total_norm

from resnet_dist.config.recipe import Recipe
from resnet_dist.data.batch import Batch
from resnet_dist.data.order import PageShuffle, micro_batch_share, train_order
from resnet_dist.models.keyed_noise import StepNoise
from resnet_dist.models.statistics import BatchNormStatistics
from resnet_dist.tracking.base import CONFUSION, Tracker
from resnet_dist.training.background import Background
from resnet_dist.training.best import keep_if_best
from resnet_dist.training.checkpoint import Card, Identity, checkpoint_name, save_checkpoint
from resnet_dist.training.collectives import share_buffers
from resnet_dist.training.context import RunContext
from resnet_dist.training.device_use import DeviceUse
from resnet_dist.training.evaluate import evaluate, sparse_json
from resnet_dist.training.health import Health
from resnet_dist.training.job import Outcome
from resnet_dist.training.metrics import Window, WindowResult
from resnet_dist.training.mixing import Mixer
from resnet_dist.training.noise import layer_keys
from resnet_dist.training.plan import RunPlan
from resnet_dist.training.precision import Precision
from resnet_dist.training.reduce import Reduction
from resnet_dist.training.resume import restore
from resnet_dist.training.schedule import lr_at
from resnet_dist.training.state import TrainState, copied


class Loader(Protocol):
    """`data.BetonLoader`, as the loop sees it."""

    def epoch(self, epoch: int, sample_ids: NDArray[np.int64]) -> Generator[Batch, None, None]:
        """Batches of a fixed size, in the order of `sample_ids`; augmentation drawn for `epoch`."""


class Samples(NamedTuple):
    loader: Loader
    num_samples: int
    pages: PageShuffle | None = None
    """If samples are not shuffled through the whole of the data, how."""


@dataclass
class Run:
    """Everything one worker needs, put together by `worker.py`."""

    recipe: Recipe
    plan: RunPlan
    identity: Identity
    ctx: RunContext
    tracker: Tracker
    state: TrainState
    model: nn.Module
    reduction: Reduction
    statistics: BatchNormStatistics
    noise: StepNoise
    precision: Precision
    mixer: Mixer
    train: Samples
    val: Samples
    window: Window
    health: Health
    device_use: DeviceUse
    background: Background = field(default_factory=Background)
    metrics: dict[str, float] = field(default_factory=dict)
    """The newest value of every metric."""
    saved_step: int = -1
    save_wanted: bool = False
    """Whether a checkpoint is wanted besides those of the plan."""


def fit(run: Run) -> Outcome:
    """Trains from `run.state.step` to the end of the plan, or until stopped. Ends with a checkpoint of where it stands.

    What is due at a step is done at the top, before training on: so a run resumed at any step does what is missing, and
    the last step is no special case.
    """
    outcome: Outcome | None = None
    while True:
        step = run.state.step
        if outcome is None and run.plan.evaluation_due(step) and run.state.evaluated_step < step:
            run_evaluation(run)
        due = bool(outcome) or run.save_wanted or run.plan.checkpoint_due(step)
        if due and outcome != "diverged" and run.saved_step < step:
            save(run)
        if step >= run.plan.last_step:
            return outcome or "finished"
        if outcome:
            return outcome
        outcome = train_epoch(run)


def train_epoch(run: Run) -> Outcome | None:
    """Trains to the end of the epoch that the run stands in; None when it got there, otherwise why it did not."""
    plan = run.plan
    run.model.train()
    run.window.restart_clock()
    for local in run.window.timed(epoch_steps(run)):
        train_step(run, local)
        step = run.state.step
        if plan.window_ends(step):
            window = run.window.close(
                learning_rate(run, step - 1), stop=run.ctx.stop_requested(), save=run.ctx.save_requested()
            )
            if window.diverged_step is not None and skip(run, window.diverged_step):
                return None
            report(run, window, step)
            run.save_wanted |= window.save
            if window.diverged_step is not None:
                return "diverged"
            if window.stop and step < plan.last_step:
                return "stopped"
        if step == plan.epoch_ends_at(step - 1):
            return None
        if plan.checkpoint_due(step) or run.save_wanted:
            save(run)
    return None


def train_step(run: Run, local: dict[int, Batch]) -> None:
    """One optimizer step; `local` are this worker's micro-batches under their numbers."""
    if run.state.step in run.state.skipped:
        run.state.step += 1
        return
    smoothing = run.recipe.train.label_smoothing
    for group in run.state.optimizer.param_groups:
        group["lr"] = learning_rate(run, run.state.step)
    for micro_batch, batch in local.items():
        run.noise.set_keys(layer_keys(run.recipe.seed, run.state.step, micro_batch, len(run.noise)))
        with run.statistics.updating(micro_batch == 0), run.reduction.accumulating(micro_batch == max(local)):
            images, targets = run.mixer(batch.images, batch.labels, run.state.step, micro_batch)
            with run.precision.autocast(run.ctx.device):
                logits = run.reduction.forward(images)
                loss = cross_entropy(logits, targets, label_smoothing=smoothing)
            run.reduction.backward(loss, micro_batch)
        run.window.add(micro_batch, loss, logits, targets, batch.num_replaced)
    run.reduction.finish()
    if run.plan.window_ends(run.state.step + 1):
        run.window.grad_norm = grad_norm(run.state.net)
    run.state.optimizer.step()
    run.state.optimizer.zero_grad()
    run.window.end_step(run.state.step)
    run.state.step += 1


def report(run: Run, window: WindowResult, step: int) -> None:
    """Tells tracker and driver what the window showed, and who holds up the others."""
    if window.metrics:
        use = run.device_use.metrics(window.metrics["speed/images_per_s"])
        run.tracker.metrics({**window.metrics, **use, **run.health.metrics(window.ranks)}, step)
    run.ctx.progress(step, window.metrics)
    run.metrics.update(window.metrics)
    for rank, factor in run.health.newly_slow(window.ranks).items() if window.ranks else ():
        run.ctx.slow(rank, factor)


def learning_rate(run: Run, step: int) -> float:
    """What step number `step` uses."""
    return lr_at(
        step,
        run.recipe.schedule,
        base_lr=run.recipe.optim.lr,
        steps_per_epoch=run.plan.steps_per_epoch,
        total_steps=run.plan.total_steps,
    )


def skip(run: Run, step: int) -> bool:
    """Goes back to the last checkpoint and leaves step number `step` out from now on, if the recipe has it so."""
    policy = run.recipe.train.divergence
    if policy.action == "stop" or len(run.state.skipped) >= policy.max_skips:
        return False
    skipped = run.state.skipped | {step}
    restore(run)
    run.state.skipped = skipped
    return True


def grad_norm(net: nn.Module) -> Tensor:
    """Length of the whole gradient, a scalar on the net's device; nothing waits for it here."""
    return get_total_norm([p.grad for p in net.parameters() if p.grad is not None])


def epoch_steps(run: Run) -> Iterator[dict[int, Batch]]:
    """This worker's micro-batches, step by step, from where the run stands in its epoch; nothing before is decoded."""
    train, rank, world_size = run.recipe.train, run.ctx.rank, run.ctx.world_size
    epoch, start_step = divmod(run.state.step, run.plan.steps_per_epoch)
    order = train_order(
        run.train.num_samples,
        seed=run.recipe.seed,
        epoch=epoch,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        rank=rank,
        world_size=world_size,
        start_step=start_step,
        pages=run.train.pages,
    )
    micro_batches = micro_batch_share(train.num_micro_batches, rank, world_size)
    with closing(batches_of(run, run.train, epoch, order.reshape(-1))) as batches:
        # zip asks the range first, so it never takes a batch of the next step.
        while local := dict(zip(micro_batches, batches, strict=False)):
            yield local


def batches_of(run: Run, samples: Samples, epoch: int, ids: NDArray[np.int64]) -> Generator[Batch, None, None]:
    """The samples' batches, with a sign of life for each."""
    with closing(samples.loader.epoch(epoch, ids)) as batches:
        for batch in batches:
            run.ctx.beat()
            yield batch


def run_evaluation(run: Run) -> None:
    share_buffers(run.state.net)
    result = evaluate(
        run.model,
        partial(batches_of, run, run.val, 0),
        num_samples=run.val.num_samples,
        batch_size=run.recipe.eval.batch_size,
        rank=run.ctx.rank,
        world_size=run.ctx.world_size,
        device=run.ctx.device,
        precision=run.precision,
        confusion_classes=run.recipe.model.num_classes if run.state.step == run.plan.last_step else None,
    )
    run.state.evaluated_step = run.state.step
    run.tracker.metrics(result.metrics(), run.state.step)
    if result.confusion is not None:
        run.tracker.text(CONFUSION, sparse_json(result.confusion))
    run.metrics.update(result.metrics())
    if run.ctx.rank == 0:
        with run.window.saving():
            net = copied(run.state.net.state_dict())
            run.background.start(partial(keep_if_best, run.ctx.storage, net, card_of(run)))
    run.ctx.progress(run.state.step, run.metrics)


def save(run: Run) -> None:
    """Commits a checkpoint of the current step: a copy of the state, which is written while training goes on."""
    epoch, step = run.plan.epoch_of(run.state.step), run.state.step
    with run.window.saving():
        write = None
        if run.ctx.rank == 0:
            write = partial(save_checkpoint, state=run.state.snapshot(), card=card_of(run))
        run.ctx.report(run.metrics, write, checkpoint_name(epoch, step))
    run.saved_step, run.save_wanted = step, False


def card_of(run: Run) -> Card:
    """What is known of the run at the step where it stands."""
    epoch, step = run.plan.epoch_of(run.state.step), run.state.step
    return Card(epoch, step, run.identity, run.recipe.model_dump(mode="json"), dict(run.metrics), files={})
