"""The sweep's own MLflow run, above those of its trials: what is searched, the best so far, the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from data_prep.redaction import redacted
from resnet_dist.config.loading import flatten, to_yaml, tree_to_yaml
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.cluster import Node
from resnet_dist.launch.code_version import read_code_version
from resnet_dist.launch.record import hardware_summary
from resnet_dist.storage.base import RunStorage
from resnet_dist.sweeps.prepare import PreparedSweep
from resnet_dist.sweeps.ranking import Ranking
from resnet_dist.tracking.mlflow_run import EndStatus, RunHandle, log_folder
from resnet_dist.tracking.sync import end_sweep, open_sweep
from resnet_dist.tracking.tracker import SpoolTracker

Say = Callable[[str], None]


@dataclass(frozen=True)
class SweepRecord:
    handle: RunHandle
    tracker: SpoolTracker
    say: Say

    def ended(self, ranking: Ranking, num_ended: int, numbers: dict[str, float]) -> None:
        """Points of the sweep's curves; the x-axis counts trials that have ended."""
        best = {} if ranking.best is None else {f"best/{ranking.metric}": ranking.best.score}
        self.tracker.metrics({**best, **{f"sweep/{key}": value for key, value in numbers.items()}}, num_ended)

    def log_report(self, folder: Path) -> None:
        try:
            log_folder(self.handle, folder, "report")
        except (Fault, UserError, OSError) as error:
            self.say(f"warning: the report is not in MLflow: {redacted(str(error))}")

    def end(self, trials: Iterable[RunStorage], status: EndStatus, reason: str) -> None:
        self.tracker.close()
        end_sweep(self.handle, trials, status, reason)


def begin_sweep_record(prepared: PreparedSweep, nodes: list[Node], say: Say) -> SweepRecord:
    """Opens the sweep's MLflow run, or continues it. Raises Fault if MLflow does not answer."""
    space, profile = prepared.space, prepared.profile
    texts = {
        "config/space.yaml": to_yaml(space),
        "config/base_recipe.yaml": tree_to_yaml(prepared.began.base),
        "config/profile.yaml": redacted(to_yaml(profile)),
    }
    code = read_code_version(Path(__file__).parents[2])
    handle = open_sweep(
        profile.tracking_uri,
        profile.experiment,
        prepared.name,
        prepared.sweep_dir,
        description=_description(prepared),
        tags={
            "sweep_hash": prepared.began.sweep_hash,
            "data_digest": prepared.began.data_digest,
            "hardware": hardware_summary(nodes),
            "mlflow.source.name": "resnet-dist tune",
            "mlflow.source.type": "JOB",
            **({"mlflow.source.git.commit": code.commit} if code else {}),
        },
        params={
            key: value[:500]
            for key, value in flatten(space).items()
            if key.partition(".")[0] not in ("trials", "seeds", "budget", "resources", "first_points", "warm_start")
        },
        texts=texts,
    )
    return SweepRecord(handle, SpoolTracker(prepared.sweep_dir, handle.run_id, profile.tracking_uri), say)


def _description(prepared: PreparedSweep) -> str:
    space, folder = prepared.space, prepared.sweep_dir
    searched = "".join(f"| {key} | `{_in_words(parameter.model_dump())}` |\n" for key, parameter in space.space.items())
    return (
        f"A sweep over {Path(space.base).name} for {space.metric}.\n\n| key | values |\n|---|---|\n{searched}\n"
        f"Search: {space.search.kind}, scheduler: {space.scheduler.kind}.\n\n"
        f"    resnet-dist tune report {folder}\n"
        f"    resnet-dist train {folder}/best_recipe.yaml --on PROFILE\n"
    )


def _in_words(parameter: dict[str, object]) -> str:
    kept = {key: value for key, value in parameter.items() if key != "kind" and value not in (None, {}, False)}
    return f"{parameter['kind']} " + ", ".join(f"{key} {value}" for key, value in kept.items())
