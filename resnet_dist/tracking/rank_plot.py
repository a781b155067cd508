"""The plot that shows which worker held up the others, and with what: computing, or waiting for its images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, NamedTuple

from resnet_dist.tracking.figures import finite, new_figure, save, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Mapping[str, Sequence[tuple[int, float]]]
_MAX_NAMED = 8
"""More curves than this have no legend: the slowest one is named."""
_MAX_BARS = 16


class StepShares(NamedTuple):
    """One worker's seconds per step, means over the run."""

    rank: int
    computing_s: float
    data_wait_s: float
    others_wait_s: float

    @property
    def busy_s(self) -> float:
        return self.computing_s + self.data_wait_s


def step_shares(points: Points) -> list[StepShares]:
    """By rank; a rank counts for the time in which it was part of the run."""
    found = []
    for rank in _ranks(points):
        step_s, data_wait_s, others_wait_s = (
            mean(value for _, value in points[f"worker/{rank}/{name}"])
            for name in ("step_s", "data_wait_s", "all_reduce_wait_s")
        )
        found.append(StepShares(rank, max(0.0, step_s - data_wait_s - others_wait_s), data_wait_s, others_wait_s))
    return found


def slowest(points: Points) -> int:
    """The rank whose own speed, its median over the run, is the least."""
    return min(_ranks(points), key=lambda rank: median(value for _, value in points[f"worker/{rank}/images_per_s"]))


def draw_ranks(points: Points, path: Path) -> Path | None:
    """Left: images per second that each worker would do alone; right: what a step of each consists of."""
    ranks = _ranks(points)
    if not ranks:
        return None
    figure = new_figure((9.6, 4.0))
    speed, shares = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_speeds(style(speed, "step", "images per second, each worker alone"), points, ranks)
    _draw_shares(style(shares, "milliseconds per step, mean", "rank"), step_shares(points))
    return save(figure, path)


def _draw_speeds(axes: Axes, points: Points, ranks: Sequence[int]) -> None:
    named = ranks if len(ranks) <= _MAX_NAMED else [slowest(points)]
    for rank in ranks:
        steps, values = finite(points[f"worker/{rank}/images_per_s"])
        if rank in named:
            label = f"rank {rank}" if len(ranks) <= _MAX_NAMED else f"rank {rank}, the slowest of {len(ranks)}"
            axes.plot(steps, values, linewidth=1.2, label=label, zorder=3)
        else:
            axes.plot(steps, values, linewidth=0.6, color="0.7")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right", fontsize="small")


def _draw_shares(axes: Axes, shares: Sequence[StepShares]) -> None:
    if len(shares) > _MAX_BARS:
        shares = sorted(shares, key=lambda share: -share.busy_s)[:_MAX_BARS]
        axes.set_title(f"the {_MAX_BARS} that were busy longest", fontsize="small")
    rows = range(len(shares))
    left = [0.0] * len(shares)
    for label, color, widths in (
        ("computing", "tab:blue", [share.computing_s for share in shares]),
        ("waiting for images", "tab:orange", [share.data_wait_s for share in shares]),
        ("waiting for the others", "0.85", [share.others_wait_s for share in shares]),
    ):
        widths_ms = [1000 * width for width in widths]
        axes.barh(rows, widths_ms, left=left, color=color, label=label)
        left = [a + b for a, b in zip(left, widths_ms, strict=True)]
    axes.set_yticks(rows, [str(share.rank) for share in shares], fontsize="small")
    axes.set_ylim(max(len(shares), 4) - 0.5, -0.5)  # downwards; one worker alone fills no plot
    axes.grid(visible=False, axis="y")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize="x-small", frameon=False)


def _ranks(points: Points) -> list[int]:
    return sorted(int(found[1]) for key in points if (found := re.fullmatch(r"worker/(\d+)/images_per_s", key)))
