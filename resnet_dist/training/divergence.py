"""Divergence: which steps may have caused it, and whether to leave them out or to end the run. Pure decisions."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from resnet_dist.config.recipe import DivergenceConfig


class Divergence(NamedTuple):
    """Losses, weights or an evaluation that are NaN, infinite or too large. The same on all workers."""

    reason: str
    """How it was noticed, in words."""
    skips: frozenset[int]
    """Steps to leave out from now on. Empty: the run ends."""
    in_evaluation: bool = False


def training_diverged(
    policy: DivergenceConfig, diverged_step: int, next_step: int, skipped: Collection[int]
) -> Divergence:
    """Decides after a point of the curves.

    Args:
        diverged_step: first step whose loss shows it; `next_step` if the losses are fine and the state is not.
        next_step: steps done.
        skipped: steps that are left out already.
    """
    if diverged_step == next_step:
        reason = f"the weights or batch norm's running statistics are not finite after step {next_step}"
    else:
        limit = "" if policy.max_loss is None else f" or above train.divergence.max_loss ({policy.max_loss:g})"
        reason = f"the training loss is not finite{limit} at step {diverged_step + 1}"
    return Divergence(reason, steps_to_skip(policy, diverged_step, next_step, skipped))


def evaluation_diverged(
    policy: DivergenceConfig, step: int, skipped: Collection[int], *, num_not_finite: int, num_samples: int
) -> Divergence:
    """Decides after an evaluation at `step` that gave NaN or infinity for `num_not_finite` samples."""
    reason = f"the evaluation gave NaN or infinity at step {step} (for {num_not_finite} of {num_samples} samples)"
    return Divergence(reason, steps_to_skip(policy, step, step, skipped), in_evaluation=True)


def steps_to_skip(
    policy: DivergenceConfig, diverged_step: int, next_step: int, skipped: Collection[int]
) -> frozenset[int]:
    """The steps to leave out where the recipe says so; empty where the run ends instead."""
    if policy.action == "stop" or len(skipped) >= policy.max_skips:
        return frozenset()
    return frozenset(suspects(diverged_step, skipped, next_step) - set(skipped))


def suspects(diverged_step: int, skipped: Collection[int], next_step: int) -> set[int]:
    """The steps that may have broken the training.

    Args:
        diverged_step: first step whose loss shows it; `next_step` if only the state after the last step does.
        skipped: steps that are left out already.
        next_step: steps done.

    >>> suspects(5, {3}, next_step=8)
    {5}
    """
    # A step's loss is computed before its own update, so a bad update shows one step later. If the steps before
    # `diverged_step` were skipped already, or if it was not taken yet, the last step taken before it is a suspect too.
    before = diverged_step - 1
    while before in skipped:
        before -= 1
    found = {diverged_step} if diverged_step < next_step else set()
    if not found or before < diverged_step - 1:
        found |= {before} - {-1}
    return found
