"""Published weights by name, `torchvision:NAME.ENTRY` and `timm:NAME.TAG`: net, test transform, accuracy and file, as
the installed library describes them.
"""

from __future__ import annotations

import csv
import hashlib
import math
import re
import shutil
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_prep.beton.files import temporary_beside
from data_prep.shown import few
from resnet_dist.errors import UserError
from resnet_dist.models.registry import BASELINES, LAYERS_PER_BLOCK, LAYOUTS, MODEL_NAMES, build_model
from resnet_dist.models.resnet import NetOptions, ResNet

LIBRARIES = ("torchvision:", "timm:")
_TIMEOUT_S = 10.0
"""Longest wait for an answer of a server."""
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_SHOWN = 12
"""Names in a message."""


@dataclass(frozen=True)
class Published:
    """How weights are used, and what accuracy their authors measured on ImageNet's 50,000 validation images."""

    model: Mapping[str, Any]
    """The recipe's `model` section."""
    size: int
    """Side of the central crop, px."""
    resize: int
    """Shorter side before the crop, px."""
    interpolation: str
    """bilinear or bicubic, of Pillow."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Per channel, in grey levels 0..255."""
    top1: float | None
    """Percent, with this transform; None: not known."""
    top5: float | None
    class_names: tuple[str, ...] | None
    """In words, by label; None: not known."""


def is_published(source: str) -> bool:
    return source.startswith(LIBRARIES)


def published(source: str) -> Published:
    """What the library says about a name. UserError if it has no such weights, or they are of a net that this project
    cannot build."""
    library, _, name = source.partition(":")
    return _torchvision(source, name) if library == "torchvision" else _timm(source, name)


def published_file(source: str) -> Path:
    """The file of the weights in the library's cache, where it is downloaded to if it is missing. UserError, which says
    which file to bring, if it cannot be downloaded."""
    library, _, name = source.partition(":")
    if library == "torchvision":
        return _from_url(source, str(_torchvision_entry(source, name).url))
    config = _timm_config(source, name)
    if config.hf_hub_id:
        return _from_hub(source, config.hf_hub_id, config.hf_hub_filename, str(config.url or ""))
    return _from_url(source, str(config.url))


# ---- torchvision -----------------------------------------------------------------------------------------------------


def _torchvision_entry(source: str, name: str) -> Any:
    """A member of torchvision's enumeration of the net's weights."""
    from torchvision.models import get_model_weights, list_models  # here, because it takes seconds to import

    net, _, entry = name.partition(".")
    nets = [other for other in list_models() if other in MODEL_NAMES]
    if net not in nets:
        raise UserError(
            f"{source}: '{net}' is not a net of torchvision and of this project; take one of {', '.join(nets)}"
        )
    entries = get_model_weights(net)
    if entry not in entries.__members__:
        known = ", ".join(f"torchvision:{net}.{member}" for member in entries.__members__)
        raise UserError(f"{source}: torchvision has no such weights of {net}; take one of {known}")
    return entries[entry]


def _torchvision(source: str, name: str) -> Published:
    weights = _torchvision_entry(source, name)
    transform = weights.transforms()
    net = name.partition(".")[0]
    mean, std = _grey_levels(transform.mean), _grey_levels(transform.std)
    if net == "googlenet":
        # These weights came from TensorFlow, where inputs are in [-1, 1]; torchvision converts (`transform_input`).
        mean = std = (127.5, 127.5, 127.5)
    accuracy = weights.meta["_metrics"].get("ImageNet-1K", {})
    categories = weights.meta["categories"]
    return Published(
        model={"name": net, "num_classes": len(categories or range(1000))},
        size=transform.crop_size[0],
        resize=transform.resize_size[0],
        interpolation=transform.interpolation.value,
        mean=mean,
        std=std,
        top1=_percent(accuracy.get("acc@1")),
        top5=_percent(accuracy.get("acc@5")),
        class_names=None if categories is None else tuple(categories),
    )


def _grey_levels(shares: Any) -> tuple[float, float, float]:
    red, green, blue = (round(float(share) * 255, 9) for share in shares)
    return red, green, blue


def _percent(value: float | None) -> float | None:
    """torchvision says NaN of weights without a classifier."""
    return None if value is None or math.isnan(value) else value


# ---- timm ------------------------------------------------------------------------------------------------------------


