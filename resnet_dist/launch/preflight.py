"""Checks everything possible before any worker starts, so that a user's mistake costs no GPU time; `--dry-run`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from data_prep.beton.manifest import Manifest, load_manifest, read_manifest
from data_prep.beton.stage import staged_path
from data_prep.redaction import redacted
from resnet_dist.config.loading import recipe_of, to_yaml
from resnet_dist.config.profile import Profile
from resnet_dist.config.recipe import FROM_DATA, Recipe, recipe_hash
from resnet_dist.config.run_name import require_run_name
from resnet_dist.data.checks import (
    NO_CLASS_NAMES,
    check_overlap,
    data_digest,
    empty_classes,
    lopsided,
    mixed_pictures,
    other_pictures,
    picture_settings,
    require_classes,
    require_same_classes,
    with_class_weights,
    with_statistics,
)
from resnet_dist.data.crops import require_sides
from resnet_dist.data.decoder import open_kernel
from resnet_dist.data.node_cache import NodeCache
from resnet_dist.data.order import micro_batch_share, sampling_weights
from resnet_dist.errors import UserError
from resnet_dist.launch.cluster import ClusterNode, alive_nodes, cluster_of, ray_session, require_capacity, this_machine
from resnet_dist.launch.start import Start, resolve_start
from resnet_dist.models import build_model
from resnet_dist.storage.base import RUN_RESULT, SWEEP_LEDGER, RunStorage
from resnet_dist.storage.locations import beside, open_storage
from resnet_dist.training.checkpoint import Identity, require_same
from resnet_dist.training.checkpoint_manager import START, newest_complete, newest_first, read_metadata, was_complete
from resnet_dist.training.context import TrainingJob
from resnet_dist.training.schedule import RunPlan, plan_run


@dataclass(frozen=True)
class Prepared:
    """A run that can start: its recipe and profile, its data, its length."""

    recipe: Recipe
    profile: Profile
    name: str
    train_source: str
    """A path or a URL."""
    val_source: str
    train_beton: Path
    """Where workers read it: the source itself, or its path in the cache of their node."""
    val_beton: Path
    train: Manifest
    val: Manifest
    identity: Identity
    plan: RunPlan
    storage: RunStorage
    warnings: tuple[str, ...]
    damaged: tuple[str, ...] = ()
    """The names of damaged checkpoints: those newer than the newest complete one, or all if none is complete."""
    lost: tuple[str, ...] = ()
    """Those of `damaged` that were complete once, if none is complete now."""
    data_warnings: tuple[str, ...] = ()
    """The `warnings` that are about the data."""
    start: Start | None = None
    """What the run starts from, if that is not random."""
    has_begun: bool = False
    """Whether there is a checkpoint to resume from."""

    @property
    def node_cache(self) -> NodeCache | None:
        profile, sources = self.profile, (self.train_source, self.val_source)
        return None if profile.cache is None else NodeCache(sources, Path(profile.cache), profile.cache_timeout_s)

    @property
    def run_dir(self) -> Path:
        """The run's small files on this machine."""
        return self.storage.folder

    def job(self) -> TrainingJob:
        """What every worker of the run is sent."""
        return TrainingJob(
            recipe=self.recipe,
            plan=self.plan,
            identity=self.identity,
            train_beton=self.train_beton,
            val_beton=self.val_beton,
            pictures=picture_settings(self.train),
            loader_threads=self.profile.cpus_per_worker,
            recompute_activations=self.profile.recompute_activations,
            micro_batches_per_launch=None if (most := self.profile.micro_batches_per_launch) == "auto" else most,
            cuda_graphs=self.profile.cuda_graphs,
            save_every_s=60 * minutes if (minutes := self.profile.checkpoint.every_minutes) else None,
        )


