"""The search space: parameters, search, scheduler and budget of a sweep, then the `Space` that holds them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from resnet_dist.config.base import Section, without_recorded_defaults

# ---- parameters ------------------------------------------------------------------------------------------------------


def as_number(value: Any) -> Any:
    """PyYAML reads `1e-3` as text. The recipe's schema would accept that, but a search has to compute with it."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def as_numbers(value: Any) -> Any:
    return [as_number(item) for item in value] if isinstance(value, list) else as_number(value)


Value = Annotated[Any, BeforeValidator(as_number)]
Wanted = Annotated[Any, BeforeValidator(as_numbers)]
"""A value, or a list of values of which any one is enough."""


class _Parameter(Section):
    when: dict[str, Wanted] = Field(default_factory=dict)
    """Only where other parameters have these values: `{schedule.kind: step}`, or a list of values. Otherwise the key
    keeps the recipe's value."""


class _Interval(_Parameter):
    low: float
    """Least value."""
    high: float
    """Greatest value."""

    @model_validator(mode="after")
    def _ascending(self) -> _Interval:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be less than high ({self.high:g})")
        return self


class LogUniform(_Interval):
    """Uniform in the logarithm: learning rates, weight decays."""

    kind: Literal["loguniform"]
    low: PositiveFloat
    """Least value."""


class Uniform(_Interval):
    """Any value from `low` to `high`."""

    kind: Literal["uniform"]


class QUniform(_Interval):
    """Multiples of `step` from `low` to `high`; whole numbers if `low` and `step` are."""

    kind: Literal["quniform"]
    step: PositiveFloat
    """Difference between two values next to each other."""

    @property
    def num_values(self) -> int:
        return int((self.high - self.low) / self.step + 1e-9) + 1

    def value(self, index: int) -> int | float:
        value = self.low + index * self.step
        whole = self.low.is_integer() and self.step.is_integer()
        return int(value) if whole else float(f"{value:.12g}")


class Choice(_Parameter):
    """One of a list of values."""

    kind: Literal["choice"]
    values: Annotated[list[Value], Field(min_length=1)]
    """The values, each equally likely."""


class Grid(_Parameter):
    """Every value, combined with every value of the other grids: a list, or `num` values from `low` to `high`."""

    kind: Literal["grid"]
    values: Annotated[list[Value], Field(min_length=1)] | None = None
    """The values; null: `low`, `high` and `num` say which."""
    low: float | None = None
    """Least value."""
    high: float | None = None
    """Greatest value."""
    num: PositiveInt | None = None
    """Number of values, both ends included."""
    log: bool = False
    """Equal factors instead of equal differences."""

    @model_validator(mode="after")
    def _one_way(self) -> Grid:
        ends = (self.low, self.high, self.num)
        if (self.values is None) == (ends == (None, None, None)) or (self.values is None and None in ends):
            raise ValueError("give either values, or low, high and num")
        if self.low is not None and self.high is not None:
            if self.low >= self.high:
                raise ValueError(f"low ({self.low:g}) must be less than high ({self.high:g})")
            if self.log and self.low <= 0:
                raise ValueError(f"low ({self.low:g}) must be positive with log: true")
        return self

    def all_values(self) -> list[Any]:
        if self.values is not None:
            return list(self.values)
        assert self.low is not None
        assert self.high is not None
        assert self.num is not None
        shares = [i / max(self.num - 1, 1) for i in range(self.num)]
        if self.log:
            return [float(f"{self.low * (self.high / self.low) ** share:.6g}") for share in shares]
        return [float(f"{self.low + (self.high - self.low) * share:.6g}") for share in shares]


class Derived(_Parameter):
    """`factor * (value of the key `of`) ** power`: a key that is computed from another one."""

    kind: Literal["derived"]
    of: str
    """The other key, a key of `space` or of the recipe."""
    factor: float = 1.0
    """Factor on the other key's value."""
    power: float = 1.0
    """Exponent of the other key's value; -1 divides by it."""
    round: bool = False
    """To the nearest whole number."""


