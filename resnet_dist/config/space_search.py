"""How a search space is searched: who proposes points, who ends trials early, and what may be spent."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from resnet_dist.config.base import Section


class RandomSearch(Section):
    """Point number i depends on `seed` and i alone."""

    kind: Literal["random"]
    seed: NonNegativeInt = 0


class GridSearch(Section):
    """Every combination of the parameters' values."""

    kind: Literal["grid"]


class SobolSearch(Section):
    """Scrambled Sobol points: random ones that do not clump. Powers of two are the best numbers of trials."""

    kind: Literal["sobol"]
    seed: NonNegativeInt = 0


class TpeSearch(Section):
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011)."""

    kind: Literal["tpe"]
    seed: NonNegativeInt = 0
    startup_trials: PositiveInt = 10
    """Random ones before the model is asked."""


class CmaSearch(Section):
    """Optuna's CMA-ES (Hansen 2016), for two or more parameters that are numbers without conditions."""

    kind: Literal["cma"]
    seed: NonNegativeInt = 0
    startup_trials: PositiveInt = 4


SearchConfig = Annotated[RandomSearch | GridSearch | SobolSearch | TpeSearch | CmaSearch, Field(discriminator="kind")]


class Fifo(Section):
    """Every trial runs to its end."""

    kind: Literal["fifo"]


class Asha(Section):
    """Asynchronous successive halving (Li et al. 2020): at each rung a trial goes on if it is in the best
    1 / `reduction_factor` of those that have been there."""

    kind: Literal["asha"]
    first_rung: Annotated[float, Field(gt=0, lt=1)] = 0.11
    """Share of the trial's own schedule after which it is first judged; each further rung is `reduction_factor` times
    as far. Later than Ray's default of one epoch: see tune_spaces/README.md."""
    rungs: PositiveInt = 2
    reduction_factor: Annotated[float, Field(gt=1)] = 3

    @model_validator(mode="after")
    def _before_the_end(self) -> Asha:
        last = self.first_rung * self.reduction_factor ** (self.rungs - 1)
        if last >= 1:
            raise ValueError(
                f"the last of {self.rungs} rungs would lie at {last:g} of the schedule; lower rungs or first_rung"
            )
        return self


class Median(Section):
    """Ends a trial whose best result is below the median of the others' running means (Golovin et al. 2017)."""

    kind: Literal["median"]
    grace: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the schedule during which no trial is ended."""
    min_trials: PositiveInt = 3


class HyperBand(Section):
    """HyperBand (Li et al. 2018): brackets of trials are halved together; a trial waits, saved, for its bracket."""

    kind: Literal["hyperband"]
    reduction_factor: Annotated[float, Field(gt=1)] = 3


SchedulerConfig = Annotated[Fifo | Asha | Median | HyperBand, Field(discriminator="kind")]


class Budget(Section):
    """What the whole sweep may spend, over all its starts. Trials in flight are saved and stopped; a larger budget goes
    on with them. null: no limit."""

    wall_hours: PositiveFloat | None = None
    trial_hours: PositiveFloat | None = None
    """Hours of computing, summed over trials: what a cluster bills, times the hardware of one trial."""
    epochs: PositiveFloat | None = None
    """Of training, summed over trials."""


class Resources(Section):
    """What one trial gets."""

    path: Literal["light", "train"] = "light"
    """light: one process, kept from trial to trial, trains it alone. train: a Ray Train worker group of the profile's
    least number of workers."""
    cpus: PositiveInt = 1
    """Of a light trial; also its loader threads."""
    gpus: NonNegativeFloat = 0.0
    """Of a light trial: 0.5 puts two on one GPU. At most 1."""
    max_concurrent: PositiveInt | None = None
    """null: as many trials at once as the cluster holds."""
    images_per_s: PositiveFloat | None = None
    """Of one trial, measured; only the estimate of `--dry-run` needs it."""
