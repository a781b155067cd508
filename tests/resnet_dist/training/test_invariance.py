"""The project's promise on a small scale: the number of workers, and a stop at any step, change no result.

As a script, all of these runs: test_invariance.py FOLDER.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import small_run as small
from small_run import NUM_VAL

from resnet_dist.training.checkpoint import checkpoint_name
from resnet_dist.training.checkpoint_manager import START

pytestmark = pytest.mark.system

GLOBAL_BATCH, MICRO_BATCH, LAST_STEP = 24, 4, 12


class Workers(NamedTuple):
    """A group of workers, and the step after which it stops."""

    num: int
    until: int = LAST_STEP


class Run(NamedTuple):
    """A run of three epochs of four steps, by one group of workers after the other."""

    recipe: str
    reduction: str
    groups: tuple[Workers, ...]
    precision: str = "fp32"
    repetition: int = 0
    merged: int | None = None
    """Micro-batches in a launch, at most; None: chosen by rule."""

    @property
    def name(self) -> str:
        groups = "-then-".join(f"{group.num}to{group.until}" for group in self.groups)
        merged = f"-merged{self.merged}" if self.merged else ""
        return f"{self.recipe}-{self.precision}-{self.reduction}-{groups}-{self.repetition}{merged}".replace(" ", "-")


def run(recipe: str, reduction: str, *groups: Workers, precision: str = "fp32", repetition: int = 0) -> Run:
    return Run(recipe, reduction, groups, precision, repetition)


ONE = Workers(num=1)

# The exact reduction: the same bits as one worker, undisturbed.
SAME_BITS = [
    run("plain", "exact", Workers(num=2)),
    run("plain", "exact", Workers(num=4)),  # six micro-batches: uneven shares
    run("plain", "exact", Workers(num=1, until=2), Workers(num=3, until=7), Workers(num=2)),
    run("eight micro-batches", "exact", Workers(num=3)),  # three, three and two
    run("eight micro-batches", "exact", Workers(num=1, until=3), Workers(num=3, until=6), Workers(num=2)),
    run("everything", "exact", Workers(num=2, until=5), Workers(num=3, until=7), Workers(num=1)),
    run("fine-tuning", "exact", Workers(num=1, until=3), Workers(num=3, until=6), Workers(num=2)),
    run("frozen statistics", "exact", Workers(num=3)),
]
# The fast reduction: in float64 the same losses up to rounding.
SAME_LOSSES = [
    run("plain", "fast", Workers(num=2), precision="fp64"),
    run("plain", "fast", Workers(num=3), precision="fp64"),
    run("plain", "fast", Workers(num=1, until=5), Workers(num=1), precision="fp64"),
    run("plain", "fast", Workers(num=1, until=5), Workers(num=3), precision="fp64"),
    run("powersgd", "fast", Workers(num=2, until=3), Workers(num=4, until=7), precision="fp64"),
    # Merged micro-batches: all six in one launch; three workers in launches of two; shares of three, three and two
    run("plain", "fast", ONE, precision="fp64")._replace(merged=6),
    run("everything", "fast", ONE, precision="fp64")._replace(merged=4),  # two launches of three
    run("everything", "fast", Workers(num=2, until=6), Workers(num=3), precision="fp64")._replace(merged=2),
    run("eight micro-batches", "fast", Workers(num=3), precision="fp64")._replace(merged=2),
    run("powersgd", "fast", Workers(num=2, until=7), precision="fp64")._replace(merged=3),
    run("fine-tuning", "fast", Workers(num=2, until=6), Workers(num=3), precision="fp64")._replace(merged=2),
    run("frozen statistics", "fast", Workers(num=2), precision="fp64")._replace(merged=3),
]
FAST_64, EXACT_64 = run("plain", "fast", ONE, precision="fp64"), run("plain", "exact", ONE, precision="fp64")
POWERSGD = run("powersgd", "fast", Workers(num=1, until=7), precision="fp64")
FAST_32, TWO_32 = run("plain", "fast", ONE), run("plain", "fast", Workers(num=2))
TWO_32_AGAIN = TWO_32._replace(repetition=1)
PARENT = run("plain", "exact", Workers(num=1, until=4))
COOLDOWN = run("cooldown", "exact", Workers(num=2, until=5), Workers(num=3))  # it ends in the middle of an epoch
COOLDOWN_PLAN = replace(small.PLAN, first_step=4, last_step=7, cooldown_steps=3)
BF16 = [run("bf16 gradients", "fast", Workers(num, until=4), precision="fp64") for num in (1, 2)]


def undisturbed(other: Run) -> Run:
    """The same by one worker in one go."""
    return other._replace(groups=(Workers(num=1, until=other.groups[-1].until),), merged=None)


OTHERS = [FAST_64, EXACT_64, POWERSGD, FAST_32, TWO_32, TWO_32_AGAIN, PARENT, COOLDOWN, undisturbed(COOLDOWN), *BF16]
ALL = dict.fromkeys([*SAME_BITS, *SAME_LOSSES, *map(undisturbed, [*SAME_BITS, *SAME_LOSSES]), *OTHERS])
Results = dict[Run, list[list[dict[str, Any]]]]


def train(rank: int, world_size: int, folder: Path, number: int, runs: list[Run]) -> None:
    """One worker's part of the groups no. `number` of these runs, one after the other."""
    for r in runs:
        config = small.recipe(r.precision, r.reduction, **small.RECIPES[r.recipe])
        run_dir, until_step = folder / r.name, r.groups[number].until
        run_dir.mkdir(exist_ok=True)
        if config.fork is not None and rank == number == 0:
            shutil.copytree(folder / PARENT.name / checkpoint_name(epoch=1, step=4), run_dir / START)
        _, result = small.trained(
            run_dir,
            config,
            plan=small.PLAN if config.fork is None else COOLDOWN_PLAN,
            until_step=until_step,
            rank=rank,
            world_size=world_size,
            micro_batches_per_launch=r.merged,
        )
        (run_dir / f"group{number}-rank{rank}.json").write_text(json.dumps(result))


