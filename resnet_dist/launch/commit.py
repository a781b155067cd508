"""Bringing a checkpoint to storage that may be full or away for a while."""

from __future__ import annotations

import time
from collections.abc import Callable

from resnet_dist.errors import Fault

_RETRY_S = 2.0


class StorageRefused(Fault):
    """Storage did not take a checkpoint within its time."""


def commit_within(
    commit: Callable[[], None],
    limit_s: float,
    *,
    what: str,
    warn: Callable[[str], object],
    sleep: Callable[[float], None] = time.sleep,
    now_s: Callable[[], float] = time.monotonic,
) -> None:
    """Calls `commit` until it does not raise OSError (a full disk, a quota, a store that does not answer), `limit_s` at
    most. `warn` hears of the first failure and of the success after it. Raises StorageRefused; anything else at once.
    """
    began_s, warned = now_s(), False
    while True:
        try:
            commit()
        except OSError as error:
            reason = error.strerror or str(error)
            if now_s() - began_s + _RETRY_S > limit_s:
                raise StorageRefused(
                    f"{what} could not be written for {limit_s:g} s (failure.storage_timeout_s): {reason}; make "
                    "room or mend it, and give the same command again: it goes on from the checkpoint before"
                ) from None
            if not warned:
                warn(f"{what} cannot be written: {reason}; tried again for up to {limit_s:g} s, training goes on")
                warned = True
            sleep(_RETRY_S)
        else:
            if warned:
                warn(f"{what} is written after all")
            return