def _timm_config(source: str, name: str) -> Any:
    """timm's `PretrainedCfg`."""
    import timm

    net = name.partition(".")[0]
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:
        config = None
    if config is None or not (config.url or config.hf_hub_id):
        known = timm.list_models(f"{net}.*", pretrained=True)
        if not known:
            raise UserError(
                f"{source}: timm has no weights of a net '{net}'; timm.list_models('*resne*', pretrained=True) lists "
                "those of ResNets"
            )
        listed = few((f"timm:{other}" for other in known), most=_SHOWN)
        raise UserError(f"{source}: timm has no such weights of {net}; take one of {listed}")
    return config


def _timm(source: str, name: str) -> Published:
    import timm
    from timm.data import resolve_data_config

    config = _timm_config(source, name)
    with torch.device("meta"):
        net = timm.create_model(name, pretrained=False)
    try:
        model = options_of(net, name.partition(".")[0], config.num_classes)
    except Inexpressible as error:
        raise UserError(f"{source}: is of a net that this project does not have: {error}; use other weights") from None
    transform = resolve_data_config(pretrained_cfg=config.to_dict(), use_test_size=True)
    if transform["crop_mode"] != "center":
        raise UserError(
            f"{source}: is tested with crop_mode {transform['crop_mode']}, only central crops are supported; use other "
            "weights"
        )
    size, crop_pct = transform["input_size"][-1], transform["crop_pct"]
    top1, top5 = _timm_accuracy(f"{config.architecture}.{config.tag}", size, crop_pct)
    return Published(
        model=model,
        size=size,
        resize=math.floor(size / crop_pct),
        interpolation=transform["interpolation"],
        mean=_grey_levels(transform["mean"]),
        std=_grey_levels(transform["std"]),
        top1=top1,
        top5=top5,
        class_names=None,
    )


