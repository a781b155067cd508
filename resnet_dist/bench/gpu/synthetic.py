"""What the checks train on: a beton of JPEGs made here, and a run on it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_prep.beton import layout
from data_prep.beton.manifest import describe_beton, write_manifest
from data_prep.beton.ranges import payload_of, write_beton
from resnet_dist.bench.step import Settings, our_loop, random_batches
from resnet_dist.config.recipe import Recipe
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.tracking.tracker import Spool, Tracker
from resnet_dist.training.checkpoint import Identity
from resnet_dist.training.context import LocalContext, TrainingJob
from resnet_dist.training.loop import Trainer
from resnet_dist.training.model import set_backends
from resnet_dist.training.schedule import RunPlan

NUM_CLASSES = 10
_CLASS_NAMES = tuple(f"class {label}" for label in range(NUM_CLASSES))
_PICTURES = 128
"""Different JPEGs in a beton; samples repeat them."""


def write_synthetic_beton(path: Path, num_samples: int, side: int, seed: int = 0) -> Path:
    """A beton and its manifest: pictures of `side` px or somewhat less, in smooth colours with noise, whose JPEGs have
    about as many bytes per pixel as ImageNet's.
    """
    random = np.random.default_rng(seed)
    jpegs, sizes = [], []
    for _ in range(min(_PICTURES, num_samples)):
        width, height = random.integers(3 * side // 4, side + 1, 2).tolist()
        coarse = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
        noise = random.integers(-12, 13, (height, width, 1), dtype=np.int16)
        buffer = io.BytesIO()
        Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        jpegs.append(buffer.getvalue())
        sizes.append((width, height))
    which = np.arange(num_samples) % len(jpegs)
    rows = np.zeros(num_samples, layout.STORED_ROW)
    rows["mode"], rows["label"] = layout.MODE_JPEG, which % NUM_CLASSES
    rows["width"], rows["height"] = np.array(sizes)[which].T
    rows["size"] = np.array([len(jpeg) for jpeg in jpegs])[which]
    plan = layout.lay_out(rows, layout.MIN_PAGE_BYTES)
    digest = write_beton(path, plan, payload_of(lambda k: jpegs[which[k]]), temporary=path.with_suffix(".tmp"))
    described = describe_beton(
        plan,
        digest,
        class_names=_CLASS_NAMES,
        num_untouched=num_samples,
        settings={},
        source={"name": "bench"},
        versions={},
    )
    write_manifest(path, described)
    return path


def beton_recipe(
    model: str, size: int, batch_size: int, *, micro_batches: int = 1, **sections: Mapping[str, Any]
) -> Recipe:
    """A recipe for betons of `write_synthetic_beton`; `sections` are added to its own."""
    tree: dict[str, dict[str, Any]] = {
        "model": {"name": model, "num_classes": NUM_CLASSES},
        "data": {
            "dataset": "synthetic",
            "train": {"kind": "random_resized_crop", "size": size},
            "eval": {"kind": "center_crop", "size": size, "resize": size * 8 // 7},
            "mean": [124, 116, 104],
            "std": [58, 57, 57],
        },
        "train": {"global_batch_size": batch_size * micro_batches, "micro_batch_size": batch_size, "total_epochs": 2},
        "optim": {"name": "sgd", "lr": 0.01, "weight_decay": 1e-4},
        "schedule": {"kind": "cosine"},
        "eval": {"batch_size": batch_size},
    }
    merged = {name: section | dict(sections.get(name, {})) for name, section in tree.items()}
    return Recipe.model_validate({"seed": 0, **merged})


def beton_job(config: Recipe, folder: Path, *, steps_per_epoch: int, log_every_steps: int, threads: int) -> TrainingJob:
    """Two epochs on `train.beton` and `val.beton` of the folder; evaluated and saved after each."""
    plan = RunPlan(
        steps_per_epoch=steps_per_epoch,
        total_steps=2 * steps_per_epoch,
        last_step=2 * steps_per_epoch,
        eval_every_epochs=1,
        save_every_epochs=1,
        save_every_steps=None,
        log_every_steps=log_every_steps,
    )
    identity = Identity("recipe", "data", _CLASS_NAMES)
    return TrainingJob(config, plan, identity, folder / "train.beton", folder / "val.beton", loader_threads=threads)


def local_context(folder: Path, device: torch.device) -> LocalContext:
    """Of a run that is kept in the folder."""
    (folder / "run").mkdir(exist_ok=True)
    return LocalContext(FolderStorage(folder / "run"), device)


class Points(Tracker):
    """Keeps the points of the curves."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.rows.append({"step": float(step), **values})

    def of(self, key: str) -> list[float]:
        return [row[key] for row in self.rows if key in row]


@contextmanager
def in_memory_run(
    config: Recipe, settings: Settings, device: torch.device, *, tracker: Tracker | None = None, **options: Any
) -> Iterator[Trainer]:
    """`bench.step.our_loop` on random batches, in a temporary folder, with PyTorch's backends as the recipe wants them.

    `tracker`: a spool by default, as in a run; `options`: more arguments of `our_loop`.
    """
    set_backends(config.train)
    with TemporaryDirectory(prefix="resnet-dist-bench-") as name:
        tracker = tracker or Spool(Path(name) / "spool")
        batches = random_batches(settings, device)
        try:
            yield our_loop(config, settings, batches, Path(name), tracker=tracker, **options)
        finally:
            tracker.close()


def first_difference(ours: Any, theirs: Any, name: str = "") -> str | None:
    """The first tensor or number, by its keys, in which two states differ in any bit; None if they are equal."""
    if isinstance(ours, torch.Tensor):
        same = ours.dtype == theirs.dtype and torch.equal(ours.cpu(), theirs.cpu())
        return None if same else name
    if isinstance(ours, Mapping):
        ours, theirs = list(ours.items()), [theirs.get(key) for key in ours]
        parts: Sequence[tuple[Any, Any, Any]] = [(k, v, t) for (k, v), t in zip(ours, theirs, strict=True)]
    elif isinstance(ours, list):
        parts = [(k, v, t) for k, (v, t) in enumerate(zip(ours, theirs, strict=True))]
    else:
        return None if ours == theirs else name
    found = (first_difference(v, t, f"{name}.{k}".removeprefix(".")) for k, v, t in parts)
    return next((difference for difference in found if difference is not None), None)
