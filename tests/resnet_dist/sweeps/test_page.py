"""The report's page: complete, readable without anything else, and safe whatever names are in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from resnet_dist.config.loading import read_tree
from resnet_dist.config.space import Space
from resnet_dist.sweeps.analysis.report import write_report
from resnet_dist.sweeps.ledger import (
    Began,
    Event,
    TrialAdded,
    TrialEnded,
    TrialLeft,
    TrialReported,
    TrialStarted,
    encode,
    ledger_file,
    replay,
    trial_name,
)
from resnet_dist.sweeps.points import planned_points
from tests.resnet_dist.sweeps.ledgers import RecordedRun, events_of

BASE = Path(__file__).parents[3] / "resnet_dist/recipes/digits_resnet20.yaml"
HOSTILE = '<script>alert("1")</script> & \'</style>$\\frac{"'
RATE: dict[str, Any] = {"optim.lr": {"kind": "loguniform", "low": 0.01, "high": 1.0}}
RATE_AND_DECAY: dict[str, Any] = {**RATE, "optim.weight_decay": {"kind": "loguniform", "low": 1e-5, "high": 1e-1}}
CATEGORIES: dict[str, Any] = {
    **RATE,
    "optim.name": {"kind": "choice", "values": ["sgd", "lamb"]},
    "train.max_steps": {"kind": "choice", "values": [None, 60]},
    "optim.momentum": {"kind": "uniform", "low": 0.8, "high": 0.95, "when": {"optim.name": "sgd"}},
}
SIX: dict[str, Any] = {
    **RATE_AND_DECAY,
    "optim.momentum": {"kind": "choice", "values": [0.8, 0.9, 0.95]},
    "schedule.final_factor": {"kind": "uniform", "low": 0.0, "high": 0.1},
    "train.global_batch_size": {"kind": "quniform", "low": 64, "high": 256, "step": 64},
    "model.zero_init_residual": {"kind": "choice", "values": [True, False]},
}


def a_space(space: dict[str, Any], **more: Any) -> Space:
    proxy = {"model.name": "resnet8", "train.total_epochs": 6}
    tree = {"base": str(BASE), "proxy": proxy, "space": space, "search": {"kind": "random"}, "trials": 12}
    return Space.model_validate({**tree, **more})


def runs_of(space: Space, outcomes: Sequence[str] = ("finished",)) -> list[RecordedRun]:
    """The planned points; the outcomes in turn, "waiting" being a run that has not started."""
    runs = []
    for number, point in enumerate(planned_points(space, space.trials or 1) or ()):
        outcome: Any = outcomes[number % len(outcomes)]
        final = 90 - 8 * abs(math.log10(point.get("optim.lr", 1.0) / 0.1)) - 0.123 * number
        epochs = {"finished": 6, "stopped": 2, "diverged": 0, "failed": 1}[outcome]
        runs.append(RecordedRun(number, 0, point, outcome, [final - 20 / epoch for epoch in range(1, epochs + 1)]))
    return runs


class Page(HTMLParser):
    """What a reader without scripts sees, and what the page refers to."""

    def __init__(self, folder: Path, events: Sequence[Event]) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.tables: list[list[list[str]]] = []
        self._open: list[str] = []
        folder.mkdir(exist_ok=True)
        ledger_file(folder).write_bytes(b"".join(map(encode, events)))
        self.source = (write_report(folder).folder / "index.html").read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = "".join(self.texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "action", "data")]
        if tag not in ("meta", "input", "wbr", "br", "img", "link"):
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("script", "style"):
            self.texts.append(data)
            if "td" in self._open or "th" in self._open:
                self.tables[-1][-1][-1] += data

    def column(self, title: str) -> list[str]:
        head, *rows = self.tables[0]
        return [row[head.index(title)] for row in rows]


def test_every_number_of_the_ledger_is_on_the_page_and_nothing_else_is_needed_to_read_it(tmp_path: Path) -> None:
    space = a_space(RATE_AND_DECAY)
    events = events_of(space, runs_of(space, ("finished", "stopped", "finished", "diverged")), read_tree(BASE))
    page = Page(tmp_path, events)
    state = replay(events)
    *_, trials = page.tables
    assert [row[0] for row in trials[1:]] == list(state.trials)
    for (name, *_, scores, _, point, run_id), trial in zip(trials[1:], state.trials.values(), strict=True):
        expected = ", ".join(f"{report.epoch:g}: {report.metrics['val/top1']:.6g}" for report in trial.reports)
        assert (scores, run_id) == (expected, f"run-{name}")
        assert all(f"{key} {value:g}" in point for key, value in trial.point.items())
    shown = [float(score) for score in page.column("val/top1") if score]
    assert shown[:6] == sorted(shown[:6], reverse=True)
    assert len({len(value.partition(".")[2]) for value in page.column("optim.lr")}) == 1  # aligned
    assert page.column("status")[-1] == "diverged in epoch 1"
    assert page.column("status")[6:9] == ["stopped after epoch 2 of 6"] * 3
    for part in (
        "resnet-dist train",
        "best_recipe.yaml \\\n    --on PROFILE",
        "diverged",
        str(ledger_file(tmp_path)),
        "12: 6 fin",
    ):
        assert part in page.text
    # Whole without a network and without scripts.
    assert all(reference.startswith("#") for reference in page.references)
    assert page.tags.count("script") == 1
    assert not {"link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert "@import" not in page.source
    assert page.source.count("url(") == page.source.count("url(#")
    assert page.tags.count("svg") == 4


def test_names_are_shown_as_they_are_and_do_nothing(tmp_path: Path) -> None:
    space = a_space(
        {**RATE, "model.init.weights": {"kind": "choice", "values": [HOSTILE, "digits\x07", "a" * 300]}}, trials=6
    )
    began, *events = events_of(space, runs_of(space, ("finished", "failed")), read_tree(BASE))
    assert isinstance(began, Began)
    began = Began(**{**vars(began), "name": HOSTILE, "class_names": [HOSTILE] * 1000})
    events = [TrialEnded(**{**vars(e), "reason": HOSTILE}) if isinstance(e, TrialEnded) else e for e in events]
    added = next(event for event in events if isinstance(event, TrialAdded))
    events.append(TrialLeft(trial=added.trial, why=HOSTILE, time_s=999.0, is_fault=True))
    page = Page(tmp_path, [began, *events])
    assert page.tags.count("script") == 1
    assert page.text.count(HOSTILE) >= 12 + 3 + 1 + 6
    assert "and 988 more" in page.text


@pytest.mark.parametrize(
    ("space", "outcomes", "figures"),
    [
        pytest.param(a_space(RATE, trials=1), ["finished"], 1, id="one point"),
        pytest.param(a_space(RATE), ["diverged"], 0, id="all diverged"),
        pytest.param(a_space(RATE_AND_DECAY), ["stopped", "failed"], 3, id="none at its end"),
        pytest.param(a_space(RATE, metric="val/loss"), ["finished", "stopped"], 3, id="one parameter, minimized"),
        pytest.param(a_space(CATEGORIES), ["finished", "diverged"], 4, id="categories and conditions"),
        pytest.param(a_space(SIX, trials=40), ["finished", "stopped"], 4, id="many points of six parameters"),
    ],
)
def test_any_sweep_has_a_page(tmp_path: Path, space: Space, outcomes: list[str], figures: int) -> None:
    runs = runs_of(space, outcomes)
    if not space.higher_is_better:
        runs = [run._replace(scores=[100 - score for score in run.scores]) for run in runs]
    page = Page(tmp_path, events_of(space, runs, read_tree(BASE)))
    assert len(page.column("point")) == len(runs)
    assert page.column("rank") == [str(rank) for rank in range(1, len(runs) + 1)]
    assert set(space.free) <= set(page.tables[0][0])
    assert page.tags.count("svg") == figures
    assert ("resnet-dist train" in page.text) == ("finished" in outcomes)
    assert ("Show all" in page.text) == (len(runs) > 30)
    # Scores of points that came to different rungs cannot be compared, their ranks can.
    assert ("place in the ranking" in page.text) == (outcomes == ["stopped", "failed"])


@pytest.mark.parametrize(
    ("num_events", "expected"), [(2, "No trial has started yet"), (4, "running, epoch 0"), (6, "running, epoch 2 of 6")]
)
def test_a_sweep_that_has_only_begun_has_a_page_too(tmp_path: Path, num_events: int, expected: str) -> None:
    space = a_space(RATE)
    page = Page(tmp_path, events_of(space, runs_of(space), read_tree(BASE))[:num_events])
    assert expected in page.text
    assert not (tmp_path / "best_recipe.yaml").exists()


def test_short_schedules_and_cooldowns_are_named_and_drawn(tmp_path: Path) -> None:
    space = a_space(RATE, trials=2, scheduler={"kind": "annealed", "rungs": [0.5]})
    events = events_of(space, [], read_tree(BASE))
    for number, kind, rung, epochs in (
        (0, "point", 0.0, [1.0, 2.0, 3.0, 6.0]),
        (0, "cooldown", 3.0, [3.6]),
        (1, "short", 2.0, [1.0, 2.0]),
    ):
        name = trial_name(number, 0, kind, rung)  # type: ignore[arg-type]
        point = {"optim.lr": 0.1 * (number + 1)}
        events.append(
            TrialAdded(trial=name, number=number, seed_number=0, point=point, time_s=1.0, kind=kind, rung=rung)  # type: ignore[arg-type]
        )
        events.append(TrialStarted(trial=name, time_s=2.0))
        for epoch in epochs:
            metrics = {"val/top1": 80 + epoch}
            events.append(
                TrialReported(trial=name, epoch=epoch, step=1, metrics=metrics, verdict="go on", time_s=2.0 + epoch)
            )
        events.append(
            TrialEnded(trial=name, outcome="finished", epoch=epochs[-1], step=1, metrics=metrics, reason="", time_s=9.0)
        )
    page = Page(tmp_path, events)
    figure = page.source[page.source.index("Learning curves") :]
    for words in ("short schedule", "cooldown", "1  t0000", "rung"):
        assert words in figure
    assert page.column("status") == ["reached its end", "dropped after a schedule of 2 epochs"]
    assert page.column("epochs") == ["6.6", "2"]  # a cooldown's own
    assert [row[1] for row in page.tables[-1][1:]] == ["whole run", "cooldown after 3 epochs", "schedule of 2 epochs"]
    assert "forked into a cooldown of 20% of its steps so far" in page.text
