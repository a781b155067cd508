"""The training loop. Read this file first.

One optimizer step is defined on the global batch, cut into micro-batches. The workers share a step's micro-batches;
each runs its own one after the other and their gradients become one gradient (`reduce.py`). Everything random is a
function of (seed, epoch, sample id), everything scheduled a function of the step or part of the state: so the loop can
be left and entered again at any step, on any number of workers, and goes on as if nothing had happened.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from contextlib import ExitStack
from functools import partial
from itertools import islice

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from resnet_dist.data.batch import Batch
from resnet_dist.errors import Fault
from resnet_dist.tracking.tracker import CONFUSION, Tracker
from resnet_dist.training.checkpoint import (
    CheckpointMetadata,
    checkpoint_name,
    load_state,
    newest_whole,
    require_same,
    write_checkpoint,
)
from resnet_dist.training.checkpoint_manager import keep_if_best
from resnet_dist.training.collectives import share_buffers, sum_over_workers
from resnet_dist.training.context import Job, Outcome, RunContext, WorkerResult
from resnet_dist.training.evaluate import evaluate, sparse_json
from resnet_dist.training.feed import batches_of, open_data, steps_from
from resnet_dist.training.metrics import WindowResult
from resnet_dist.training.model import set_backends
from resnet_dist.training.schedule import lr_at
from resnet_dist.training.state import copied
from resnet_dist.training.step import layer_keys, training_loss
from resnet_dist.training.trainer import Run, assemble


def fit(run: Run) -> Outcome:
    """Trains from `run.state.step` to the end of the plan, or until stopped. Ends with a checkpoint of where it stands.

    What is due at a step is done at the top, before training on: so a run resumed at any step does what is missing, and
    the last step is no special case.
    """
    outcome: Outcome | None = None
    while True:
        step = run.state.step
        if outcome is None and run.plan.evaluation_due(step) and run.state.evaluated_step < step:
            if not run_evaluation(run):
                if skip(run, step):
                    continue
                if run.saved_step < step and run.update.leaves_finite_state():
                    save(run)  # resumed, it is evaluated again at once: no step is trained from here
                return "diverged"
            if step < run.plan.last_step and anyone_asks_to_stop(run):
                outcome = "stopped"
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
    for local in run.window.timed(
        steps_from(run.train, run.recipe, run.ctx, *divmod(run.state.step, plan.steps_per_epoch))
    ):
        train_step(run, local)
        step = run.state.step
        stop, save_wished = run.ctx.stop_requested(), run.ctx.save_requested()
        if run.agreement.reached(stop or save_wished) or plan.window_ends(step):
            is_broken = not run.update.leaves_finite_state()
            lr = learning_rate(run, step - 1)
            window = run.window.close(lr, stop=stop, save=save_wished, next_step=step, is_broken=is_broken)
            if window.diverged_step is not None and skip(run, window.diverged_step):
                return None
            report(run, window, step)
            run.save_wanted |= window.save
            if window.diverged_step is not None:
                run.diverged = what_diverged(window.diverged_step, step, run.recipe.train.divergence.max_loss)
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
    step = run.state.step
    if step not in run.state.skipped:
        for micro_batch, batch in local.items():
            add_gradient(run, micro_batch, batch, is_last=micro_batch == max(local))
        run.reduction.finish()
        run.window.grad_norm = run.update.apply(learning_rate(run, step), measure=run.plan.window_ends(step + 1))
        run.window.end_step(step)
    run.state.step += 1


def add_gradient(run: Run, micro_batch: int, batch: Batch, *, is_last: bool) -> None:
    """Forward and backward pass of one micro-batch of the step where the run stands; `is_last` of this worker's."""
    run.noise.set_keys(layer_keys(run.recipe.seed, run.state.step, micro_batch, len(run.noise)))
    with run.statistics.updating(micro_batch == 0), run.reduction.accumulating(is_last):
        images, targets = run.mixer(batch.images, batch.labels, run.state.step, micro_batch)
        with run.precision.autocast(run.ctx.device):
            logits = run.reduction.forward(images)
            loss = training_loss(logits, targets, run.recipe.train)
        run.reduction.backward(run.update.scaled(loss), micro_batch)
    run.window.add(micro_batch, loss, logits, targets, batch.num_replaced)


def report(run: Run, window: WindowResult, step: int) -> None:
    """Tells tracker and driver what the window showed, and who holds up the others."""
    if window.metrics:
        use = run.device_use.metrics(window.metrics["speed/images_per_s"], run.plan.epoch_of(step - 1))
        run.tracker.metrics({**window.metrics, **use, **run.health.metrics(window.ranks)}, step)
    run.ctx.progress(step, window.metrics)
    run.metrics.update(window.metrics)
    for rank, factor in run.health.newly_slow(window.ranks).items() if window.ranks else ():
        run.ctx.report_straggler(rank, factor)


