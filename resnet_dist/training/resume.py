"""Putting a run where its newest checkpoint stands: at the start of every worker group, and after a diverged step."""

from __future__ import annotations

import torch

from resnet_dist.errors import Fault
from resnet_dist.training.checkpoint import load_state, newest_whole, require_same
from resnet_dist.training.collectives import sum_over_workers
from resnet_dist.training.run import Run

_MAX_REASON = 200


def restore(run: Run) -> None:
    """Loads the newest whole checkpoint, if there is one. All workers call it together.

    Raises:
        UserError: the checkpoint is of another recipe or of other data.
        Fault: storage cannot be reached, or the workers found different ones.
    """
    run.ctx.settle()
    sum_over_workers(torch.zeros(1))  # nobody looks before all have written
    with newest_whole(run.ctx.storage) as found:
        if found is not None:
            require_same(found.card, run.identity, run.recipe, run.ctx.storage.location)
            saved = load_state(found.directory, run.ctx.device, run.state.net)
            try:
                run.state.load_state_dict(saved)
            except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                why = " ".join(f"{type(error).__name__}: {error}".split())
                raise Fault(
                    f"{run.ctx.storage.location}/{found.name}: its state is not one of this run ({why[:_MAX_REASON]}); "
                    "remove that checkpoint"
                ) from None
            run.metrics.update(found.card.metrics)
            run.saved_step = run.state.step
    step = run.state.step
    if int(sum_over_workers(torch.tensor([step]))) != step * run.ctx.world_size:
        raise Fault(
            f"worker {run.ctx.rank} found step {step} in storage, others another: is storage shared by all nodes?"
        )
