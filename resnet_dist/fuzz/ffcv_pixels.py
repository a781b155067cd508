"""`python -m resnet_dist.fuzz.ffcv_pixels BETON --source NAME --input PATH`: the stock ffcv `Loader`, and Pillow.

The beton is read by ffcv's own reader, `Loader` and decoding, with the fast, inexact DCT of its libjpeg-turbo; only the
buffer is ours, so that images may differ in size. Each is compared with what Pillow decodes from the source's own file
(exact DCT), shrunk as the manifest's settings say. Exit code 1 when a label, a size or an image is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.beton import layout
from data_prep.beton.manifest import load_manifest
from data_prep.beton.reader import BetonReader
from data_prep.converter.verify import spread
from data_prep.errors import Fault, UserError
from data_prep.pixels import PictureSettings, to_rgb
from data_prep.sources import open_source
from data_prep.sources.base import Source
from data_prep.sources.splits import requested_split

MOST_MEAN = {"stored as pixels": 0.0, "own bytes": 4.0, "encoded again": 6.0}
"""Mean error that an image may have, in grey levels: none; the fast DCT's; that of the fast DCT and of encoding again.

A wrong image has tens.
"""
BATCH = 2


def read_with_ffcv(beton: Path, reader: BetonReader, samples: NDArray[np.int64]) -> Iterator[tuple[NDArray[Any], int]]:
    """The samples' pixels, uint8 [height, width, 3], and labels, in order, through the stock `Loader`."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline.allocation_query import AllocationQuery

    most_bytes = int((reader.heights.astype(np.int64) * reader.widths * 3)[samples].max())

    class AnySize(SimpleRGBImageDecoder):
        """The stock decoder declares one size, which its code does not need. Pixels are at the start of a flat
        buffer."""

        def declare_state_and_memory(self, previous_state: Any) -> Any:
            state = replace(previous_state, jit_mode=True, shape=(most_bytes,), dtype=np.dtype("<u1"))
            return state, AllocationQuery((most_bytes,), np.dtype("<u1"))

    loader = Loader(
        str(beton),
        batch_size=BATCH,
        num_workers=1,
        batches_ahead=1,
        order=OrderOption.SEQUENTIAL,
        indices=samples,
        drop_last=False,
        pipelines={"image": [AnySize()], "label": [IntDecoder()]},
    )
    numbers = iter(samples.tolist())
    for images, labels in loader:
        for flat, label in zip(np.asarray(images), np.asarray(labels).reshape(-1), strict=True):
            sample = next(numbers)
            height, width = reader.height(sample), reader.width(sample)
            yield flat[: height * width * 3].reshape(height, width, 3), int(label)


def pillow_pixels(data: bytes, max_side: int | None, settings: PictureSettings) -> NDArray[np.uint8]:
    """The file as RGB, uint8 [height, width, 3], shrunk with the filter that conversions use."""
    from PIL import Image

    image = to_rgb(data, settings)
    longer = max(image.size)
    if max_side is None or longer <= max_side:
        return np.asarray(image)
    width, height = (max(1, round(side * max_side / longer)) for side in image.size)
    return np.asarray(image.resize((width, height), Image.Resampling.HAMMING))


def compare(beton: Path, source: Source, count: int | None) -> tuple[dict[str, list[tuple[float, int]]], list[str]]:
    """Mean and greatest differences in grey levels of the images of each kind; and problems, one line each.

    `count`: how many images, spread evenly; None: all.
    """
    manifest, reader = load_manifest(beton), BetonReader(beton)
    max_side, settings = manifest.settings.get("max_side"), PictureSettings.from_dict(manifest.settings)
    left_out = {int(entry["index"]) for entry in manifest.quarantined}
    indices = [index for index in range(len(source)) if index not in left_out]
    samples = spread(len(reader), count)
    found: dict[str, list[tuple[float, int]]] = defaultdict(list)
    wrong = []
    for sample, (pixels, label) in zip(samples.tolist(), read_with_ffcv(beton, reader, samples), strict=True):
        original = source[indices[sample]]
        expected = pillow_pixels(original.data, max_side, settings)
        if expected.shape != pixels.shape:
            wrong.append(f"{original.key}: stored as {pixels.shape}, expected {expected.shape}")
            continue
        difference = np.abs(pixels.astype(np.int16) - expected)
        is_raw = reader.mode(sample) == layout.MODE_RAW
        is_own = not is_raw and bytes(reader.image_bytes(sample)) == original.data
        kind = "stored as pixels" if is_raw else "own bytes" if is_own else "encoded again"
        mean = float(difference.mean())
        found[kind].append((mean, int(difference.max())))
        if label != original.label:
            wrong.append(f"{original.key}: label {label}, expected {original.label}")
        if mean > MOST_MEAN[kind]:
            wrong.append(f"{original.key}: {kind}, off by {mean:.1f} grey levels on average")
    return found, wrong


def as_table(found: dict[str, list[tuple[float, int]]]) -> str:
    lines = ["| | images | mean difference | of the worst image | of the worst pixel |", "|---|---|---|---|---|"]
    for kind, differences in sorted(found.items()):
        means, most = zip(*differences, strict=True)
        lines.append(f"| {kind} | {len(means):,} | {np.mean(means):.3f} | {max(means):.3f} | {max(most)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m resnet_dist.fuzz.ffcv_pixels", description=__doc__)
    parser.add_argument("beton", type=Path)
    parser.add_argument("--source", required=True)
    parser.add_argument("--input", required=True)
    parser.add_argument("--split", help="default: the beton's name")
    parser.add_argument("--count", type=int, help="images, spread evenly; default: all")
    arguments = parser.parse_args()
    split = requested_split(arguments.split, arguments.beton)
    try:
        found, wrong = compare(arguments.beton, open_source(arguments.source, arguments.input, split), arguments.count)
    except (UserError, Fault) as error:
        print(f"ffcv_pixels: {error}", file=sys.stderr)
        return 2
    print(as_table(found))
    for problem in wrong[:20]:
        print(problem, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
