"""The user's settings: how images are stored, which is in the manifest, and what to do about bad samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, get_args

from data_prep.beton import layout
from data_prep.errors import UserError

if TYPE_CHECKING:
    from data_prep.pixels import PictureSettings

Encoding = Literal["original", "jpeg", "raw", "mixed"]
Subsampling = Literal["4:4:4", "4:2:2", "4:2:0"]
Exif = Literal["ignore", "apply"]
Check = Literal["decode", "headers"]
OnError = Literal["fail", "quarantine", "reencode"]

DEFAULT_QUALITY = 95
DEFAULT_RAW_SHARE = 0.5
DEFAULT_MAX_BAD = "0.1%"


@dataclass(frozen=True)
class ConvertSettings:
    """UserError on values out of range."""

    encode: Encoding = "original"
    """`original`: the source's own bytes where the stock ffcv decoder reads them correctly and the longer side is
    within `max_side`, else as `jpeg`. `jpeg`: every image decoded and encoded again. `raw`: RGB pixels. `mixed`: a
    share of the samples as `raw`, the rest as `original`."""
    max_side: int | None = None
    """Longer side of the stored images, px; larger ones are shrunk. None: as they are."""
    quality: int = DEFAULT_QUALITY
    """JPEG quality of images encoded again, 1..100."""
    subsampling: Subsampling = "4:4:4"
    """Chroma subsampling of images encoded again."""
    page_bytes: int = layout.DEFAULT_PAGE_BYTES
    """Page of the beton; the largest stored image must fit in one."""
    raw_share: float = 0.0
    """With `mixed`: the share stored as pixels, 0..1."""
    seed: int = 0
    """With `mixed`: which samples those are, by their index in the source."""
    exif: Exif = "ignore"
    """An EXIF orientation: `ignore`, as torchvision's ImageFolder and all published figures do, or `apply`."""
    background: tuple[int, int, int] | None = None
    """Red, green and blue behind transparent pixels. None: alpha is dropped, as torchvision's ImageFolder does."""
    check: Check = "decode"
    """How a JPEG that is stored unchanged is checked: `decode`: libjpeg-turbo decodes all of it without a warning;
    `headers`: its markers are read. One that is encoded again must decode without a warning in either case."""
    salvage: bool = False
    """A damaged JPEG is encoded again from what can be decoded of it. `convert` sets it with `on_error: reencode`."""

    def __post_init__(self) -> None:
        _require_one_of("--encode", self.encode, get_args(Encoding))
        _require_one_of("--subsampling", self.subsampling, get_args(Subsampling))
        _require_one_of("--exif", self.exif, get_args(Exif))
        _require_one_of("--check", self.check, get_args(Check))
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality {self.quality}: expected 1..100")
        if self.max_side is not None and not 1 <= self.max_side <= layout.MAX_SIDE_PX:
            raise UserError(f"--max-side {self.max_side}: expected 1..{layout.MAX_SIDE_PX} px")
        if not layout.is_page_size(self.page_bytes):
            raise UserError(f"--page-mib {self.page_bytes / 2**20:g}: expected a power of two, 2..2048")
        if not 0 <= self.raw_share <= 1:
            raise UserError(f"--raw-share {self.raw_share:g}: expected 0..1")
        if self.seed < 0 or self.seed >= 1 << 64:
            raise UserError(f"--seed {self.seed}: expected 0..2**64-1")

        try:
            self.picture  # noqa: B018
        except ValueError:
            raise UserError(f"--background {self.background}: expected R,G,B, each 0..255") from None

    @property
    def picture(self) -> PictureSettings:
        from data_prep.pixels import PictureSettings  # Pillow is not needed to show a command's help

        return PictureSettings(self.exif, self.background)

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), **self.picture.as_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConvertSettings:
        """From `as_dict`, or an older version's. TypeError for anything else."""
        from data_prep.pixels import PictureSettings

        background = PictureSettings.from_dict(values).background
        return cls(**{**values, "background": background})

    def made(self, values: Mapping[str, Any]) -> bool:
        """Whether `values`, from a manifest, are these settings."""
        try:
            return self == self.from_dict(values)
        except (TypeError, ValueError, UserError):
            return False


@dataclass(frozen=True)
class BadPolicy:
    """What to do about samples that cannot be stored. In either case all samples are read and all bad ones reported."""

    on_error: OnError = "fail"
    """`fail`: write no beton. `quarantine`: leave them out, up to `max_bad`, and list them. `reencode`: likewise, but
    what can be decoded of damaged JPEGs is stored, however many they are, and listed too."""
    max_bad: str = DEFAULT_MAX_BAD
    """How many may be left out: a number of samples, or a share such as `0.1%`."""

    def __post_init__(self) -> None:
        _require_one_of("--on-error", self.on_error, get_args(OnError))
        self.limit(1)

    def limit(self, num_samples: int) -> int:
        """How many of `num_samples` may be left out."""
        text = self.max_bad.strip()
        try:
            limit = Fraction(text[:-1]) / 100 * num_samples if text.endswith("%") else Fraction(int(text))
        except (ValueError, ZeroDivisionError):
            limit = Fraction(-1)
        if limit < 0 or (text.endswith("%") and limit > num_samples):
            raise UserError(f"--max-bad {self.max_bad}: expected a number, or a share such as {DEFAULT_MAX_BAD}")
        return int(limit) if self.on_error != "fail" else 0


def _require_one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{option} {value}: expected one of {', '.join(known)}")
