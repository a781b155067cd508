"""`resnet-dist show`: a net's layout as a table, as table 1 of He et al. 2015 with the counts."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from resnet_dist.models import Summary


def print_model(title: str, summary: Summary, console: Console) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    for heading, justify in (("part", "left"), ("output", "left"), ("contents", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    table.add_column("parameters", justify="right")
    table.add_column("MMACs", justify="right")
    for part in summary.parts:
        table.add_row(part.name, part.output, part.contents, f"{part.parameters:,}", f"{part.macs / 1e6:,.1f}")
    table.add_section()
    table.add_row("all", "", "", f"{summary.parameters:,}", f"{summary.macs / 1e6:,.1f}")
    console.print(table)
