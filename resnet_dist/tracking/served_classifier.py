"""What runs when a logged model is served: pictures in, class names and probabilities out.

A copy of this file and of `data_prep/pixels.py` is in every logged model, in a separate package whose name follows from
their content, so that models of several versions load into one process. `mlflow models serve` and
`mlflow.pyfunc.load_model` need mlflow, torch, numpy and Pillow, and nothing from this project.

One row is one picture, in the column `image`: the bytes of a picture's file, the same in base64 or as a data URL, or
RGB grey levels [H, W, 3] 0..255 (an array, or nested lists as JSON has them). Files become pixels exactly as the
training data did: by the same code, with the settings of its conversion. Then each picture is cropped as in the
recipe's evaluation: the shorter side to `resize`, then the central `size` x `size`.

Every request gets predictions, or is refused with status 400 and one line.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import mlflow.pytorch
import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from numpy.typing import NDArray
from PIL import Image

from data_prep.pixels import (
    DRAFT_RESERVE,
    BadPicture,
    PictureSettings,
    read_header,
    require_size,
    resized_window,
    shrunk_size,
    to_rgb,
)

COLUMN = "image"
PROTOCOL = "protocol.json"
_PIXELS_PER_FORWARD = 64 * 224 * 224
_HOW_TO = "give the bytes of a JPEG or PNG file, the same in base64, or RGB grey levels [H, W, 3] from 0 to 255"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RequestLimits:
    """Limits for one request, besides those for each picture: `limits` of `protocol.json`, which may be edited."""

    pictures: int = 256
    bytes: int = 64 << 20
    """Of all picture files together."""
    pixels: int = 500_000_000
    """Pixels that all pictures together decode to."""


@dataclass(frozen=True)
class ServingProtocol:
    """What the net expects and returns: `protocol.json`."""

    class_names: tuple[str, ...]
    size: int
    """Side of what the net sees, px."""
    resize: int
    """The shorter side before the crop, px."""
    pictures: PictureSettings = field(default_factory=PictureSettings)
    max_side: int | None = None
    """The longer side to which the data's pictures were first shrunk."""
    interpolation: str = "bilinear"
    """Pillow's filter for resizing to `resize`: bilinear or bicubic."""
    limits: RequestLimits = RequestLimits()

    def to_json(self) -> str:
        tree = {
            "class_names": list(self.class_names),
            "size": self.size,
            "resize": self.resize,
            "interpolation": self.interpolation,
            "pictures": {**self.pictures.as_dict(), "max_side": self.max_side},
            "limits": asdict(self.limits),
        }
        return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ServingProtocol:
        """Only of this version: a model of another one has its own copy of this file."""
        tree = json.loads(text)
        pictures = tree["pictures"]
        return cls(
            class_names=tuple(tree["class_names"]),
            size=tree["size"],
            resize=tree["resize"],
            interpolation=tree["interpolation"],
            pictures=PictureSettings.from_dict(pictures),
            max_side=pictures.get("max_side"),
            limits=RequestLimits(**tree["limits"]),
        )


class BadRequest(MlflowException):
    """An error that the client sees, with status 400. MLflow's server would put the entire request before the
    message."""

    def __init__(self, line: str) -> None:
        self._line = line
        super().__init__(line, error_code=INVALID_PARAMETER_VALUE)

    @property
    def message(self) -> str:
        return self._line

    @message.setter
    def message(self, _: object) -> None:
        """Cannot be changed."""


