"""`study paper`: every number of the papers' tables beside what was measured, from YAML and MLflow.

A run counts for a line if it trained that net on those data: its `model.*` and `data.dataset` are the recipe's. Other
differences (fewer epochs, another precision) are listed beside its number.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.shown import markdown_table
from resnet_dist.config.base import Section
from resnet_dist.config.loading import flatten, load_as, load_recipe, model_of_name
from resnet_dist.errors import UserError
from resnet_dist.evaluation.protocols import PAPER_SCALES
from resnet_dist.models import summarise
from resnet_dist.tracking.experiment import RunRow, list_runs

_FIGURES = Path(__file__).with_name("paper.yaml")
_RECIPES = Path(__file__).parents[1] / "recipes"
_COUNTED: tuple[PublishedMetric, ...] = ("parameters", "macs")
_IGNORED = ("seed", "eval.", "train.cpu_threads", "train.channels_last", "train.micro_batch_size", "data.decoder")
"""Keys of a recipe whose differences are not listed: they change the result no more than another seed does."""
_MAX_DIFFERENCES = 4


PublishedMetric = Literal["top1_error", "top5_error", "parameters", "macs", "figure"]


class PublishedRow(Section):
    what: str
    paper: tuple[float | str | None, ...]
    """The printed numbers, one for each of the table's metrics; null: not printed. Errors in percent."""
    net: str | None = None
    """null: another paper's net, which is not reproduced here."""
    sets: tuple[str, ...] = ()
    """Overrides of the table's recipe, besides the table's own."""
    evaluate: tuple[str, ...] = ()
    """Options of `resnet-dist evaluate` besides the table's protocol."""
    expected: str = ""
    """What to expect from the recipe, with its source, if that is not the paper's number."""


class PublishedTable(Section):
    title: str
    metrics: tuple[PublishedMetric, ...]
    rows: tuple[PublishedRow, ...]
    scale: float = 1.0
    """The unit of counts: 1e6 for millions."""
    recipe: str | None = None
    """The name of a file in `resnet_dist/recipes`."""
    sets: tuple[str, ...] = ()
    """Overrides of the recipe for all rows."""
    protocol: str = "1-crop"
    note: str = ""


class Published(Section):
    tables: tuple[PublishedTable, ...]


def load_published(path: Path) -> Published:
    """Raises UserError."""
    published = load_as(Published, path)
    for table in published.tables:
        for row in table.rows:
            if len(row.paper) != len(table.metrics):
                raise UserError(
                    f"{path}: {table.title}: {row.what}: {len(row.paper)} numbers for {len(table.metrics)} metrics"
                )
    return published


@dataclass(frozen=True)
class Line:
    """One number, as printed and as measured."""

    table: str
    what: str
    metric: PublishedMetric
    paper: str
    expected: str
    measured: str
    command: str


def paper_table(tracking_uris: Sequence[str]) -> str:
    """All numbers as Markdown, with what the runs in these MLflow stores measured. Raises UserError, Fault."""
    runs = [row for uri in tracking_uris for row in list_runs(uri)]
    published = load_published(_FIGURES)
    return as_markdown(published, [line for table in published.tables for line in lines_of(table, runs)])


def lines_of(table: PublishedTable, runs: Sequence[RunRow]) -> list[Line]:
    """A line for each printed number."""
    lines = []
    for row in table.rows:
        for metric, paper in zip(table.metrics, row.paper, strict=True):
            if paper is None:
                continue
            lines.append(
                Line(
                    table.title,
                    row.what,
                    metric,
                    str(paper),
                    row.expected or (str(paper) if row.net and table.recipe else ""),
                    _measured(table, row, metric, runs),
                    _command(table, row, metric),
                )
            )
    return lines


def as_markdown(published: Published, lines: Sequence[Line]) -> str:
    parts = [
        "# The papers' numbers",
        "",
        "Made by `resnet-dist study paper` from `resnet_dist/studies/paper.yaml` and the runs in MLflow. P: He et al. "
        "2015, P2: He et al. 2016. Errors in percent. *Expected*: of the recipe in the command. "
        "*Measured*: empty where nobody has run it; counts are made with the table.",
    ]
    for table in published.tables:
        parts += ["", f"## {table.title}", ""]
        if table.note:
            parts += [table.note, ""]
        rows = [
            [line.what, line.metric.replace("_", " "), line.paper, line.expected, line.measured, line.command]
            for line in lines
            if line.table == table.title
        ]
        parts.append(markdown_table(["net", "number", "paper", "expected", "measured", "command"], rows))
    return "\n".join(parts) + "\n"


