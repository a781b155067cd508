"""What the user decides about the stored images. All of it stands in the manifest."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from data_prep.beton import layout
from data_prep.errors import UserError

Encoding = Literal["original", "jpeg", "raw"]
Subsampling = Literal["4:4:4", "4:2:2", "4:2:0"]

DEFAULT_QUALITY = 95


@dataclass(frozen=True)
class ConvertSettings:
    """UserError on values out of range."""

    encode: Encoding = "original"
    """`original`: the source's own bytes where the stock ffcv decoder reads them correctly and the longer side is
    within `max_side`, else as `jpeg`. `jpeg`: every image decoded and encoded anew. `raw`: RGB pixels."""
    max_side: int | None = None
    """Longer side of the stored images, px; larger ones are shrunk. None: as they are."""
    quality: int = DEFAULT_QUALITY
    """JPEG quality of images encoded anew, 1..100."""
    subsampling: Subsampling = "4:4:4"
    """Chroma subsampling of images encoded anew."""
    page_bytes: int = layout.DEFAULT_PAGE_BYTES
    """Page of the beton; the largest stored image must fit in one."""

    def __post_init__(self) -> None:
        if self.encode not in get_args(Encoding):
            raise UserError(f"--encode {self.encode}: expected one of {', '.join(get_args(Encoding))}")
        if self.subsampling not in get_args(Subsampling):
            raise UserError(f"--subsampling {self.subsampling}: expected one of {', '.join(get_args(Subsampling))}")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality {self.quality}: expected 1..100")
        if self.max_side is not None and not 1 <= self.max_side <= layout.MAX_SIDE_PX:
            raise UserError(f"--max-side {self.max_side}: expected 1..{layout.MAX_SIDE_PX} px")
        if not layout.is_page_size(self.page_bytes):
            raise UserError(f"--page-mib {self.page_bytes / 2**20:g}: expected a power of two, 2..2048")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
