"""What the driver tells MLflow of a run besides its numbers: at the start what it is, at the end what came of it.

None of this can fail a run: if the server does not take it, a line says so and the training goes on.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from data_prep.beton.files import write_text_atomically
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
from resnet_dist.storage.base import RunStorage
from resnet_dist.tracking.details import log_details, log_folder, set_tags
from resnet_dist.tracking.history import read_history
from resnet_dist.tracking.mlflow_run import EndStatus, RunHandle, open_run, record_end, send_end_status
from resnet_dist.tracking.plots import draw_plots
from resnet_dist.tracking.preparations import PreparationRun, find_preparations
from resnet_dist.tracking.server import Unanswered
from resnet_dist.tracking.sync import sync
from resnet_dist.training.best import GROUP
from resnet_dist.training.checkpoint import glance, newest_first

Say = Callable[[str], None]
Undelivered = Fault | UserError | OSError
"""Why MLflow does not have something."""


@dataclass(frozen=True)
class Record:
    """One driver's view of its MLflow run."""

    handle: RunHandle
    prepared: Prepared
    events: EventLog
    say: Say

    def close(self, status: EndStatus, reason: str) -> None:
        """After the workers ended, however they did: what they could not send, plots, checkpoints and events, and the
        run's end. What MLflow does not take waits in storage, and one line says so.
        """
        record_end(self.handle, status, reason)
        storage = self.prepared.storage
        why = send_measured(storage, self.handle, self.prepared.val.class_names)
        if not isinstance(why, Unanswered):
            end = send_end(storage, self.handle)
            why = why or end
        if why is not None:
            self.say(f"warning: {short(why)}; {waits(storage.location, self.handle.tracking_uri)}")

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
    storage = prepared.storage
    storage.pull()
    texts = {
        "recipe.yaml": to_yaml(recipe),
        "profile.yaml": redacted(to_yaml(profile)),
        "class_names.json": json.dumps(prepared.val.class_names, indent=0, ensure_ascii=False) + "\n",
    }
    for file, text in texts.items():
        path = storage.folder / file
        write_text_atomically(path, text)
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


def send_measured(storage: RunStorage, handle: RunHandle, class_names: Sequence[str]) -> Undelivered | None:
    """Brings to MLflow what the workers left, then plots, checkpoints and events; what stopped it, if anything did."""
    return _first_failure(
        partial(sync, storage, handle.tracking_uri, limit_s=600.0, with_end=False),
        partial(_log_files, storage, handle, class_names),
    )


def send_end(storage: RunStorage, handle: RunHandle) -> Undelivered | None:
    """Brings the end to MLflow that `record_end` kept."""
    return _first_failure(partial(send_end_status, storage.folder, handle.tracking_uri, publish=storage.publish))


def _first_failure(*steps: Callable[[], object]) -> Undelivered | None:
    """Does them all, but asks a server that is away only once."""
    first: Undelivered | None = None
    for step in steps:
        try:
            step()
        except (Fault, UserError, OSError) as error:
            first = first or error
            if isinstance(error, Unanswered):
                break
    return first


def short(why: Undelivered) -> str:
    """Why, without what to do about it: that is said once, by `waits`."""
    return redacted(why.why if isinstance(why, Unanswered) else str(why))


def waits(location: str, tracking_uri: str) -> str:
    """What becomes of what MLflow did not take."""
    return (
        "what it does not have is kept in storage and goes there by "
        f"`resnet-dist tracking sync {location} --tracking-uri {redacted(tracking_uri)}`"
    )


def _log_files(storage: RunStorage, handle: RunHandle, class_names: Sequence[str]) -> None:
    log = EventLog(storage).read()
    checkpoints = json.dumps(list_checkpoints(storage), indent=1)
    log_details(handle, texts={"events.log": log, "checkpoints.json": checkpoints})
    set_tags(handle, count_events(log))
    with tempfile.TemporaryDirectory(prefix="resnet-dist-plots-") as folder:
        history = read_history(handle.run_dir, handle.run_id)
        if draw_plots(history, class_names, Path(folder)):
            log_folder(handle, Path(folder), "plots")


def list_checkpoints(storage: RunStorage) -> list[dict[str, object]]:
    """The checkpoints in storage, newest first, and the best weights: where they lie, their step and metrics.

    Only the cards are read: a damaged one is found by whoever opens it.
    """
    found: list[dict[str, object]] = []
    for name in [*newest_first(storage.names()), *(f"{GROUP}/{name}" for name in newest_first(storage.names(GROUP)))]:
        card = glance(storage, name)
        if card is not None:
            path = f"{storage.location}/{name}"
            found.append({"name": name, "step": card.step, "metrics": dict(card.metrics), "path": path})
    return found
