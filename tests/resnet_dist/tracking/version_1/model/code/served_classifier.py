"""What answers when a logged model is served: pictures in, class names and probabilities out.

A copy of this file travels with every logged model, so it imports nothing of this project: `mlflow models serve` and
`mlflow.pyfunc.load_model` need mlflow, torch, numpy and Pillow, no more.

One row is one picture, in the column `image`: the bytes of a picture's file, the same in base64, or RGB grey levels
[H, W, 3] 0..255 (an array, or nested lists as JSON has them). Each goes through the test protocol of the recipe: the
shorter side to `resize`, then the central `size` x `size`.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow.pytorch
import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from PIL import Image

COLUMN = "image"
PROTOCOL = "protocol.json"
_IMAGES_PER_FORWARD = 64


class ServedClassifier:
    """`predict` as MLflow's pyfunc flavour calls it."""

    def __init__(self, module: torch.nn.Module, class_names: Sequence[str], size: int, resize: int) -> None:
        """`module`: uint8 [N, size, size, 3] -> logits [N, len(class_names)]."""
        self._module = module
        self._class_names = list(class_names)
        self._size = size
        self._resize = resize

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """One row per picture: `class`, `probability`, and `probabilities`, which has all class names.

        Raises MlflowException (status 400 when served) naming the row that is no picture.
        """
        pictures = [self._prepared(value, row) for row, value in enumerate(_rows(model_input))]
        rows = []
        for start in range(0, len(pictures), _IMAGES_PER_FORWARD):
            images = torch.from_numpy(np.stack(pictures[start : start + _IMAGES_PER_FORWARD]))
            with torch.inference_mode():
                rows += self._module(images).double().softmax(dim=1).tolist()
        best = [max(range(len(row)), key=row.__getitem__) for row in rows]
        return pd.DataFrame(
            {
                "class": [self._class_names[k] for k in best],
                "probability": [row[k] for row, k in zip(rows, best, strict=True)],
                "probabilities": [dict(zip(self._class_names, row, strict=True)) for row in rows],
            }
        )

    def _prepared(self, value: Any, row: int) -> np.ndarray[Any, Any]:
        try:
            picture = _picture(value)
        except (ValueError, TypeError, OSError, binascii.Error) as error:
            raise MlflowException.invalid_parameter_value(
                f"row {row}: not a picture ({error}); give the bytes of a JPEG or PNG file, the same in base64, or "
                "RGB grey levels [H, W, 3] from 0 to 255"
            ) from None
        return center_crop(picture, self._size, self._resize)


def center_crop(picture: Image.Image, size: int, resize: int) -> np.ndarray[Any, Any]:
    """uint8 [size, size, 3]: the shorter side resized to `resize`, then the central square; as training evaluates.

    A window half a pixel off the middle goes to the even side, as in training.
    """
    shorter = min(picture.size)
    width, height = (resize * side // shorter for side in picture.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = picture.resize((width, height), Image.Resampling.BILINEAR)
    return np.array(resized.crop((left, top, left + size, top + size)))


def _rows(model_input: Any) -> list[Any]:
    """One value per picture, whatever the container: DataFrame, dict, array [N, H, W, 3], list."""
    if isinstance(model_input, pd.DataFrame):
        model_input = model_input[COLUMN].tolist()
    elif isinstance(model_input, Mapping):
        model_input = model_input[COLUMN]
    values = list(model_input)
    if len(values) == 1 and isinstance(values[0], list) and all(isinstance(v, str | bytes) for v in values[0]):
        return values[0]  # mlflow puts {"image": ["...", "..."]} into one row
    return values


def _picture(value: Any) -> Image.Image:
    if isinstance(value, str):
        value = base64.b64decode(value.partition("base64,")[2] or value, validate=True)
    if isinstance(value, bytes | bytearray | memoryview):
        with Image.open(io.BytesIO(bytes(value))) as image:
            return image.convert("RGB")
    levels = np.asarray(value)
    if levels.ndim != 3 or levels.shape[2] != 3:
        raise ValueError(f"an array of shape {list(levels.shape)}")
    if levels.dtype != np.uint8 and (levels.dtype.kind not in "iu" or levels.min() < 0 or levels.max() > 255):
        raise ValueError(f"{levels.dtype} values from {levels.min()} to {levels.max()}")
    return Image.fromarray(np.ascontiguousarray(levels.astype(np.uint8)))


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> ServedClassifier:
    """MLflow's entry point; `path` is the model's folder."""
    protocol = json.loads((Path(path) / PROTOCOL).read_text(encoding="utf-8"))
    module = mlflow.pytorch.load_model(path)
    return ServedClassifier(module, protocol["class_names"], protocol["size"], protocol["resize"])