Parameter = Annotated[LogUniform | Uniform | QUniform | Choice | Grid | Derived, Field(discriminator="kind")]


def listed_values(parameter: Parameter) -> list[Any] | None:
    """All values of a choice or a grid; None: it is another kind."""
    if isinstance(parameter, Choice):
        return list(parameter.values)
    return parameter.all_values() if isinstance(parameter, Grid) else None


# ---- search, scheduler, budget, resources ----------------------------------------------------------------------------


class RandomSearch(Section):
    """Point number i depends only on `seed` and i."""

    kind: Literal["random"]
    seed: NonNegativeInt = 0
    """Another seed draws other points."""


class GridSearch(Section):
    """Every combination of the parameters' values."""

    kind: Literal["grid"]


class SobolSearch(Section):
    """Scrambled Sobol points: random, but evenly spread. Best with a power of two as the number of trials."""

    kind: Literal["sobol"]
    seed: NonNegativeInt = 0
    """Another seed scrambles the points in another way."""


class TpeSearch(Section):
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011)."""

    kind: Literal["tpe"]
    seed: NonNegativeInt = 0
    """Another seed draws other points."""
    startup_trials: PositiveInt = 10
    """Random trials before the model proposes any."""


class CmaSearch(Section):
    """Optuna's CMA-ES (Hansen 2016), for two or more parameters that are numbers without conditions."""

    kind: Literal["cma"]
    seed: NonNegativeInt = 0
    """Another seed draws other points."""
    startup_trials: PositiveInt = 4
    """Random trials before the model proposes any."""


SearchConfig = Annotated[RandomSearch | GridSearch | SobolSearch | TpeSearch | CmaSearch, Field(discriminator="kind")]


class Fifo(Section):
    """Every trial runs to the end."""

    kind: Literal["fifo"]


class Asha(Section):
    """Asynchronous successive halving (Li et al. 2020): at each rung a trial continues if it is in the best
    1 / `reduction_factor` of those that have reached it."""

    kind: Literal["asha"]
    first_rung: Annotated[float, Field(gt=0, lt=1)] = 0.11
    """Share of the trial's own schedule after which it is first judged; each further rung is `reduction_factor` times
    as far. Later than Ray's default of one epoch: see tune_spaces/README.md."""
    rungs: PositiveInt = 2
    """How often a trial is judged."""
    reduction_factor: Annotated[float, Field(gt=1)] = 3
    """The best 1 / `reduction_factor` continue."""

    @model_validator(mode="after")
    def _before_the_end(self) -> Asha:
        last = self.first_rung * self.reduction_factor ** (self.rungs - 1)
        if last >= 1:
            raise ValueError(
                f"the last of {self.rungs} rungs would be at {last:g} of the schedule; lower rungs or first_rung"
            )
        return self


class Median(Section):
    """Ends a trial whose best result is below the median of the others' running means (Golovin et al. 2017)."""

    kind: Literal["median"]
    grace: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the schedule during which no trial is ended."""
    min_trials: PositiveInt = 3
    """Other trials that must have come as far before a trial can be ended."""


class HyperBand(Section):
    """HyperBand (Li et al. 2018): brackets of trials are halved together; a trial waits, saved, for its bracket."""

    kind: Literal["hyperband"]
    reduction_factor: Annotated[float, Field(gt=1)] = 3
    """The best 1 / `reduction_factor` of a bracket continue."""


Numbers = TypeVar("Numbers", bound=tuple[float, ...])


def _ascending(values: Numbers) -> Numbers:
    if list(values) != sorted(set(values)):
        raise ValueError(f"must ascend, got {list(values)}")
    return values


_Rungs = Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], AfterValidator(_ascending)]
"""Shares of a trial's own schedule."""
_Lengths = Annotated[tuple[PositiveInt, ...], AfterValidator(_ascending)]
"""Epochs of schedules."""
_Cooldown = Annotated[float, Field(gt=0, le=1)]
"""Steps of a cooldown, as a share of the steps before it."""
Carry = Literal["tau", "tau_share"]
"""What a shorter schedule keeps of weight decay. tau: rate and decay are unchanged, so that tau in epochs is.
tau_share: the rate is unchanged, and the decay such that tau is the same share of the schedule."""


