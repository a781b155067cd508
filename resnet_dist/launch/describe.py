"""A run in words and tables, for whoever finds it in MLflow: parameters, tags, description. Pure."""

from __future__ import annotations

import getpass
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from resnet_dist.config.loading import flatten
from resnet_dist.config.profile import Profile
from resnet_dist.config.recipe import Recipe
from resnet_dist.launch.cluster import Node
from resnet_dist.launch.code_version import CodeVersion
from resnet_dist.launch.preflight import Prepared
from resnet_dist.tracking.details import DataInput
from resnet_dist.tracking.preparations import PreparationRun
from resnet_dist.training.checkpoint import Identity

HARDWARE_KEYS = ("workers", "cpus_per_worker", "gpus_per_worker", "local_cpus", "ray_address", "resize_every_s")
"""Keys of a profile that may change each time a run goes on: tags, because MLflow never changes a parameter."""


def run_params(recipe: Recipe, profile: Profile) -> dict[str, str]:
    """The recipe's keys as they are, the profile's under `profile.`."""
    kept = {key: value for key, value in flatten(profile).items() if key.partition(".")[0] not in HARDWARE_KEYS}
    return flatten(recipe) | {f"profile.{key}": value for key, value in kept.items()}


def run_tags(profile: Profile, identity: Identity, nodes: Sequence[Node], code: CodeVersion | None) -> dict[str, str]:
    """What may differ between two starts of one run, and what MLflow's own columns show."""
    hardware = {key: value for key, value in flatten(profile).items() if key.partition(".")[0] in HARDWARE_KEYS}
    return {
        "recipe_hash": identity.recipe_hash,
        "data_digest": identity.data_digest,
        **{f"profile.{key}": value for key, value in hardware.items()},
        "hardware": hardware_summary(nodes),
        "mlflow.user": _user(),
        "mlflow.source.name": "resnet-dist train",
        "mlflow.source.type": "JOB",
        **({"mlflow.source.git.commit": code.commit, "git.dirty": str(code.dirty).lower()} if code else {}),
    }


def hardware_summary(nodes: Sequence[Node]) -> str:
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    return f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}, {cpus:g} CPUs, {gpus:g} GPUs"


def data_inputs(recipe: Recipe, prepared: Prepared) -> list[DataInput]:
    return [
        DataInput(
            name=f"{recipe.data.dataset}/{PurePosixPath(source).stem}",
            digest=manifest.digest.partition(":")[2],
            context=context,
            location=source,
            facts={
                "num_samples": manifest.num_samples,
                "num_classes": len(manifest.class_names),
                "bytes": manifest.beton_bytes,
            },
        )
        for source, manifest, context in (
            (prepared.train_source, prepared.train, "training"),
            (prepared.val_source, prepared.val, "validation"),
        )
    ]


def links(inputs: Sequence[DataInput], found: Mapping[str, PreparationRun]) -> dict[str, PreparationRun]:
    """`training` and `validation` -> the run that recorded how this data was made; `found` is by digest."""
    return {data.context: found[data.digest] for data in inputs if data.digest in found}


def description(recipe: Recipe, name: str, prepared: Prepared, made_by: Mapping[str, PreparationRun]) -> str:
    """Markdown: what is trained on what, and the commands that go on with it and check it."""
    train, folder = recipe.train, prepared.storage.location
    rows = {
        "model": f"{recipe.model.name}, {recipe.model.num_classes} classes",
        "data": f"{recipe.data.dataset}: {prepared.train.num_samples:,} train, {prepared.val.num_samples:,} validation",
        **({"data made by": ", ".join(f"[{c}]({run.page})" for c, run in made_by.items())} if made_by else {}),
        "length": f"{prepared.plan.last_step:,} steps, {prepared.plan.steps_per_epoch:,} an epoch",
        "batch": f"{train.global_batch_size} images in micro-batches of {train.micro_batch_size}, {train.precision}",
        "optimizer": f"{recipe.optim.name}, lr {recipe.optim.lr:g}, weight decay {recipe.optim.weight_decay:g}",
        "schedule": recipe.schedule.kind,
        "seed": str(recipe.seed),
        "recipe hash": f"`{prepared.identity.recipe_hash}`",
    }
    table = "".join(f"| {key} | {value} |\n" for key, value in rows.items())
    return (
        f"{recipe.model.name} on {recipe.data.dataset}.\n\n| | |\n|---|---|\n{table}\n"
        "Go on with it, or train it again under another name:\n\n"
        f"    resnet-dist train {folder}/recipe.yaml --on {folder}/profile.yaml --name {name}\n\n"
        "Evaluate its newest checkpoint:\n\n"
        f"    resnet-dist evaluate {folder} --data {prepared.val_beton}\n\n"
        "Send what an outage of MLflow kept back:\n\n"
        f"    resnet-dist tracking sync {folder} --tracking-uri URI\n"
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return "unknown"
