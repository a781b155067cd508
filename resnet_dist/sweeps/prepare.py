"""What is checked of a sweep before Ray starts, and how many of its trials fit into a cluster."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.beton.class_names import difference
from data_prep.shown import joined
from resnet_dist.config.loading import load_space, read_tree, recipe_from_tree
from resnet_dist.config.profile import Profile, Workers
from resnet_dist.config.recipe import FROM_DATA, Recipe, recipe_changes
from resnet_dist.config.run_name import require_run_name
from resnet_dist.config.space import MAY_CHANGE, Annealed, Halving, Record, Space, sweep_hash
from resnet_dist.errors import UserError
from resnet_dist.launch.cluster import ClusterNode, listed, no_gpus, require_capacity, worker_bundles, worker_capacity
from resnet_dist.launch.preflight import manifest_of, prepare, require_micro_batch_each
from resnet_dist.storage.base import RunStorage
from resnet_dist.storage.locations import beside, is_url, open_storage
from resnet_dist.sweeps.analysis.next_sweep import warm_start
from resnet_dist.sweeps.forecast import PointCost, point_cost
from resnet_dist.sweeps.ledger import Began, Event, SweepState, TrialState, ledger_file, read_ledger, trial_name
from resnet_dist.sweeps.points import Builder, Point, planned_points, random_point, require_buildable, require_proxy
from resnet_dist.sweeps.scheduler import judged_epoch, rung_shares
from resnet_dist.training.checkpoint import Identity, checkpoint_name
from resnet_dist.training.schedule import plan_run

_MOST_POINTS = 1_000_000
_SAMPLES = 64
"""How many random points are checked in place of those that a model will propose."""
_DECIDE_COST = ("train.", "eval.", "fork")
"""Keys of a recipe that say how long its run is, and where it is evaluated."""


@dataclass(frozen=True)
class PreparedSweep:
    space: Space
    name: str
    sweep_dir: Path
    """The folder of ledger and report, on this machine."""
    profile: Profile
    """The user's."""
    trial_profile: Profile
    """A trial's: see `profile_of_trials`."""
    began: Began
    builder: Builder
    planned: tuple[Point, ...] | None
    warnings: tuple[str, ...] = ()
    """About the data."""

    def trial_run(self, trial: str) -> str:
        """The trial's name in storage and in MLflow."""
        return f"{self.name}-{trial}"

    def trial_storage(self, trial: str) -> RunStorage:
        return open_storage(beside(self.trial_profile.storage, self.trial_run(trial)))

    def recipe(self, trial: TrialState, trials: Mapping[str, TrialState]) -> Recipe:
        """What the trial trains.

        Args:
            trials: all, by name; a cooldown forks from one of them.
        """
        scheduler = self.space.scheduler
        if trial.kind == "short":
            assert isinstance(scheduler, Halving | Record)
            return self.builder.short(trial.point, int(trial.rung), scheduler.carry)
        if trial.kind == "cooldown":
            assert isinstance(scheduler, Annealed | Record)
            trunk = trials[trial_name(trial.number)]
            step = next(report.step for report in trunk.reports if report.epoch == trial.rung)
            checkpoint = f"{self.trial_storage(trunk.name).location}/{checkpoint_name(int(trial.rung), step)}"
            return self.builder.cooldown(trial.point, checkpoint, scheduler.cooldown)
        return self.builder.proxy(trial.point, trial.seed_number)

    def is_saved(self, trial: TrialState) -> bool:
        """Whether the trial has the checkpoint of its last report."""
        last = trial.reports[-1]
        return checkpoint_name(int(last.epoch), last.step) in self.trial_storage(trial.name).names()

    def total_epochs(self, point: Point) -> float:
        """The length of the point's schedule, or where its run ends if that is earlier."""
        return self.cost(point).length

    def cost(self, point: Point) -> PointCost:
        recipe = self.builder.proxy(point)
        plan = plan_run(recipe, self.trial_profile, self.builder.num_proxy_samples)
        length = plan.last_step / plan.steps_per_epoch
        return point_cost(self.space, length, plan.steps_per_epoch, recipe.eval.every_epochs)

    def costs(self, state: SweepState, num_points: int) -> dict[int, PointCost]:
        """By number, of all points that the sweep will try; of those that are not proposed yet, the proxy's own."""
        points = dict(enumerate(self.planned or ())) | {trial.number: trial.point for trial in state.trials.values()}
        numbers = sorted({*points, *range(num_points)})
        if any(key.startswith(_DECIDE_COST) for key in self.space.space):
            return {number: self.cost(points.get(number, {})) for number in numbers}
        return dict.fromkeys(numbers, self.cost({}))  # building thousands of recipes takes seconds