def prepare(recipe: Recipe, profile: Profile, name: str) -> Prepared:
    """Resolves the recipe (`from_data` and `balanced` become numbers, what it starts from a digest) and checks
    everything that needs no cluster; touches no GPU and starts nothing. Raises UserError."""
    require_run_name(name)
    require_micro_batch_each(recipe, profile)
    require_compatible(recipe, profile)
    require_buildable(recipe)
    folder = beside(profile.data_root, recipe.data.dataset)
    train_source, val_source = f"{folder}/train.beton", f"{folder}/val.beton"
    try:
        train, val = manifest_of(train_source), manifest_of(val_source)
    except UserError as error:
        raise UserError(f"{error} (dataset {recipe.data.dataset} of data_root {profile.data_root})") from None
    require_same_classes(train, val, folder)
    storage = open_storage(beside(profile.storage, name))
    recorded = _recorded(storage)
    recipe = with_statistics(_with_recorded_statistics(recipe, recorded), train, train_source)
    recipe = with_class_weights(recipe, train)
    for source, manifest in ((train_source, train), (val_source, val)):
        require_fitting_data(recipe, manifest, source)
    if recipe.data.sampling is not None:
        sampling_weights(recipe.data.sampling, train.class_names, train.class_counts)  # its mistakes, before the start
    shared = check_overlap(train, val, train_source, val_source, allow=recipe.data.allow_overlap)
    storage.require_writable()
    identity = Identity("", data_digest(train, val), train.class_names)
    recipe, start = resolve_start(recipe, profile, identity, recorded)
    identity = replace(identity, recipe_hash=recipe_hash(recipe))
    lost: tuple[str, ...] = ()
    with newest_complete(storage) as found:
        has_begun = found is not None
        if found is not None:
            require_same(found.metadata, identity, recipe, storage.location)
            damaged = found.damaged
            warnings = [f"{warning}; the checkpoint before it is used" for warning in found.warnings]
            if not found.metadata.identity.class_names:
                warnings.append(f"{storage.location}/{found.name}: {NO_CLASS_NAMES}")
        else:
            damaged = tuple(newest_first(storage.names()))
            lost = tuple(name for name in damaged if was_complete(storage, name))
            states = {
                name: "is damaged" if name in lost else "was never completely written; ignored" for name in damaged
            }
            warnings = [f"{storage.location}/{name}: {state}" for name, state in states.items()]
    of_data = (
        shared,
        empty_classes(train, train_source),
        empty_classes(val, val_source),
        lopsided(recipe, train, train_source),
        mixed_pictures(train, train_source),
        mixed_pictures(val, val_source),
        other_pictures(picture_settings(train), picture_settings(val), "train.beton", "val.beton"),
    )
    data_warnings = [warning for warning in of_data if warning is not None]
    if (warning := frozen_at_random(recipe)) is not None:
        warnings.append(warning)
    plan = plan_run(recipe, profile, train.num_samples)
    return Prepared(
        recipe=recipe,
        profile=profile,
        name=name,
        train_source=train_source,
        val_source=val_source,
        train_beton=read_place(train_source, train, profile),
        val_beton=read_place(val_source, val, profile),
        train=train,
        val=val,
        identity=identity,
        plan=plan,
        storage=storage,
        warnings=(*warnings, *data_warnings),
        damaged=damaged,
        lost=lost,
        data_warnings=tuple(data_warnings),
        start=start,
        has_begun=has_begun,
    )


def _recorded(storage: RunStorage) -> Recipe | None:
    """The resolved recipe that the run in `storage` began with."""
    for name in (*newest_first(storage.names()), START):
        metadata = read_metadata(storage, name)
        if metadata is not None:
            with suppress(UserError):  # of another version: `require_same` says so
                return recipe_of(metadata.recipe, name)
    return None


def frozen_at_random(recipe: Recipe) -> str | None:
    """A warning if the recipe keeps something as it is that no training has made."""
    keys = [
        *(["optim.freeze"] if recipe.optim.freeze else []),
        *(["train.freeze_bn_statistics"] if recipe.train.freeze_bn_statistics else []),
    ]
    if not keys or recipe.model.init is not None or recipe.fork is not None:
        return None
    return (
        f"{' and '.join(keys)}: without model.init, random weights and statistics stay as they are; set model.init, or "
        "train everything"
    )


def _with_recorded_statistics(recipe: Recipe, recorded: Recipe | None) -> Recipe:
    """The mean and deviation that the run began with, where the recipe takes the data's: the manifest may have been
    written again since."""
    names = [name for name in ("mean", "std") if recorded and getattr(recipe.data, name) == FROM_DATA]
    known = {name: getattr(recorded.data, name) for name in names if recorded}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=known)})


def require_trainable(prepared: Prepared) -> None:
    """UserError for a sweep's folder, and for a run whose checkpoints are all damaged.

    Not in `prepare`: a sweep checks its own folder with that, and a run that is complete needs no checkpoint.
    """
    where = prepared.storage.location
    if prepared.storage.read(SWEEP_LEDGER) is not None:  # a run in it would write into the sweep's MLflow run
        raise UserError(f"{where}: is a sweep's folder; give another --name")
    if prepared.lost:  # to begin again would hide that a training was lost
        raise UserError(
            f"{where}: none of its {len(prepared.damaged)} checkpoints is complete (newest: {prepared.lost[0]}); see "
            f"`resnet-dist doctor {where}`, restore one from a copy, or use another --name to start over"
        )


