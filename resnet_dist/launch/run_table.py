"""Runs as tables for a terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_prep.shown import shown
from resnet_dist.tracking.listing import Difference, RunRow

_COLORS = {"FINISHED": "green", "RUNNING": "cyan", "FAILED": "red", "KILLED": "yellow"}


def print_runs(rows: Sequence[RunRow], console: Console) -> None:
    """One line for each run, newest first; says so if there is none."""
    if not rows:
        console.print("no runs")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for header in ("run", "status", "model", "top-1 %", "loss", "images/s", "started", "id"):
        table.add_column(header, no_wrap=header != "run", overflow="fold")
    for row in rows:
        table.add_row(
            _plain(row.name),
            f"[{_COLORS.get(row.status, 'white')}]{row.status}[/]",
            _plain(row.params.get("model.name", "")),
            _number(row, "val/top1", ".2f"),
            _number(row, "train/loss", ".4f"),
            _number(row, "speed/images_per_s", ".0f"),
            time.strftime("%m-%d %H:%M", time.localtime(row.start_ms / 1000)),
            row.run_id[:8],
        )
    console.print(table)


def print_differences(first: RunRow, second: RunRow, found: Sequence[Difference], console: Console) -> None:
    table = Table("", title="what differs, and every metric's last value")
    for run in (first, second):
        table.add_column(_plain(run.name))
    for pair in found:
        table.add_row(*(_plain(text or "") for text in (pair.key, pair.first, pair.second)))
    console.print(table)


def _plain(text: str) -> Text:
    """As it is, but for control characters: names come from a server, and rich would read `[...]` as markup."""
    return Text(shown(text))


def _number(row: RunRow, key: str, form: str) -> str:
    return format(row.metrics[key], form) if key in row.metrics else ""