def learning_rate(run: Run, step: int) -> float:
    """What step number `step` uses."""
    return lr_at(
        step,
        run.recipe.schedule,
        base_lr=run.recipe.optim.lr,
        steps_per_epoch=run.plan.steps_per_epoch,
        total_steps=run.plan.total_steps,
        num_drops=run.state.plateau.num_drops,
    )


def skip(run: Run, step: int) -> bool:
    """Goes back to the last checkpoint and leaves step number `step` out from now on, if the recipe has it so."""
    policy = run.recipe.train.divergence
    if policy.action == "stop" or len(run.state.skipped) >= policy.max_skips:
        return False
    new = suspects(step, run.state.skipped, run.state.step) - run.state.skipped
    if not new:
        return False  # the first weights were not finite
    skipped = run.state.skipped | new
    restore(run)
    run.state.skipped = skipped
    return True


def what_diverged(diverged_step: int, next_step: int, max_loss: float | None) -> str:
    """In words. `diverged_step` is `next_step` where the losses before it were finite and the weights no longer are."""
    if diverged_step == next_step:
        return f"the weights or batch norm's running statistics are not finite after step {next_step}"
    limit = "" if max_loss is None else f" or above train.divergence.max_loss ({max_loss:g})"
    return f"the training loss is not finite{limit} at step {diverged_step + 1}"


def suspects(diverged_step: int, skipped: Collection[int], next_step: int) -> set[int]:
    """Which steps may have broken the training.

    The first sign of it is the loss of `diverged_step`, or the weights before it if that is `next_step`.

    A loss is computed before the step's own update. So where the steps before were left out already, or the step itself
    was not taken yet, the last one that was taken before it is to blame.
    """
    before = diverged_step - 1
    while before in skipped:
        before -= 1
    found = {diverged_step} if diverged_step < next_step else set()
    if not found or before < diverged_step - 1:
        found |= {before} - {-1}
    return found


def run_evaluation(run: Run) -> bool:
    """Whether the net gave finite numbers; if not, the evaluation counts as not done and the run has diverged."""
    share_buffers(run.state.evaluated_net)
    if run.recipe.train.bn_statistics_steps and run.state.step == run.plan.last_step:
        average_statistics(run, run.recipe.train.bn_statistics_steps)
    result = evaluate(
        run.evaluated,
        partial(batches_of, run.val, run.ctx, 0),
        num_samples=run.val.num_samples,
        batch_size=run.recipe.eval.batch_size,
        rank=run.ctx.rank,
        world_size=run.ctx.world_size,
        device=run.ctx.device,
        precision=run.precision,
        confusion_classes=run.recipe.model.num_classes if run.state.step == run.plan.last_step else None,
    )
    run.tracker.metrics(result.metrics(), run.state.step)
    run.metrics.update(result.metrics())
    if not result.is_finite:
        run.diverged = (
            f"the evaluation gave NaN or infinity at step {run.state.step} "
            f"(for {result.num_not_finite} of {result.num_samples} samples)"
        )
        run.ctx.progress(run.state.step, run.metrics)
        return False
    run.state.evaluated_step = run.state.step
    if run.recipe.schedule.kind == "plateau":
        run.state.plateau = run.state.plateau.after(result.top1_error, run.recipe.schedule)
    if result.confusion is not None:
        run.tracker.text(CONFUSION, sparse_json(result.confusion))
    if run.ctx.rank == 0 and result.top1 > run.best_top1:
        run.best_top1 = result.top1
        with run.window.saving():
            net = copied(run.state.evaluated_net.state_dict())
            run.background.start(partial(keep_if_best, run.ctx.storage, net, metadata_of(run)))
    run.ctx.progress(run.state.step, run.metrics)
    return True


def anyone_asks_to_stop(run: Run) -> bool:
    """Looked at after an evaluation too: a sweep judges its trials there, and not one step more should be spent."""
    return bool(sum_over_workers(torch.tensor([float(run.ctx.stop_requested())])) > 0)


def save(run: Run) -> None:
    """Commits a checkpoint of the current step: a copy of the state, which is written while training goes on."""
    epoch, step = run.plan.epoch_of(run.state.step), run.state.step
    with run.window.saving():
        run.reduction.settle()
        write = None
        if run.ctx.rank == 0:
            write = partial(write_checkpoint, state=run.state.snapshot(), metadata=metadata_of(run))
        run.ctx.save_checkpoint(checkpoint_name(epoch, step), write, run.metrics)
    run.saved_step, run.save_wanted = step, False


