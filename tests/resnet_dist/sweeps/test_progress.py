"""The bar of a running sweep, as it reads at 80 columns and in a pipe."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from resnet_dist.config.space import Space
from resnet_dist.launch.progress_bar import ProgressBar
from resnet_dist.sweeps import progress
from resnet_dist.sweeps.forecast import point_cost
from resnet_dist.sweeps.ledger import Ledger
from resnet_dist.sweeps.points import planned_points
from resnet_dist.sweeps.progress import SweepProgress
from resnet_dist.sweeps.sweep import Sweep


def test_a_line_has_epochs_time_left_best_score_and_the_trials_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SHOW_EVERY_S", 0.0)
    monkeypatch.setattr(progress.time, "time", lambda: 100.0)
    space = Space.model_validate(
        {
            "base": "b",
            "space": {"optim.lr": {"kind": "grid", "values": [0.1, 0.2, 0.3]}},
            "search": {"kind": "grid"},
        }
    )
    out, times = io.StringIO(), iter([0.0] * 4 + [100.0] * 4 + [10.0, 20.0] + [20.0] * 9)
    planned = planned_points(space, 3)
    sweep = Sweep(space, Ledger(), planned=planned, total_epochs=lambda _: 2.0, now_s=lambda: next(times, 20.0))
    sweep.begin()
    cost = point_cost(space, 2.0, 10, 1)
    prepared = SimpleNamespace(costs=lambda state, num: dict.fromkeys(range(num), cost))
    bar = ProgressBar("epochs", line_every_s=0.0, console=Console(file=out, width=80, soft_wrap=True))
    shown = SweepProgress(cast(Any, prepared), sweep, bar)
    shown.show(at_once=2, num_up=0)
    assert out.getvalue() == ""  # a pipe shows what is new, and nothing is
    for _ in range(2):
        trial = sweep.next_trial()
        assert trial is not None
        sweep.start(trial)
    shown.epochs["t0000"] = 0.5
    shown.show(at_once=2, num_up=2)
    assert out.getvalue().endswith(": t0000 0.5/2, t0001 starts\n")
    assert out.getvalue().startswith("epochs 0.5/6")
    for epoch in (1.0, 2.0):
        sweep.report("t0000", epoch, round(10 * epoch), {"val/top1": 90 + epoch})
    sweep.end("t0000", "finished", epoch=2.0, step=20, metrics={"val/top1": 92.0}, reason="finished")
    shown.epochs["t0001"] = 0.25
    shown.show(at_once=2, num_up=2)
    line = out.getvalue().splitlines()[-1]
    assert line.startswith("epochs 2.2/6, 0:00:")
    assert line.endswith(" left: best 92, t0001 0.25/2")


@pytest.mark.parametrize("width", [80, 200])
def test_the_bar_is_one_line_with_the_time_left_whatever_the_terminals_width(width: int) -> None:
    out = io.StringIO()
    bar = ProgressBar("epochs", console=Console(file=out, width=width, force_terminal=True, color_system=None))
    with bar.live("connecting"):
        bar.show(12.25, 100, ", ".join(f"t{number:04d} 9.5/15" for number in range(20)), left_s=3723)
    shown = re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()))
    text = next(line for line in shown if line.startswith("epochs 12.2/100 "))
    assert " 1:02:03 left t0000 9.5/15, " in text
    assert len(text) <= width
    assert text.index("left") > len("epochs 12.2/100 ") + 10  # the bar itself
