"""Sums, rank 0's buffers and checkpoint for all workers, and waits for a worker that is gone or hangs.

As a script, the groups of workers of these tests: test_collectives.py FOLDER.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
import small_run as small
import torch
import torch.distributed as dist
from torch import Tensor, nn

from resnet_dist.data.node_cache import NodeCache
from resnet_dist.errors import Fault, UserError
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.training import checkpoint_manager
from resnet_dist.training.checkpoint import Identity
from resnet_dist.training.checkpoint_manager import CheckpointManager
from resnet_dist.training.collectives import MOST_IN_A_MESH, prepare_connections, share_state, sum_over_workers
from resnet_dist.training.context import LocalContext

pytestmark = pytest.mark.system

WORKERS = 3
LOST = 1
"""The rank that is killed or stopped."""
LIMIT_S = 3.0
LOSSES = {
    "killed before the workers are connected": (signal.SIGKILL, False),
    "stopped before the workers are connected": (signal.SIGSTOP, False),
    "killed between two sums": (signal.SIGKILL, True),
    "stopped between two sums": (signal.SIGSTOP, True),
}


class Buffers(nn.Module):
    def __init__(self, value: int) -> None:
        super().__init__()
        for name in ("a", "b"):
            self.register_buffer(name, torch.full((2, 3), value + 0.25))
            self.register_buffer(f"{name}_count", torch.tensor(value))
        self.register_buffer("constant", torch.tensor(value), persistent=False)


def sums(rank: int, folder: Path) -> object:
    cells = torch.zeros(3, dtype=torch.float64)
    cells[rank] = 0.1 * (rank + 1)
    return sum_over_workers(cells).tolist() == [0.1, 0.2, 0.1 * 3]


def buffers(rank: int, folder: Path) -> object:
    module, sent = Buffers(rank), list[int]()
    broadcast = dist.broadcast

    def counted(values: Tensor, *args: Any, **options: Any) -> Any:
        sent.append(values.numel())
        return broadcast(values, *args, **options)

    dist.broadcast = counted
    share_state(module, only_buffers=True)
    dist.broadcast = broadcast
    return [module.a.sum().item(), module.b_count.item(), module.constant.item(), sorted(sent)]  # type: ignore[operator]


def filled(rank: int, folder: Path) -> object:
    NodeCache([], folder, timeout_s=60.0).fill()
    return "filled"


# One worker's restore from the checkpoint in `folder`: the step and the weights, or the error; and what it read


def restored(rank: int, folder: Path, identity: Identity = small.IDENTITY) -> object:
    storage = FolderStorage(folder)
    reads, fetched = list[str](), storage.fetched
    storage.fetched = lambda name: reads.append(name) or fetched(name)  # type: ignore[method-assign, func-returns-value]
    context = LocalContext(storage, rank=rank, world_size=WORKERS)
    trainer = small.trainer_of(folder, small.recipe(), context=context)
    with torch.no_grad():
        for weight in trainer.state.parameters:
            weight.add_(rank * 1e-6)  # as from another processor
    manager = CheckpointManager(replace(trainer.checkpoints._job, identity=identity), context, trainer.state)
    try:
        manager.restore()
    except (Fault, UserError) as error:
        return f"{type(error).__name__}: {error}"
    return [trainer.state.step, small.digest(trainer.state.state_dict()), len(reads)]


def of_another_recipe(rank: int, folder: Path) -> object:
    return restored(rank, folder, replace(small.IDENTITY, recipe_hash="other"))


def not_shared(rank: int, folder: Path) -> object:
    return restored(rank, folder / "elsewhere" if rank == LOST else folder)


def changed_on_the_way(rank: int, folder: Path) -> object:
    received = checkpoint_manager.broadcast_file

    def changed(*args: Any) -> Any:
        file: Any = received(*args)
        file[1000] ^= 1
        return file

    if rank == LOST:
        checkpoint_manager.broadcast_file = changed
    try:
        return restored(rank, folder)
    finally:
        checkpoint_manager.broadcast_file = received


def without_a_checkpoint(rank: int, folder: Path) -> object:
    return restored(rank, folder / "empty")


TOGETHER: tuple[Callable[[int, Path], object], ...] = (
    sums,
    buffers,
    filled,
    restored,
    of_another_recipe,
    not_shared,
    without_a_checkpoint,
    changed_on_the_way,
)


def all_together(rank: int, store: Path, folder: Path) -> dict[str, object]:
    connect(store, rank, timeout_s=120.0)
    found = {case.__name__: case(rank, folder) for case in TOGETHER}
    dist.barrier()
    return found


def one_lost(rank: int, store: Path, folder: Path, number: int, connected: bool) -> dict[str, object]:
    connect(store, rank, timeout_s=LIMIT_S)
    if connected:
        sum_over_workers(torch.ones(1))
    if rank == LOST:
        os.kill(os.getpid(), number)
    time.sleep(0.5)
    began_s = time.monotonic()
    try:
        sum_over_workers(torch.ones(1))
    except (Fault, RuntimeError) as error:
        return {"seconds": time.monotonic() - began_s, "error": str(error)}
    return {}


def connect(store: Path, rank: int, timeout_s: float) -> None:
    """As in a group of more than `MOST_IN_A_MESH` workers."""
    torch.set_num_threads(1)
    prepare_connections(rank, MOST_IN_A_MESH + 1)
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORKERS, timeout=timeout)


def start(folder: Path, name: str, work: Callable[..., dict[str, object]], *args: object) -> list[ForkProcess]:
    """Starts `work` on all workers; what each returns goes to NAME-RANK.json."""

    def target(rank: int) -> None:
        found = work(rank, folder / f"{name}-store", folder, *args)
        (folder / f"{name}-{rank}.json").write_text(json.dumps(found))
        os._exit(0)  # a group that lost a worker cannot be closed in order

    workers = [multiprocessing.get_context("fork").Process(target=target, args=(rank,)) for rank in range(WORKERS)]
    for worker in workers:
        worker.start()
    return workers


def finish(workers: list[ForkProcess], limit_s: float = 60.0) -> None:
    for worker in workers:
        worker.join(limit_s)
    for worker in workers:
        worker.kill()
        worker.join()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("groups")
    trainer = small.trainer_of(folder, small.recipe())
    for _ in range(3):
        trainer.advance()
    trainer.checkpoints.save({})
    subprocess.run([sys.executable, __file__, str(folder)], check=True, timeout=280)
    return folder


@pytest.fixture(scope="module")
def together(results: Path) -> dict[str, list[Any]]:
    """By case: what each rank found."""
    ranks = [json.loads((results / f"together-{rank}.json").read_text()) for rank in range(WORKERS)]
    return {case.__name__: [found[case.__name__] for found in ranks] for case in TOGETHER}


def test_a_cell_that_one_worker_fills_is_summed_exactly(together: dict[str, list[Any]]) -> None:
    assert together["sums"] == [True] * WORKERS


def test_rank_0s_saved_buffers_are_sent_in_one_message_a_dtype(together: dict[str, list[Any]]) -> None:
    assert together["buffers"] == [[1.5, 0, rank, [2, 12]] for rank in range(WORKERS)]


def test_workers_wait_until_all_nodes_have_their_copies(together: dict[str, list[Any]]) -> None:
    assert together["filled"] == ["filled"] * WORKERS


def test_all_workers_restore_the_checkpoint_that_rank_0_alone_reads(together: dict[str, list[Any]]) -> None:
    (step, weights, reads), *others = together["restored"]
    assert (step, reads) == (3, 1)
    assert others == [[3, weights, 0]] * 2


def test_without_a_checkpoint_all_workers_start_with_rank_0s_weights(together: dict[str, list[Any]]) -> None:
    (step, weights, reads), *others = together["without_a_checkpoint"]
    assert (step, reads) == (0, 0)
    assert others == [[0, weights, 0]] * 2


@pytest.mark.parametrize(
    ("case", "problem"),
    [
        ("of_another_recipe", "began with another recipe"),
        ("not_shared", "rank 1 sees step 0 as the newest there, rank 0 step 3: is storage shared by all nodes?"),
        ("changed_on_the_way", "rank 1 did not receive what rank 0 verified"),
    ],
)
def test_all_workers_raise_what_one_finds_wrong(together: dict[str, list[Any]], case: str, problem: str) -> None:
    first, *others = together[case]
    assert problem in first
    assert [other.rpartition(": ")[2] for other in others] == [first.rpartition(": ")[2]] * 2


@pytest.mark.parametrize("name", LOSSES)
def test_a_wait_for_a_lost_worker_ends_at_the_limit(results: Path, name: str) -> None:
    """Without a limit of our own, gloo waits five times as long for a connection that is only made now."""
    for rank in {*range(WORKERS)} - {LOST}:
        found = json.loads((results / f"{name}-{rank}.json").read_text())
        assert found["error"]
        assert found["seconds"] < 3 * LIMIT_S


def test_only_large_groups_connect_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", "")
    del os.environ["TORCH_GLOO_LAZY_INIT"]
    prepare_connections(0, MOST_IN_A_MESH)
    assert "TORCH_GLOO_LAZY_INIT" not in os.environ
    prepare_connections(0, MOST_IN_A_MESH + 1)
    assert os.environ["TORCH_GLOO_LAZY_INIT"] == "1"


def test_only_rank_0_needs_a_file_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = list[tuple[int, int]]()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", "1")
    assert prepare_connections(0, 3000) == prepare_connections(1, 5000) == ""
    assert prepare_connections(0, 5000).startswith("a process may open 4,096 files, and rank 0 of 5,000 workers needs ")
    assert limits == [(4096, 4096)] * 3


if __name__ == "__main__":
    where = Path(sys.argv[1])
    groups = [start(where, name, one_lost, number, connected) for name, (number, connected) in LOSSES.items()]
    finish(start(where, "together", all_together))
    for group in groups:
        finish([worker for rank, worker in enumerate(group) if rank != LOST])
        finish([group[LOST]], limit_s=0.0)