def manifest_of(source: str) -> Manifest:
    """The manifest of a beton on disk, whose size is checked too, or behind a URL. Raises UserError."""
    return read_manifest(source) if "://" in source else load_manifest(Path(source))


def read_place(source: str, manifest: Manifest, profile: Profile) -> Path:
    return staged_path(source, manifest, Path(profile.cache)) if profile.cache else Path(source)


def require_compatible(recipe: Recipe, profile: Profile) -> None:
    if profile.recompute_activations and recipe.train.compile:
        raise UserError(
            "the profile's recompute_activations and the recipe's train.compile exclude each other; set one to false"
        )


def require_micro_batch_each(recipe: Recipe, profile: Profile) -> None:
    train = recipe.train
    if profile.workers.max > train.num_micro_batches:
        raise UserError(
            f"the profile asks for {profile.workers} workers, a step of this recipe has {train.num_micro_batches} "
            f"micro-batches ({train.global_batch_size} / {train.micro_batch_size}) and every worker needs one; "
            f"set workers to {train.num_micro_batches} or less"
        )


def require_buildable(recipe: Recipe) -> None:
    """Builds the model without memory for its weights and opens the decoder, to raise their errors now."""
    if recipe.data.decoder == "native":
        open_kernel(recipe.data.decoder, num_threads=1, max_image_bytes=0)
    require_net(recipe)


def require_net(recipe: Recipe) -> None:
    with torch.device("meta"), _NoValues():
        build_model(**recipe.model.build_options())


class _NoValues(TorchFunctionMode):
    """Tensors without memory need no random values. PyTorch 2.14 would import its compiler, which takes seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in (Tensor.normal_, Tensor.uniform_) else func(*args, **(kwargs or {}))


def require_fitting_data(recipe: Recipe, manifest: Manifest, beton: Path | str) -> None:
    require_classes(recipe, manifest, beton)
    require_sides(beton, manifest, recipe.data.train)


def describe_run(recipe: Recipe, profile: Profile, name: str) -> str:
    """Describes what `train` would do with these arguments. Raises UserError as `train` would."""
    prepared = prepare(recipe, profile, name)
    if prepared.storage.read(RUN_RESULT) is None:  # `train` only shows the result of a complete run
        require_trainable(prepared)
    if (nodes := nodes_to_come(profile)) is not None:
        require_capacity(nodes, profile, os.environ)
    run = _run(prepared.recipe, profile, name, prepared)
    return redacted(f"# recipe\n{to_yaml(prepared.recipe)}\n# profile\n{to_yaml(profile)}\n# run\n{run}")


def _times_shown(recipe: Recipe, prepared: Prepared) -> str:
    """How often an epoch shows an image, as the end of a line. A step has a full global batch, so without sampling each
    epoch leaves out the rest, which differs from epoch to epoch."""
    data, sampling = prepared.train, recipe.data.sampling
    if sampling is not None:
        weights = sampling_weights(sampling, data.class_names, data.class_counts)
        num_images = prepared.plan.steps_per_epoch * recipe.train.global_batch_size / recipe.data.augmentation_repeats
        times = [
            num_images * int(w) / int(weights.sum()) / n for w, n in zip(weights, data.class_counts, strict=True) if n
        ]
        return f", sampled by class: an image is shown {min(times):.3g} to {max(times):.3g} times on average"
    num_left_out = data.num_samples % recipe.train.global_batch_size
    if num_left_out == 0 or recipe.data.augmentation_repeats > 1:
        return ""
    return f", {num_left_out:,} images left out of each epoch, different ones each time"


def _steps(plan: RunPlan) -> str:
    first, begins = plan.first_step, plan.schedule_start
    schedule = f"schedule over {f'{begins:,} to ' if begins else ''}{plan.total_steps:,}"
    if plan.cooldown_steps:
        schedule = f"cooldown over {plan.cooldown_steps:,}"
    return f"{f'{first:,} to ' if first else ''}{plan.last_step:,} ({schedule})"


def nodes_to_come(profile: Profile) -> Sequence[ClusterNode] | None:
    """The nodes that a run would find; None if they are still to be started (failure.wait_for_nodes_s)."""
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
        **({"start": prepared.start.lines[0]} if prepared.start and prepared.start.lines else {}),
        "steps per epoch": f"{plan.steps_per_epoch:,}{_times_shown(recipe, prepared)}",
        "steps in all": _steps(plan),
        "MLflow": f"experiment {profile.experiment} at {profile.tracking_uri}",
    }
    width = max(map(len, rows))
    warnings = "".join(f"warning: {warning}\n" for warning in prepared.warnings)
    return "".join(f"{key:<{width}}  {value}\n" for key, value in rows.items()) + warnings
