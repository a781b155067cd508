"""The promise of the project in small: the number of workers, and a stop at any step, change no result."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("worker_process.py")
GLOBAL_BATCH, MICRO_BATCH, NUM_VAL = 24, 4, 37
Results = list[dict[str, list]]
Train = Callable[..., Results]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains with a number of workers, each a process; remembers what it has run."""
    known: dict[tuple[int, str, str], Results] = {}

    def run(
        world_size: int, precision: str, reduction: str = "fast", *, folder: Path | None = None, max_steps: int = 12
    ) -> Results:
        key = (world_size, precision, reduction)
        if folder is None and key in known:
            return known[key]
        place = folder or tmp_path_factory.mktemp("run")
        (place / "store").unlink(missing_ok=True)
        arguments = [str(world_size), precision, reduction, str(max_steps)]
        workers = [
            subprocess.Popen([sys.executable, str(SCRIPT), str(place), str(rank), *arguments])
            for rank in range(world_size)
        ]
        assert [worker.wait(timeout=120) for worker in workers] == [0] * world_size
        results = [json.loads((place / f"rank{rank}.json").read_text()) for rank in range(world_size)]
        if folder is None:
            known[key] = results
        return results

    return run


def micro_batches(results: Results) -> list[list[int]]:
    """All micro-batches of a run in their global order: step by step, rank by rank."""
    shares = [len(r["train"]) // 12 for r in results]
    return [
        batch
        for step in range(12)
        for share, result in zip(shares, results, strict=True)
        for batch in result["train"][step * share : (step + 1) * share]
    ]


@pytest.mark.parametrize("world_size", [2, 3])
def test_losses_agree_to_1e9_in_float64(train: Train, world_size: int) -> None:
    alone, together = train(1, "fp64")[0], train(world_size, "fp64")[0]
    assert len(alone["losses"]) == 12
    assert together["losses"] == pytest.approx(alone["losses"], abs=1e-9)
    assert len(alone["evaluations"]) == 3
    for ours, theirs in zip(together["evaluations"], alone["evaluations"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-9)


def test_first_losses_agree_to_1e4_in_float32(train: Train) -> None:
    alone, together = train(1, "fp32")[0], train(2, "fp32")[0]
    assert together["losses"][:4] == pytest.approx(alone["losses"][:4], abs=1e-4)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_same_samples_in_the_same_micro_batches(train: Train, world_size: int) -> None:
    expected = micro_batches(train(1, "fp64"))
    assert len(expected) == 12 * GLOBAL_BATCH // MICRO_BATCH
    assert micro_batches(train(world_size, "fp64")) == expected


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_validation_sample_is_seen_once(train: Train, world_size: int) -> None:
    seen = [
        i for result in train(world_size, "fp64") for batch in result["val"][: len(result["val"]) // 3] for i in batch
    ]
    assert sorted(seen) == list(range(NUM_VAL))


@pytest.mark.parametrize(("first", "then"), [(1, 1), (2, 1), (1, 3)])
def test_a_stop_at_any_step_changes_nothing(train: Train, tmp_path: Path, first: int, then: int) -> None:
    """Stopped at step 5, the second of its epoch, and gone on with another number of workers."""
    undisturbed = train(1, "fp64")[0]["losses"]
    before = train(first, "fp64", folder=tmp_path, max_steps=5)[0]["losses"]
    after = train(then, "fp64", folder=tmp_path)[0]["losses"]
    assert (len(before), len(after)) == (5, 7)
    assert before + after == pytest.approx(undisturbed, abs=1e-9)
    if (first, then) == (1, 1):
        assert before + after == undisturbed


def test_two_runs_are_equal_to_the_last_bit(train: Train, tmp_path: Path) -> None:
    assert train(2, "fp32", folder=tmp_path)[0]["losses"] == train(2, "fp32")[0]["losses"]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_exact_reduction_gives_the_same_bits_for_any_number_of_workers(train: Train, world_size: int) -> None:
    """Six micro-batches: four workers have uneven shares."""
    alone, together = train(1, "fp32", "exact")[0], train(world_size, "fp32", "exact")
    assert together[0]["losses"] == alone["losses"]
    assert together[0]["evaluations"] == alone["evaluations"]
    assert together[0]["weights"] == alone["weights"]


def test_the_exact_reduction_gives_the_same_bits_across_stops_and_resizes(train: Train, tmp_path: Path) -> None:
    undisturbed = train(1, "fp32", "exact")[0]
    losses: list[float] = []
    for world_size, max_steps in ((1, 2), (3, 7), (2, 12)):
        result = train(world_size, "fp32", "exact", folder=tmp_path, max_steps=max_steps)[0]
        losses += result["losses"]
    assert losses == undisturbed["losses"]
    assert result["weights"] == undisturbed["weights"]


def test_fast_and_exact_agree_in_float64(train: Train) -> None:
    assert train(1, "fp64", "exact")[0]["losses"] == pytest.approx(train(1, "fp64")[0]["losses"], abs=1e-9)
