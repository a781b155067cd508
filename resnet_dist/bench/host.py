"""What the host costs a step and a checkpoint: two of the planner's constants."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import nn

from resnet_dist.models.registry import build_model
from resnet_dist.training.checkpoint import Card, Identity, save_checkpoint

_BLOCKS = 150


def bench_host(folder: Path, rounds: int) -> str:
    """A Markdown table. `folder`: where checkpoints are written."""
    layer_us = 1e6 * host_s_per_layer(rounds)
    num_bytes, write_s = checkpoint_write(folder, rounds)
    return "\n".join(
        [
            "| | |",
            "|---|---|",
            f"| CPU time to start one layer's part of a step, us | {layer_us:.0f} |",
            f"| checkpoint of ResNet-152 with SGD, MB | {num_bytes / 1e6:.0f} |",
            f"| written, fsynced and digested, s | {write_s:.2f} |",
            f"| that is, MB/s | {num_bytes / write_s / 1e6:.0f} |",
        ]
    )


def host_s_per_layer(rounds: int) -> float:
    """CPU seconds of a training step of layers that compute next to nothing, by their number."""
    torch.set_num_threads(1)
    net = nn.Sequential(
        *(
            layer
            for _ in range(_BLOCKS)
            for layer in (nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        )
    )
    images = torch.zeros(2, 4, 2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    times = []
    for _ in range(5 * rounds):
        begin = time.process_time()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = net(images).float().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - begin)
    return median(times[rounds:]) / (3 * _BLOCKS)


def checkpoint_write(folder: Path, rounds: int) -> tuple[int, float]:
    """(bytes, seconds) of one checkpoint of ResNet-152 and SGD's momentum."""
    net = build_model("resnet152", 1000).state_dict()
    state = {"net": net, "momentum": {name: torch.zeros_like(value) for name, value in net.items()}}
    card = Card(epoch=0, step=0, identity=Identity("", ""), recipe={}, metrics={}, files={})
    times = []
    for _ in range(rounds):
        with TemporaryDirectory(dir=folder) as name:
            begin = time.perf_counter()
            save_checkpoint(Path(name), state=state, card=card)
            times.append(time.perf_counter() - begin)
            num_bytes = sum(path.stat().st_size for path in Path(name).iterdir())
    return num_bytes, median(times)
