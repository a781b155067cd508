"""`resnet-dist bench opening`: start-up, resume and memory of a loader at ImageNet's number of samples.

The beton is made up: as many samples as ImageNet has, each a tiny JPEG. Every peer opens it in a process of its own and
shows three batches from the middle of an epoch, as after a restart.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.beton import layout, manifest
from data_prep.beton import layout as pages
from data_prep.beton.ranges import payload_of, write_beton
from resnet_dist.bench.peers import anonymous_bytes
from resnet_dist.errors import Fault

PEERS = {"native": 7, "ours on libffcv": 7, "stock FFCV": 10}
"""Whole batches in memory when three are held: ours three in the queue and one that waits for room there;
stock's ring of five, once for the crops and once for their flips."""
SIDE, SIZE, BATCH_SIZE, NUM_THREADS = 32, 224, 256, 2
_LIMIT_S = 600.0


def bench_opening(num_samples: int, peers: Sequence[str] = tuple(PEERS), keep: Path | None = None) -> str:
    """A Markdown table, times in seconds by the clock and, in brackets, of CPU. The beton is written to the folder
    `keep`, if given, or read from there if an earlier call has left it."""
    with tempfile.TemporaryDirectory() as temporary:
        beton = (keep or Path(temporary)) / f"{num_samples}.beton"
        if not beton.exists():
            write_tiny_samples(beton, num_samples)
        rows = [_row(peer, _measured(peer, beton)) for peer in peers]
    head = [
        f"{num_samples:,} samples, batches of {BATCH_SIZE} at {SIZE} px, {NUM_THREADS} threads",
        "",
        "| | imports, s | opening, s | an epoch's order, s | first batch, s | memory of imports, MB "
        "| besides them and batches, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *rows])


def write_tiny_samples(path: Path, num_samples: int) -> Path:
    """A beton and its manifest: all samples are one JPEG of 32 x 32 px."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (90, 120, 200)).save(buffer, "JPEG")
    rows = np.zeros(num_samples, pages.STORED_ROW)
    rows["mode"], rows["width"], rows["height"] = layout.MODE_JPEG, SIDE, SIDE
    rows["label"], rows["size"] = np.arange(num_samples) % 1000, len(buffer.getvalue())
    plan = pages.lay_out(rows, layout.MIN_PAGE_BYTES)
    digest = write_beton(path, plan, payload_of(lambda k: buffer.getvalue()), temporary=path.with_suffix(".tmp"))
    described = manifest.describe_beton(
        plan,
        digest,
        class_names=tuple(map(str, range(1000))),
        num_untouched=num_samples,
        settings={},
        source={"name": "bench"},
        versions={},
    )
    manifest.write_manifest(path, described)
    return path


def _measured(peer: str, beton: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "resnet_dist.bench.opening", peer, str(beton)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=_LIMIT_S, check=False)
    if done.returncode:
        raise Fault(f"the process of {peer} ended; its reason stands above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _row(peer: str, found: dict[str, Any]) -> str:
    times = [f"{found[name][0]:.1f} ({found[name][1]:.1f})" for name in ("imports", "opening", "order", "first_batch")]
    memory = [f"{found[name] / 1e6:.0f}" for name in ("imports_bytes", "held_bytes")]
    return f"| {peer} | {' | '.join([*times, *memory])} |"


class _Stopwatch:
    """Times of the stages of a start, by the clock and of CPU."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self._began = time.perf_counter(), time.process_time()

    def stage(self, name: str) -> None:
        now = time.perf_counter(), time.process_time()
        self.found[name] = [now[0] - self._began[0], now[1] - self._began[1]]
        self._began = time.perf_counter(), time.process_time()


def ours(beton: Path, decoder: Any, watch: _Stopwatch) -> Callable[[], Any]:
    import torch

    from data_prep.beton.manifest import load_manifest
    from resnet_dist.config.recipe import RandomResizedCrop
    from resnet_dist.data import loader as loader_module
    from resnet_dist.data.order import train_order

    if decoder == "ffcv":
        import resnet_dist.data.ffcv_kernel  # noqa: F401
    watch.stage("imports")
    watch.found["imports_bytes"] = anonymous_bytes()
    watch.stage("skipped")
    told = load_manifest(beton)
    loader = loader_module.BetonLoader(
        beton,
        told,
        RandomResizedCrop(kind="random_resized_crop", size=SIZE),
        decoder=decoder,
        batch_size=BATCH_SIZE,
        seed=0,
        num_threads=NUM_THREADS,
        device=torch.device("cpu"),
    )
    watch.stage("opening")
    start_step = told.num_samples // BATCH_SIZE // 2
    order = train_order(
        told.num_samples,
        seed=0,
        epoch=40,
        global_batch_size=BATCH_SIZE,
        micro_batch_size=BATCH_SIZE,
        rank=0,
        world_size=1,
        start_step=start_step,
    )
    watch.stage("order")
    batches = loader.epoch(40, order.reshape(-1))
    return lambda: next(batches).images


def stock(beton: Path, watch: _Stopwatch) -> Callable[[], Any]:
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    watch.stage("imports")
    watch.found["imports_bytes"] = anonymous_bytes()
    watch.stage("skipped")
    image = [RandomResizedCropRGBImageDecoder((SIZE, SIZE)), RandomHorizontalFlip(), ToTensor()]
    loader = Loader(
        str(beton),
        BATCH_SIZE,
        num_workers=NUM_THREADS,
        os_cache=True,
        order=OrderOption.RANDOM,
        pipelines={"image": image, "label": [IntDecoder(), ToTensor()]},
    )
    watch.stage("opening")
    batches = iter(loader)  # draws the order; begins at the epoch's first batch, since it cannot resume
    watch.stage("order")
    return lambda: next(batches)[0]


def main() -> None:
    peer, beton = sys.argv[1], Path(sys.argv[2])
    watch = _Stopwatch()
    decoder = {"native": "native", "ours on libffcv": "ffcv"}.get(peer)
    show = ours(beton, decoder, watch) if decoder else stock(beton, watch)
    shown = [show()]
    watch.stage("first_batch")
    shown += [show(), show()]
    time.sleep(5.0)  # so that every buffer of the loader is filled
    batches = PEERS[peer] * BATCH_SIZE * SIZE * SIZE * 3
    watch.found["held_bytes"] = anonymous_bytes() - watch.found["imports_bytes"] - batches
    print(json.dumps(watch.found), flush=True)
    os._exit(0)  # stock's thread waits for a consumer for ever


if __name__ == "__main__":
    main()