@dataclass(frozen=True)
class ReadSweep:
    """A space and its base recipe, checked as far as that needs no data."""

    space: Space
    base: dict[str, Any]
    """The base recipe's file as read."""
    proxy: Recipe
    """A trial's recipe, before the values of a point are set."""
    trial_profile: Profile


def read_sweep(file: Path, overrides: Sequence[str], profile: Profile, name: str) -> ReadSweep:
    """Reads the space and its base recipe, and checks what needs neither data nor cluster. Raises UserError."""
    space = load_space(file, overrides)
    require_run_name(name)
    ledgers = profile.sweeps or profile.storage
    if is_url(ledgers):
        raise UserError(
            f"{'sweeps' if profile.sweeps else 'storage'} {ledgers}: a sweep's ledger is appended to, which object "
            "storage cannot do; set sweeps to a folder of this machine, or storage to one that all nodes share"
        )
    base = read_tree((file.parent / Path(space.base).expanduser()).resolve())
    proxy = require_proxy(space, base, str(file))
    return ReadSweep(space, base, proxy, profile_of_trials(space, profile, beside(profile.storage, name)))


def prepare_sweep(file: Path, overrides: Sequence[str], profile: Profile, name: str) -> PreparedSweep:
    """Reads the space and checks everything that needs no cluster.

    Args:
        file: the space's YAML.
        overrides: `a.b=c`, keys of the space.
        profile: the user's.
        name: the sweep's.

    Raises UserError with every mistake of one kind at once.
    """
    read = read_sweep(file, overrides, profile, name)
    space, base, proxy, trial_profile = read.space, read.base, read.proxy, read.trial_profile
    sweep_dir = Path(profile.sweeps or profile.storage) / name
    # Builds a model and an optimizer and opens a decoder, once for all trials. With the user's storage, so that a
    # mistake leaves no folder.
    data = prepare(proxy, trial_profile.model_copy(update={"storage": profile.storage}), name)
    base = _pinned(base, space, data.recipe)
    builder = Builder(space, base, data.train.num_samples, _num_base_samples(base, profile))
    began = _began(space, base, name, sweep_dir, builder, data.identity, file)
    space = space.model_copy(update={"first_points": [dict(point) for point in began.first_points]})
    tried = {builder.key(dict(point)) for point in began.tried}
    planned = planned_points(space, space.trials or _MOST_POINTS, builder.key, tried)
    if planned == []:
        raise UserError(f"{file}: the sweeps of warm_start have tried every point of this space; change its values")
    checked = planned
    if checked is None:
        checked = [*space.first_points, *(random_point(space, 0, i) for i in range(_SAMPLES))]
    require_buildable(builder, checked, str(file))
    is_new = not ledger_file(sweep_dir).exists()
    _require_plannable(builder, trial_profile, checked, str(file), is_new=is_new)
    return PreparedSweep(
        space,
        name,
        sweep_dir,
        profile,
        trial_profile,
        began,
        builder,
        tuple(planned) if planned is not None else None,
        data.data_warnings,
    )


def profile_of_trials(space: Space, profile: Profile, storage: str) -> Profile:
    """One trial's hardware, and a folder of the sweep as its storage. Models are not registered."""
    resources = space.resources
    light = {
        "workers": Workers(min=1, max=1),
        "cpus_per_worker": resources.cpus,
        "gpus_per_worker": 1 if resources.gpus else 0,
    }
    if 0 < resources.gpus < 1 and profile.micro_batches_per_launch == "auto":
        light["micro_batches_per_launch"] = 1  # each trial would measure the free memory, and take most of it
    # Elastic groups of several trials would take each other's nodes.
    least: dict[str, Any] = {"workers": Workers(min=profile.workers.min, max=profile.workers.min)}
    if isinstance(space.scheduler, Annealed | Record):
        # A worker group trains on until it hears that it is to wait; its cooldown forks where it was evaluated.
        keep = max(profile.checkpoint.keep, 3)
        least["checkpoint"] = profile.checkpoint.model_copy(update={"every_epochs": 1, "keep": keep})
    update = light if resources.path == "light" else least
    # The sweep asks for nodes, for all its trials.
    failure = profile.failure.model_copy(update={"wait_for_nodes_s": 0.0})
    return profile.model_copy(update={**update, "storage": storage, "register_models": False, "failure": failure})


