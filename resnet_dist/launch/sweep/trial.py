"""A trial as Ray Tune runs it: a function in an actor that Tune places, keeps and gives the next trial to.

Tune's controller never ends a trial from outside: it would kill the actor, and a Ray Train worker group in it outlives
that unless a dashboard runs (ray 2.60), its MLflow run has no end, its last steps are lost. The scheduler's verdict is
fetched after each report, which comes back when Tune has dealt with it, and the trial ends itself in order.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from data_prep.runtime.ray_errors import explain
from resnet_dist.config.recipe import Recipe
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.preflight import prepare
from resnet_dist.launch.sweep.light import train_light
from resnet_dist.launch.sweep.trial_exchange import TrialEnd, TrialSetup, Wishes, judged, say
from resnet_dist.launch.sweep.workers import train_with_workers
from resnet_dist.tracking.connection import settle_environment


def run_trial(config: Mapping[str, Any], setup: TrialSetup) -> None:
    """Tune's trainable. `config`: `trial` (its name in the ledger), `run` (its name in storage), `recipe`.

    Whatever goes wrong inside comes back as words; only the death of the process is an exception to Tune.
    """
    settle_environment(os.environ)  # a node may have settings of its own
    os.environ.update(setup.environment)
    with Wishes(setup.control, config["trial"]) as wishes:
        try:
            end = _train(config, setup, wishes)
        except UserError as error:
            end = TrialEnd("mistake", error=str(error))
        except Fault as error:
            end = TrialEnd("fault", error=str(error))
        except Exception as error:  # noqa: BLE001 - a trial that fails must not end the sweep
            end = TrialEnd("fault", error=explain(error).sentence)
    fields = asdict(end)
    fields["metrics"] = judged(end.metrics)
    say({"end": fields})


def _train(config: Mapping[str, Any], setup: TrialSetup, wishes: Wishes) -> TrialEnd:
    if wishes.asked():
        return TrialEnd("stopped")
    recipe = Recipe.model_validate(config["recipe"])
    prepared = prepare(recipe, setup.profile, config["run"])
    work = train_light if setup.is_light else train_with_workers
    return work(recipe, setup, config, prepared, wishes)