def _measured(table: PublishedTable, row: PublishedRow, metric: PublishedMetric, runs: Sequence[RunRow]) -> str:
    if row.net is None:
        return ""
    if metric in _COUNTED:
        return f"{counted(row, metric) / table.scale:.5g}" if table.scale != 1 else f"{counted(row, metric):,}"
    wanted = _wanted(table, row)
    found = [
        (differences(wanted, run.params), -run.start_ms, run) for run in runs if _fits(table, row, metric, wanted, run)
    ]
    if not found:
        return ""
    differing, _, run = min(found, key=lambda item: (len(item[0]), item[1]))
    value = f"{run.metrics[f'val/{metric}']:.2f}"
    where = ", ".join(
        part for part in (run.tags.get("mlflow.user"), run.tags.get("hardware"), f"run {run.run_id[:8]}") if part
    )
    return f"**{value}** ({where}{'; ' if differing else ''}{', '.join(_at_most(differing))})"


def counted(row: PublishedRow, metric: PublishedMetric) -> int:
    """Parameters or multiply-adds of the row's net, at the classes and size it was made for."""
    assert row.net is not None
    options = model_of_name(row.net, row.sets).build_options() | {"num_classes": None}
    name = options.pop("name")
    summary = summarise(name, **options)
    return summary.parameters if metric == "parameters" else summary.macs


def differences(wanted: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """`key=value` of a run where it is not the recipe's; keys that an older run does not have are the default."""
    return [
        f"{key}={found[key]} instead of {value}"
        for key, value in wanted.items()
        if key in found and found[key] != value and not key.startswith(_IGNORED)
    ]


def _fits(
    table: PublishedTable, row: PublishedRow, metric: PublishedMetric, wanted: Mapping[str, str], run: RunRow
) -> bool:
    """Whether the run measured this number: it trained that net on those data to the end, under that protocol."""
    same_net = all(
        run.params.get(key, value) == value
        for key, value in wanted.items()
        if key.startswith("model.") or key == "data.dataset"
    )
    is_evaluation = run.tags.get("kind") == "evaluation"
    protocol = run.params.get("protocol", "1-crop")
    return (
        "model.name" in run.params
        and same_net
        and run.status == "FINISHED"
        and f"val/{metric}" in run.metrics
        and protocol == table.protocol
        and (_same_views(table, row, wanted, run) if is_evaluation else not row.evaluate)
    )


def _same_views(table: PublishedTable, row: PublishedRow, wanted: Mapping[str, str], run: RunRow) -> bool:
    """Whether an evaluation used the validation images, and used them as the row says, or else as the recipe does."""
    beton = Path(run.params.get("data", ""))
    if (beton.parent.name, beton.name) != (wanted["data.dataset"], "val.beton"):
        return False
    if table.protocol == "multi-scale":
        return run.params.get("scales") == str(list(PAPER_SCALES))
    asked = dict(option.removeprefix("--").split("=") for option in row.evaluate)
    return all(
        run.params.get(key, "").strip("[]") == asked.get(key, wanted[f"data.eval.{key}"]) for key in ("size", "resize")
    )


def _wanted(table: PublishedTable, row: PublishedRow) -> dict[str, str]:
    assert table.recipe is not None
    return flatten(load_recipe(_RECIPES / f"{table.recipe}.yaml", _sets(table, row)))


def _sets(table: PublishedTable, row: PublishedRow) -> list[str]:
    return [f"model.name={row.net}", *table.sets, *row.sets]


def _command(table: PublishedTable, row: PublishedRow, metric: PublishedMetric) -> str:
    if row.net is None:
        return ""
    if metric in _COUNTED:
        return f"`resnet-dist show {row.net}{_options(row.sets)}`"
    recipe = f"resnet_dist/recipes/{table.recipe}.yaml"
    commands = [f"resnet-dist train {recipe} --on PROFILE --name RUN{_options(_sets(table, row))}"]
    if table.protocol != "1-crop" or row.evaluate:
        protocol = [f"--protocol {table.protocol}"] if table.protocol != "1-crop" else []
        options = " ".join([*protocol, *row.evaluate])
        commands.append(
            f"resnet-dist evaluate runs/RUN --data data/imagenet/val.beton {options} --output OUT --experiment paper"
        )
    return "; ".join(f"`{command}`" for command in commands)


def _options(sets: Sequence[str]) -> str:
    return "".join(f" --set {shlex.quote(item)}" for item in sets)


def _at_most(differing: Sequence[str]) -> list[str]:
    more = len(differing) - _MAX_DIFFERENCES
    return [*differing[:_MAX_DIFFERENCES], *([f"{more} more"] if more > 0 else [])]
