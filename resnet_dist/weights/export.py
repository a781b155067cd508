"""`resnet-dist export`: a trained model as one file that needs nothing from this project, checked against the model.

A program (.onnx, .pt2, .pt) has the normalisation in it: it takes uint8 pixels as they are decoded. Weights alone
(.pth, .safetensors) have the names that torchvision, timm or this project give them: their net takes normalised floats.
A JSON file beside either describes its input, the steps before it, and its output.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
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
from resnet_dist.weights.keys import match_keys
from resnet_dist.weights.libraries import Keys, LibraryNet, library_net
from resnet_dist.weights.source import TrainedModel, load_model

Format = Literal["torchscript", "onnx", "pt2", "pth", "safetensors"]
SUFFIXES: dict[str, Format] = {
    ".onnx": "onnx",
    ".pt2": "pt2",
    ".pt": "torchscript",
    ".ts": "torchscript",
    ".pth": "pth",
    ".safetensors": "safetensors",
}
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
    library: LibraryNet | None
    """The net that takes the file's weights; None of a program."""
    warnings: tuple[str, ...] = ()


def export_model(
    source: str,
    path: Path,
    *,
    tracking_uri: str | None = None,
    data: Path | None = None,
    keys: Keys | None = None,
    licence: str | None = None,
) -> Exported:
    """Writes `path`, in the format that its suffix names, and `<path>.json`; neither is written before the check has
    passed.

    `source` as `load_model` takes it; `data`: a beton of the model's classes, whose first images are used for the check
    (random ones else); `keys`: whose names the tensors of a file of weights have, as `library_net` takes it; `licence`:
    of the weights, for its description. Raises UserError for models that cannot be exported, Fault if the file's logits
    are not the model's.
    """
    file_format = SUFFIXES.get(path.suffix)
    if file_format is None:
        raise UserError(f"{path}: its name must end in one of {', '.join(SUFFIXES)}, which select the format")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file")
    of_weights = file_format in ("pth", "safetensors")
    if keys and not of_weights:
        raise UserError(f"--keys {keys}: is for files of weights, .pth and .safetensors; {path.name} is a program")
    model = load_model(source, tracking_uri)
    library = library_net(model.recipe.model.build_options(), keys) if of_weights else None
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
    facts = describe(model, file_format, class_names, pictures or {}, library, licence)
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        create(temporary).close()  # writing would follow a link of that name
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        with _quiet():
            if library is None:
                _WRITERS[file_format](model.classifier, images[:2], temporary)
                run = _RUNNERS[file_format]
            else:
                _write_weights(model, library, file_format, facts, temporary)
                run = partial(_run_weights, library, file_format, facts)
            differences = [_difference(model, run, temporary, part) for part in (images[:1], images)]
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
    facts["check"] = {"images": len(images), "max_difference": max_difference, "largest_logit": largest}
    write_text_atomically(card, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    found = tuple(warning for warning in warnings if warning is not None)
    return Exported(path, card, max_difference, largest, library, warnings=found)


def describe(
    model: TrainedModel,
    file_format: Format,
    class_names: tuple[str, ...],
    pictures: Mapping[str, Any],
    library: LibraryNet | None,
    licence: str | None,
) -> dict[str, Any]:
    """What a user of the file needs to know. `library`: the net that takes it, if it is weights alone."""
    crop, classifier = model.recipe.data.eval, model.classifier
    mean, std = ([round(level / 255, 6) for level in levels.tolist()] for levels in (classifier.mean, classifier.std))
    if library is None:
        loading: dict[str, Any] = {}
        given = {"name": "images", "dtype": "uint8", "shape": ["N", crop.size, crop.size, 3], "colours": "RGB"}
        last = "nothing else: the file subtracts the mean and divides by the standard deviation"
    else:
        read = "safetensors.torch.load_file(FILE)" if file_format == "safetensors" else "torch.load(FILE)"
        loading = {"keys": library.keys, "load": f"net = {library.call}; net.load_state_dict({read})"}
        given = {"dtype": "float32", "shape": ["N", 3, crop.size, crop.size], "colours": "RGB"}
        last = "divide by 255, subtract `mean` and divide by `std`, channel by channel: the net takes normalised floats"
    return {
        "format": file_format,
        "torch": torch.__version__,
        "source": model.name,
        "net": model.recipe.model.name,
        "recipe_hash": model.recipe_hash,
        "data_digest": model.data_digest,
        "started_from": model.recipe.model.model_dump(mode="json").get("init"),
        "license": licence,
        **loading,
        "input": given,
        "decoding": _to_pixels(pictures),
        "preprocessing": [
            f"resize so that the shorter side is {crop.resize} px ({crop.interpolation}, antialiased, as Pillow does)",
            f"cut out the central {crop.size} x {crop.size} px",
            last,
        ],
        "transform": {"resize": crop.resize, "size": crop.size, "interpolation": crop.interpolation},
        "mean": mean,
        "std": std,
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
def _difference(
    model: TrainedModel, run: Callable[[Path, Tensor], Tensor], path: Path, images: Tensor
) -> tuple[float, float]:
    """Largest difference of a logit from the model's own, and the largest logit."""
    own = model.classifier(images)
    if not own.isfinite().all():
        broken = int((~own.isfinite().all(dim=1)).int().argmax())
        raise Fault(
            f"{model.name}: gives NaN or infinity for image {broken} of the check; its weights are useless: export "
            "another checkpoint"
        )
    theirs = run(path, images)
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


def _write_weights(
    model: TrainedModel, library: LibraryNet, file_format: Format, facts: Mapping[str, Any], path: Path
) -> None:
    """The net's tensors by the library's names: float32, contiguous, without anything around them."""
    with torch.device("meta"):
        theirs = library.build()
    matched = match_keys(model.classifier.net.state_dict(), theirs, model.name)
    state = {
        name: (value.float() if value.is_floating_point() else value).clone(memory_format=torch.contiguous_format)
        for name, value in matched.state.items()
    }
    if file_format == "pth":
        torch.save(state, path)
        return
    from safetensors.torch import save_file

    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
    save_file(state, path, {**metadata, "format": "pt"})  # "pt", as other readers of such files expect


def _run_weights(
    library: LibraryNet, file_format: Format, facts: Mapping[str, Any], path: Path, images: Tensor
) -> Tensor:
    """In the library's own net, on pixels that are prepared as the facts say."""
    from safetensors.torch import load_file

    net = library.build()
    net.load_state_dict(load_file(path) if file_format == "safetensors" else torch.load(path, weights_only=True))
    mean, std = (torch.tensor(facts[key]).view(3, 1, 1) for key in ("mean", "std"))
    logits: Tensor = net.eval()((images.permute(0, 3, 1, 2) / 255 - mean) / std)
    return logits


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