class ServedClassifier:
    """`predict` as MLflow's pyfunc flavour calls it."""

    def __init__(self, module: torch.nn.Module, protocol: ServingProtocol) -> None:
        """`module`: uint8 [N, size, size, 3] -> logits [N, len(class_names)]."""
        self._module = module
        self._protocol = protocol
        self._names = _unique_names(protocol.class_names)

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """One row per picture: `class`, `probability`, and `probabilities`, which has all class names.

        Raises BadRequest, naming the row that is not a picture.
        """
        try:
            return self._answers(_rows(model_input))
        except MemoryError:
            raise BadRequest("the request takes more memory than there is; send fewer or smaller pictures") from None
        except RecursionError:
            raise BadRequest(f"the request is nested too deeply; {_HOW_TO}") from None
        except BadRequest:
            raise
        except Exception as error:  # noqa: BLE001 - MLflow would send the stack to the client
            _log.exception("a request failed")
            raise BadRequest(f"the request failed ({type(error).__name__})") from None

    def _answers(self, values: Sequence[Any]) -> pd.DataFrame:
        limits = self._protocol.limits
        if not values:
            raise BadRequest(f"there is no picture in the request; {_HOW_TO}")
        if len(values) > limits.pictures:
            raise BadRequest(
                f"{len(values):,} pictures in one request, more than {limits.pictures:,}; send them in parts"
            )
        pictures = _opened(values, limits)
        rows: list[list[float]] = []
        for images in self._batches(pictures):
            with torch.inference_mode():
                logits = self._module(torch.from_numpy(images)).double()
            finite = logits.isfinite().all(dim=1)
            if not finite.all():
                broken = len(rows) + int((~finite).int().argmax())
                raise BadRequest(f"row {broken}: the net gives NaN or infinity for this picture")
            rows += logits.softmax(dim=1).tolist()
        best = [max(range(len(row)), key=row.__getitem__) for row in rows]
        return pd.DataFrame(
            {
                "class": [self._names[k] for k in best],
                "probability": [row[k] for row, k in zip(rows, best, strict=True)],
                "probabilities": [dict(zip(self._names, row, strict=True)) for row in rows],
            }
        )

    def _batches(self, pictures: Sequence[_Opened]) -> Iterator[NDArray[np.uint8]]:
        """What the net sees of the pictures, uint8 [N, size, size, 3]; a picture is decoded when its batch is made."""
        size, resize, interpolation = self._protocol.size, self._protocol.resize, self._protocol.interpolation
        batch = max(1, _PIXELS_PER_FORWARD // size**2)
        for start in range(0, len(pictures), batch):
            images = []
            for row, picture in enumerate(pictures[start : start + batch], start):
                with _named(row):
                    images.append(center_crop(self._stored(picture), size, resize, interpolation))
            yield np.stack(images)

    def _stored(self, picture: _Opened) -> Image.Image:
        """In mode RGB, as the data's conversion would have stored it."""
        settings = self._protocol.pictures
        width, height = shrunk_size((picture.width, picture.height), self._protocol.max_side)
        if isinstance(picture.data, bytes):
            image = to_rgb(picture.data, settings, at_least=(width * DRAFT_RESERVE, height * DRAFT_RESERVE))
        else:
            image = Image.fromarray(picture.data)
        if settings.exif == "apply" and picture.orientation >= 5:
            width, height = height, width
        return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.HAMMING)


class _Opened(NamedTuple):
    """A picture of a request, not decoded yet."""

    data: bytes | NDArray[np.uint8]
    """A file, or grey levels [H, W, 3]."""
    width: int
    height: int
    orientation: int


def _opened(values: Sequence[Any], limits: RequestLimits) -> list[_Opened]:
    """Raises BadRequest for a value that is not a picture, or for more bytes or pixels than the limits allow."""
    pictures = []
    num_bytes = num_pixels = 0
    for row, value in enumerate(values):
        num_bytes += _size_of(value)
        if num_bytes > limits.bytes:
            raise BadRequest(f"the pictures have more than {limits.bytes >> 20:,} MiB in all; send them in parts")
        with _named(row):
            pictures.append(_open(value))
        num_pixels += pictures[-1].width * pictures[-1].height
        if num_pixels > limits.pixels:
            raise BadRequest(f"the pictures have more than {limits.pixels:,} px in all; send them in parts")
    return pictures


@contextmanager
def _named(row: int) -> Iterator[None]:
    """Turns a picture's errors into the message for the client."""
    try:
        yield
    except BadPicture as error:
        raise BadRequest(f"row {row} {error}") from None
    except (ValueError, TypeError, OverflowError) as error:
        raise BadRequest(f"row {row} is not a picture: {_one_line(error)}; {_HOW_TO}") from None