class Annealed(Section):
    """Successive halving by annealed scores. At a rung every trial is forked into a cooldown, in which the rate goes
    to zero; the best 1 / `reduction_factor` by the score after it continue from where they were.

    A rung decides when all its trials have a score, so the order in which results come changes nothing.
    """

    kind: Literal["annealed"]
    rungs: Annotated[_Rungs, Field(min_length=1)] = (0.11, 0.33)
    """Shares of a trial's own schedule at which it is judged, ascending."""
    cooldown: _Cooldown = 0.2
    """Steps of a cooldown, as a share of the steps before it."""
    reduction_factor: Annotated[float, Field(gt=1)] = 3
    """The best 1 / `reduction_factor` of a rung continue."""
    smooth: bool = False
    """Judges a point's score together with the scores of points near it, because one run's is noisy."""


class Halving(Section):
    """Successive halving by whole schedules: every rung trains its points from the start with a schedule of so many
    epochs, and the best 1 / `reduction_factor` go to the next rung."""

    kind: Literal["halving"]
    rungs: Annotated[_Lengths, Field(min_length=2)]
    """Epochs, ascending; the last are the recipe's `train.total_epochs`."""
    reduction_factor: Annotated[float, Field(gt=1)] = 3
    """The best 1 / `reduction_factor` of a rung go to the next one."""
    carry: Carry = "tau"
    """What a shorter schedule keeps of weight decay. tau: rate and decay. tau_share: the rate, and a decay with which
    tau is the same share of the schedule."""
    smooth: bool = False
    """Judges a point's score together with the scores of points near it, because one run's is noisy."""


class Record(Section):
    """Stops no trial, and records for `tune compare` what the other schedulers would see."""

    kind: Literal["record"]
    cooldowns: _Rungs = ()
    """Shares of the schedule after which a cooldown forks."""
    cooldown: _Cooldown = 0.2
    """Steps of a cooldown, as a share of the steps before it."""
    shorts: _Lengths = ()
    """Epochs of whole, shorter schedules."""
    carry: Carry = "tau"
    """As in `halving`."""


SchedulerConfig = Annotated[Fifo | Asha | Median | HyperBand | Annealed | Halving | Record, Field(discriminator="kind")]


class Race(Section):
    """More seeds where they decide. When all trials are over, rounds begin: in each, the better half of the points that
    cannot be told from the best get one more seed. The race ends when only one is left."""

    max_seeds: Annotated[int, Field(ge=2)] = 8
    """Runs of one point, with those of `seeds`."""
    min_difference: NonNegativeFloat = 0.0
    """In the metric's units: a smaller difference does not matter. The race ends when no point can be better than the
    best by more."""


class Budget(Section):
    """Limits of the sweep, over all its starts. Trials in flight are saved and stopped; a larger budget
    resumes them. null: no limit."""

    wall_hours: PositiveFloat | None = None
    """Hours by the clock while the sweep's command runs."""
    trial_hours: PositiveFloat | None = None
    """Hours of computing, summed over trials. Times the hardware of one trial, this is what a cluster bills."""
    epochs: PositiveFloat | None = None
    """Epochs of training, summed over trials."""


class Resources(Section):
    """The hardware of one trial."""

    path: Literal["light", "train"] = "light"
    """light: one process, reused from trial to trial, trains it alone. train: a Ray Train worker group of the profile's
    least number of workers."""
    cpus: PositiveInt = 1
    """CPUs of a light trial; also its loader threads."""
    gpus: NonNegativeFloat = 0.0
    """GPUs of a light trial, at most 1: 0.5 puts two on one GPU."""
    max_concurrent: PositiveInt | None = None
    """null: as many trials at once as the cluster holds."""
    images_per_s: PositiveFloat | None = None
    """Images per second of one trial, measured; only the estimate of `--dry-run` needs it."""


# ---- the space -------------------------------------------------------------------------------------------------------


