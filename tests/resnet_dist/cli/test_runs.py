"""Runs as tables: names from a server are shown in the terminal as plain text."""

from __future__ import annotations

import io

from rich.console import Console

from resnet_dist.cli.runs import print_differences, print_runs
from resnet_dist.tracking.experiment import Difference, RunRow


def test_no_name_of_a_run_is_an_escape_sequence_or_markup() -> None:
    output = io.StringIO()
    console = Console(file=output, width=200)
    name = "[/] \x1b[2J[red]demo\r"
    row = RunRow(name, "r" * 32, "exp", "FINISHED", 0, None, {}, {"model.name": "\x1b]0;x\a"}, {})
    print_runs([row], console)
    print_differences(row, row, [Difference("\x1b[1m", "[/]", None)], console)
    assert not {"\x1b", "\a", "\r"} & set(output.getvalue())
    assert r"[/] \x1b[2J[red]demo\r" in output.getvalue()


def test_balanced_accuracy_has_a_column_where_it_differs_from_top1() -> None:
    def table(balanced: float) -> str:
        console = Console(file=io.StringIO(), width=200)
        metrics = {"val/top1": 90.0, "val/balanced_top1": balanced}
        print_runs([RunRow("r", "r" * 32, "exp", "FINISHED", 0, None, metrics, {}, {})], console)
        return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]

    assert "balanced" not in table(balanced=90.0)
    assert "balanced %" in table(balanced=61.5)
    assert "61.50" in table(balanced=61.5)
