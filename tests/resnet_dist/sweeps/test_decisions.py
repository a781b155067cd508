"""A sweep's decisions: every search with every scheduler, trials played by a formula, drivers killed."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from typing import Any

import pytest

from resnet_dist.config.profile import Profile
from resnet_dist.config.space import Space
from resnet_dist.launch.cluster import ClusterNode
from resnet_dist.sweeps.analysis.ranking import rank
from resnet_dist.sweeps.ledger import (
    Event,
    Ledger,
    SweepState,
    TrialAdded,
    TrialOutcome,
    decode,
    encode,
    spent_epochs,
)
from resnet_dist.sweeps.points import planned_points
from resnet_dist.sweeps.prepare import profile_of_trials, trials_at_once
from resnet_dist.sweeps.searcher import OptunaSearcher
from resnet_dist.sweeps.sweep import Sweep

EPOCHS = 9
RANGES: dict[str, dict[str, Any]] = {
    "optim.lr": {"kind": "loguniform", "low": 1e-3, "high": 1},
    "optim.weight_decay": {"kind": "loguniform", "low": 1e-5, "high": 1e-2},
}


def a_space(search: str, scheduler: str, **more: Any) -> Space:
    scheduler_config = more.pop("asha", {"kind": scheduler})
    grid = {key: {**value, "kind": "grid", "num": 4, "log": True} for key, value in RANGES.items()}
    return Space.model_validate(
        {
            "base": "b",
            "space": more.pop("space", grid if search == "grid" else RANGES),
            "search": {"kind": search},
            "scheduler": scheduler_config,
            "trials": None if search == "grid" else 16,
            **more,
        }
    )


class InMemory(Ledger):
    """Events come back as they would from a file."""

    def append(self, event: Event) -> None:
        super().append(decode(encode(event).rstrip()))


def top1(point: dict[str, float], epoch: int) -> float:
    lr, decay = point["optim.lr"], point["optim.weight_decay"]
    return 90 - 10 * abs(math.log10(lr / 0.1)) - 5 * abs(math.log10(lr * decay / 1e-5)) - 30 / epoch


def end(sweep: Sweep, trial: str, outcome: TrialOutcome, epoch: float, metrics: dict[str, float]) -> None:
    sweep.end(trial, outcome, epoch=epoch, step=round(10 * epoch), metrics=metrics, reason=outcome)


class Play:
    """Drivers that work on one ledger, each killed after `kill_after` evaluations."""

    def __init__(self, space: Space, kill_after: int | None, at_once: int = 3) -> None:
        self.space, self.log, self.epochs_trained, self.num_drivers = space, InMemory(), Counter[str](), 0
        self._unsaved: set[str] = set()
        """Trials that wait, killed between their report and their checkpoint."""
        self._random, self._clock, self._at_once = random.Random(1), itertools.count(1), at_once
        while not self._drive(kill_after):
            assert self.num_drivers < 200, "the sweep does not end"

    def now_s(self) -> float:
        return float(next(self._clock))

    def sweep(self) -> Sweep:
        planned = planned_points(self.space, self.space.trials or 1_000)
        return Sweep(
            self.space,
            self.log,
            planned=planned,
            total_epochs=lambda point: EPOCHS,
            searcher=OptunaSearcher(self.space) if planned is None else None,
            now_s=self.now_s,
        )

    @property
    def ledger(self) -> list[Event]:
        return self.log.events

    def _drive(self, kill_after: int | None) -> bool:
        self.num_drivers += 1
        sweep = self.sweep()
        sweep.begin(lambda trial: trial.name not in self._unsaved)
        running: dict[str, int] = {}
        for done in itertools.count():
            if sweep.is_over():
                self.state: SweepState = sweep.state
                return True
            if done == kill_after:
                return False
            while len(running) < self._at_once and (trial := sweep.next_trial()) is not None:
                sweep.start(trial)
                running[trial.name] = round(trial.epoch) - (trial.name in self._unsaved)  # its checkpoint
            assert running, "nothing runs, and nothing is over"
            name = self._random.choice(sorted(running))
            match sweep.state.trials[name].kind:
                case "point":
                    self._one_epoch(sweep, running, name, dies=kill_after is not None and self._random.random() < 0.1)
                case "short":
                    self._one_epoch_of_short(sweep, running, name)
                case "cooldown":
                    self._cooldown(sweep, running, name)
        raise AssertionError

    def _one_epoch_of_short(self, sweep: Sweep, running: dict[str, int], name: str) -> None:
        self.epochs_trained[name] += 1
        running[name] = self.epochs_trained[name]  # it saves every epoch
        trial = sweep.state.trials[name]
        if trial.point["optim.lr"] > 0.7:
            end(sweep, name, "diverged", 1, {"val/top1": math.nan})
        elif running[name] == trial.rung:
            metrics = {"val/top1": top1(trial.point, EPOCHS) - 10}
            assert sweep.report(name, running[name], 10, metrics) == "go on"
            end(sweep, name, "finished", running[name], metrics)
        else:
            return
        del running[name]

    def _cooldown(self, sweep: Sweep, running: dict[str, int], name: str) -> None:
        """A fifth of its trunk's epochs, in one piece."""
        trial = sweep.state.trials[name]
        trunk = sweep.state.trials[f"t{trial.number:04d}"]
        assert (trunk.status, trunk.epoch, trunk.name in self._unsaved) == ("paused", trial.rung, False)
        metrics = {"val/top1": top1(trial.point, EPOCHS) - 10}
        sweep.report(name, 1.2 * trial.rung, 12, metrics)
        end(sweep, name, "finished", 1.2 * trial.rung, metrics)
        del running[name]

    def _one_epoch(self, sweep: Sweep, running: dict[str, int], name: str, *, dies: bool = False) -> None:
        running[name] = epoch = running[name] + 1
        self.epochs_trained[name] += 1
        point = sweep.state.trials[name].point
        if point["optim.lr"] > 0.7 and epoch == 2:
            end(sweep, name, "diverged", epoch, {"val/top1": math.nan})
            del running[name]
            return
        metrics = {"val/top1": top1(point, epoch)}
        verdict = sweep.report(name, epoch, epoch * 10, metrics)
        self._unsaved.discard(name)
        if epoch == EPOCHS:
            assert verdict == "go on"
            end(sweep, name, "finished", epoch, metrics)
        elif verdict == "stop":
            end(sweep, name, "stopped", epoch, metrics)
        elif verdict == "wait" and dies:
            sweep.leave(name, "its process died", is_fault=True, is_saved=False)
            self._unsaved.add(name)
        elif verdict == "wait":
            sweep.leave(name, "waits")
        if verdict != "go on" or epoch == EPOCHS:
            del running[name]


