"""Data on every node's own disk before the first step: runs in the workers, which wait for each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from data_prep.beton.stage import stage
from resnet_dist.config.profile import Profile
from resnet_dist.errors import Fault


@dataclass(frozen=True)
class NodeCache:
    """What to copy (paths or URLs), to which folder, and for how long the slowest node may take."""

    sources: Sequence[str]
    folder: Path
    timeout_s: float


def node_cache(profile: Profile, sources: Sequence[str]) -> NodeCache | None:
    if profile.cache is None:
        return None
    return NodeCache(tuple(sources), Path(profile.cache), profile.cache_timeout_s)


def fill(cache: NodeCache) -> None:
    """Copies what this node lacks, and returns when all workers' nodes have everything.

    Workers of one node share the copy: the first one copies, the others wait for it. Waiting happens in a group of its
    own, because the limits of the training's collectives are minutes and a copy of ImageNet may take an hour.
    Raises Fault when the source is damaged, the disk full or the limit passed; UserError when the source is gone.
    """
    everybody = None
    if dist.is_initialized() and dist.get_world_size() > 1:
        everybody = dist.new_group(backend="gloo", timeout=timedelta(seconds=cache.timeout_s))
    for source in cache.sources:
        stage(source, cache.folder, wait_limit_s=cache.timeout_s)
    if everybody is None:
        return
    try:
        dist.barrier(everybody)  # type: ignore[arg-type]  # new_group's stub allows for ranks outside
    except RuntimeError as error:
        raise Fault(f"another node did not copy its data into {cache.folder}: {error}") from None
    dist.destroy_process_group(everybody)
