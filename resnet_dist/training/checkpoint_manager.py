"""The best weights so far, beside the checkpoints: `best/epoch=007-step=00012345/` with the net and a metadata.

Checkpoints serve to go on and only the newest few are kept; the best evaluation may be long ago, or lie between two
checkpoints. Weights only: half the size of a checkpoint, and only written when an evaluation beats all before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from resnet_dist.storage.base import RunStorage
from resnet_dist.training.checkpoint import (
    METADATA,
    CheckpointMetadata,
    Damaged,
    Found,
    Identity,
    checkpoint_name,
    newest_first,
    opened,
    read_metadata,
    write_checkpoint,
)

BEST = "best"
_METRIC = "val/top1"


def keep_if_best(storage: RunStorage, net: Mapping[str, Any], metadata: CheckpointMetadata) -> bool:
    """Keeps the net's state dict if its `val/top1` is higher than that of the kept ones; of equals the first stays.

    A kill leaves the old best, the new one, or both.
    """
    kept = [old.metrics[_METRIC] for old in _all_best(storage, metadata.identity).values()]
    if kept and metadata.metrics[_METRIC] <= max(kept):
        return False
    new = checkpoint_name(metadata.epoch, metadata.step)
    storage.commit(f"{BEST}/{new}", partial(write_checkpoint, state={"net": net}, metadata=metadata), last=METADATA)
    for other in storage.names(BEST):
        if other != new:
            storage.remove(f"{BEST}/{other}")
    return True


@contextmanager
def open_best(storage: RunStorage, identity: Identity) -> Iterator[Found | None]:
    """The best complete weights of this recipe and these data, or None."""
    kept = _all_best(storage, identity)
    for name in sorted(kept, key=lambda name: kept[name].metrics[_METRIC], reverse=True):
        with ExitStack() as stack:
            try:
                found = stack.enter_context(opened(storage, name))
            except Damaged:
                continue
            yield found
            return
    yield None


def _all_best(storage: RunStorage, identity: Identity) -> dict[str, CheckpointMetadata]:
    """The metadata of the best weights in storage, without those of another run."""
    found = {f"{BEST}/{name}": read_metadata(storage, f"{BEST}/{name}") for name in newest_first(storage.names(BEST))}
    return {
        name: data for name, data in found.items() if data and data.identity.is_of(identity) and _METRIC in data.metrics
    }


# Work that must not hold up training, done by one thread, one piece at a time.


class Background:
    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="background")
        self._last: Future[object] | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Waits for the piece before, so that at most one is held in memory. Raises what that one raised."""
        self.wait()
        self._last = self._thread.submit(work)

    def wait(self) -> None:
        """Until everything is done. Raises what the last piece raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()
