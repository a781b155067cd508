"""Launches: micro-batches merged into one forward and backward pass, rehearsed, and captured as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_run as small
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from resnet_dist.config.recipe import Recipe
from resnet_dist.data.batch import Batch
from resnet_dist.errors import Fault
from resnet_dist.training.launches import Launches, cut, merged_on_cpu, merged_on_gpu
from resnet_dist.training.loop import Trainer
from resnet_dist.training.reduce import FastReduction


@given(st.integers(0, 50), st.integers(1, 60), st.integers(1, 70))
def test_launches_cover_a_share_in_order_and_differ_little(start: int, length: int, most: int) -> None:
    launches = cut(range(start, start + length), most)
    assert [number for launch in launches for number in launch] == list(range(start, start + length))
    assert max(map(len, launches)) <= most
    assert len(launches) == -(-length // most)  # no more of them than needed
    assert max(map(len, launches)) - min(map(len, launches)) <= 1


@pytest.mark.parametrize(
    ("micro_batch_size", "image_px", "precision", "expected"),
    [
        (4, 64, "fp32", 8),  # all of eight
        (8, 64, "bf16", 4),
        (4, 224, "fp32", 1),  # too many pixels
        (16, 32, "fp32", 1),
        (4, 32, "fp64", 1),
    ],
)
def test_small_micro_batches_are_merged_on_a_cpu(
    micro_batch_size: int, image_px: int, precision: str, expected: int
) -> None:
    assert merged_on_cpu(micro_batch_size, image_px, 8, precision=precision) == expected


def test_a_gpu_merges_what_its_memory_holds() -> None:
    assert merged_on_gpu(32, 8, launch_bytes=10, free_bytes=1000) == 8
    assert merged_on_gpu(32, 64, launch_bytes=10, free_bytes=1000) == 16  # 512 images
    assert merged_on_gpu(32, 8, launch_bytes=10, free_bytes=35) == 3
    assert merged_on_gpu(32, 8, launch_bytes=10, free_bytes=5) == 1  # which has just run
    assert merged_on_gpu(1024, 8, launch_bytes=1, free_bytes=1000) == 1


# The same mathematics


NETS: dict[str, dict[str, Any]] = {
    "plain": {"name": "plain20"},
    "projections": {"name": "resnet20", "shortcut": "C", "drop_path": 0.3, "dropout": 0.2},
    "identity mappings": {"name": "resnet110", "activation_order": "pre", "shortcut_dropout": 0.2},
    "gated": {"name": "resnet20", "gate": "exclusive"},
    "grouped bottlenecks": {
        "name": "resnet26",
        "groups": 4,
        "base_width": 16,
        "stem": "deep",
        "se_ratio": 0.25,
        "pooled_projection": True,
        "drop_path": 0.2,
    },
    "blurred": {"name": "resnet18", "blur_pool": True},
}


def stepped(folder: Path, recipe: Recipe, merged: int) -> tuple[list[Tensor], list[float]]:
    """State after one step, and its loss: later ones amplify rounding, the more the fewer values a norm sees."""
    points = small.Points()
    trainer = small.trainer_of(folder, recipe, tracker=points, micro_batches_per_launch=merged)
    trainer.advance()
    trainer._log()
    return list(trainer.state.net.state_dict().values()), list(points.losses().values())


@pytest.mark.parametrize("net", NETS)
def test_merged_steps_equal_unmerged_ones_to_1e10_in_float64(net: str, tmp_path: Path) -> None:
    mixing = {"mixing": {"mixup_alpha": 0.2, "cutmix_alpha": 1.0}}
    recipe = small.recipe("fp64", model=NETS[net] | {"num_classes": 4}, data=mixing)
    expected, losses = stepped(tmp_path / "alone", recipe, merged=1)
    for merged in (2, 4, 6):
        state, same_losses = stepped(tmp_path / str(merged), recipe, merged)
        assert same_losses == pytest.approx(losses, rel=1e-10)
        for mine, wanted in zip(state, expected, strict=True):
            assert float((mine - wanted).double().norm()) <= 1e-10 * float(wanted.double().norm())


def test_the_exact_reduction_does_not_merge(tmp_path: Path) -> None:
    trainer = small.trainer_of(tmp_path, small.recipe(reduction="exact"), micro_batches_per_launch=6)
    assert trainer.train_step.prepare(small.SIZE) == [range(i, i + 1) for i in range(6)]


# Rehearsals and graphs


class Recorded:
    """A stand-in for a CUDA graph: what was captured runs again on the inputs of the capture, in the same memory."""

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self._run, self.num_replays = run, 0

    def replay(self) -> Tensor:
        self.num_replays += 1
        return self._run()

    def pool(self) -> str:
        return "pool"


Capture = Callable[[Callable[[], Tensor], Any], Any]


def with_graphs(trainer: Trainer, capture: Capture, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets the trainer capture its launches; returns the lines that it logs."""
    monkeypatch.setattr("resnet_dist.training.launches.capture", capture)
    step, lines = trainer.train_step, list[str]()
    step.reduction = FastReduction(trainer.classifier, 1, num_micro_batches=6, compression="none", in_buckets=True)
    step.launches = Launches(
        step.forward_backward, step.reduction, step.statistics, uses_graphs=True, log=print, warn=lines.append
    )
    step.launches.rehearse(step.rehearsal_batch(3, small.SIZE))
    return lines