def _size_of(value: Any) -> int:
    """Bytes of a picture's file; 0 of other values, whose pixels are counted."""
    if isinstance(value, str):
        return len(value) * 3 // 4
    return len(value) if isinstance(value, bytes | bytearray | memoryview) else 0


def _open(value: Any) -> _Opened:
    """Raises BadPicture, or ValueError, TypeError for a value that is not a picture at all."""
    if isinstance(value, str):
        value = _decoded(value)
    if isinstance(value, bytes | bytearray | memoryview):
        data = bytes(value)
        header = read_header(data)
        return _Opened(data, header.width, header.height, header.orientation)
    levels = _levels(value)
    return _Opened(levels, levels.shape[1], levels.shape[0], orientation=1)


def center_crop(picture: Image.Image, size: int, resize: int, interpolation: str = "bilinear") -> NDArray[np.uint8]:
    """uint8 [size, size, 3]: the shorter side resized to `resize`, then the central square; as training evaluates.

    A window half a pixel off the middle is rounded to the even position, as in training. Only the part that is shown is
    resized.
    """
    shorter = min(picture.size)
    width, height = (resize * side // shorter for side in picture.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.array(resized_window(picture, (width, height), (left, top, size, size), interpolation))


def _rows(model_input: Any) -> list[Any]:
    """One value per picture, whatever the container: DataFrame, dict, array [N, H, W, 3], list."""
    if isinstance(model_input, pd.DataFrame | Mapping):
        if COLUMN not in model_input:
            raise BadRequest(f"there is no column {COLUMN!r}: pictures are given as {{{COLUMN!r}: [...]}}")
        model_input = model_input[COLUMN]
    if isinstance(model_input, str | bytes | bytearray) or model_input is None:
        return [model_input]
    try:
        values = list(model_input)
    except TypeError:
        raise BadRequest(f"pictures are given as a list; {_HOW_TO}") from None
    # mlflow puts {"image": ["...", "..."]} into one row
    if len(values) == 1 and isinstance(values[0], list) and (not values[0] or _depth(values[0][0]) in (0, 3)):
        return values[0]
    return values


def _depth(value: Any) -> int:
    """Of nested lists: 3 of a picture's grey levels, 0 of a file."""
    depth = 0
    while isinstance(value, list) and depth < 5:
        value = value[0] if value else None
        depth += 1
    return depth + (value.ndim if isinstance(value, np.ndarray) else 0)


def _decoded(text: str) -> bytes:
    """base64, as it is or as a data URL, on one line or several."""
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise ValueError("a data URL without base64")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("a text that is not base64") from None


def _levels(value: Any) -> NDArray[np.uint8]:
    try:
        levels = np.asarray(value)
    except ValueError:
        raise ValueError("nested lists of unequal lengths, or too deep") from None
    if levels.ndim != 3 or levels.shape[2] != 3:
        raise ValueError(
            f"an array of shape {list(levels.shape)}" if levels.ndim else f"of type {type(value).__name__}"
        )
    require_size(levels.shape[1], levels.shape[0])
    if levels.dtype.kind not in "iu":
        raise ValueError(f"levels of type {levels.dtype}")
    if levels.dtype != np.uint8 and (levels.min() < 0 or levels.max() > 255):
        raise ValueError(f"levels from {levels.min()} to {levels.max()}")
    return np.ascontiguousarray(levels.astype(np.uint8))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _unique_names(names: Sequence[str]) -> list[str]:
    """The class names; one that several classes share gets its label, because `probabilities` is a mapping by names."""
    times = Counter(names)
    return [name if times[name] == 1 else f"{name} (class {label})" for label, name in enumerate(names)]


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> ServedClassifier:
    """MLflow's entry point; `path` is the model's folder."""
    protocol = ServingProtocol.from_json((Path(path) / PROTOCOL).read_text(encoding="utf-8"))
    return ServedClassifier(mlflow.pytorch.load_model(path), protocol)
