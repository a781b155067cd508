"""The best weights so far, beside the checkpoints: `best/epoch=007-step=00012345/` with the net and a card.

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
    CARD,
    Card,
    Damaged,
    Found,
    Identity,
    checkpoint_name,
    glance,
    newest_first,
    opened,
    save_checkpoint,
)

GROUP = "best"
_METRIC = "val/top1"


def keep_if_best(storage: RunStorage, net: Mapping[str, Any], card: Card) -> bool:
    """Keeps the net's state dict if the card's `val/top1` is higher than that of the kept ones; of equals the first.

    A kill leaves the old best, the new one, or both.
    """
    kept = max((found.metrics[_METRIC] for found in _cards(storage, card.identity).values()), default=None)
    if kept is not None and card.metrics[_METRIC] <= kept:
        return False
    final = checkpoint_name(card.epoch, card.step)
    storage.commit(f"{GROUP}/{final}", partial(save_checkpoint, state={"net": net}, card=card), last=CARD)
    for other in storage.names(GROUP):
        if other != final:
            storage.remove(f"{GROUP}/{other}")
    return True


@contextmanager
def open_best(storage: RunStorage, identity: Identity) -> Iterator[Found | None]:
    """The best whole weights, opened; None if there are none of this recipe and these data."""
    cards = _cards(storage, identity)
    for name in sorted(cards, key=lambda name: cards[name].metrics[_METRIC], reverse=True):
        with ExitStack() as stack:
            try:
                found = stack.enter_context(opened(storage, name))
            except Damaged:
                continue
            yield found
            return
    yield None


def _cards(storage: RunStorage, identity: Identity) -> dict[str, Card]:
    """What the cards of the kept weights say; only of those that are of this run."""
    names = [f"{GROUP}/{name}" for name in newest_first(storage.names(GROUP))]
    cards = {name: glance(storage, name) for name in names}
    return {
        name: card for name, card in cards.items() if card and card.identity.is_of(identity) and _METRIC in card.metrics
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
