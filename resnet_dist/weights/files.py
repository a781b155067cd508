"""A file of weights, as other projects save them: what is in it, read without running any code of it."""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.beton.digest import digest_state
from data_prep.shown import shown
from resnet_dist.errors import UserError

SUFFIXES = (".pth", ".pt", ".th", ".safetensors", ".bin", ".tar", ".ckpt")
_AVERAGES = ("average", "state_dict_ema", "model_ema", "ema_state_dict", "ema")
_NETS = ("state_dict", "model", "net", "model_state_dict", "weights", "params", "teacher", "module")
"""Keys under which projects keep weights, a moving average of them first: it is what they evaluate."""
_MAX_DEPTH = 5
"""Of mappings in mappings: one may contain itself."""
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_WRAPPERS = re.compile(r"(module\.|_orig_mod\.)+")
"""In front of names: DistributedDataParallel and torch.compile."""
_NOT_LOADED = re.compile(r"unsupported global:? (?:GLOBAL )?([\w.]+)", re.IGNORECASE)
_MAX_EXPANSION = 8
"""Bytes of the tensors for each byte of the file: a tensor may be a view that is larger than what the file has."""


def read_file(path: Path) -> dict[str, Tensor]:
    """The weights in a .safetensors file or in one that torch.save wrote, by their names without wrappers
    (`module.`, `_orig_mod.`, and a first part that all names share), on the CPU. Of weights and their moving average,
    the average.

    Raises UserError if it cannot be read, holds no weights, or would run code, or if a tensor is sparse, has no values
    (meta), or is not of real floating-point numbers.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not start:
        raise UserError(f"{path}: is empty; copy or download it again")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: is a pointer of Git LFS, not the weights; run `git lfs pull`, or download the file")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path, start)
    state = _unwrapped(_weights_in(content, path))
    for name, value in state.items():
        if why := _unusable(name, value):
            raise UserError(f"{path}: its {shown(name)} {why}")
    num_bytes = sum(value.numel() * value.element_size() for value in state.values())
    if num_bytes > _MAX_EXPANSION * path.stat().st_size:
        raise UserError(f"{path}: claims {num_bytes:,} bytes of tensors, more than the file can hold: it is damaged")
    return state


def is_file(source: str) -> bool:
    """Whether it names a file of weights, which may not exist, and not a checkpoint, a run or a model in MLflow."""
    path = Path(source).expanduser()
    return ":/" not in source and not path.is_dir() and (path.suffix in SUFFIXES or path.is_file())


def is_exported(path: Path) -> bool:
    """Whether `export` wrote it, as a .safetensors file says itself and the JSON file beside another."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                facts = file.metadata()
        else:
            facts = json.loads(path.with_name(f"{path.name}.json").read_bytes())
    except (OSError, ValueError, RecursionError, SafetensorError):
        return False
    return isinstance(facts, dict) and "recipe_hash" in facts


def digest_of(state: Mapping[str, Tensor]) -> str:
    """Hex digits of BLAKE3 over names, types, shapes and values: equal for the same tensors in any format of file.
    Batch norm's counters, which some files lack, are left out."""
    digest = digest_state()
    for name in sorted(name for name in state if not name.endswith("num_batches_tracked")):
        value = state[name].detach().cpu()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return str(digest.hexdigest())


def _read_safetensors(path: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: is damaged or not a safetensors file: {_reason(error)}") from None


def _read_torch(path: Path, start: bytes) -> object:
    # Harmless classes that checkpoints of torchvision's and timm's training scripts contain besides tensors.
    harmless: list[Any] = [argparse.Namespace, *_numpy_scalars()]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(harmless):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise UserError(f"{path}: claims more than the memory of this machine: it is damaged") from None
    except Exception as error:  # noqa: BLE001 - a damaged file raises a dozen kinds
        if "TorchScript" in str(error):
            what = "is a TorchScript program, not weights; give the file that its weights came from"
        elif code := _NOT_LOADED.search(str(error)):
            what = (
                f"is a pickle that would run code ({code[1]}), so it is not loaded; if you trust it, save its weights "
                "alone: torch.save(model.state_dict(), FILE)"
            )
        elif not start.startswith((b"PK", b"\x80")):
            what = "is not a file that torch.save or safetensors wrote"
        else:
            what = f"is damaged or not a file that torch.save wrote: {_reason(error)}; copy or download it again"
        raise UserError(f"{path}: {what}") from None


def _numpy_scalars() -> list[Any]:
    """The classes of numpy's numbers, such as the best accuracy so far."""
    import numpy as np
    from numpy._core.multiarray import scalar

    return [scalar, np.dtype, type(np.dtype(np.float64)), type(np.dtype(np.float32)), type(np.dtype(np.int64))]


def _reason(error: Exception) -> str:
    advice = ("Weights only load failed", "Check the documentation", "Please file an issue")
    lines = [line for line in str(error).splitlines() if line.strip() and not line.strip().startswith(advice)]
    return lines[0].strip()[:200] if lines else type(error).__name__


def _weights_in(content: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not weights by name")
    state = _innermost(content, path)
    if not state:
        keys = ", ".join(str(key)[:40] for key in list(content)[:6]) or "nothing"
        raise UserError(f"{path}: holds no weights of a net, only {keys}; give the file with the net's state_dict")
    return state


def _innermost(content: Mapping[Any, Any], path: Path, depth: int = 0) -> dict[str, Tensor]:
    """The first that has weights, and not only counters or rates; empty if none has."""
    if depth == _MAX_DEPTH:
        raise UserError(f"{path}: nests its weights {depth} mappings deep; save the net's state_dict alone")
    for key in (*_AVERAGES, *_NETS):
        if isinstance(inner := content.get(key), Mapping) and (state := _innermost(inner, path, depth + 1)):
            return state
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    return state if any(value.ndim > 1 for value in state.values()) else {}


def _unusable(name: str, value: Tensor) -> str | None:
    """Why it cannot be a net's tensor."""
    if value.layout != torch.strided:
        return "is a sparse or nested tensor; save its weights dense: value.to_dense()"
    if value.device.type != "cpu":
        return f"is on the device {value.device.type}, without values; save the net with its weights loaded"
    if value.dtype in _FLOATS or name.endswith("num_batches_tracked"):
        return None
    if value.is_complex():
        return f"is of complex numbers ({value.dtype}), the nets' are real"
    return f"is of {value.dtype}: its weights are quantised; give the file of the weights before quantisation"


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {name: _WRAPPERS.sub("", name, count=1) if _WRAPPERS.match(name) else name for name in state}
    tensors = [name for name in names.values() if "." in name]
    while tensors and all(name.count(".") > 1 for name in tensors) and len({n.split(".")[0] for n in tensors}) == 1:
        names = {old: name.partition(".")[2] if "." in name else name for old, name in names.items()}
        tensors = [name for name in names.values() if "." in name]
    return {name: state[old] for old, name in names.items() if state[old].ndim or name.endswith("num_batches_tracked")}
