"""The promise of the project in small: the number of workers, and a stop at any step, change no result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("worker_process.py")
GLOBAL_BATCH, MICRO_BATCH, NUM_VAL, LAST_STEP = 24, 4, 37, 12

# Groups of workers one after the other, and what each trains: name, precision, reduction, until which step. A name that
# comes again is the next leg of that run. One group trains several runs.
GROUPS = """
1: alone-64 fp64 fast 12, alone-32 fp32 fast 12, alone-exact fp32 exact 12, alone-64-exact fp64 exact 12
1: eighths-alone fp32 exact 12, eighths-resized fp32 exact 3
1: one-then-one fp64 fast 5, one-then-three fp64 fast 5, resized fp32 exact 2, bf16-alone fp64 fast 4
2: two-64 fp64 fast 12, two-32 fp32 fast 12, two-32-again fp32 fast 12, two-exact fp32 exact 12
2: two-then-one fp64 fast 5, parts-resized fp32 exact 6, bf16-two fp64 fast 4, powersgd-resized fp64 fast 3
3: three-64 fp64 fast 12, three-exact fp32 exact 12, one-then-three fp64 fast 12, resized fp32 exact 7
3: eighths-three fp32 exact 12, eighths-resized fp32 exact 6
2: eighths-resized fp32 exact 12, resized fp32 exact 12
1: one-then-one fp64 fast 12, two-then-one fp64 fast 12, parts-alone fp32 exact 12, powersgd-alone fp64 fast 7
4: four-exact fp32 exact 12, parts-resized fp32 exact 12, powersgd-resized fp64 fast 7
"""
Legs = dict[str, list[list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def legs(tmp_path_factory: pytest.TempPathFactory) -> Legs:
    """For every run its legs in order, for every leg what each rank saw."""
    folder = tmp_path_factory.mktemp("runs")
    groups = []
    for line in GROUPS.split("\n")[1:-1]:
        number, _, listed = line.partition(": ")
        runs = [
            (name, precision, reduction, int(step))
            for name, precision, reduction, step in map(str.split, listed.split(", "))
        ]
        groups.append((int(number), runs))
    subprocess.run([sys.executable, str(SCRIPT), str(folder), json.dumps(groups)], check=True, timeout=280)
    found: Legs = {}
    for world_size, runs in groups:
        for name, _, _, last_step in runs:
            files = [folder / name / f"rank{rank}-of{world_size}-to{last_step}.json" for rank in range(world_size)]
            found.setdefault(name, []).append([json.loads(file.read_text()) for file in files])
    return found


def losses(legs: Legs, name: str) -> list[float]:
    return [loss for leg in legs[name] for loss in leg[0]["losses"]]


def micro_batches(leg: list[dict[str, Any]]) -> list[list[int]]:
    """All micro-batches of a run in their global order: step by step, rank by rank."""
    shares = [len(rank["train"]) // LAST_STEP for rank in leg]
    return [
        batch
        for step in range(LAST_STEP)
        for share, rank in zip(shares, leg, strict=True)
        for batch in rank["train"][step * share : (step + 1) * share]
    ]


@pytest.mark.parametrize("name", ["two-64", "three-64"])
def test_losses_agree_to_1e9_in_float64(legs: Legs, name: str) -> None:
    (alone,), (together,) = legs["alone-64"], legs[name]
    assert len(alone[0]["losses"]) == LAST_STEP
    assert together[0]["losses"] == pytest.approx(alone[0]["losses"], abs=1e-9)
    assert len(alone[0]["evaluations"]) == 3
    for ours, theirs in zip(together[0]["evaluations"], alone[0]["evaluations"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-9)


def test_first_losses_agree_to_1e4_in_float32(legs: Legs) -> None:
    assert losses(legs, "two-32")[:4] == pytest.approx(losses(legs, "alone-32")[:4], abs=1e-4)


@pytest.mark.parametrize("name", ["two-64", "three-64"])
def test_the_same_samples_in_the_same_micro_batches(legs: Legs, name: str) -> None:
    expected = micro_batches(legs["alone-64"][0])
    assert len(expected) == LAST_STEP * GLOBAL_BATCH // MICRO_BATCH
    assert micro_batches(legs[name][0]) == expected


@pytest.mark.parametrize("name", ["alone-64", "two-64", "three-64"])
def test_every_validation_sample_is_seen_once(legs: Legs, name: str) -> None:
    first_evaluation = [batch for rank in legs[name][0] for batch in rank["val"][: len(rank["val"]) // 3]]
    assert sorted(sample_id for batch in first_evaluation for sample_id in batch) == list(range(NUM_VAL))


@pytest.mark.parametrize("name", ["one-then-one", "two-then-one", "one-then-three"])
def test_a_stop_changes_nothing(legs: Legs, name: str) -> None:
    """Stopped at step 5, the second of its epoch, and gone on, also with another number of workers."""
    assert [len(leg[0]["losses"]) for leg in legs[name]] == [5, 7]
    assert losses(legs, name) == pytest.approx(losses(legs, "alone-64"), abs=1e-9)
    if name == "one-then-one":
        assert losses(legs, name) == losses(legs, "alone-64")


def test_two_runs_are_equal_to_the_last_bit(legs: Legs) -> None:
    assert losses(legs, "two-32-again") == losses(legs, "two-32")


@pytest.mark.parametrize("name", ["two-exact", "three-exact", "four-exact"])
def test_the_exact_reduction_gives_the_same_bits_for_any_number_of_workers(legs: Legs, name: str) -> None:
    """Six micro-batches: four workers have uneven shares."""
    alone, together = legs["alone-exact"][0][0], legs[name][0][0]
    assert together["losses"] == alone["losses"]
    assert together["evaluations"] == alone["evaluations"]
    assert together["weights"] == alone["weights"]


def test_the_exact_reduction_gives_the_same_bits_across_stops_and_resizes(legs: Legs) -> None:
    """One worker to step 2, three to step 7, two to the end."""
    assert losses(legs, "resized") == losses(legs, "alone-exact")
    assert legs["resized"][-1][0]["weights"] == legs["alone-exact"][0][0]["weights"]


def test_the_exact_reduction_gives_the_same_bits_where_eight_micro_batches_are_shared_by_three(legs: Legs) -> None:
    """Three, three and two a step; and after one worker to step 3, three to step 6 and two to the end."""
    alone = legs["eighths-alone"][0][0]
    assert [len(rank["train"]) for rank in legs["eighths-three"][0]] == [3 * LAST_STEP, 3 * LAST_STEP, 2 * LAST_STEP]
    assert losses(legs, "eighths-three") == losses(legs, "eighths-resized") == alone["losses"]
    assert legs["eighths-three"][0][0]["weights"] == legs["eighths-resized"][-1][0]["weights"] == alone["weights"]


def test_all_parts_of_a_recipe_keep_the_promise(legs: Legs) -> None:
    """Two workers to step 6, in the middle of an epoch, and four to the end, against one alone: the same bits."""
    assert losses(legs, "parts-resized") == losses(legs, "parts-alone")
    alone, resized = legs["parts-alone"][0][0], legs["parts-resized"][-1][0]
    assert resized["evaluations"] == alone["evaluations"][-2:]
    assert resized["weights"] == alone["weights"]


def test_compressed_gradients_agree_to_their_rounding(legs: Legs) -> None:
    """And are rounded: the first loss is computed before, the others are not those of whole gradients."""
    whole, alone, two = (losses(legs, name)[:4] for name in ("alone-64", "bf16-alone", "bf16-two"))
    assert alone[0] == two[0] == pytest.approx(whole[0], abs=1e-9)
    assert two == pytest.approx(alone, abs=0.02)
    assert all(abs(a - b) > 1e-7 for run in (alone, two) for a, b in zip(run[2:], whole[2:], strict=True))


def test_powersgd_does_not_depend_on_the_number_of_workers(legs: Legs) -> None:
    """Two workers to step 3, four to step 7: what each had kept of the gradient went along."""
    assert losses(legs, "powersgd-resized") == pytest.approx(losses(legs, "powersgd-alone"), abs=1e-9)
    assert losses(legs, "powersgd-alone")[3] != pytest.approx(losses(legs, "alone-64")[3], abs=1e-3)


def test_fast_and_exact_agree_in_float64(legs: Legs) -> None:
    assert losses(legs, "alone-64-exact") == pytest.approx(losses(legs, "alone-64"), abs=1e-9)
