"""Batch norm's statistics after training: a plain average over many micro-batches instead of the moving average.

He et al. computed those of their released models so. The micro-batches of a step fill a table, which is summed over
the workers and then in the micro-batches' order: the result does not depend on the number of workers.
"""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from resnet_dist.training.collectives import sum_over_workers
from resnet_dist.training.feed import steps_from
from resnet_dist.training.run import Run


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
