"""The same function in several processes of this machine, which talk by gloo: for what needs no cluster."""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from resnet_dist.errors import Fault, UserError

T = TypeVar("T")
_LIMIT = timedelta(hours=1)
"""Of one collective: workers meet at the end only, and their shares differ by one batch."""


def on_local_workers(work: Callable[[int, int], T], num_workers: int) -> T:
    """`work(rank, world_size)` on every worker; returns rank 0's result. One worker is this process itself.

    `work` and its result are pickled. Raises what a worker raised if that is a UserError or a Fault; a Fault, with the
    last line of the cause, for anything else, a killed worker too; the others are ended then.
    """
    if num_workers == 1:
        return work(0, 1)
    with tempfile.TemporaryDirectory(prefix="resnet-dist-workers-") as folder:
        try:
            spawn(_worker, args=(work, num_workers, folder), nprocs=num_workers)
        except (ProcessRaisedException, ProcessExitedException) as error:
            raise _cause(Path(folder), error) from None
        result: T = pickle.loads((Path(folder) / "result").read_bytes())
        return result


def _worker(rank: int, work: Callable[[int, int], Any], num_workers: int, folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=num_workers, timeout=_LIMIT
    )
    try:
        result = work(rank, num_workers)
        if rank == 0:
            (Path(folder) / "result").write_bytes(pickle.dumps(result))
    except Exception as error:
        (Path(folder) / f"error-{rank}").write_bytes(_pickled(error))
        raise
    finally:
        dist.destroy_process_group()
    # On a busy machine gloo's threads may outlive the interpreter, which then aborts after its work is done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _pickled(error: Exception) -> bytes:
    known = error if type(error) in (UserError, Fault) else Fault(traceback.format_exception_only(error)[-1].strip())
    return pickle.dumps(known)


def _cause(folder: Path, error: Exception) -> Exception:
    """What the worker that failed first says; the others fail because it is gone."""
    told = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
    if told:
        first: Exception = pickle.loads(told[0].read_bytes())
        return first
    return Fault(f"a worker ended without a word: {str(error).strip().splitlines()[-1]}")
