"""The comparison of loaders: peers run in turns, and the table says what was measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resnet_dist.bench import loader as bench
from resnet_dist.bench.loader import bench_batches, bench_endurance
from resnet_dist.bench.peers import Task
from resnet_dist.errors import UserError

pytestmark = pytest.mark.system


def test_two_rounds_of_a_peer(
    tmp_path: Path,
    photographs: list[Any],
    write_images: Callable[..., Path],
    to_jpeg: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    beton = write_images(tmp_path / "train.beton", [to_jpeg(p) for p in photographs[:12]])
    seen: dict[str, Any] = {}
    monkeypatch.setattr(bench, "passes_table", lambda task, results: seen.update(results) or "the table")
    assert (
        bench.bench_loader(beton, num_threads=1, rounds=2, peers=["native"], settings=[bench.read_setting("eval-48")])
        == "the table"
    )
    assert list(seen) == ["native"]
    for result in seen.values():
        assert len(result.images_per_cpu_s) == len(result.images_per_s) == 2
        assert min(*result.images_per_cpu_s, *result.images_per_s, result.start_s, result.memory_bytes) > 0


def test_the_table_compares_within_rounds() -> None:
    task = Task("native", "a.beton")
    results = {
        "native": bench.Result(1.5, 400_000_000, (200.0, 400.0, 90.0), (300.0, 600.0, 150.0)),
        "stock FFCV": bench.Result(9.0, 800_000_000, (100.0, 100.0, 90.0), (100.0, 101.0, 102.0)),
    }
    lines = bench.passes_table(task, results).splitlines()
    assert lines[0] == "### training: random resized crop, flip, 224 px, 2 threads"
    assert lines[-2:] == [
        "| native | 200 | 2.00 | 1.00 | 300 | 1.5 | 400 |",
        "| stock FFCV | 100 | 1.00 | 2.00 | 101 | 9.0 | 800 |",
    ]


@pytest.mark.parametrize("text", ["224", "train", "train-0", "train-20000", "test-224", "eval-"])
def test_no_setting(text: str) -> None:
    with pytest.raises(UserError, match=f"^{text}: a setting is train-SIZE or eval-SIZE"):
        bench.read_setting(text)


def test_raw_pixels_and_unknown_peers_are_refused(photo_beton: Path) -> None:
    with pytest.raises(UserError, match="holds raw pixels too"):
        bench.bench_loader(photo_beton, num_threads=1, rounds=1, peers=["native"])
    with pytest.raises(UserError, match=r"there is no peer tf\.data; there are native"):
        bench.bench_loader(photo_beton, num_threads=1, rounds=1, peers=["tf.data"])


@pytest.mark.slow
def test_a_small_beton_is_opened_in_little_time_and_memory(tmp_path: Path) -> None:
    found = bench.measure_opening(Task("native", str(bench.write_tiny_samples(tmp_path / "train.beton", 2000))))
    assert set(found) >= {"imports", "opening", "order", "first_batch", "imports_bytes", "held_bytes"}
    assert found["imports_bytes"] > 1e8
    assert found["held_bytes"] < 1.5e8


def test_a_loader_holds_the_same_after_every_epoch(photo_beton: Path) -> None:
    rows = bench_endurance(photo_beton, num_epochs=32, num_threads=2, size=48).splitlines()[2:]
    memory, threads, handles = zip(*(row.split(" | ")[1:] for row in rows), strict=True)
    assert len(set(threads[1:])) == len(set(handles[1:])) == 1
    assert float(memory[-1]) - float(memory[1]) < 3.0  # MB


def test_batches_are_made_again_and_again(
    tmp_path: Path, photographs: list[Any], write_images: Callable[..., Path], to_jpeg: Callable[..., bytes]
) -> None:
    beton = write_images(tmp_path / "train.beton", [to_jpeg(p) for p in photographs[:20]])
    table = bench_batches(beton, size=48, num_batches=2, rounds=2, peers=["native", "torchvision"])
    rows = [row.strip("| ").split(" | ") for row in table.splitlines()[4:]]
    assert [name for name, *_ in rows] == ["native", "torchvision"]
    assert rows[0][2] == "1.00"
    assert all(float(row[1]) > 0 for row in rows)
