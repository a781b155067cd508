"""All-reduce over links: within a node, then between nodes, as a ring or as a tree, whichever is sooner."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from resnet_dist.errors import UserError
from resnet_dist.planner.constants import HOP_S, LOCAL_HOP_S, NET_EFFICIENCY


@dataclass(frozen=True)
class Links:
    local_bytes_s: float
    """Bus bandwidth of an all-reduce within a node, bytes/s per GPU, as measured (not a line rate)."""
    net_bytes_s: float
    """Line rate between nodes, bytes/s per node, all its adapters together."""
    gpus_per_node: int
    local_shared: bool = False
    """GeForce cards without NVLink: all of a node's traffic goes through the host's memory, `local_bytes_s` in all."""


@dataclass(frozen=True)
class AllReduce:
    local_s: float
    net_s: float
    """Between nodes; 0 on one node."""

    @property
    def seconds(self) -> float:
        return self.local_s + self.net_s


def all_reduce(num_bytes: float, workers: int, links: Links) -> AllReduce:
    """Sum of `num_bytes` per worker over all workers, that stand `gpus_per_node` to a node."""
    local = min(workers, links.gpus_per_node)
    nodes = math.ceil(workers / links.gpus_per_node)
    return AllReduce(
        _one_level(num_bytes, local, links.local_bytes_s / (local if links.local_shared else 1), LOCAL_HOP_S),
        _one_level(num_bytes, nodes, links.net_bytes_s * NET_EFFICIENCY, HOP_S),
    )


def _one_level(num_bytes: float, n: int, bytes_s: float, hop_s: float) -> float:
    if n == 1:
        return 0.0
    ring = 2 * (n - 1) / n * num_bytes / bytes_s + 2 * (n - 1) * hop_s
    tree = 2 * num_bytes / bytes_s + 2 * math.ceil(math.log2(n)) * hop_s
    return min(ring, tree)


def parse_net(text: str) -> float:
    """`400Gbps`, or `8x400Gbps` for eight adapters a node -> bytes/s per node. Raises UserError."""
    match = re.fullmatch(r"(?:(\d+)x)?(\d+(?:\.\d+)?)\s*([GgMm])(?:bps|b/s|bit/s)", text.strip())
    if not match or float(match.group(2)) == 0 or match.group(1) == "0":
        raise UserError(f"--net {text}: expected the network of one node like 100Gbps or 8x400Gbps (bits)")
    count, rate, unit = match.groups()
    return int(count or 1) * float(rate) * {"g": 1e9, "m": 1e6}[unit.lower()] / 8