def test_a_captured_step_gives_the_numbers_of_the_step_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small.recipe("fp64", **{k: v for k, v in small.PARTS.items() if k != "schedule"})
    eager, captured = (
        small.trainer_of(tmp_path / name, recipe, micro_batches_per_launch=4) for name in ("eager", "captured")
    )
    graphs: list[Recorded] = []

    def capture(run: Callable[[], Tensor], pool: Any) -> Recorded:
        graphs.append(Recorded(run))
        return graphs[-1]

    before = small.digest(captured.state.state_dict())
    addresses = []
    assert with_graphs(captured, capture, monkeypatch) == []
    assert small.digest(captured.state.state_dict()) == before  # a rehearsal leaves nothing behind
    for trainer in (eager, captured):
        for _ in range(3):
            trainer.advance()
            addresses.append([p.grad.data_ptr() for p in trainer.state.parameters if p.grad is not None])
    assert [graph.num_replays for graph in graphs] == [6]  # three steps of two launches
    assert addresses[3] == addresses[4] == addresses[5]  # a graph writes to fixed memory
    assert len(addresses[3]) == len(captured.state.parameters)
    for mine, wanted in zip(
        captured.state.net.state_dict().values(), eager.state.net.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-13)


def test_where_a_capture_fails_the_step_runs_by_itself_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = small.trainer_of(tmp_path, small.recipe(), micro_batches_per_launch=4)

    def capture(run: Callable[[], Tensor], pool: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    assert with_graphs(trainer, capture, monkeypatch) == [
        "CUDA graphs are disabled (slower, same results): operation not permitted when stream is capturing and more"
    ]
    for _ in range(2):
        trainer.advance()
    assert trainer.state.step == 2


def test_a_launch_that_does_not_fit_says_what_to_change(tmp_path: Path) -> None:
    step = small.trainer_of(tmp_path, small.recipe()).train_step

    def too_large(batch: Batch) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    launches = Launches(too_large, step.reduction, step.statistics, uses_graphs=False, log=print, warn=print)
    with pytest.raises(Fault, match=r"8 images of 8 px .* set micro_batches_per_launch below 2, or recompute_act"):
        launches.rehearse(step.rehearsal_batch(2, small.SIZE))


@pytest.mark.parametrize(("fits", "expected"), [(6, 6), (3, 3), (1, 1)])
def test_on_a_gpu_the_merge_that_is_faster_and_fits_is_taken(
    fits: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that makes launches equally long, and an estimate of the memory that is too high."""
    step, lines = small.trainer_of(tmp_path, small.recipe()).train_step, list[str]()
    for name, value in {"memory_allocated": 0, "max_memory_allocated": 10}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 1000))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    seconds = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(seconds))

    def forward_backward(batch: Batch) -> Tensor:
        if len(batch.micro_batches) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step.forward_backward(batch)

    launches = Launches(
        forward_backward, step.reduction, step.statistics, uses_graphs=False, log=lines.append, warn=print
    )
    before = small.digest(step.state.state_dict())
    assert launches.best_merge(lambda k: step.rehearsal_batch(k, small.SIZE), 6, compiled=False) == expected
    chosen = (
        f"micro-batches in a launch: {expected} of a worker's 6 (1: 20 images/s, {expected}: {20 * expected} images/s)"
    )
    assert lines == ["micro-batches in a launch: 1 of a worker's 6, which fit the memory" if expected == 1 else chosen]
    assert small.digest(step.state.state_dict()) == before
