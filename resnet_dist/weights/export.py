"""`resnet-dist export`: a trained model as one file that needs nothing from this project, checked against the model.

Normalisation is part of the file: it takes uint8 pixels as they are decoded. A JSON file beside it describes the steps
before it (crop) and its output (class names).
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.beton.files import create, fsync_folder, temporary_beside, write_text_atomically
from data_prep.beton.manifest import load_manifest
from data_prep.pixels import PictureSettings
from resnet_dist.data.checks import other_pictures, picture_settings, require_classes, require_classes_of
from resnet_dist.data.decoder import eval_images
from resnet_dist.data.loader import BetonLoader
from resnet_dist.errors import Fault, UserError
from resnet_dist.weights.source import TrainedModel, load_model

Format = Literal["torchscript", "onnx", "pt2"]
SUFFIXES: dict[str, Format] = {".onnx": "onnx", ".pt2": "pt2", ".pt": "torchscript", ".ts": "torchscript"}
_NUM_IMAGES = 5
TOLERANCE = 1e-4
"""Largest difference of a logit, as a share of the largest logit: other kernels add in another order."""


@dataclass(frozen=True)
class Exported:
    path: Path
    card: Path
    """The JSON file beside it."""
    max_difference: float
    """Largest difference of a logit from the model's own."""
    largest_logit: float
    warnings: tuple[str, ...] = ()


