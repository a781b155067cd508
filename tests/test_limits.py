"""docs/limits.md lists the limits in the code. To write it again: python tests/test_limits.py"""

from __future__ import annotations

from pathlib import Path

from data_prep.beton import layout, manifest
from data_prep.beton import paths as beton_paths
from data_prep.pixels import LIMITS
from data_prep.sources import hf_parquet, labels, webdataset
from data_prep.sources.datasets import cifar, ilsvrc
from data_prep.sources.files import find, paths, table, tar
from resnet_dist.config import recipe, yaml_text

DOCUMENT = Path(__file__).parents[1] / "docs" / "limits.md"
HEAD = """# Limits

Anything larger is refused, in one line that names it and says what to do. A sample that exceeds a limit is a bad one,
which `--on-error quarantine` leaves out; anything else ends the command. The limits keep a small file from using up a
machine's memory or hours of its time.

The limits on a picture are the same for every format and every tool: `convert`, `inspect`, `verify`, `evaluate` and a
served model. They are checked on the file's header, before it is decoded (`data_prep/pixels.py`, `LIMITS`).
"""


def mib(num_bytes: int) -> str:
    assert num_bytes % (1 << 20) == 0
    return f"{num_bytes >> 20:,} MiB"


def tables() -> dict[str, list[tuple[str, str, str]]]:
    """Title -> what is limited, by how much, and what to know."""
    return {
        "A picture": [
            (
                "pixels that are decoded",
                f"{LIMITS.pixels:,}",
                "with `--max-side`, large JPEGs are decoded at 1/2, 1/4 or 1/8 of their size; other formats whole",
            ),
            ("one side", f"{LIMITS.side:,} px", "libjpeg's own limit"),
            ("longer to shorter side", f"{LIMITS.aspect:,} to 1", ""),
            (
                "memory for decoding",
                mib(LIMITS.decoded_bytes),
                "everything that the decoder holds at once: a WebP's canvases, JPEG 2000's components, a TIFF's tile",
            ),
            (
                "coefficients of a JPEG in several scans",
                mib(LIMITS.coefficient_bytes),
                "all are held, at whatever size it is decoded; in training too",
            ),
            ("scans of a JPEG", f"{LIMITS.scans}", "libjpeg-turbo's own limit"),
            ("scans times pixels of a JPEG", f"{LIMITS.scan_pixels:,}", "each scan is a pass over all of them"),
            ("a stored image", "a page of the beton", "8 MiB by default: `--page-mib`"),
        ],
        "A source": [
            ("a sample's file", mib(paths.MAX_SAMPLE_BYTES), "and any other file that is read at once"),
            ("classes", f"{labels.MAX_CLASSES:,}", "labelled from 0"),
            ("a class name", f"{labels.MAX_NAME_CHARS:,} characters", ""),
            ("a table of labels", mib(table.MAX_TEXT_BYTES), "`--labels`, `--classes`, Kaggle's tables"),
            ("files that a pattern with `{0..9}` or `*` names", f"{find.MAX_EXPANDED:,}", ""),
            ("a name in a tar", f"{tar.MAX_NAME_BYTES:,} bytes", ""),
            ("an extended header in a tar", mib(tar.MAX_EXTENSION_BYTES), ""),
            ("zeros after the end of a tar", mib(tar.MAX_TAIL_BYTES), "anything else there is refused"),
            ("a label's file in a WebDataset", mib(webdataset.MAX_LABEL_BYTES), "`.cls` and `.json`"),
            (
                "rows of a parquet file",
                f"{hf_parquet.FEW_ROWS:,}",
                "more only if the file has a byte for each: a few bytes can claim billions",
            ),
            (
                "a CIFAR archive, unpacked",
                mib(cifar.MAX_UNPACKED_BYTES),
                f"its files together {mib(cifar.MAX_FILES_BYTES)}",
            ),
            ("a devkit, unpacked", mib(ilsvrc.MAX_UNPACKED_BYTES), ""),
        ],
        "A beton": [
            ("a side of a stored image", f"{layout.MAX_SIDE_PX:,} px", "the format's own limit"),
            ("a page", mib(layout.MAX_PAGE_BYTES), "`--page-mib`, a power of two"),
            ("a manifest", mib(manifest.MAX_MANIFEST_BYTES), ""),
            ("source paths", mib(beton_paths.MAX_TEXT_BYTES), f"compressed {mib(beton_paths.MAX_FILE_BYTES)}"),
        ],
        "A run": [
            ("a recipe, profile or space", mib(yaml_text.MAX_TEXT_BYTES), ""),
            ("its nesting", f"{yaml_text.MAX_DEPTH} levels", ""),
            ("its values", f"{yaml_text.MAX_NODES:,}", "aliases are counted wherever they are used"),
            ("a side of the net's input", f"{recipe.MAX_SIZE:,} px", ""),
        ],
    }


def document() -> str:
    parts = [HEAD]
    for title, rows in tables().items():
        lines = [f"\n## {title}\n", "| What | At most | |", "|---|---|---|"]
        parts.append(
            "\n".join([*lines, *(f"| {what} | {most} | {note} |".replace("|  |", "| |") for what, most, note in rows)])
            + "\n"
        )
    return "".join(parts)


def test_the_document_matches_the_code() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document()


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