def _pinned(base: dict[str, Any], space: Space, resolved: Recipe) -> dict[str, Any]:
    """The base recipe with what `prepare` found at the sweep's start, so that all trials have the same: digests of what
    it starts from, mean and deviation of the data. Keys that the space or its proxy sets are left to the trials.
    """
    pinned, free = dict(base), (*space.space, *space.proxy)

    def set_by_trials(section: str) -> bool:
        return any(f"{key}.".startswith(f"{section}.") for key in free)

    init, fork, data = resolved.model.init, resolved.fork, pinned["data"]
    if init is not None and pinned["model"].get("init") and not set_by_trials("model.init"):
        pinned["model"] = {**pinned["model"], "init": {**pinned["model"]["init"], "digest": init.digest}}
    if fork is not None and pinned.get("fork") and not set_by_trials("fork"):
        pinned["fork"] = {**pinned["fork"], "digest": fork.digest, "step": fork.step}
    if not set_by_trials("data.dataset"):
        names = [name for name in ("mean", "std") if data.get(name) == FROM_DATA and not set_by_trials(f"data.{name}")]
        pinned["data"] = {**data, **{name: list(getattr(resolved.data, name)) for name in names}}
    return pinned


def _num_base_samples(base: Mapping[str, Any], profile: Profile) -> int | None:
    """Images of the base recipe's own data set, if it is here; a proxy may train on a subset."""
    recipe = recipe_from_tree(base, {})
    try:
        return manifest_of(beside(profile.data_root, f"{recipe.data.dataset}/train.beton")).num_samples
    except UserError:
        return None


def _began(
    space: Space, base: dict[str, Any], name: str, sweep_dir: Path, builder: Builder, data: Identity, file: Path
) -> Began:
    """The ledger's first event: that of the sweep that resumes, or a new one."""
    events: Sequence[Event] = read_ledger(sweep_dir) if ledger_file(sweep_dir).exists() else ()
    found = next((event for event in events if isinstance(event, Began)), None)
    if found is not None:
        _require_same(found, space, base, data, sweep_dir)
        return found
    folders = [(file.parent / Path(folder).expanduser()).resolve() for folder in space.warm_start]
    earlier = warm_start(builder, data.data_digest, folders)
    return Began(
        name=name,
        sweep_hash=sweep_hash(space, base),
        space=space.model_dump(mode="json"),
        base=base,
        num_proxy_samples=builder.num_proxy_samples,
        num_base_samples=builder.num_base_samples,
        data_digest=data.data_digest,
        class_names=data.class_names,
        first_points=[*space.first_points, *(point for point in earlier.first if point not in space.first_points)],
        known=earlier.known,
        tried=earlier.tried,
        time_s=time.time(),
    )


def _require_same(began: Began, space: Space, base: dict[str, Any], data: Identity, sweep_dir: Path) -> None:
    if began.data_digest != data.data_digest:
        raise UserError(
            f"{sweep_dir}: this sweep began on data {began.data_digest}, data_root now holds {data.data_digest}; use a "
            "new --name, or the data that it began with"
        )
    differ = difference(began.class_names, data.class_names, "the sweep", "data_root") if began.class_names else None
    if differ is not None:
        raise UserError(
            f"{sweep_dir}: data_root holds this sweep's images under other class names: {differ}; use a new --name, or "
            "the manifests that it began with"
        )
    if list(space.warm_start) != list(began.space.get("warm_start", [])):
        raise UserError(
            f"{sweep_dir}: warm_start is read when a sweep begins, and this one began with another; use a new --name"
        )
    if began.sweep_hash == sweep_hash(space, base):
        return
    now = space.model_dump(mode="json")
    free = {"base", "warm_start", *MAY_CHANGE}
    changed = [key for key in now if key not in free and now[key] != began.space.get(key)]
    if not changed:
        recipe = f"base recipe ({', '.join(recipe_changes(began.base, base)[:8])})"
        changed = [recipe if base != began.base else "order of the parameters in space"]
    raise UserError(
        f"{sweep_dir}: this sweep began with another {', '.join(changed)}; use a new --name, or the space that "
        f"it began with ({joined(MAY_CHANGE)} may change)"
    )


def require_judged_at_rungs(space: Space, epochs: float, eval_every_epochs: int) -> None:
    """Raises UserError if a trial would be judged after the scheduler's rung, because there is no evaluation there."""
    for share in rung_shares(space.scheduler):
        due, judged = (judged_epoch(share, epochs, every) for every in (1, eval_every_epochs))
        if judged > due:
            raise UserError(
                f"scheduler: {space.scheduler.kind} judges a trial at epoch {due:g} of {epochs:g}, but "
                f"eval.every_epochs is {eval_every_epochs} and the next evaluation is at epoch {judged:g}; set "
                "proxy: {eval.every_epochs: 1}, or a value that divides the epochs of the rungs"
            )


