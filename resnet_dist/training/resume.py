"""Putting a run where its newest checkpoint stands: at the start of every worker group, and after a diverged step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from resnet_dist.errors import Fault
from resnet_dist.training.checkpoint import load_state, read_card, require_same
from resnet_dist.training.collectives import sum_over_workers

if TYPE_CHECKING:
    from resnet_dist.training.loop import Run


def restore(run: Run) -> None:
    """Loads the newest whole checkpoint, if there is one. All workers call it together.

    Raises:
        UserError: the checkpoint is of another recipe or of other data.
        Fault: it is damaged, or the workers found different ones.
    """
    directory = _newest(run)
    if directory is not None:
        card = read_card(directory)
        require_same(card.identity, run.identity, directory)
        run.state.load_state_dict(load_state(directory, run.ctx.device))
        run.metrics.update(card.metrics)
        run.saved_step = run.state.step
    step = run.state.step
    if int(sum_over_workers(torch.tensor([step]))) != step * run.ctx.world_size:
        raise Fault(
            f"worker {run.ctx.rank} found step {step} in storage, others another: is storage shared by all nodes?"
        )


def _newest(run: Run) -> Path | None:
    """Rank 0 looks first, because it may still be writing one; then the others."""
    found = run.ctx.restore() if run.ctx.rank == 0 else None
    sum_over_workers(torch.zeros(1))
    return found if run.ctx.rank == 0 else run.ctx.restore()
