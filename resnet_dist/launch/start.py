"""What a run starts from, besides its seed: weights (`model.init`), or another run's checkpoint (`fork`).

`resolve_start` finds it and pins it in the recipe by its digest. `write_start` copies it into the run's storage, where
workers find it; then the run no longer needs the original.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from operator import sub
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_prep.shown import few
from resnet_dist.config.profile import Profile
from resnet_dist.config.recipe import ForkConfig, InitConfig, ModelConfig, Recipe, recipe_changes
from resnet_dist.errors import Fault, UserError
from resnet_dist.models import build_model
from resnet_dist.storage.base import RunStorage
from resnet_dist.storage.locations import beside, is_url, open_storage, split
from resnet_dist.tracking.mlflow_run import recorded_run
from resnet_dist.training.checkpoint import (
    METADATA,
    STATE,
    CheckpointMetadata,
    Damaged,
    Identity,
    load_state,
    step_of,
    write_checkpoint,
)
from resnet_dist.training.checkpoint_manager import (
    BEST,
    START,
    StoredCheckpoint,
    newest_complete,
    newest_first,
    open_checkpoint,
)
from resnet_dist.training.model import Precision, build_classifier
from resnet_dist.weights.keys import head_of, match_keys
from resnet_dist.weights.published import is_published
from resnet_dist.weights.source import Weights, read_weights

_SHOWN = 4
"""Tensors or keys in a message."""
_EPOCH = re.compile(r"(.+)@(\d+)")
_FIXED = (
    "model",
    "data.dataset",
    "train.global_batch_size",
    "train.micro_batch_size",
    "optim.name",
    "optim.freeze",
    "optim.lr_factors",
    "optim.layer_decay",
)
"""Keys of which a fork has its parent's values: what its state and its steps mean depends on them."""


_NOT_THE_FUNCTION = {
    "name",
    "num_classes",
    "zero_init_residual",
    "gate_bias",
    "drop_path",
    "dropout",
    "shortcut_dropout",
}
"""Keys of a net that do not change what given weights compute in evaluation, or that their shapes tell."""


@dataclass(frozen=True)
class Start:
    """What was found, in the user's words and as tags of the MLflow run."""

    lines: tuple[str, ...]
    tags: Mapping[str, str]


def resolve_start(
    recipe: Recipe, profile: Profile, data: Identity, recorded: Recipe | None
) -> tuple[Recipe, Start | None]:
    """The recipe with the digest of what it starts from, and what that is; None if the run starts at random.

    Args:
        data: of its fields, the run's data and class names.
        recorded: the recipe that the run began with, if it has. Then what it began with may be gone.

    Raises UserError if what the recipe names is missing, does not fit, or has another digest.
    """
    if recipe.fork is not None:
        recipe = _with_init(recipe, None)  # the parent's, if it is in the recipe: this run has the parent's weights
        return _resolve_fork(recipe, profile, data.data_digest, recorded.fork if recorded else None)
    if recipe.model.init is not None:
        return _resolve_init(
            recipe, recipe.model.init, profile, data.class_names, recorded.model.init if recorded else None
        )
    return recipe, None


def write_start(recipe: Recipe, profile: Profile, storage: RunStorage, identity: Identity, pictures: Any) -> None:
    """Puts what a resolved recipe starts from into the run's storage, unless it is there. Raises UserError, Fault."""
    with suppress(Damaged), open_checkpoint(storage, START) as found:
        if found.metadata.identity.matches(identity):
            return
    metadata = partial(CheckpointMetadata, identity=identity, recipe=recipe.model_dump(mode="json"), files={})
    if recipe.fork is not None:
        with _parent(recipe.fork, profile) as (location, parent):
            of = parent.metadata
            _require_digest("fork.checkpoint", location, of.files[STATE], recipe.fork.digest)
            state = load_state(parent.directory, torch.device("cpu"))
        if "optimizer" not in state:
            raise _weights_alone(location)
        made = metadata(epoch=of.epoch, step=of.step, metrics=of.metrics, pictures=pictures)
    else:
        assert recipe.model.init is not None
        weights = read_weights(recipe.model.init.weights, profile.tracking_uri)
        _require_digest("model.init.weights", weights.name, weights.digest, recipe.model.init.digest)
        net = _initial_net(recipe, recipe.model.init, weights)
        state = {"net": net.state_dict()}
        made = metadata(epoch=0, step=0, metrics={}, pictures=pictures)
    storage.commit(START, partial(write_checkpoint, state=state, metadata=made), last=METADATA)


# ---- weights


