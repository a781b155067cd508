"""Bringing a run to MLflow whose training is over: by `train` itself, by the same command again, by `tracking sync`."""

from __future__ import annotations

from dataclasses import replace

from data_prep.redaction import redacted
from data_prep.shown import shown
from resnet_dist.config.profile import FailureConfig
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.hand_over import hand_over
from resnet_dist.launch.lease import driver_of, held
from resnet_dist.launch.preflight import Prepared
from resnet_dist.launch.record import Say, send_end, send_measured, short, waits
from resnet_dist.launch.result import RunResult, read_result, write_result
from resnet_dist.launch.trained import Trained, read_trained
from resnet_dist.storage.base import RunStorage
from resnet_dist.tracking.mlflow_run import record_end, recorded_end, recorded_run, require_run
from resnet_dist.tracking.server import Unanswered
from resnet_dist.tracking.sync import SyncReport, sync

_UNDER_WAY = "finished; its model is not in MLflow yet"


def trained_before(prepared: Prepared) -> Trained | None:
    """What an earlier command trained to the end that is still asked for, and could not bring to MLflow."""
    trained = read_trained(prepared.storage)
    if trained is None or trained.step != prepared.plan.last_step or prepared.damaged:
        return None
    return trained if trained.identity.is_of(prepared.identity) else None


def complete(trained: Trained, storage: RunStorage, tracking_uri: str, say: Say) -> RunResult:
    """Brings a finished training to MLflow: what its workers left, plots, models, their registration, its end.

    A second call, from wherever, does what is missing. Raises Fault, or UserError if the server refuses this user, with
    what was reached and how the rest gets there; nothing then says that the training failed.
    """
    storage.pull()
    handle = recorded_run(storage.folder, tracking_uri)
    if handle is None:
        raise Fault(f"{storage.location}: {trained.words}, but which MLflow run it belongs to is not there any more")
    handle = replace(handle, publish=storage.publish)
    record_end(handle, "FINISHED", _UNDER_WAY)
    try:
        require_run(handle)
        say(f"{trained.words}; metrics, plots and model go to MLflow now")
        unsent = send_measured(storage, handle, trained.identity.class_names)
        if isinstance(unsent, Unanswered):
            raise unsent
        result = hand_over(trained, storage, handle, say)
        record_end(handle, "FINISHED", "finished")
        if (why := send_end(storage, handle)) is not None:
            raise why
    except (Fault, UserError, OSError) as error:
        record_end(handle, "FINISHED", f"{_UNDER_WAY}: {short(error)}")
        if not isinstance(error, Unanswered):
            send_end(storage, handle)
        kind = UserError if isinstance(error, UserError) else Fault
        raise kind(
            f"{trained.words} ({storage.location}), but MLflow does not have all of it: {short(error)}; "
            f"{waits(storage.location, tracking_uri)}, or by the same command again"
        ) from error
    if unsent is not None:
        say(f"warning: {short(unsent)}; {waits(storage.location, tracking_uri)}")
    write_result(storage, result)
    return result


def sync_run(storage: RunStorage, tracking_uri: str, say: Say) -> str:
    """Brings to MLflow whatever it does not have of a run, as `train` would have; what came of it, in words.

    Harmless at any time: a run that a driver is at work on gets its points only. Raises as `sync` and `complete` do.
    """
    trained = read_trained(storage) if read_result(storage) is None else None
    if trained is None:
        report = sync(storage, tracking_uri, say=say)
        return _words(report, storage)
    with held(storage, FailureConfig().driver_timeout_s, say):
        result = complete(trained, storage, tracking_uri, say)
    return f"{trained.words}: run {result.run_id} is complete in MLflow and marked FINISHED, model {result.model_uri}"


def _words(report: SyncReport, storage: RunStorage) -> str:
    sent = f"sent {report.num_points:,} points" + (f" and {report.num_texts:,} texts" if report.num_texts else "")
    parts = [sent if report.num_points or report.num_texts else "nothing was waiting"]
    end = recorded_end(storage.folder)
    if end is not None:
        was = "" if report.end_status_sent else "was "
        parts.append(f"run {was}marked {end.status}" + (f" ({end.reason})" if end.reason != "finished" else ""))
    elif (driver := driver_of(storage)) is not None:
        parts.append(f"run in progress (pid {driver.pid} on {driver.host})")
    else:
        parts.append("the run has not ended: the `train` command with its name continues it")
    if report.num_rejected:
        parts.append(
            f"MLflow refused {report.num_rejected:,} things for good: see tracking/*/rejected.jsonl of the run"
        )
    if report.num_bad_lines:
        parts.append(f"{report.num_bad_lines:,} lines that no tracker wrote were passed over")
    if report.num_unreadable_bytes:
        parts.append(f"{report.num_unreadable_bytes:,} bytes at the end of the spool are no whole line")
    if report.strangers:
        parts.append(f"left alone, as of other MLflow runs: {', '.join(report.strangers)}")
    return shown(redacted("; ".join(parts)), None)