def main(folder: Path) -> None:
    """Trains ALL. One group of processes trains all runs that need as many workers at the same time."""
    together: dict[tuple[int, int], list[Run]] = defaultdict(list)
    for r in ALL:
        for number, group in enumerate(r.groups):
            together[number, group.num].append(r)
    for (number, num_workers), runs in sorted(together.items()):
        store = folder / f"store-{number}-{num_workers}"
        codes = small.run_group(store, num_workers, train, folder, number, runs)
        assert not any(codes), f"{num_workers} workers: exit codes {codes}"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """For every run its groups in order, for every group what each rank saw."""
    folder = tmp_path_factory.mktemp("runs")
    subprocess.run([sys.executable, __file__, str(folder)], check=True, timeout=280)
    return {
        r: [
            [json.loads((folder / r.name / f"group{number}-rank{rank}.json").read_text()) for rank in range(group.num)]
            for number, group in enumerate(r.groups)
        ]
        for r in ALL
    }


def losses(results: Results, r: Run) -> list[float]:
    return [loss for group in results[r] for loss in group[0]["losses"]]


def evaluations(results: Results, r: Run) -> list[dict[str, float]]:
    return [evaluation for group in results[r] for evaluation in group[0]["evaluations"]]


@pytest.mark.parametrize("r", SAME_BITS, ids=lambda r: r.name)
def test_the_exact_reduction_gives_the_same_bits(results: Results, r: Run) -> None:
    alone = undisturbed(r)
    assert len(losses(results, alone)) == LAST_STEP
    assert losses(results, r) == losses(results, alone)
    assert evaluations(results, r) == evaluations(results, alone)
    assert results[r][-1][0]["weights"] == results[alone][-1][0]["weights"]


