"""Sheets of pictures with lines of text below each: samples as training sees them, and the worst of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import ceil, sqrt
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from data_prep.beton.files import cannot_be_written, written_atomically
from data_prep.shown import shown
from resnet_dist.errors import UserError

Ink = Literal["strong", "faint", "right", "wrong"]
_INKS: dict[Ink, str] = {"strong": "#111111", "faint": "#707070", "right": "#1a7a2e", "wrong": "#c62828"}
_PAPER = "#ffffff"
_SMALLEST, _LARGEST = 160, 256
"""Sides of a picture on a sheet, px: smaller ones are enlarged by a whole number, so that each pixel is seen."""
_MARGIN, _GAP, _LINE, _TITLE = 16, 12, 18, 18
"""Around the sheet, between pictures, of a line of text, and of the title, px."""
_FONT, _TITLE_FONT = 13, 15
"""px."""


@dataclass(frozen=True)
class Tile:
    pixels: NDArray[np.uint8]
    """[side, side, 3], RGB."""
    lines: tuple[tuple[str, Ink], ...]


def require_picture_name(option: str, path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise UserError(f"{option} {path}: expected a name that ends in .png")


def draw_sheet(path: Path, tiles: Sequence[Tile], title: str) -> None:
    """Writes the tiles, in rows, as a PNG. Fault when it cannot be written."""
    side = tiles[0].pixels.shape[0]
    shown_px = side * ceil(_SMALLEST / side) if side < _SMALLEST else min(side, _LARGEST)
    fewest = min(len(tiles), max(3, round(sqrt(1.5 * len(tiles)))))
    columns = min(range(fewest, fewest + 3), key=lambda count: -len(tiles) % count)  # the last row as full as possible
    lines_px = _LINE * max(len(tile.lines) for tile in tiles)
    step_x, step_y = shown_px + _GAP, shown_px + lines_px + _GAP
    top = _MARGIN + _TITLE + _GAP
    sheet = Image.new(
        "RGB", (2 * _MARGIN + columns * step_x - _GAP, top + ceil(len(tiles) / columns) * step_y + _MARGIN), _PAPER
    )
    draw, font, title_font = ImageDraw.Draw(sheet), _font(_FONT), _font(_TITLE_FONT)
    title = _fitting(title, sheet.width - 2 * _MARGIN, title_font)
    draw.text((_MARGIN, _MARGIN - 4), title, _INKS["strong"], title_font)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        x, y = _MARGIN + column * step_x, top + row * step_y
        sheet.paste(_scaled(Image.fromarray(tile.pixels), shown_px), (x, y))
        for k, (text, ink) in enumerate(tile.lines):
            draw.text((x, y + shown_px + 2 + k * _LINE), _fitting(text, shown_px, font), _INKS[ink], font)
    with cannot_be_written(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_atomically(path) as file:
            sheet.save(file, "PNG")


def _scaled(picture: Image.Image, side: int) -> Image.Image:
    enlarges = side > picture.width
    return picture.resize((side, side), Image.Resampling.NEAREST if enlarges else Image.Resampling.LANCZOS)


def _fitting(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """The text, cut at its end to `width` px."""
    text = shown(text, None)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's DejaVu Sans, which has more letters than Pillow's own font."""
    spec = find_spec("matplotlib")
    assert spec is not None
    assert spec.origin is not None
    return ImageFont.truetype(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf", size)
