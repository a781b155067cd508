"""What one worker learns at its own moment - a wish to stop or to save - becomes known to all after the same step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Agreement:
    """A vote after every step whose result is read after the next one, when it has long arrived: nobody waits for it.

    4 bytes a step through the CPU's collective, beside the next step's forward pass.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, dist.Work] | None = None
        self._counts = False
        """Whether the pending vote is a new one: votes repeat until the wish is fulfilled."""

    def reached(self, wish: bool) -> bool:
        """Whether any worker wished at the call before; with one worker, whether it wishes now.

        All workers call it together. After a True, the vote of that call does not count.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return wish
        before, counts = self._pending, self._counts
        votes = torch.tensor([float(wish)])
        work = dist.all_reduce(votes, async_op=True)
        assert work is not None
        self._pending, self._counts = (votes, work), True
        if before is None:
            return False
        before[1].wait()
        agreed = counts and float(before[0]) > 0
        self._counts = not agreed
        return agreed