HALVING: dict[str, dict[str, Any]] = {
    "annealed": {"kind": "annealed", "rungs": [0.11, 0.33], "cooldown": 0.2, "reduction_factor": 3},
    "halving": {"kind": "halving", "rungs": [1, 3, 9], "reduction_factor": 3},
    "record": {"kind": "record", "cooldowns": [0.11, 0.33], "cooldown": 0.2, "shorts": [1, 3]},
    "smooth": {"kind": "annealed", "rungs": [0.11, 0.33], "smooth": True},
}


def what_happened(play: Play) -> dict[str, tuple[Any, ...]]:
    return {
        name: (trial.kind, trial.rung, trial.point, trial.status, trial.epoch, trial.metrics)
        for name, trial in sorted(play.state.trials.items())
    }


@pytest.mark.parametrize("scheduler", sorted(HALVING))
@pytest.mark.parametrize("search", ["random", "grid"])
def test_a_synchronous_rule_decides_the_same_in_any_order_and_after_any_kill(search: str, scheduler: str) -> None:
    """One trial at a time, many at a time, drivers killed, processes that die between a verdict and its checkpoint."""
    space = a_space(search, "", asha=HALVING[scheduler])
    quiet = what_happened(Play(space, kill_after=None, at_once=1))
    assert quiet == what_happened(Play(space, kill_after=None, at_once=5))
    for kill_after in (2, 3, 7, 11):
        assert quiet == what_happened(Play(space, kill_after=kill_after, at_once=4))


def test_annealed_rungs_keep_the_best_third_and_cost_their_cooldowns() -> None:
    play = Play(a_space("random", "", asha=HALVING["annealed"]), kill_after=None)
    state = play.state
    by_kind = Counter((trial.kind, trial.rung) for trial in state.trials.values())
    diverged = sum(trial.status == "diverged" for trial in state.trials.values())
    assert by_kind == {("point", 0): 16, ("cooldown", 1): 16, ("cooldown", 3): 6 - diverged}
    stopped_at = Counter(trial.epoch for trial in state.trials.values() if trial.status == "stopped")
    assert stopped_at == {1.0: 10, 3.0: 4 - diverged}
    finished = [trial for trial in state.trials.values() if trial.status == "finished" and trial.kind == "point"]
    scores = sorted(
        (top1(trial.point, EPOCHS) for trial in state.trials.values() if trial.kind == "point"), reverse=True
    )
    assert sorted((trial.metrics["val/top1"] for trial in finished), reverse=True) == scores[: len(finished)]
    trunks = sum(trial.epoch for trial in state.trials.values() if trial.kind == "point")
    assert spent_epochs(state) == pytest.approx(trunks + 0.2 * 16 + 0.6 * (6 - diverged))