def export_model(source: str, path: Path, *, tracking_uri: str | None = None, data: Path | None = None) -> Exported:
    """Writes `path`, in the format that its suffix names, and `<path>.json`; neither is written before the check has
    passed.

    `source` as `load_model` takes it; `data`: a beton of the model's classes, whose first images are used for the check
    (random ones else). Raises UserError for models that cannot be exported, Fault if the file's logits are not the
    model's.
    """
    file_format = SUFFIXES.get(path.suffix)
    if file_format is None:
        raise UserError(f"{path}: its name must end in one of {', '.join(SUFFIXES)}, which select the format")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file")
    model = load_model(source, tracking_uri)
    class_names, *warnings = _class_names(model, data)
    pictures = model.pictures
    if data is not None:
        of_data = picture_settings(load_manifest(data))
        pictures = of_data if pictures is None else pictures
        warnings.append(other_pictures(pictures, of_data, model.name, str(data)))
    if pictures is None:
        warnings.append(
            f"{model.name}: does not know how its data was converted (an earlier version wrote it); its file says "
            "the default settings: give --data FILE.beton"
        )
    images = _images(model, data)
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        create(temporary).close()  # writing would follow a link of that name
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        with _quiet():
            _WRITERS[file_format](model.classifier, images[:2], temporary)
            differences = [_difference(model, file_format, temporary, part) for part in (images[:1], images)]
        max_difference = max(difference for difference, _ in differences)
        largest = max(logit for _, logit in differences)
        if not max_difference <= TOLERANCE * largest:
            raise Fault(
                f"{path}: the exported model's logits differ by up to {max_difference:.3g} from its own (largest logit "
                f"{largest:.3g}): not written"
            )
        temporary.replace(path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    card = path.with_name(f"{path.name}.json")
    facts = describe(model, file_format, class_names, pictures or {})
    facts["check"] = {"images": len(images), "max_difference": max_difference, "largest_logit": largest}
    write_text_atomically(card, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    return Exported(path, card, max_difference, largest, tuple(warning for warning in warnings if warning is not None))


def describe(
    model: TrainedModel, file_format: Format, class_names: tuple[str, ...], pictures: Mapping[str, Any]
) -> dict[str, Any]:
    """What a user of the file needs to know."""
    crop = model.recipe.data.eval
    return {
        "format": file_format,
        "torch": torch.__version__,
        "source": model.name,
        "net": model.recipe.model.name,
        "recipe_hash": model.recipe_hash,
        "input": {"name": "images", "dtype": "uint8", "shape": ["N", crop.size, crop.size, 3], "colours": "RGB"},
        "decoding": _to_pixels(pictures),
        "preprocessing": [
            f"resize so that the shorter side is {crop.resize} px ({crop.interpolation}, antialiased, as Pillow does)",
            f"cut out the central {crop.size} x {crop.size} px",
            "nothing else: the file subtracts the mean and divides by the standard deviation",
        ],
        "output": {"name": "logits", "shape": ["N", len(class_names)], "meaning": "softmax gives probabilities"},
        "class_names": list(class_names),
    }


def _to_pixels(pictures: Mapping[str, Any]) -> list[str]:
    """The steps from a picture's file to the image that is resized; `pictures` as `picture_settings` has it."""
    settings, max_side = PictureSettings.from_dict(pictures), pictures.get("max_side")
    turn = {
        "ignore": "do not rotate the picture by its EXIF orientation",
        "apply": "rotate the picture by its EXIF orientation",
    }[settings.exif]
    alpha = "drop alpha" if settings.background is None else f"composite it onto the colour {list(settings.background)}"
    shrink = f"shrink it so that the longer side is at most {max_side} px (Pillow's Hamming filter)"
    return [
        f"{turn}; make it RGB of 8 bits: of 16 bits the upper 8, {alpha}, no colour profile",
        *([shrink] if max_side else []),
    ]


def _class_names(model: TrainedModel, data: Path | None) -> tuple[tuple[str, ...], str | None]:
    """The model's own, or the data's if it knows none, with a warning."""
    warning = None
    if data is not None:
        manifest = load_manifest(data)
        way_out = "leave --data out, or convert it with the same classes in the same order (--classes FILE)"
        warning = require_classes_of(model.name, model.class_names, manifest, data, way_out)
        require_classes(model.recipe, manifest, data)
        if model.class_names is None:
            return manifest.class_names, warning
    if model.class_names is None:
        raise UserError(
            f"{model.name}: has no class names (an earlier version wrote it); give --data FILE.beton, which has them"
        )
    return model.class_names, warning


def _images(model: TrainedModel, data: Path | None) -> Tensor:
    """uint8 [N, size, size, 3] for the check."""
    recipe = model.recipe
    size = recipe.data.eval.size
    generator = torch.Generator().manual_seed(0)
    made_up = torch.randint(0, 256, (_NUM_IMAGES, size, size, 3), dtype=torch.uint8, generator=generator)
    if data is None:
        return made_up
    with closing(BetonLoader(data, eval_images(recipe), batch_size=_NUM_IMAGES)) as loader:
        (batch,) = loader.epoch(0, np.arange(min(_NUM_IMAGES, loader.num_samples)))
    return torch.cat([batch.images, made_up])[:_NUM_IMAGES]


@torch.no_grad()
def _difference(model: TrainedModel, file_format: Format, path: Path, images: Tensor) -> tuple[float, float]:
    """Largest difference of a logit from the model's own, and the largest logit."""
    own = model.classifier(images)
    if not own.isfinite().all():
        broken = int((~own.isfinite().all(dim=1)).int().argmax())
        raise Fault(
            f"{model.name}: gives NaN or infinity for image {broken} of the check; its weights are useless: export "
            "another checkpoint"
        )
    theirs = _RUNNERS[file_format](path, images)
    if theirs.shape != own.shape:
        raise Fault(f"{path}: the exported model returns {list(theirs.shape)}, expected {list(own.shape)}")
    return float((theirs - own).abs().max()), float(own.abs().max())


def _write_torchscript(classifier: nn.Module, images: Tensor, path: Path) -> None:
    with torch.no_grad():
        torch.jit.trace(classifier, (images,)).save(str(path))


def _write_pt2(classifier: nn.Module, images: Tensor, path: Path) -> None:
    with torch.no_grad(), path.open("wb") as file:
        torch.export.save(torch.export.export(classifier, (images,), dynamic_shapes=_any_number()), file)


def _write_onnx(classifier: nn.Module, images: Tensor, path: Path) -> None:
    require_onnx()
    with torch.no_grad():
        program = torch.onnx.export(
            classifier,
            (images,),
            dynamo=True,
            dynamic_shapes=_any_number(),
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None
    program.save(str(path), external_data=False)


def _run_torchscript(path: Path, images: Tensor) -> Tensor:
    result: Tensor = torch.jit.load(str(path))(images)
    return result


def _run_pt2(path: Path, images: Tensor) -> Tensor:
    with path.open("rb") as file:
        result: Tensor = torch.export.load(file).module()(images)
    return result


def _run_onnx(path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    return torch.from_numpy(logits)


_WRITERS: dict[Format, Callable[[nn.Module, Tensor, Path], None]] = {
    "torchscript": _write_torchscript,
    "onnx": _write_onnx,
    "pt2": _write_pt2,
}
_RUNNERS: dict[Format, Callable[[Path, Tensor], Tensor]] = {
    "torchscript": _run_torchscript,
    "onnx": _run_onnx,
    "pt2": _run_pt2,
}


def require_onnx() -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"ONNX needs {error.name}: pip install 'resnet-dist[onnx]', or export to .pt2") from None


def _any_number() -> tuple[dict[int, Any], ...]:
    """The number of images is free, their size is not."""
    return ({0: torch.export.Dim("n")},)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch's words on its own deprecations and passes off the user's screen."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
