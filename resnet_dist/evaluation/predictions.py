"""What an evaluation predicted for each sample: in a file of each worker, then in a table, and a sheet of the worst."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from data_prep.beton.files import read_up_to
from data_prep.beton.samples import Samples
from data_prep.beton.table import Columns, require_table_name, write_table
from data_prep.shown import shown
from resnet_dist.data.decoder import ImageSettings
from resnet_dist.data.loader import BetonLoader
from resnet_dist.errors import UserError
from resnet_dist.evaluation.sheets import Ink, Tile, draw_sheet, require_picture_name

FEW_CLASSES = 20
"""A table has the probabilities of all classes if they are no more than this."""
NUM_TOP = 5
NUM_WORST = 40
_ROWS = 4096


@dataclass(frozen=True)
class PredictionOutputs:
    """The files to write. UserError for names of other kinds of files and options that do not fit."""

    table: Path | None = None
    """`.parquet` or `.csv`."""
    all_probabilities: bool = False
    """Those of all classes, however many there are."""
    worst: Path | None = None
    """`.png`, a sheet of the samples with the highest losses."""

    def __post_init__(self) -> None:
        if self.table is not None:
            require_table_name("--predictions", self.table)
        elif self.all_probabilities:
            raise UserError("--all-probabilities: are for the table of --predictions FILE, which is missing")
        if self.worst is not None:
            require_picture_name("--worst", self.worst)

    def keeps_all(self, num_classes: int) -> bool:
        return self.table is not None and (self.all_probabilities or num_classes <= FEW_CLASSES)


def row_type(num_classes: int, *, keeps_all: bool) -> np.dtype[np.void]:
    """What is kept of a sample: the loss in nats, the most likely classes, and the probabilities of those or of all."""
    num_top = min(NUM_TOP, num_classes)
    num_kept = num_classes if keeps_all else num_top
    return np.dtype([("loss", "<f8"), ("top", "<i4", (num_top,)), ("probabilities", "<f4", (num_kept,))])


class PredictionFile:
    """One worker's predictions, in the order of its samples.

    Args:
        file: is written to, a batch at a time.
        row: `row_type`.
    """

    def __init__(self, file: BinaryIO, row: np.dtype[np.void]) -> None:
        self._file, self._row = file, row

    def __call__(self, logits: Tensor, labels: Tensor) -> None:
        """`logits` [N, C], `labels` [N]."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        top = logits.topk(self._row["top"].shape[0], dim=1).indices
        finite = logits.isfinite().all(dim=1, keepdim=True)
        probabilities = logits.softmax(dim=1).where(finite, torch.nan)
        if probabilities.shape[1] != self._row["probabilities"].shape[0]:
            probabilities = probabilities.gather(1, top)
        rows = np.zeros(len(labels), self._row)
        rows["loss"] = cross_entropy(logits, labels, reduction="none").double().where(finite[:, 0], torch.nan).cpu()
        rows["top"] = top.where(finite, -1).cpu()
        rows["probabilities"] = probabilities.cpu()
        self._file.write(rows.tobytes())


def part_path(folder: Path, rank: int) -> Path:
    return folder / f"{rank:05d}.rows"


def write_predictions(
    outputs: PredictionOutputs,
    parts: Path,
    num_parts: int,
    beton: Path,
    num_classes: int,
    images: ImageSettings,
    num_threads: int,
) -> str | None:
    """Writes the table and the sheet from the files of all workers: worker k has the k-th share of the samples.

    Args:
        num_classes: of the model.
        images: what the model sees of a sample, for the sheet.

    Returns a line about source paths that are not known.
    """
    samples = Samples(beton)
    row = row_type(num_classes, keeps_all=outputs.keeps_all(num_classes))
    files = [part_path(parts, rank) for rank in range(num_parts)]
    if outputs.table is not None:
        write_table(outputs.table, _columns(samples, files, row, num_classes))
    if outputs.worst is not None:
        _draw_worst(outputs.worst, samples, files, row, images, num_threads)
    return samples.why_no_paths if outputs.table is not None else None


def _rows(files: list[Path], row: np.dtype[np.void]) -> Iterator[NDArray[np.void]]:
    """`_ROWS` at a time wherever a file ends, so that a table's bytes do not depend on the number of workers."""
    part = b""
    for path in files:
        with path.open("rb") as file:
            while data := read_up_to(file, _ROWS * row.itemsize - len(part)):
                part += data
                if len(part) == _ROWS * row.itemsize:
                    yield np.frombuffer(part, row)
                    part = b""
    if part:
        yield np.frombuffer(part, row)


def _columns(samples: Samples, files: list[Path], row: np.dtype[np.void], num_classes: int) -> Iterator[Columns]:
    names = [shown(name, None) for name in samples.manifest.class_names]
    keeps_all = row["probabilities"].shape[0] == num_classes
    # Two classes may have one name.
    titles = [f"p_{name}" if names.count(name) == 1 else f"p_{name}_{label}" for label, name in enumerate(names)]

    def class_of(label: int) -> str:
        return names[label] if label >= 0 else ""

    start = 0
    for rows in _rows(files, row):
        labels = samples.reader.labels[start : start + len(rows)]
        top = rows["top"]
        columns = {
            "index": list(range(start, start + len(rows))),
            "path": [shown(samples.path(start + k), None) for k in range(len(rows))],
            "label": labels.tolist(),
            "class": [names[label] for label in labels.tolist()],
            "prediction": top[:, 0].tolist(),
            "predicted_class": [class_of(label) for label in top[:, 0].tolist()],
            "correct": (top[:, 0] == labels).tolist(),
            "loss": rows["loss"].tolist(),
        }
        if keeps_all:
            columns |= {title: rows["probabilities"][:, label] for label, title in enumerate(titles)}
        else:
            for k in range(top.shape[1]):
                columns[f"top{k + 1}_class"] = [class_of(label) for label in top[:, k].tolist()]
                columns[f"top{k + 1}_probability"] = rows["probabilities"][:, k]
        yield columns
        start += len(rows)


def _draw_worst(
    path: Path,
    samples: Samples,
    files: list[Path],
    row: np.dtype[np.void],
    images: ImageSettings,
    num_threads: int,
) -> None:
    found = np.concatenate([rows[["loss", "top"]].copy() for rows in _rows(files, row)])
    worst = np.argsort(-np.nan_to_num(found["loss"], nan=np.inf), kind="stable")[:NUM_WORST].astype(np.int64)
    names = samples.manifest.class_names
    loader = BetonLoader(samples.reader.path, images, batch_size=len(worst), num_threads=num_threads)
    with closing(loader):
        pictures = next(loader.epoch(0, worst)).images.numpy()
    tiles = []
    for picture, index in zip(pictures, worst.tolist(), strict=True):
        true, predicted = samples.reader.label(index), int(found["top"][index, 0])
        lines: tuple[tuple[str, Ink], ...] = (
            (names[true], "strong"),
            (names[predicted] if predicted >= 0 else "NaN", "right" if predicted == true else "wrong"),
            (f"sample {index}, loss {found['loss'][index]:.2f}", "faint"),
        )
        tiles.append(Tile(picture, lines))
    title = f"{samples.reader.path.name}, the {len(tiles)} highest losses: true class, predicted class"
    draw_sheet(path, tiles, title)
