"""Published figures as data: the tables of a paper, and how this project makes the same number."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from resnet_dist.config.base import Section
from resnet_dist.config.loading import load_as
from resnet_dist.errors import UserError

Metric = Literal["top1_error", "top5_error", "parameters", "macs", "figure"]


class PublishedRow(Section):
    what: str
    paper: tuple[float | str | None, ...]
    """As printed, one for each of the table's metrics; null: not printed. Errors in percent."""
    net: str | None = None
    """null: others' work, which is not made here."""
    sets: tuple[str, ...] = ()
    """Overrides of the table's recipe, besides the table's own."""
    evaluate: tuple[str, ...] = ()
    """Options of `resnet-dist evaluate` besides the table's protocol."""
    expected: str = ""
    """What the recipe should give, if that is another figure than the paper's, and who says so."""


class PublishedTable(Section):
    title: str
    metrics: tuple[Metric, ...]
    rows: tuple[PublishedRow, ...]
    scale: float = 1.0
    """What is counted is shown in this unit."""
    recipe: str | None = None
    """Name of a file of `resnet_dist/recipes`."""
    sets: tuple[str, ...] = ()
    """Overrides of the recipe, for all rows."""
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
