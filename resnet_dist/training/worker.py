"""One worker of a run: plain data in, loaders opened, resumed where the run stands, trained, outcome out."""

from __future__ import annotations

from contextlib import ExitStack

from resnet_dist.tracking.tracker import Tracker
from resnet_dist.training.assemble import assemble
from resnet_dist.training.backends import set_backends
from resnet_dist.training.context import RunContext
from resnet_dist.training.job import Job, WorkerResult
from resnet_dist.training.loop import fit
from resnet_dist.training.resume import restore
from resnet_dist.training.samples import open_data


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
        ctx.settle()  # while the watchdog still looks: Ray waits for what is left without a limit
        return WorkerResult(outcome, run.state.step, run.metrics, run.diverged)
