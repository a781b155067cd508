"""The training loop: what one worker does from the first step to the last. The step itself is in `step.py`."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import ExitStack
from functools import partial
from itertools import islice

from resnet_dist.config.recipe import train_size
from resnet_dist.data.batch import Batch
from resnet_dist.data.order import eval_batch_size, micro_batch_share
from resnet_dist.storage.locations import is_url
from resnet_dist.tracking.tracker import CONFUSION, Tracker
from resnet_dist.training.checkpoint_manager import CheckpointManager
from resnet_dist.training.collectives import Requests, Vote, share_state
from resnet_dist.training.context import RunContext, TrainingJob, TrainingOutcome, WorkerResult
from resnet_dist.training.curves import CurvePoint, MetricAccumulator, Stragglers
from resnet_dist.training.device import DeviceUse
from resnet_dist.training.divergence import Divergence, evaluation_diverged, training_diverged
from resnet_dist.training.evaluate import average_statistics, evaluate, sparse_json
from resnet_dist.training.feed import OpenSplit, batches_of, open_data, steps_from
from resnet_dist.training.model import (
    Precision,
    build_classifier,
    build_optimizer,
    classifier_around,
    compile_cache,
    compile_model,
    name_nondeterministic_operation,
    recompute_blocks,
    set_backends,
)
from resnet_dist.training.reduce import PowerSgdReduction, build_reduction
from resnet_dist.training.schedule import EarlyStop
from resnet_dist.training.state import MovingAverage, TrainState
from resnet_dist.training.step import TrainStep


def run_worker(job: TrainingJob, ctx: RunContext, tracker: Tracker) -> WorkerResult:
    """Trains to the end of the plan or to a stop, from the newest checkpoint. The result is the same on all workers.

    Raises:
        UserError: the checkpoint to resume from is of another recipe or of other data.
        Fault: bad data, a damaged checkpoint, a loader that failed.
    """
    set_backends(job.recipe.train)
    with ExitStack() as stack, name_nondeterministic_operation():
        if job.recipe.train.compile and not is_url(ctx.storage.location):
            # In the run's folder: a node that joins, or a restarted group, finds what the others have compiled.
            stack.enter_context(compile_cache(ctx.storage.folder / "compile-cache"))
        trainer = Trainer(job, ctx, tracker, *open_data(job, ctx.device, stack))
        trainer.restore()
        ctx.progress(trainer.state.step, {})
        result = trainer.fit()
        trainer.checkpoints.wait()  # while the watchdog still runs: Ray waits for the rest without a limit
        return result


class Trainer:
    """One worker's training: `restore`, then `fit`.

    Everything random is a function of (seed, epoch, sample id) or (seed, step, micro-batch), everything scheduled a
    function of the step or part of the state. So training can stop after any step and resume on any number of workers,
    and the result is the same.
    """

    def __init__(self, job: TrainingJob, ctx: RunContext, tracker: Tracker, train: OpenSplit, val: OpenSplit) -> None:
        recipe, precision = job.recipe, Precision(job.recipe.train.precision)
        self.recipe, self.plan, self.ctx, self.tracker = recipe, job.plan, ctx, tracker
        self.precision = precision

        # Classifier. It and all that follows are as before step 0; `restore` brings them to where the run is.
        num_micro_batches, micro_batch_size = recipe.train.num_micro_batches, recipe.train.micro_batch_size
        classifier = build_classifier(recipe).to(ctx.device, precision.weights)
        average = (
            MovingAverage(classifier.net, recipe.train.ema, job.plan.steps_per_epoch) if recipe.train.ema else None
        )
        if job.recompute_activations:
            recompute_blocks(classifier)  # after the average was copied: a copy would share the changed `forward`
        self.classifier = classifier
        self.evaluated = classifier_around(average.net, recipe) if average else classifier

        # Step: reduction of gradients, optimizer, state
        reduction = build_reduction(
            recipe.train.reduction,
            compile_model(classifier) if recipe.train.compile else classifier,
            rank=ctx.rank,
            world_size=ctx.world_size,
            num_micro_batches=num_micro_batches,
            compression=recipe.train.gradient_compression,
        )
        self.state = TrainState(
            classifier.net,
            build_optimizer(classifier.net, recipe.optim),
            early_stop=EarlyStop() if recipe.train.early_stop else None,
            average=average,
            scaler=precision.scaler(ctx.device),
            gradient_memory=reduction if isinstance(reduction, PowerSgdReduction) else None,
        )
        self.train_step = TrainStep(
            recipe,
            self.state,
            classifier,
            reduction,
            ctx.device,
            rank=ctx.rank,
            world_size=ctx.world_size,
            micro_batches_per_launch=job.micro_batches_per_launch,
            cuda_graphs=job.cuda_graphs,
            log=ctx.log,
            warn=ctx.warn,
        )

        # Checkpoints and requests
        self.checkpoints = CheckpointManager(job, ctx, self.state)
        self.vote = Vote()

        # Curves, speed, stragglers
        self.accumulator = MetricAccumulator(
            num_micro_batches,
            micro_batch_size,
            ctx.rank,
            ctx.world_size,
            reduction.wait,
            max_loss=recipe.train.divergence.max_loss or math.inf,
            counts_replaced=recipe.data.on_bad_sample == "skip",
        )
        shares = [len(micro_batch_share(num_micro_batches, r, ctx.world_size)) for r in range(ctx.world_size)]
        self.stragglers = Stragglers(shares, micro_batch_size)
        self.device_use = DeviceUse(recipe, ctx.device, ctx.world_size)
        self.metrics: dict[str, float] = {}
        """The newest value of every metric."""

        # Data
        self.train, self.val = train, val
        self._launches: list[range] = []
        self._steps: Generator[list[Batch], None, None] | None = None
        """The rest of the epoch's steps, while an epoch is open."""

    def restore(self) -> None:
        """Continues from the newest complete checkpoint, if there is one. All workers call it together."""
        self.metrics.update(self.checkpoints.restore())

    def fit(self) -> WorkerResult:
        """Trains to the end of the plan, or until it is stopped or diverges. The result is the same on all workers."""
        while True:
            if (result := self.advance()) is not None:
                return result

    def advance(self) -> WorkerResult | None:
        """Does what is due at the current step, then trains one step. Returns a result if the run is over instead.

        What is due comes before the next step. So a run that is resumed at any step does what is missing, and the last
        step needs no special case.
        """
        due = self._do_what_is_due()
        if isinstance(due, Divergence):
            return self._go_back_or_end(due)
        if self.state.step >= self.plan.last_step:
            return self._result("finished")
        if reason := self._why_early():
            return self._result("finished", reason)
        if due.stop:
            return self._result("stopped")
        self._train_one_step()
        return None

    def _do_what_is_due(self) -> Requests | Divergence:
        """A point of the curves, an evaluation, the vote, a checkpoint: what is due of it, in this order.

        Returns what was requested, or at once that training diverged: such a state is neither evaluated nor saved.
        """
        plan, step = self.plan, self.state.step
        evaluates = plan.evaluation_due(step) and self.state.evaluated_step < step

        # Log. First, because it checks the losses and the weights.
        if plan.point_due(step) and (diverged := self._log()):
            return diverged

        # Evaluate
        if evaluates and (diverged := self._evaluate()):
            return diverged

        # Vote: the one place where requests to stop and to save are read. Signals reach the workers at different
        # moments, and if one of them stopped a step before the others, the others would hang in a collective.
        # After an evaluation, wait for the other workers: a sweep judges its trials by evaluations, and a stopped
        # trial should not train one more step. Otherwise the answer is that of the step before, without a wait.
        requests = self.vote.cast(stop=self.ctx.stop_requested(), save=self.checkpoints.due_by_clock(), wait=evaluates)

        # Save. The request is of the step before, so a checkpoint of that step has answered it already.
        save_requested = requests.save and self.checkpoints.saved_step < step - 1
        if plan.checkpoint_due(step) or save_requested or requests.stop or self._why_early():
            # A request comes at any step, but only a checked state is saved.
            if diverged := self._log():
                return diverged
            self._save()
        return requests

    def _go_back_or_end(self, diverged: Divergence) -> WorkerResult | None:
        """Goes back to the last checkpoint, to leave out the steps that broke the training; or ends the run."""
        if diverged.skips:
            skipped = self.state.skipped | diverged.skips
            self._close_epoch()
            self.restore()
            self.state.skipped = skipped  # after `restore`, which brings back the checkpoint's own
            return None
        # The training itself was fine. Resumed, the run evaluates again before it trains a step.
        if diverged.in_evaluation and self.state.is_finite():
            self._save()
        return self._result("diverged", diverged.reason)

    def _train_one_step(self) -> None:
        state, plan, step = self.state, self.plan, self.state.step
        if self._steps is None:
            self.classifier.train()  # the evaluation left it in eval mode
            self._steps = self.steps_from(*divmod(step, plan.steps_per_epoch))
            self.accumulator.restart_clock()
        with self.accumulator.waiting_for_data():
            batches = next(self._steps)  # a skipped step's too: the loader is one stream
        if step in state.skipped:
            state.step += 1
        else:
            # Measuring the gradient's norm costs a pass over it, so only the step before a point does.
            self.train_step(batches, self.learning_rate(step), self.accumulator, measure_norm=plan.point_due(step + 1))
        if state.step == plan.epoch_ends_at(step):
            self._close_epoch()

    def steps_from(self, epoch: int, first_step: int) -> Generator[list[Batch], None, None]:
        """This worker's batches, step by step, from `first_step` of `epoch` to the epoch's end."""
        image_px = train_size(self.recipe.data, epoch, self.recipe.train.total_epochs)
        launches = self.train_step.prepare(image_px, self.ctx.heartbeat)
        if self._launches != launches:
            self._launches = launches
            self.tracker.tags({"micro_batches_by_launch": "+".join(str(len(launch)) for launch in launches)})
        numbers = partial(self.train_step.numbers, image_px=image_px)
        return steps_from(self.train, self.recipe, self.ctx, epoch, first_step, launches=launches, numbers=numbers)

    def _log(self) -> Divergence | None:
        """Adds a point to the curves for the steps since the last one, if there are any."""
        step = self.state.step
        if not self.accumulator.steps:
            return None
        point = self.accumulator.take(
            self.learning_rate(step - 1), next_step=step, state_is_finite=self.state.is_finite()
        )
        diverged = None
        if point.diverged_step is not None:
            diverged = training_diverged(self.recipe.train.divergence, point.diverged_step, step, self.state.skipped)
        if diverged is None or not diverged.skips:  # otherwise these steps are done again, and so is their point
            self._report(point)
        return diverged

    def _report(self, point: CurvePoint) -> None:
        step = self.state.step
        use = self.device_use.metrics(point.metrics["speed/images_per_s"], self.plan.epoch_of(step - 1))
        newly_slow = self.stragglers.newly_slow(point.ranks)
        self.tracker.metrics({**point.metrics, **use, **self.stragglers.metrics(point.ranks)}, step)
        self.ctx.progress(step, point.metrics)
        self.metrics.update(point.metrics)
        if newly_slow:
            self.ctx.report_stragglers(newly_slow)

    def _evaluate(self) -> Divergence | None:
        """Evaluates the net; if logits or loss are not finite, the evaluation counts as not done."""
        state, recipe, ctx = self.state, self.recipe, self.ctx
        is_last, early = state.step == self.plan.last_step, recipe.train.early_stop
        may_be_last = is_last
        if early is not None and state.early_stop is not None:
            may_be_last |= state.early_stop.num_without_best + 1 >= early.patience
        share_state(state.evaluated_net, only_buffers=True)  # only rank 0 updates batch norm's running statistics
        if is_last and recipe.train.bn_statistics_steps:
            # Over images of the epoch after the last one, augmented but not mixed. A cooldown may end beyond the
            # schedule.
            epoch = max(recipe.train.total_epochs, math.ceil(state.step / self.plan.steps_per_epoch))
            steps = steps_from(self.train, recipe, ctx, epoch, 0)
            average_statistics(
                self.evaluated,
                islice(steps, recipe.train.bn_statistics_steps),
                num_micro_batches=recipe.train.num_micro_batches,
                device=ctx.device,
                precision=self.precision,
            )
            steps.close()
        evaluation = evaluate(
            self.evaluated,
            partial(batches_of, self.val, ctx, 0),
            num_samples=self.val.num_samples,
            batch_size=eval_batch_size(recipe.eval.batch_size, ctx.device.type),
            rank=ctx.rank,
            world_size=ctx.world_size,
            device=ctx.device,
            precision=self.precision,
            num_classes=recipe.model.num_classes,
            confusion=may_be_last,
        )
        if not evaluation.is_finite:
            # Not reported, because it is done again: after the steps that caused it were left out, or when the run is
            # resumed. The spool and a sweep's ledger keep the first evaluation of a step.
            return evaluation_diverged(
                recipe.train.divergence,
                state.step,
                state.skipped,
                num_not_finite=evaluation.num_not_finite,
                num_samples=evaluation.num_samples,
            )
        metrics = evaluation.metrics()
        self.tracker.metrics(metrics, state.step)
        self.metrics.update(metrics)
        state.evaluated_step = state.step  # before a checkpoint is saved: a resumed run does not evaluate again
        if recipe.schedule.kind == "plateau" and not self.plan.cooldown_steps:  # a cooldown keeps the rate at its fork
            state.plateau = state.plateau.after(evaluation.top1_error, recipe.schedule)
        if early is not None and state.early_stop is not None:
            state.early_stop = state.early_stop.after(metrics[early.metric], state.step, early)
        if evaluation.confusion is not None and (is_last or self._why_early()):
            self.tracker.text(CONFUSION, sparse_json(evaluation.confusion))
        with self.accumulator.saving():
            self.checkpoints.save_if_best(self.metrics)
        ctx.evaluated(state.step, self.metrics)
        return None

    def _why_early(self) -> str:
        """Why the run ends before its last step; "" if it does not."""
        stop = self.state.early_stop
        return "" if stop is None else stop.reason(self.recipe.train.early_stop)

    def _save(self) -> None:
        with self.accumulator.saving():
            self.checkpoints.save(self.metrics)

    def learning_rate(self, step: int) -> float:
        """Learning rate of step number `step`."""
        return self.plan.learning_rate(step, self.recipe, self.state.plateau.num_drops)

    def _close_epoch(self) -> None:
        if self._steps is not None:
            self._steps.close()
            self._steps = None

    def _result(self, outcome: TrainingOutcome, reason: str = "") -> WorkerResult:
        self._close_epoch()
        return WorkerResult(outcome, self.state.step, self.metrics, reason)