Metric = Literal["val/top1", "val/top5", "val/balanced_top1", "val/top1_error", "val/top5_error", "val/loss"]
_HIGHER_IS_BETTER = ("val/top1", "val/top5", "val/balanced_top1")
_WORST_SCORE = {
    **dict.fromkeys(_HIGHER_IS_BETTER, 0.0),
    "val/top1_error": 100.0,
    "val/top5_error": 100.0,
    "val/loss": 1e6,
}
LR_PER_256 = "lr_per_256"
TAU_EPOCHS = "tau_epochs"
COORDINATES = {LR_PER_256: "optim.lr", TAU_EPOCHS: "optim.weight_decay"}
"""Keys of a space that are not keys of a recipe, and the recipe's key that each decides: see `tune.coordinates`."""


class Space(Section):
    base: str
    """The recipe's file; a relative path starts at the space's own folder."""
    proxy: dict[str, Value] = Field(default_factory=dict)
    """Keys of the recipe that make a trial cheap: fewer epochs, smaller images. `best_recipe.yaml` leaves them out."""
    space: dict[str, Parameter]
    """By key of the recipe (`optim.lr`), or `lr_per_256` and `tau_epochs`."""
    search: SearchConfig = RandomSearch(kind="random")
    scheduler: SchedulerConfig = Fifo(kind="fifo")
    metric: Metric = "val/top1"
    """A metric of the last evaluation, so that trials are compared on the same images."""
    trials: PositiveInt | None = None
    """Number of points; null, for a grid only: all of them."""
    seeds: PositiveInt = 1
    """Runs of every point that reaches the end, with the recipe's seed, that plus 1, and so on: to tell progress from
    noise."""
    race: Race | None = None
    """Further seeds for the points among which these runs do not decide."""
    first_points: list[dict[str, Value]] = Field(default_factory=list)
    """Points to try before all others, known good values for example."""
    warm_start: list[str] = Field(default_factory=list)
    """Folders of earlier sweeps. Points whose trial would be the same run are not trained again, and tpe and cma learn
    from their scores; of sweeps over another proxy the best points are tried first."""
    budget: Budget = Budget()
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _consistent(self) -> Space:
        if mistakes := self._mistakes():
            raise ValueError("; ".join(mistakes))
        return self

    def _mistakes(self) -> list[str]:
        found: list[str] = []
        if "seed" in self.space:
            found.append("space.seed: a seed is not a hyper-parameter; set seeds to repeat every point")
        if not self.space:
            found.append("space is empty: name at least one key of the recipe to search, for example optim.lr")
        grid = isinstance(self.search, GridSearch)
        before: dict[str, Parameter] = {}
        for key, parameter in self.space.items():
            if grid and not isinstance(parameter, Grid | Choice | Derived):
                found.append(f"space.{key}: a grid needs kind grid, choice or derived, got {parameter.kind}")
            if not grid and isinstance(parameter, Grid):
                found.append(f"space.{key}: kind grid needs search: {{kind: grid}}; or make it a choice")
            if isinstance(self.search, CmaSearch) and (isinstance(parameter, Choice) or parameter.when):
                found.append(f"space.{key}: cma searches numbers without conditions; take tpe")
            found += _mistakes_of_when(key, parameter, before)
            if isinstance(parameter, Derived):
                found += self._mistakes_of_derived(key, parameter, before)
            before[key] = parameter
        for coordinate, decided in COORDINATES.items():
            if coordinate in self.space and decided in self.space:
                found.append(f"space: {coordinate} decides {decided}; leave one of them out")
        if all(isinstance(parameter, Derived) for parameter in self.space.values()) and self.space:
            found.append("space: all parameters are derived; one must be free")
        if isinstance(self.search, CmaSearch) and sum(not isinstance(p, Derived) for p in self.space.values()) < 2:
            found.append("search: cma needs two or more free parameters; take tpe")
        if isinstance(self.search, TpeSearch | CmaSearch) and isinstance(
            self.scheduler, HyperBand | Annealed | Halving | Record
        ):
            found.append(
                f"scheduler: {self.scheduler.kind} starts all points before any result is known, {self.search.kind} "
                "proposes them by results; use scheduler asha or median, or search sobol or random"
            )
        if self.trials is None and not grid:
            found.append("trials: is missing; only a grid knows its own number")
        if self.race and self.race.max_seeds < self.seeds:
            found.append(
                f"race.max_seeds: {self.race.max_seeds} is less than seeds ({self.seeds}), which all points get"
            )
        if self.resources.gpus > 1:
            found.append(f"resources.gpus: a light trial uses at most 1, got {self.resources.gpus:g}")
        for point in self.first_points:
            unknown = sorted(set(point) - set(self.free))
            if unknown:
                found.append(f"first_points: {', '.join(unknown)} not among the free parameters of space")
            found += [
                f"first_points: {key} {point[key]!r}, expected {expected}"
                for key, parameter in self.free.items()
                if key in point and (expected := _expected(parameter, point[key]))
            ]
        return found

    def _mistakes_of_derived(self, key: str, parameter: Derived, before: Mapping[str, Parameter]) -> list[str]:
        by = next((c for c, decided in COORDINATES.items() if decided == parameter.of and c in self.space), None)
        if by is not None:
            return [f"space.{key}.of: {parameter.of} is decided by {by}; derive from {by}"]
        later = isinstance(self.space.get(parameter.of), Derived) and parameter.of not in before
        return [f"space.{key}.of: {parameter.of} is derived too and must be before it"] if later else []

    @property
    def higher_is_better(self) -> bool:
        return self.metric in _HIGHER_IS_BETTER

    @property
    def worst_score(self) -> float:
        return _WORST_SCORE[self.metric]

    def score(self, metrics: Mapping[str, float]) -> float:
        """The space's metric; the worst there is if training diverged or did not get as far as an evaluation."""
        value = metrics.get(self.metric, math.nan)
        return value if math.isfinite(value) else self.worst_score

    def is_better(self, first: float, second: float) -> bool:
        return first > second if self.higher_is_better else first < second

    @property
    def free(self) -> dict[str, Parameter]:
        """The parameters that are not derived."""
        return {key: parameter for key, parameter in self.space.items() if not isinstance(parameter, Derived)}


