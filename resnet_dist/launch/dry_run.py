"""`--dry-run`: the resolved recipe and profile, and what would run where. Starts nothing and touches no GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from data_prep.redaction import redacted
from resnet_dist.config.loading import to_yaml
from resnet_dist.config.profile import Profile
from resnet_dist.config.recipe import Recipe
from resnet_dist.data.order import micro_batch_share
from resnet_dist.launch.cluster import Node, alive_nodes, cluster_of, ray_session, require_capacity, this_machine
from resnet_dist.launch.preflight import Prepared, prepare


def describe_run(recipe: Recipe, profile: Profile, name: str) -> str:
    """Everything `train` would do with these arguments, as text. Raises UserError as `train` would."""
    prepared = prepare(recipe, profile, name)
    if (nodes := nodes_to_come(profile)) is not None:
        require_capacity(nodes, profile, os.environ)
    run = _run(recipe, profile, name, prepared)
    return redacted(f"# recipe\n{to_yaml(recipe)}\n# profile\n{to_yaml(profile)}\n# run\n{run}")


def _left_out(recipe: Recipe, prepared: Prepared) -> str:
    """A step has a whole global batch, so an epoch leaves the rest out: other images in each epoch."""
    num_left_out = prepared.train.num_samples % recipe.train.global_batch_size
    if num_left_out == 0 or recipe.data.augmentation_repeats > 1:
        return ""
    return f", {num_left_out:,} images left out of each epoch, others each time"


def nodes_to_come(profile: Profile) -> Sequence[Node] | None:
    """Those that a run would find; None where they are still to be started (failure.wait_for_nodes_s)."""
    if cluster_of(profile, os.environ) is None:
        return [this_machine(profile, torch.cuda.device_count())]
    if profile.failure.wait_for_nodes_s:
        return None
    with ray_session(profile):
        return alive_nodes()


def _run(recipe: Recipe, profile: Profile, name: str, prepared: Prepared) -> str:
    train, plan = recipe.train, prepared.plan
    most = profile.workers.max
    shares = [len(micro_batch_share(train.num_micro_batches, rank, most)) for rank in range(most)]
    rows = {
        "name": name,
        "storage": prepared.storage.location,
        "recipe hash": prepared.identity.recipe_hash,
        "cluster": cluster_of(profile, os.environ) or f"a local Ray with {profile.local_cpus or os.cpu_count()} CPUs",
        "workers": f"{profile.workers} x ({profile.cpus_per_worker} CPUs, {profile.gpus_per_worker} GPUs)",
        "micro-batches": f"{train.num_micro_batches} of {train.micro_batch_size} images a step",
        "share of a worker": f"{shares} micro-batches of each step",
        "train samples": f"{prepared.train.num_samples:,} in {prepared.train_source}",
        "val samples": f"{prepared.val.num_samples:,} in {prepared.val_source}",
        "read from": f"each node's own copy under {profile.cache}" if profile.cache else "the paths above",
        "data digest": prepared.identity.data_digest,
        "steps per epoch": f"{plan.steps_per_epoch:,}{_left_out(recipe, prepared)}",
        "steps in all": f"{plan.last_step:,} (schedule over {plan.total_steps:,})",
        "MLflow": f"experiment {profile.experiment} at {profile.tracking_uri}",
    }
    width = max(map(len, rows))
    warnings = "".join(f"warning: {warning}\n" for warning in prepared.warnings)
    return "".join(f"{key:<{width}}  {value}\n" for key, value in rows.items()) + warnings
