"""The run's betons on each node's own disk, copied before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from data_prep.beton.stage import stage
from data_prep.shown import one_line
from resnet_dist.errors import Fault


@dataclass(frozen=True)
class NodeCache:
    sources: Sequence[str]
    """What to copy: paths or URLs."""
    folder: Path
    timeout_s: float
    """Longest time that the slowest node may take."""

    def fill(self) -> None:
        """Copies what this node lacks, and returns when all workers' nodes have everything.

        Workers on the same node share the copy: the first one copies, the others wait for it. Raises Fault if the
        source is damaged, the disk full or the limit passed; UserError if there is no source.
        """
        for source in self.sources:
            stage(source, self.folder, wait_limit_s=self.timeout_s)
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        # Through the store of the group, of which rank 0 has the server: the training's collectives time out in
        # minutes, and copying ImageNet may take an hour.
        assert dist.group.WORLD is not None
        store = dist.group.WORLD.get_group_store()
        try:
            if store.add("node-cache/filled", 1) == dist.get_world_size():
                store.set("node-cache/all-filled", "")
            store.wait(["node-cache/all-filled"], timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            raise Fault(f"another node did not copy its data into {self.folder}: {one_line(error)}") from None