def _timm_accuracy(name: str, size: int, crop_pct: float) -> tuple[float | None, float | None]:
    """From timm's results/results-imagenet.csv (Apache-2.0), which its package does not have."""
    with (resources.files("resnet_dist.weights") / "timm_accuracy.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if (row["model"], int(row["size"]), float(row["crop_pct"])) == (name, size, round(crop_pct, 3)):
                return float(row["top1"]), float(row["top5"])
    return None, None


class Inexpressible(Exception):
    """No net of this project is the same as timm's; the message says what differs."""


def options_of(net: nn.Module, name: str, num_classes: int) -> dict[str, Any]:
    """The recipe's `model` section for a net of timm, which is on the meta device, read from its modules."""
    if num_classes < 1:
        raise Inexpressible("it has no classifier")
    if name in BASELINES:  # the same layers, whose fully connected ones are convolutions of the whole map
        return {"name": name, "num_classes": num_classes}
    for module in (net, *getattr(net, "layer1", ())):
        if type(module).__module__ != "timm.models.resnet":
            raise Inexpressible(f"it has {type(module).__name__} of {type(module).__module__}")
    model = {**_layout_of(net), **_stem_of(net), "num_classes": num_classes}
    parts = dict(net.named_modules())
    if "layer2.0.downsample.2" in parts:
        model["pooled_projection"] = True
    if narrow := parts.get("layer4.0.se.fc1"):
        model["se_ratio"] = narrow.out_channels / narrow.in_channels
    with torch.device("meta"):
        ours = build_model(**model)
    if difference := _difference(net, ours):
        raise Inexpressible(difference)
    return model


def _layout_of(net: nn.Module) -> dict[str, Any]:
    """Name and widths: of the registry's nets with these blocks, the one that leaves fewest options to set."""
    stages = [list(net.get_submodule(f"layer{k}").children()) for k in (1, 2, 3, 4)]
    num_blocks, first = tuple(map(len, stages)), stages[0][0]
    num_layers = 3 if hasattr(first, "conv3") else 2
    conv = net.get_submodule("layer1.0.conv2")
    assert isinstance(conv, nn.Conv2d)
    widths = {"groups": conv.groups, "base_width": conv.out_channels // conv.groups} if num_layers == 3 else {}
    options = {key: value for key, value in widths.items() if value != getattr(NetOptions, key)}
    found = [
        {"name": name, **{key: value for key, value in options.items() if key not in layout.options}}
        for name, layout in LAYOUTS.items()
        if layout.family is ResNet
        and layout.shortcut
        and layout.num_blocks == num_blocks
        and LAYERS_PER_BLOCK[layout.block] == num_layers
        and all(widths.get(key) == value for key, value in layout.options.items())
    ]
    if not found:
        raise Inexpressible(f"no net has {', '.join(map(str, num_blocks))} blocks of {num_layers} convolutions")
    return min(found, key=len)


def _stem_of(net: nn.Module) -> dict[str, Any]:
    first = net.get_submodule("conv1")
    if isinstance(first, nn.Conv2d):
        return {}
    widths = tuple(layer.out_channels for layer in first.children() if isinstance(layer, nn.Conv2d))
    stems: dict[tuple[int, ...], str] = {(32, 32, 64): "deep", (24, 32, 64): "deep_tiered"}
    stem = stems.get(widths)
    if stem is None:
        raise Inexpressible(f"its stem has {', '.join(map(str, widths))} channels")
    replaced = isinstance(net.get_submodule("maxpool"), nn.Sequential)
    return {"stem": "deep_strided" if replaced else stem}


_COMPUTED = ("Conv2d", "BatchNorm2d", "Linear")
"""Layers that are compared one by one."""
_SAME = ("Identity", "ReLU", "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d", "Sigmoid", "Dropout", "Flatten")
"""Layers without weights that are the same in both where those with weights are."""


def _difference(theirs: nn.Module, ours: nn.Module) -> str | None:
    """What timm's net has and ours does not, by the layers' names, shapes and strides."""
    layers = dict(ours.named_modules())
    for name, module in theirs.named_modules():
        kind = type(module).__name__
        if next(module.children(), None) is not None:
            continue
        if kind in _COMPUTED:
            if name not in layers or layers[name].extra_repr() != module.extra_repr():
                return f"its {name} is {module}"
        elif kind not in _SAME:
            return f"its {name} is {kind}"
    if theirs.state_dict().keys() != ours.state_dict().keys():
        return "it has fewer layers"
    return None


# ---- files -----------------------------------------------------------------------------------------------------------


def _from_url(source: str, url: str) -> Path:
    """A file of torch's cache, checked against the first digits of its SHA-256, which its name has."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.exists():
        _download(source, url, path, f"put it into {path.parent}")
    wanted = re.search(r"-([0-9a-f]{8,})\.", path.name)
    if wanted and not _sha256(path).startswith(wanted[1]):
        raise UserError(
            f"{path}: is damaged: its SHA-256 does not begin with {wanted[1]}; remove it, and fetch it again"
        )
    return path


def _from_hub(source: str, repository: str, file_name: str | None, url: str) -> Path:
    """A file of the Hugging Face cache; or of torch's, where older versions of timm put it."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    names = (file_name,) if file_name else _HUB_FILES
    for name in names:
        if isinstance(cached := try_to_load_from_cache(repository, name), str):
            return Path(cached)
    older = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if url and older.exists():
        return _from_url(source, url)
    where = f"{constants.ENDPOINT}/{repository}/resolve/main/{names[0]}"
    folder = f"models--{repository.replace('/', '--')}"
    remedy = f"copy the folder {folder} of another machine's cache to {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        raise _missing(source, where, "HF_HUB_OFFLINE is set", remedy)
    try:
        _open(where, method="HEAD").close()  # hf_hub_download would retry for minutes
        return Path(hf_hub_download(repository, names[0], etag_timeout=_TIMEOUT_S))
    except Exception as error:  # noqa: BLE001 - its HTTP client's errors, and its own
        raise _missing(source, where, _why(error), remedy) from None


def _download(source: str, url: str, path: Path, remedy: str) -> None:
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _open(url) as answer, temporary.open("wb") as file:
            shutil.copyfileobj(answer, file, 1 << 20)
        temporary.replace(path)
    except (OSError, ValueError) as error:
        raise _missing(source, url, _why(error), remedy) from None
    finally:
        temporary.unlink(missing_ok=True)


def _open(url: str, method: str = "GET") -> Any:
    request = urllib.request.Request(url, method=method, headers={"User-Agent": "resnet-dist"})
    return urllib.request.urlopen(request, timeout=_TIMEOUT_S)


def _missing(source: str, url: str, why: str, remedy: str) -> UserError:
    return UserError(
        f"{source}: its file is not on this machine and cannot be downloaded ({why}); download {url} elsewhere "
        f"and {remedy}; or name the file itself, by `evaluate --weights FILE` or as model.init.weights"
    )


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    return (str(reason).strip().splitlines() or [type(error).__name__])[0][:120]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
