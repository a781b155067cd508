"""What the driver tells MLflow of a run besides its numbers: at the start what it is, at the end what came of it.

None of this can fail a run: if the server does not take it, a line says so and the training goes on.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.redaction import redacted
from resnet_dist.config.loading import to_yaml
from resnet_dist.config.profile import Profile
from resnet_dist.config.recipe import Recipe
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.cluster import Node
from resnet_dist.launch.code_version import library_versions, read_code_version
from resnet_dist.launch.describe import data_inputs, description, links, run_params, run_tags
from resnet_dist.launch.events import EventLog, count_events
from resnet_dist.launch.preflight import Prepared
from resnet_dist.tracking.details import log_details, log_folder, set_tags
from resnet_dist.tracking.history import read_history
from resnet_dist.tracking.mlflow_run import RunHandle, open_run
from resnet_dist.tracking.plots import draw_plots
from resnet_dist.tracking.preparations import PreparationRun, find_preparations
from resnet_dist.tracking.sync import sync
from resnet_dist.tracking.transport import driver_environment
from resnet_dist.training.best import GROUP
from resnet_dist.training.checkpoint import glance, newest_first

Say = Callable[[str], None]


@dataclass(frozen=True)
class Record:
    """One driver's view of its MLflow run."""

    handle: RunHandle
    prepared: Prepared
    events: EventLog
    say: Say

    def end(self, outcome: str) -> None:
        """After the workers ended, however they did: sends what they could not, then plots, checkpoints and events."""
        with self.told("what the workers left unsent waits in storage"):
            sync(self.prepared.storage, self.handle.tracking_uri, limit_s=600.0)
        self.events.note(outcome)
        log = self.events.read()
        with self.told("plots, checkpoints and events are not in MLflow"):
            checkpoints = json.dumps(list_checkpoints(self.prepared), indent=1)
            log_details(self.handle, texts={"events.log": log, "checkpoints.json": checkpoints})
            set_tags(self.handle, count_events(log))
            with tempfile.TemporaryDirectory(prefix="resnet-dist-plots-") as folder:
                history = read_history(self.handle.run_dir, self.handle.run_id)
                if draw_plots(history, self.prepared.val.class_names, Path(folder)):
                    log_folder(self.handle, Path(folder), "plots")

    @contextmanager
    def told(self, consequence: str) -> Iterator[None]:
        """Turns what MLflow or storage refuse into a line for the user."""
        try:
            yield
        except (Fault, UserError, OSError) as error:
            self.say(f"warning: {consequence}: {redacted(str(error))}")


def begin_record(
    recipe: Recipe,
    profile: Profile,
    name: str,
    prepared: Prepared,
    nodes: Sequence[Node],
    say: Say,
    *,
    parent_run_id: str | None = None,
    answer_limit_s: float = 10.0,
) -> Record:
    """Opens the MLflow run of `prepared.run_dir`, or continues it, and describes it there; below `parent_run_id`, if
    it is a sweep's trial.

    Raises Fault if MLflow does not answer: nothing has been started yet.
    """
    for key, value in driver_environment().items():
        os.environ.setdefault(key, value)
    storage = prepared.storage
    storage.pull()
    texts = {
        "recipe.yaml": to_yaml(recipe),
        "profile.yaml": redacted(to_yaml(profile)),
        "class_names.json": json.dumps(prepared.val.class_names, indent=0, ensure_ascii=False) + "\n",
    }
    for file, text in texts.items():
        path = storage.folder / file
        path.write_text(text, encoding="utf-8")
        storage.publish(path)
    code = read_code_version(Path(__file__).parents[2])
    tags = run_tags(profile, prepared.identity, nodes, code)
    handle = open_run(
        profile.tracking_uri,
        profile.experiment,
        name,
        storage.folder,
        tags,
        run_params(recipe, profile),
        parent_run_id=parent_run_id,
        answer_limit_s=answer_limit_s,
        publish=storage.publish,
    )
    record = Record(handle, prepared, EventLog(storage), say)
    record.events.note(f"driver began: {tags['hardware']}, code {code.commit[:12] if code else 'not in git'}")
    facts = {"libraries": library_versions(), "nodes": [asdict(node) for node in nodes]}
    inputs = data_inputs(recipe, prepared)
    made_by: dict[str, PreparationRun] = {}
    with record.told("the run is not linked to how its data was made"):
        made_by = links(inputs, find_preparations(profile.tracking_uri, {data.digest for data in inputs}))
        set_tags(handle, {f"data_prep.{context}": run.run_id for context, run in made_by.items()})
    with record.told("the run is not described in MLflow"):
        log_details(
            handle,
            description=description(recipe, name, prepared, made_by),
            texts={
                **{f"config/{file}": text for file, text in texts.items()},
                "code/environment.json": json.dumps(facts, indent=1),
                **({"code/changes.diff": code.diff} if code and code.dirty and profile.record_changes else {}),
            },
            inputs=inputs,
        )
    return record


def list_checkpoints(prepared: Prepared) -> list[dict[str, object]]:
    """The checkpoints in storage, newest first, and the best weights: where they lie, their step and metrics.

    Only the cards are read: a damaged one is found by whoever opens it.
    """
    storage = prepared.storage
    found: list[dict[str, object]] = []
    for name in [*newest_first(storage.names()), *(f"{GROUP}/{name}" for name in newest_first(storage.names(GROUP)))]:
        card = glance(storage, name)
        if card is not None:
            path = f"{storage.location}/{name}"
            found.append({"name": name, "step": card.step, "metrics": dict(card.metrics), "path": path})
    return found