def _mistakes_of_when(key: str, parameter: Parameter, before: Mapping[str, Parameter]) -> list[str]:
    found: list[str] = []
    for other, wanted in parameter.when.items():
        if other not in before:
            found.append(f"space.{key}.when: {other} is not a parameter that is before it in space")
        elif isinstance(before[other], Derived) and not isinstance(parameter, Derived):
            found.append(f"space.{key}.when: {other} is derived, which is known only after all free ones")
        else:
            found += [
                f"space.{key}.when: {other} is never {value!r}, expected {expected}"
                for value in (wanted if isinstance(wanted, list) else [wanted])
                if not isinstance(before[other], Derived) and (expected := _expected(before[other], value))
            ]
    return found


def _expected(parameter: Parameter, value: Any) -> str | None:
    """The parameter's possible values, in words; None if `value` is one, or a number outside its range."""
    listed = listed_values(parameter)
    if listed is not None:
        return None if value in listed else f"one of {', '.join(map(str, listed))}"
    return None if isinstance(value, int | float) and not isinstance(value, bool) else "a number"


MAY_CHANGE = ("trials", "seeds", "race", "budget", "resources")
"""Keys of a space that may change when the sweep resumes."""
RECORDED_DEFAULTS: Mapping[str, Any] = {}
"""Keys that were added after spaces were first hashed, see `without_recorded_defaults`."""


def sweep_hash(space: Space, base: dict[str, Any]) -> str:
    """16 hex digits of what must stay the same when a sweep resumes: all but `MAY_CHANGE`.

    `base`: the recipe as read. The folder of the space's file does not matter.
    """
    free = {"base", "warm_start", *MAY_CHANGE}
    dumped = without_recorded_defaults(space.model_dump(mode="json", exclude=free), RECORDED_DEFAULTS)
    tree: dict[str, Any] = {"space": dumped, "base": base}
    # The order of the parameters decides which random number each takes.
    tree["order"] = list(space.space)
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
