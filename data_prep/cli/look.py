"""The commands that look into a beton: `data-prep show`, `list`, `extract`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from data_prep.cli.options import AsJson, checked, echo, local_path
from data_prep.cli.progress import progress_on_stderr
from data_prep.errors import UserError
from data_prep.runtime.stop import StopFlag
from data_prep.shown import few, shown

Beton = Annotated[Path, typer.Argument(metavar="FILE.beton", show_default=False)]


def show(
    beton: Beton,
    samples: Annotated[list[int], typer.Argument(metavar="SAMPLE...", help="Indices, from 0.", show_default=False)],
    image: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the sample's picture: .png, or .jpg for the stored bytes of a JPEG; one sample."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a sample is: its file in the source, class, size, and how it is stored.

    Example: data-prep show data/imagenet/train.beton 18 --image sample.png
    """
    from data_prep.beton.samples import Samples

    if image is not None and len(samples) != 1:
        raise UserError("--image: give one sample")
    opened = Samples(local_path(beton))
    found = [opened[index] for index in samples]
    source = {key: opened.manifest.source.get(key, "") for key in ("name", "location", "split")}
    origin = " ".join(str(value) for value in source.values() if value)
    for facts in found:
        own = {True: "the source's own bytes", False: "encoded by convert", None: "perhaps the source's own bytes"}
        stored = "stored as pixels" if facts.kind == "raw" else own[facts.is_original]
        echo(f"sample {facts.index}: {facts.path or 'source path not known'} ({origin})")
        echo(f"  label {facts.label}: {facts.class_name}")
        echo(f"  {facts.width} x {facts.height} px, {facts.kind}, {facts.num_bytes:,} bytes, {stored}")
    if (reason := opened.why_no_paths) is not None:
        echo(reason)
    if image is not None:
        _write_image(opened, samples[0], local_path(image))
    if as_json:
        rows = [{**asdict(facts), "path": shown(facts.path, None) or None} for facts in found]
        typer.echo(json.dumps({"ok": True, "beton": str(beton), "source": source, "samples": rows}))


def _write_image(opened: Any, index: int, path: Path) -> None:
    from PIL import Image

    from data_prep.beton.files import write_bytes_atomically, written_atomically
    from data_prep.beton.samples import pixels_of

    if path.suffix.lower() in (".jpg", ".jpeg"):
        if opened[index].kind != "jpeg":
            raise UserError(f"--image {path}: sample {index} is stored as pixels, not as a JPEG; name a .png")
        write_bytes_atomically(path, bytes(opened.reader.image_bytes(index)))
    elif path.suffix.lower() == ".png":
        with written_atomically(path) as file:
            Image.fromarray(pixels_of(opened.reader, index)).save(file, "PNG")
    else:
        raise UserError(f"--image {path}: expected a name that ends in .png or .jpg")


def list_(
    beton: Beton,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Table to write: .parquet or .csv.  [default: CSV to stdout]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List all samples, one row each: index, path in the source, label, class, width, height, bytes, kind.

    Example: data-prep list data/imagenet/train.beton --output samples.parquet
    """
    from data_prep.beton.samples import Samples
    from data_prep.beton.table import require_table_name, write_csv, write_table

    if output is None:
        if as_json:
            raise UserError("--json: give --output FILE too; without it, stdout is the table")
        samples = Samples(local_path(beton))
        write_csv(sys.stdout, samples.table())
    else:
        require_table_name("--output", output)
        samples = Samples(local_path(beton))
        write_table(local_path(output), samples.table())
        echo(f"{output}: {len(samples):,} samples")
    if (reason := samples.why_no_paths) is not None:
        typer.echo(shown(f"data-prep: {reason}", None), err=True)
    if as_json:
        typer.echo(json.dumps({"ok": True, "path": str(output), "num_samples": len(samples)}))


def extract(
    beton: Beton,
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder to make; not one with files.", show_default=False)
    ],
    as_json: AsJson = False,
) -> None:
    """Write a beton's images back into class folders: JPEGs byte for byte as stored, raw pixels as PNG.

    Files have their names in the source, or their index. Converting the folder again gives the same beton, byte for
    byte, if all images are JPEGs and it came from class folders.

    Example: data-prep extract data/imagenet/val.beton --output imagenet-val
    """
    from data_prep.converter.extract import extract as run_extract

    with StopFlag() as stop, progress_on_stderr() as progress:
        done = run_extract(local_path(beton), local_path(output), checked(stop, progress))
    total = done.num_original + done.num_jpeg + done.num_png
    echo(
        f"{output}: {total:,} images: {done.num_original:,} with the source's own bytes, {done.num_jpeg:,} other "
        f"JPEGs as stored, {done.num_png:,} PNGs of stored pixels"
    )
    if done.renamed:
        pairs = few(f"{name!r} as {folder!r}" for name, folder in done.renamed.items())
        echo(f"classes whose names cannot be folders: {pairs}")
    elif not done.is_sorted:
        echo(f"to keep the order of the classes: data-prep convert --source image-folder ... --classes {beton}")
    if as_json:
        typer.echo(json.dumps({"ok": True, **asdict(done), "folder": str(done.folder)}))
