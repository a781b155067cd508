"""Published figures as data: the tables of a paper, and how this project makes the same number."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from resnet_dist.config.base import Section
from resnet_dist.config.loading import load_as

Metric = Literal["top1_error", "top5_error", "parameters", "macs", "figure"]


PAPER_SCALES = (224, 256, 384, 480, 640)
"""Shorter sides of the images in "multi-scale" evaluations, px: He et al. 2015, section 3.4."""


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

    @model_validator(mode="after")
    def _as_many_as_metrics(self) -> PublishedTable:
        for row in self.rows:
            if len(row.paper) != len(self.metrics):
                raise ValueError(f"{row.what}: {len(row.paper)} numbers for {len(self.metrics)} metrics")
        return self


class Published(Section):
    tables: tuple[PublishedTable, ...]


def load_published(path: Path) -> Published:
    """Raises UserError."""
    return load_as(Published, path)
