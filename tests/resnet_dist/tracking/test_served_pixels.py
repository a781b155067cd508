"""One picture file on all paths to the net: converted and read by training or evaluation, or served.

Pixels are compared one by one, for every kind of file and every setting that decides what becomes of them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pytest
import torch
from mlflow.pyfunc import PyFuncModel
from PIL import Image

from data_prep.beton.manifest import Manifest, load_manifest
from data_prep.converter.convert import convert
from data_prep.converter.settings import ConvertSettings
from data_prep.pixels import PictureSettings
from data_prep.sources.image_folder import ImageFolder
from data_prep.sources.splits import requested_split
from resnet_dist.config.recipe import CenterCrop, Interpolation
from resnet_dist.data.checks import picture_settings
from resnet_dist.data.decoder import ImageSettings
from resnet_dist.data.loader import BetonLoader
from resnet_dist.evaluation.views import ViewLoader
from resnet_dist.tracking.models import make_servable, write_model
from resnet_dist.tracking.served_classifier import ServingProtocol, center_crop

SIZE, RESIZE = 9, 12
WIDTH, HEIGHT = 37, 26


class Echo(torch.nn.Module):
    """The logits are the pixels themselves, and a 0 to measure them from."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.flatten(1).double()
        return torch.cat([pixels, torch.zeros_like(pixels[:, :1])], dim=1)


def colours(scale: int = 1) -> np.ndarray:
    y, x = np.mgrid[: HEIGHT * scale, : WIDTH * scale] // scale
    return np.stack([x * 6, y * 9, (x + y) * 4], axis=2).astype(np.uint8)


def gray16() -> Image.Image:
    return Image.fromarray((colours()[:, :, 0].astype(np.uint16) << 8) + 200)


def with_alpha() -> Image.Image:
    alpha = (colours()[:, :, 1].astype(int) * 255 // 230).astype(np.uint8)
    return Image.fromarray(np.dstack([colours(), alpha]))


def palette_with_hole() -> Image.Image:
    image = Image.fromarray(colours()).quantize(16)
    image.info["transparency"] = 3
    return image


def exif(turn: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = turn
    return tags.tobytes()


def files() -> Iterator[tuple[str, bytes]]:
    rgb = Image.fromarray(colours())
    plain = {"RGB": rgb, "L": rgb.convert("L"), "P": rgb.quantize(16), "1": rgb.convert("1")}
    alpha = {"RGBA": with_alpha(), "LA": with_alpha().convert("LA"), "P-hole": palette_with_hole()}
    for mode, image in {**plain, **alpha, "I16": gray16()}.items():
        yield f"{mode}.png", encoded(image, "PNG")
    for mode, image in {**plain, "I16": gray16(), "RGBA": with_alpha(), "CMYK": rgb.convert("CMYK")}.items():
        yield f"{mode}.tiff", encoded(image, "TIFF")
    for mode in ("RGB", "L", "CMYK"):
        yield f"{mode}.jpg", encoded(rgb.convert(mode), "JPEG", quality=92)
    yield "gray-alpha.webp", encoded(with_alpha(), "WEBP", lossless=True)
    yield "gray-alpha.avif", encoded(with_alpha(), "AVIF", exif=exif(6))
    yield "palette.gif", encoded(palette_with_hole(), "GIF")
    yield "colours.bmp", encoded(rgb, "BMP")
    large = Image.fromarray(colours(scale=9))  # a JPEG that is shrunk is decoded at a fraction
    for turn in range(1, 9):
        yield f"turned-{turn}.jpg", encoded(rgb, "JPEG", quality=92, exif=exif(turn))
        yield f"large-{turn}.jpeg", encoded(large, "JPEG", quality=92, exif=exif(turn))
        yield f"turned-{turn}.png", encoded(with_alpha(), "PNG", exif=exif(turn))
        yield f"turned-{turn}.webp", encoded(rgb, "WEBP", lossless=True, exif=exif(turn))
        yield f"turned-{turn}.tiff", encoded(rgb, "TIFF", exif=exif(turn))


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


FILES = dict(sorted(files()))


def converted(folder: Path, **settings: Any) -> tuple[Path, Manifest]:
    images = folder / "images" / "all"
    images.mkdir(parents=True)
    for name, data in FILES.items():
        (images / name).write_bytes(data)
    beton = folder / "all.beton"
    source = ImageFolder.open(str(folder / "images"), requested_split(None, beton))
    chosen = ConvertSettings(encode="raw", **settings)
    convert(source, beton, settings=chosen)
    return beton, load_manifest(beton)


def served_by(folder: Path, pictures: Mapping[str, Any], interpolation: Interpolation) -> PyFuncModel:
    """A logged model of that data, through its files, as `mlflow models serve` loads it."""
    example = np.zeros((2, SIZE, SIZE, 3), dtype=np.uint8)
    names = tuple(map(str, range(3 * SIZE**2 + 1)))
    settings = PictureSettings.from_dict(pictures)
    write_model(Echo(), folder, example, {})
    protocol = ServingProtocol(names, SIZE, RESIZE, settings, pictures["max_side"], interpolation)
    make_servable(folder, example[0], protocol)
    return mlflow.pyfunc.load_model(str(folder))


def pixels_of(answers: Any) -> np.ndarray:
    """[N, SIZE, SIZE, 3]: what the net was shown, out of the probabilities."""
    logs = np.log(np.array([list(answer.values()) for answer in answers["probabilities"]]))
    return np.rint(logs[:, :-1] - logs[:, -1:]).astype(int).reshape(-1, SIZE, SIZE, 3)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"exif": "apply"},
        {"background": (200, 30, 90)},
        {"exif": "apply", "background": (0, 0, 0), "max_side": 21},
        {"max_side": 30},
    ],
    ids=lambda settings: "-".join(settings) or "default",
)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_served_picture_is_the_one_that_training_and_evaluation_see(
    tmp_path: Path, settings: Any, interpolation: Interpolation
) -> None:
    beton, manifest = converted(tmp_path, **settings)
    assert manifest.num_samples == len(FILES)
    served = served_by(tmp_path / "model", picture_settings(manifest), interpolation)
    shown = pixels_of(served.predict({"image": list(FILES.values())}))

    ids = np.arange(manifest.num_samples)
    reader = ViewLoader(beton, [], batch_size=1, num_threads=1, device=torch.device("cpu"))
    evaluated = [center_crop(reader.picture(k), SIZE, RESIZE, interpolation) for k in ids.tolist()]
    reader.close()
    crop = CenterCrop(kind="center_crop", size=SIZE, resize=RESIZE, interpolation=interpolation)
    loader = BetonLoader(beton, ImageSettings(crop), batch_size=len(ids))
    (batch,) = loader.epoch(0, ids)
    trained = batch.images.numpy().copy()
    loader.close()
    for k, name in enumerate(FILES):
        np.testing.assert_array_equal(evaluated[k], trained[k], err_msg=name)
        np.testing.assert_array_equal(shown[k], trained[k], err_msg=name)


def test_files_that_differ_in_what_settings_decide_are_among_them() -> None:
    """Else nothing would be shown above."""
    turned = {name for name in FILES if name.startswith(("turned", "large"))}
    assert len(turned) == 40
    assert len(FILES) == len(turned) + 22