def test_halving_trains_whole_schedules_of_the_survivors_of_the_rung_before() -> None:
    play = Play(a_space("random", "", asha=HALVING["halving"]), kill_after=None)
    by_kind = Counter((trial.kind, trial.rung) for trial in play.state.trials.values())
    assert by_kind == {("short", 1): 16, ("short", 3): 6, ("point", 0): 2}
    best = rank(play.space, play.state).best
    assert best is not None
    assert best.score == max(top1(trial.point, EPOCHS) for trial in play.state.trials.values())


def test_points_that_are_added_to_a_halved_sweep_are_judged_with_those_before() -> None:
    for rule in ("annealed", "halving"):
        play = Play(a_space("random", "", asha=HALVING[rule]), kill_after=None)
        before = what_happened(play)
        play.space = a_space("random", "", asha=HALVING[rule], trials=24)
        while not play._drive(5):
            pass
        assert before.items() <= what_happened(play).items()
        assert len({trial.number for trial in play.state.trials.values()}) == 24


PAIRS = [
    (search, scheduler)
    for search in ("random", "grid", "sobol", "tpe", "cma")
    for scheduler in ("fifo", "asha", "median", "hyperband")
    if not (search in ("tpe", "cma") and scheduler == "hyperband")
]


@pytest.mark.parametrize(("search", "scheduler"), PAIRS)
def test_a_sweep_ends_however_often_its_driver_is_killed(search: str, scheduler: str) -> None:
    play = Play(a_space(search, scheduler), kill_after=11)
    assert play.num_drivers > 2
    assert len(play.state.trials) == 16
    assert {trial.status for trial in play.state.trials.values()} <= {"finished", "stopped", "diverged"}
    # Nothing that a trial had reported was trained again, and no ended trial was started again.
    assert play.epochs_trained == {name: trial.epoch for name, trial in play.state.trials.items()}
    # The grid's rates ascend, so none is below the median of those before it.
    stops_none = scheduler == "fifo" or (search, scheduler) == ("grid", "median")
    assert any(trial.status == "stopped" for trial in play.state.trials.values()) != stops_none


@pytest.mark.parametrize(("search", "scheduler"), PAIRS)
def test_kills_change_no_result(search: str, scheduler: str) -> None:
    """One trial at a time, so that the order of results is the same; proposals of a model are too."""

    def outcome(play: Play) -> dict[str, tuple[dict[str, Any], str, float]]:
        return {name: (trial.point, trial.status, trial.epoch) for name, trial in play.state.trials.items()}

    space = a_space(search, scheduler)
    assert outcome(Play(space, kill_after=7, at_once=1)) == outcome(Play(space, kill_after=None, at_once=1))


@pytest.mark.parametrize("search", ["tpe", "cma"])
def test_a_model_resumes_with_the_points_that_were_trained(search: str) -> None:
    """The searcher learns a trial's score at the ledger's point, not at another draw."""
    play = Play(a_space(search, "asha"), kill_after=9)
    points = [tuple(trial.point.values()) for trial in play.state.trials.values()]
    assert len(set(points)) == len(points)
    searcher = OptunaSearcher(play.space)
    searcher.suggest(play.ledger)
    drawn = [pytest.approx(tuple(trial.params.values()), rel=1e-5) for trial in searcher.study.trials[:-1]]
    assert points == drawn


@pytest.mark.parametrize("search", ["tpe", "cma"])
def test_the_same_ledger_has_the_same_next_point(search: str) -> None:
    """A driver that saw all events one by one, and one that was started after them."""
    space = a_space(search, "asha")
    play, watching = Play(space, kill_after=None), OptunaSearcher(space)
    seen: list[Event] = []
    for event in play.ledger:
        if isinstance(event, TrialAdded):
            assert watching.suggest(seen) == OptunaSearcher(space).suggest(seen) == event.point
        seen.append(event)


def test_asha_judges_at_its_rungs_and_keeps_the_best_third() -> None:
    space = a_space("random", "asha", asha={"kind": "asha", "first_rung": 1 / 9, "rungs": 2})
    play = Play(space, kill_after=None, at_once=16)
    stopped_at = Counter(trial.epoch for trial in play.state.trials.values() if trial.status == "stopped")
    assert set(stopped_at) <= {1.0, 3.0}
    best = rank(space, play.state).best
    assert best is not None
    assert best.score == max(top1(trial.point, EPOCHS) for trial in play.state.trials.values())


def test_more_trials_are_added_to_a_finished_sweep() -> None:
    play = Play(a_space("random", "asha", trials=6), kill_after=None)
    before = {name: (trial.status, trial.epoch) for name, trial in play.state.trials.items()}
    play.space = a_space("random", "asha", trials=9)
    while not play._drive(None):
        pass
    after = {name: (trial.status, trial.epoch) for name, trial in play.state.trials.items()}
    assert len(after) == 9
    assert before.items() <= after.items()