def metadata_of(run: Run) -> CheckpointMetadata:
    """What is known of the run at the step where it stands."""
    epoch, step = run.plan.epoch_of(run.state.step), run.state.step
    metrics = {key: value for key, value in run.metrics.items() if math.isfinite(value)}  # JSON has no NaN
    recipe = run.recipe.model_dump(mode="json")
    return CheckpointMetadata(epoch, step, run.identity, recipe, metrics, files={}, pictures=run.pictures)


# One worker of a run: plain data in, loaders opened, resumed where the run stands, trained, outcome out.


def run_worker(job: Job, ctx: RunContext, tracker: Tracker) -> WorkerResult:
    """Runs one worker to the end of the plan or to a stop. The result is the same on all workers.

    Raises:
        UserError: the checkpoint to resume from is of another recipe or of other data.
        Fault: bad data, a damaged checkpoint, a loader that died.
    """
    set_backends(job.recipe.train)
    with ExitStack() as stack:
        run = assemble(job, ctx, tracker, *open_data(job, ctx.device, stack))
        restore(run)
        ctx.progress(run.state.step, {})
        outcome = fit(run)
        run.background.wait()
        ctx.wait_for_checkpoints()  # while the watchdog still looks: Ray waits for what is left without a limit
        return WorkerResult(outcome, run.state.step, run.metrics, run.diverged)


# Putting a run where its newest checkpoint stands: at the start of every worker group, and after a diverged step.


_MAX_REASON = 200


def restore(run: Run) -> None:
    """Loads the newest whole checkpoint, if there is one. All workers call it together.

    Raises:
        UserError: the checkpoint is of another recipe or of other data.
        Fault: storage cannot be reached, or the workers found different ones.
    """
    run.ctx.wait_for_checkpoints()
    sum_over_workers(torch.zeros(1))  # nobody looks before all have written
    with newest_whole(run.ctx.storage) as found:
        if found is not None:
            require_same(found.metadata, run.identity, run.recipe, run.ctx.storage.location)
            saved = load_state(found.directory, run.ctx.device, run.state.net)
            try:
                run.state.load_state_dict(saved)
            except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                why = " ".join(f"{type(error).__name__}: {error}".split())
                raise Fault(
                    f"{run.ctx.storage.location}/{found.name}: its state is not one of this run ({why[:_MAX_REASON]}); "
                    "remove that checkpoint"
                ) from None
            run.metrics.update(found.metadata.metrics)
            run.saved_step = run.state.step
    step = run.state.step
    if int(sum_over_workers(torch.tensor([step]))) != step * run.ctx.world_size:
        raise Fault(
            f"worker {run.ctx.rank} found step {step} in storage, others another: is storage shared by all nodes?"
        )


# Batch norm's statistics after training: a plain average over many micro-batches instead of the moving average.


@torch.no_grad()
def average_statistics(run: Run, num_steps: int) -> None:
    """Replaces the running statistics of the evaluated net. All workers call it together.

    Over the images of the epoch after the last, augmented but not mixed, of `num_steps` steps (an epoch's at most);
    dropout and drop-path are off, as they are when the statistics are used.
    """
    norms = [module for module in run.evaluated.modules() if isinstance(module, _BatchNorm)]
    num_micro_batches = run.recipe.train.num_micro_batches
    momenta, counters = [norm.momentum for norm in norms], [_counter(norm).clone() for norm in norms]
    run.evaluated.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0  # the running statistics are then those of the last micro-batch
    total, num_rows = torch.zeros(sum(2 * norm.num_features for norm in norms), dtype=torch.float64), 0
    for local in islice(steps_from(run.train, run.recipe, run.ctx, run.recipe.train.total_epochs, 0), num_steps):
        table = torch.zeros((num_micro_batches, len(total)), dtype=torch.float64)
        for micro_batch, batch in local.items():
            with run.precision.autocast(run.ctx.device):
                run.evaluated(batch.images)
            table[micro_batch] = torch.cat([s.double() for norm in norms for s in _statistics(norm)]).cpu()
        total += sum_over_workers(table).sum(dim=0)
        num_rows += num_micro_batches
    averages = (total / num_rows).split([norm.num_features for norm in norms for _ in range(2)])
    for statistic, average in zip([s for norm in norms for s in _statistics(norm)], averages, strict=True):
        statistic.copy_(average)
    for norm, momentum, counter in zip(norms, momenta, counters, strict=True):
        norm.momentum = momentum
        _counter(norm).copy_(counter)


def _statistics(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def _counter(norm: _BatchNorm) -> Tensor:
    assert norm.num_batches_tracked is not None
    return norm.num_batches_tracked