def _resolve_init(
    recipe: Recipe,
    init: InitConfig,
    profile: Profile,
    class_names: tuple[str, ...],
    recorded: InitConfig | None,
) -> tuple[Recipe, Start]:
    location = _locate_weights(init.weights, profile)
    known = recorded if _is_recorded(init, location, recorded) else None
    weights = None
    if known is None or is_published(location) or Path(location).is_file():  # a run may have newer weights since
        try:
            weights = read_weights(location, profile.tracking_uri)
        except (UserError, Fault):
            if known is None:
                raise
    if weights is None:  # the run has a copy of what it began with
        assert known is not None
        init = known.model_copy(update={"head": init.head or known.head})
        return _with_init(recipe, init), Start((), _init_tags(init))
    _require_digest("model.init.weights", init.weights, weights.digest, init.digest)
    with torch.device("meta"):
        net = build_model(**recipe.model.build_options())
    matched = match_keys(weights.state, net, weights.name)
    head = init.head or ("new" if matched.head_differs or weights.class_names not in (None, class_names) else "keep")
    if head == "keep" and matched.head_differs:
        raise UserError(
            f"model.init.head: keep, but {weights.name} has a classifier for another number of classes; set head: new"
        )
    pinned = init.model_copy(update={"digest": weights.digest, "weights": location, "head": head})
    lines = [f"starts from {weights.name}, {'with a new head' if head == 'new' else 'its head too'}"]
    if matched.unexpected:
        unused = few(matched.unexpected, most=_SHOWN)
        lines.append(f"warning: {weights.name} has {unused}, which the net has no place for")
    lines += [f"warning: {note}" for note in matched.notes]
    lines += [f"warning: {weights.name} {difference}" for difference in _other_use(weights, recipe)]
    return _with_init(recipe, pinned), Start(tuple(lines), _init_tags(pinned))


def _locate_weights(weights: str, profile: Profile) -> str:
    """Published weights and URLs as they are; a path, or the name of a run under `storage`, as an absolute path."""
    if ":" in weights:
        return weights
    path, run = Path(weights).expanduser(), beside(profile.storage, weights)
    if is_url(run) or path.exists() or not Path(run).exists():
        return str(path.absolute())
    return str(Path(run).absolute())


def _is_recorded(init: InitConfig, location: str, recorded: InitConfig | None) -> bool:
    """Whether the run began with the weights that the recipe names, as far as their name and digest say."""
    if recorded is None or init.digest not in (None, recorded.digest):
        return False
    return recorded.weights in (init.weights, location) or Path(recorded.weights).name == init.weights


def _other_use(weights: Weights, recipe: Recipe) -> Iterator[str]:
    """How the weights were used where they were trained, if this run uses them otherwise, as far as is known."""
    if weights.recipe is not None:
        model, mean, std = weights.recipe.model, weights.recipe.data.mean, weights.recipe.data.std
    elif weights.published is not None:
        model = ModelConfig.model_validate({**weights.published.model, "num_classes": 1})
        mean, std = weights.published.mean, weights.published.std
    else:
        return
    nets = [net.build_options() for net in (model, recipe.model)]
    theirs, ours = ({key: net[key] for key in net.keys() - _NOT_THE_FUNCTION} for net in nets)
    if changes := recipe_changes(theirs, ours):
        yield f"is of a net that computes something else: {few((f'model.{c}' for c in changes), most=_SHOWN)}"
    for name, given, own in (("mean", mean, recipe.data.mean), ("std", std, recipe.data.std)):
        if not isinstance(given, str) and not isinstance(own, str) and max(map(abs, map(sub, given, own))) > 1:
            yield f"was trained with data.{name} {list(given)}, this recipe has {list(own)}"


def _initial_net(recipe: Recipe, init: InitConfig, weights: Weights) -> nn.Module:
    """The recipe's net with the weights, and the classifier that the seed gives where `head` is new."""
    net = build_classifier(recipe).to(Precision(recipe.train.precision).weights).net
    found = match_keys(weights.state, net, weights.name).state
    head = f"{head_of(net)}."
    kept = {name: value for name, value in found.items() if init.head == "keep" or not name.startswith(head)}
    net.load_state_dict({**net.state_dict(), **kept})
    return net


def _with_init(recipe: Recipe, init: InitConfig | None) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"init": init})})


def _init_tags(init: InitConfig) -> dict[str, str]:
    return {"init.weights": init.weights, "init.digest": init.digest or ""}


# ---- another run's checkpoint