def require_rungs_fit(space: Space, proxy: Recipe, epochs: float) -> None:
    """Raises UserError if the trials' schedule cannot be made shorter or annealed as the scheduler says.

    Args:
        proxy: the recipe of a trial.
        epochs: those after which its run ends.
    """
    scheduler, total = space.scheduler, proxy.train.total_epochs
    where = f"scheduler: {scheduler.kind}"
    judged = [judged_epoch(share, epochs, proxy.eval.every_epochs) for share in rung_shares(scheduler)]
    if isinstance(scheduler, Annealed | Record) and len(set(judged)) < len(judged):
        raise UserError(
            f"{where}: two of its rungs are at epoch {max(judged, key=judged.count):g} of {epochs:g}; leave one out"
        )
    if isinstance(scheduler, Annealed | Record) and judged and proxy.fork and proxy.fork.schedule != "whole":
        raise UserError(
            f"{where}: a cooldown forks a run with a schedule of its own, not with fork.schedule: {proxy.fork.schedule}"
        )
    shorts: tuple[int, ...] = ()
    if isinstance(scheduler, Halving | Record):
        shorts = scheduler.rungs if isinstance(scheduler, Halving) else scheduler.shorts
    if not shorts:
        return
    if proxy.train.max_steps is not None or proxy.fork is not None or proxy.schedule.kind == "plateau":
        key = "schedule.kind plateau" if proxy.schedule.kind == "plateau" else "train.max_steps or a fork"
        raise UserError(f"{where}: with {key} there is no whole schedule to make shorter; take annealed or asha")
    if isinstance(scheduler, Halving) and shorts[-1] != total:
        raise UserError(
            f"{where}: the last of its rungs, {shorts[-1]} epochs, must be the trials' train.total_epochs, {total}; "
            "change one of them"
        )
    if isinstance(scheduler, Record) and shorts[-1] >= total:
        raise UserError(f"{where}: shorts must have fewer epochs than the trials' {total}, got {shorts[-1]}")


def _require_plannable(
    builder: Builder, profile: Profile, points: Sequence[Point], where: str, *, is_new: bool
) -> None:
    """Raises UserError unless each point's run can be planned, with a micro-batch for each worker.

    Args:
        is_new: also require evaluations at the rungs. A sweep that began before this was checked may resume.
    """
    for point in points:
        recipe: Recipe = builder.proxy(point)
        try:
            require_micro_batch_each(recipe, profile)
            plan = plan_run(recipe, profile, builder.num_proxy_samples)
            if is_new:
                epochs = plan.last_step / plan.steps_per_epoch
                require_judged_at_rungs(builder.space, epochs, recipe.eval.every_epochs)
                require_rungs_fit(builder.space, recipe, epochs)
                _require_shorts_plannable(builder, profile, point)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


def _require_shorts_plannable(builder: Builder, profile: Profile, point: Point) -> None:
    """Raises UserError unless the shortest schedule can be planned."""
    match builder.space.scheduler:
        case Halving(rungs=epochs, carry=carry) | Record(shorts=epochs, carry=carry) if epochs:
            try:
                plan_run(builder.short(point, epochs[0], carry), profile, builder.num_proxy_samples)
            except ValueError as error:
                raise UserError(f"a schedule of {epochs[0]} epochs: {error}") from None


# How many trials fit into a cluster at once. A trial holds all it needs before it starts.


def trials_at_once(space: Space, trial_profile: Profile, nodes: Sequence[ClusterNode]) -> int:
    """At most `resources.max_concurrent`."""
    resources = space.resources
    if resources.path == "light":
        # A hundredth of a GPU: 3 * 0.333 fit on one.
        fit = sum(
            int(min(node.cpus // resources.cpus, (node.gpus + 0.01) // resources.gpus if resources.gpus else 1e9))
            for node in nodes
        )
    else:
        fit = worker_capacity(list(nodes), trial_profile) // trial_profile.workers.min
    return min(fit, resources.max_concurrent or fit)


def trial_bundles(space: Space, trial_profile: Profile, num_trials: int) -> list[dict[str, float]]:
    """The resources of `num_trials` at once, or of as many as `resources.max_concurrent` allows."""
    resources = space.resources
    at_once = min(num_trials, resources.max_concurrent or num_trials)
    if resources.path == "train":
        return worker_bundles(trial_profile) * at_once
    bundle = {"CPU": float(resources.cpus), "GPU": float(resources.gpus)}
    return [{name: amount for name, amount in bundle.items() if amount} for _ in range(at_once)]


def require_trial_fits(space: Space, trial_profile: Profile, nodes: Sequence[ClusterNode]) -> None:
    """Raises UserError, with what was found, if not even one trial fits."""
    resources = space.resources
    if resources.path == "train":
        require_capacity(nodes, trial_profile)
    elif trials_at_once(space, trial_profile, nodes) == 0:
        way_out = "lower resources.cpus or resources.gpus, or add nodes"
        if resources.gpus and not any(node.gpus for node in nodes):
            way_out = f"{no_gpus(os.environ)}set resources.gpus to 0 to train on CPUs, or add nodes with GPUs"
        raise UserError(
            f"a trial asks for {resources.cpus} CPUs and {resources.gpus:g} GPUs on one node, the cluster has "
            f"{listed(nodes)}; {way_out}"
        )