def test_a_cooldown_gives_the_same_bits_on_any_number_of_workers(results: Results) -> None:
    alone = undisturbed(COOLDOWN)
    assert len(losses(results, alone)) == COOLDOWN_PLAN.cooldown_steps
    assert losses(results, COOLDOWN) == losses(results, alone)
    assert evaluations(results, COOLDOWN) == evaluations(results, alone)
    assert results[COOLDOWN][-1][0]["weights"] == results[alone][-1][0]["weights"]


@pytest.mark.parametrize("r", SAME_LOSSES, ids=lambda r: r.name)
def test_the_fast_reduction_gives_the_same_losses_to_1e9_in_float64(results: Results, r: Run) -> None:
    alone = undisturbed(r)
    last_step = r.groups[-1].until
    assert len(losses(results, alone)) == last_step
    assert losses(results, r) == pytest.approx(losses(results, alone), abs=1e-9)
    assert len(evaluations(results, r)) == last_step // 4
    for ours, theirs in zip(evaluations(results, r), evaluations(results, alone), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-9)
    if all(group.num == 1 for group in r.groups) and r.merged is None:
        assert losses(results, r) == losses(results, alone)  # a stop alone changes no bit


def test_two_runs_are_equal_to_the_last_bit(results: Results) -> None:
    assert losses(results, TWO_32_AGAIN) == losses(results, TWO_32)


def test_the_first_losses_agree_to_1e4_in_float32(results: Results) -> None:
    assert losses(results, TWO_32)[:4] == pytest.approx(losses(results, FAST_32)[:4], abs=1e-4)


def test_fast_and_exact_agree_in_float64(results: Results) -> None:
    assert losses(results, EXACT_64) == pytest.approx(losses(results, FAST_64), abs=1e-9)


def test_powersgd_sends_less_than_the_full_gradient(results: Results) -> None:
    assert losses(results, POWERSGD)[3] != pytest.approx(losses(results, FAST_64)[3], abs=1e-3)


def test_compressed_gradients_agree_to_their_rounding(results: Results) -> None:
    """And are rounded: the first loss is computed before, the later ones differ from those of whole gradients."""
    whole, alone, two = (losses(results, r)[:4] for r in (FAST_64, *BF16))
    assert alone[0] == two[0] == pytest.approx(whole[0], abs=1e-9)
    assert two == pytest.approx(alone, abs=0.02)
    assert all(abs(a - b) > 1e-7 for rounded in (alone, two) for a, b in zip(rounded[2:], whole[2:], strict=True))


@pytest.mark.parametrize("r", SAME_LOSSES[:2], ids=lambda r: r.name)
def test_the_same_samples_in_the_same_micro_batches(results: Results, r: Run) -> None:
    expected = micro_batches(results[FAST_64][0])
    assert len(expected) == LAST_STEP * GLOBAL_BATCH // MICRO_BATCH
    assert micro_batches(results[r][0]) == expected


def micro_batches(ranks: list[dict[str, Any]]) -> list[list[int]]:
    """All micro-batches of a run in their global order: step by step, rank by rank."""
    shares = [len(rank["train"]) // LAST_STEP for rank in ranks]
    return [
        batch
        for step in range(LAST_STEP)
        for share, rank in zip(shares, ranks, strict=True)
        for batch in rank["train"][step * share : (step + 1) * share]
    ]


@pytest.mark.parametrize("r", [FAST_64, *SAME_LOSSES[:2]], ids=lambda r: r.name)
def test_every_validation_sample_is_seen_once(results: Results, r: Run) -> None:
    first_evaluation = [batch for rank in results[r][0] for batch in rank["val"][: len(rank["val"]) // 3]]
    assert sorted(sample_id for batch in first_evaluation for sample_id in batch) == list(range(NUM_VAL))


def test_eight_micro_batches_are_shared_three_three_two(results: Results) -> None:
    (ranks,) = results[SAME_BITS[3]]
    assert [len(rank["train"]) for rank in ranks] == [3 * LAST_STEP, 3 * LAST_STEP, 2 * LAST_STEP]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