def _resolve_fork(
    recipe: Recipe, profile: Profile, data_digest: str, recorded: ForkConfig | None
) -> tuple[Recipe, Start]:
    fork = recipe.fork
    assert fork is not None
    if fork.schedule == "cooldown":  # nothing but its length ends it
        train = recipe.train.model_copy(update={"early_stop": None, "max_steps": None})
        recipe = recipe.model_copy(update={"train": train})
    location, epoch = _locate(fork, profile)
    known = None
    if recorded is not None and fork.digest in (None, recorded.digest):
        run, name = split(recorded.checkpoint)
        if location == recorded.checkpoint or (location == run and epoch in (None, _epoch_of(name))):
            # The parent may have newer ones since.
            known = recorded.model_copy(update={"schedule": fork.schedule, "cooldown": fork.cooldown})
    try:
        with _parent(known or fork, profile) as (location, parent):
            metadata = parent.metadata
    except (UserError, Fault):
        if known is None:
            raise
        # The run has a copy of the checkpoint; the original may be gone.
        return recipe.model_copy(update={"fork": known}), Start((), {"fork.checkpoint": known.checkpoint})
    _require_digest("fork.checkpoint", location, metadata.files[STATE], fork.digest)
    changes = _require_forkable(recipe, data_digest, metadata, location)
    pinned = {"checkpoint": location, "digest": metadata.files[STATE], "step": metadata.step}
    parent_run = recorded_run(open_storage(split(location)[0]), profile.tracking_uri)
    tags = {"fork.checkpoint": location} | ({"fork.run_id": parent_run.run_id} if parent_run else {})
    line = f"continues {location} (step {metadata.step}) with {few(changes, most=_SHOWN) or 'the same recipe'}"
    return recipe.model_copy(update={"fork": fork.model_copy(update=pinned)}), Start((line,), tags)


def _require_forkable(recipe: Recipe, data_digest: str, parent: CheckpointMetadata, location: str) -> list[str]:
    """What the fork changes of its parent's recipe. UserError if its state would mean something else then."""
    changes = recipe_changes({**parent.recipe, "fork": None}, {**recipe.model_dump(mode="json"), "fork": None})
    changes = [change for change in changes if not change.startswith("model.init")]
    fixed = [change for change in changes if any(f"{change.split()[0]}.".startswith(f"{key}.") for key in _FIXED)]
    if parent.identity.data_digest != data_digest:
        fixed.append(f"data {parent.identity.data_digest} -> {data_digest}")
    if fixed:
        raise UserError(
            f"fork: {few(fixed, most=_SHOWN)}: a fork keeps these of its parent; to start from its weights instead, "
            f"set model.init.weights={location}"
        )
    return changes


def _locate(fork: ForkConfig, profile: Profile) -> tuple[str, int | None]:
    """Path or URL of the run or checkpoint, and the epoch after `@`."""
    match = _EPOCH.fullmatch(fork.checkpoint)
    text, epoch = (match[1], int(match[2])) if match else (fork.checkpoint, None)
    path = Path(text).expanduser()
    if not is_url(text) and not path.exists() and not path.is_absolute():
        text = beside(profile.storage, text)
    return text.rstrip("/") if is_url(text) else str(Path(text).expanduser().absolute()), epoch


@contextmanager
def _parent(fork: ForkConfig, profile: Profile) -> Iterator[tuple[str, StoredCheckpoint]]:
    """The checkpoint that a fork continues, verified, and where it is. Raises UserError if there is none, Fault."""
    location, epoch = _locate(fork, profile)
    run, name = split(location)
    if BEST in (name, split(run)[1]):
        raise _weights_alone(location)
    if step_of(name) is None:
        run, name = location, ""
    storage = open_storage(run)
    names = newest_first(storage.names())
    if epoch is not None:
        of_epoch = [known for known in names if _epoch_of(known) == epoch]
        if not of_epoch:
            epochs = ", ".join(str(number) for number in sorted(set(map(_epoch_of, names)))) or "none"
            raise UserError(f"fork: {run} has no checkpoint of epoch {epoch}, but of {epochs} (checkpoint.keep)")
        name = of_epoch[-1]  # the first of the epoch: others are from the middle of the next one
    if name and name not in names:
        raise UserError(f"fork: {location}: there is no such checkpoint")
    with open_checkpoint(storage, name) if name else newest_complete(storage) as found:
        if found is None:
            raise UserError(
                f"fork: {location} is not a run with a checkpoint; name one, as path, URL or name under "
                f"{profile.storage}"
            )
        yield f"{run}/{found.name}", found


def _weights_alone(location: str) -> UserError:
    return UserError(
        f"fork: {location} has weights alone, without the optimizer's state; to start from them, set "
        f"model.init.weights={location} instead"
    )


def _epoch_of(checkpoint: str) -> int:
    return int(checkpoint.partition("=")[2].partition("-")[0])


# ---- both


def _require_digest(key: str, name: str, found: str, expected: str | None) -> None:
    if expected not in (None, found):
        raise UserError(
            f"{key}: {name} has digest {found}, the recipe says {expected}: it changed; give the right one, or set "
            f"{key.rpartition('.')[0]}.digest to null under a new --name"
        )