def test_a_point_that_reaches_its_end_is_repeated_with_further_seeds_a_diverged_one_is_not() -> None:
    play = Play(a_space("grid", "fifo", seeds=2), kill_after=8)
    assert Counter(trial.status for trial in play.state.trials.values()) == {"finished": 12 * 2, "diverged": 4}
    assert {"t0000", "t0000-s1"} <= set(play.state.trials)


def test_the_budget_ends_a_sweep_and_a_larger_one_resumes_it() -> None:
    play = Play(a_space("random", "fifo"), kill_after=20)
    play.space = a_space("random", "fifo", budget={"epochs": 10})
    sweep = play.sweep()
    assert sweep.budget_spent() == f"budget.epochs: {16 * EPOCHS} of 10 spent"
    assert sweep.next_trial() is None


def test_an_evaluation_that_is_reported_again_has_the_same_verdict() -> None:
    """A trial that is killed between its report and its checkpoint evaluates again; the scheduler sees it once."""
    play = Play(a_space("random", "asha"), kill_after=None)
    stopped = next(trial for trial in play.state.trials.values() if trial.status == "stopped")
    last, num_events = stopped.reports[-1], len(play.ledger)
    assert play.sweep().report(stopped.name, last.epoch, last.step, last.metrics) == "stop"
    assert len(play.ledger) == num_events


@pytest.mark.parametrize("search", ["tpe", "random"])
@pytest.mark.parametrize("kill_after", [None, 5])
def test_a_point_is_trained_once_and_a_space_without_others_ends_the_sweep(search: str, kill_after: int | None) -> None:
    choices = {key: {"kind": "choice", "values": [1e-4, 1e-3]} for key in RANGES}
    play = Play(a_space(search, "fifo", space=choices, trials=7), kill_after)
    points = [tuple(trial.point.values()) for trial in play.state.trials.values()]
    assert sorted(points) == sorted(itertools.product([1e-4, 1e-3], repeat=2))
    assert all(trial.status == "finished" for trial in play.state.trials.values())


SPOT = {"market": "spot"}


@pytest.mark.parametrize(
    ("resources", "labels", "nodes", "expected"),
    [
        ({"cpus": 1}, {}, [ClusterNode("a", 2, 0)], 2),
        ({"cpus": 3}, {}, [ClusterNode("a", 8, 0), ClusterNode("b", 2, 0), ClusterNode("c", 4, 0)], 3),
        ({"cpus": 1, "gpus": 0.25}, {}, [ClusterNode("a", 16, 2)], 8),
        ({"cpus": 4, "gpus": 0.25}, {}, [ClusterNode("a", 16, 2)], 4),
        ({"cpus": 1, "max_concurrent": 3}, {}, [ClusterNode("a", 64, 0)], 3),
        ({"path": "train"}, {}, [ClusterNode("a", 8, 4), ClusterNode("b", 8, 4)], 4),
        ({"path": "train"}, SPOT, [ClusterNode("a", 8, 8, SPOT), ClusterNode("b", 64, 8)], 2),
        ({"cpus": 1}, {}, [], 0),
    ],
)
def test_how_many_trials_fit(
    resources: dict[str, Any], labels: dict[str, str], nodes: list[ClusterNode], expected: int
) -> None:
    space = a_space("random", "fifo", resources=resources)
    profile = Profile.model_validate(
        {
            "workers": "2..8",
            "cpus_per_worker": 2,
            "gpus_per_worker": 1,
            "node_labels": labels,
            "data_root": "/d",
            "storage": "/s",
            "tracking_uri": "sqlite:////m.db",
        }
    )
    assert trials_at_once(space, profile_of_trials(space, profile, "/s/sweep"), nodes) == expected


@pytest.mark.parametrize(
    ("gpus", "merge", "expected"), [(0.25, "auto", 1), (0.25, 4, 4), (1.0, "auto", "auto"), (0.0, "auto", "auto")]
)
def test_trials_that_share_a_gpu_do_not_measure_how_much_of_it_is_free(gpus: float, merge: Any, expected: Any) -> None:
    space = a_space("random", "fifo", resources={"cpus": 1, "gpus": gpus})
    profile = Profile.model_validate(
        {
            "workers": 1,
            "cpus_per_worker": 2,
            "micro_batches_per_launch": merge,
            "data_root": "/d",
            "storage": "/s",
            "tracking_uri": "sqlite:////m.db",
        }
    )
    assert profile_of_trials(space, profile, "/s/sweep").micro_batches_per_launch == expected
