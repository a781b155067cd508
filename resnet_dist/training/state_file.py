"""`state.pt`: a zip of tensors as `torch.save` writes it, looked through before it is loaded.

`weights_only` keeps it from running code. It does not keep a small file from taking all memory: by entries that are
compressed, storages larger than what is there, tensors larger than their storages, byte arrays of any size. Such a file
is no checkpoint of ours, whatever its digest says.
"""

from __future__ import annotations

import os
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from data_prep.beton.files import open_regular

MAX_PICKLE_BYTES = 16 << 20
"""What the file says besides the tensors' numbers: 0.5 MB for ResNet-152."""
_NAMES = re.compile(r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch [A-Z][A-Za-z0-9]{0,19}Storage")
"""What a saved state is made of besides plain values."""


def open_state(path: Path) -> BinaryIO:
    return os.fdopen(open_regular(path, os.O_RDONLY), "rb")


def require_plain(file: BinaryIO) -> None:
    """ValueError, with the reason, unless the file holds plain values and tensors that are no larger than itself."""
    num_bytes = file.seek(0, os.SEEK_END)
    try:
        _require_plain_pickle(_read_pickle(file, num_bytes))
        file.seek(0)
        state = torch.load(file, map_location="meta", weights_only=True)
    except (OSError, MemoryError, ValueError):
        raise
    except Exception as error:  # noqa: BLE001 - what unpickles a damaged file raises a dozen kinds
        raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from None
    if not isinstance(state, dict) or not isinstance(state.get("net"), dict):
        raise ValueError("holds no net")
    storages: dict[int, int] = {}
    for tensor in _tensors(state):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        extent = sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        needed = max(tensor.numel(), tensor.storage_offset() + extent if tensor.numel() else 0) * tensor.element_size()
        if needed > storage.nbytes():
            raise ValueError(f"holds a tensor of {needed:,} bytes in {storage.nbytes():,}")
    if sum(storages.values()) > num_bytes:
        raise ValueError(f"holds tensors of {sum(storages.values()):,} bytes, more than its own {num_bytes:,}")


def _read_pickle(file: BinaryIO, num_bytes: int) -> bytes:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(e.compress_type != zipfile.ZIP_STORED or e.compress_size != e.file_size for e in entries):
            raise ValueError("has compressed entries")
        if sum(entry.file_size for entry in entries) > num_bytes or min(e.header_offset for e in entries) != 0:
            raise ValueError("has entries that are larger than the file, or something before them")
        pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
            raise ValueError("has no data.pkl, or one that is too large")
        return archive.read(pickles[0])


def _require_plain_pickle(data: bytes) -> None:
    for operation, argument, _ in pickletools.genops(data):
        if operation.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"has the pickle operation {operation.name}")
        if operation.name == "GLOBAL" and not _NAMES.fullmatch(str(argument)):
            raise ValueError(f"refers to {str(argument)[:80]!a}")


def _tensors(state: object) -> Iterator[torch.Tensor]:
    """Each container once: they may refer to each other, and to themselves."""
    waiting, seen = [state], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            waiting += item.values() if isinstance(item, dict) else item


class Digesting:
    """A file that is written from its beginning to its end, and digested on the way."""

    def __init__(self, file: BinaryIO, state: Any) -> None:
        self._file, self._state = file, state

    def write(self, data: bytes | memoryview) -> int:
        self._state.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()
