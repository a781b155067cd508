"""One checkpoint: how it is written, what makes it complete, how it is loaded without trusting it.

A folder `epoch=007-step=00012345/` with `state.pt` and, written last, `checkpoint.json`: the digest of the state, and
the run that it belongs to.
"""

from __future__ import annotations

import errno
import json
import os
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from data_prep.beton.class_names import difference
from data_prep.beton.digest import ALGORITHM, Algorithm, digest_state, digest_stream, parse_digest
from data_prep.beton.files import Unfit, create, open_regular, read_small
from data_prep.shown import one_line
from resnet_dist.config.recipe import Recipe, recipe_changes
from resnet_dist.config.records import MAX_RECORD_BYTES, read_record
from resnet_dist.errors import Fault, UserError

METADATA = "checkpoint.json"
STATE = "state.pt"
SCHEMA_VERSION = 2
_ALGORITHM_OF: Mapping[int, Algorithm] = {1: "xxh3_128", SCHEMA_VERSION: ALGORITHM}
"""Digest algorithm by schema version. That of version 1 protects against accidents only."""
_MAX_COPIES, _MAX_OTHER_BYTES = 12, 64 << 20
"""Limits of a state's size: the net, its average, the state of optimizer and reduction, all twice for 16-bit nets."""
_NAME = re.compile(r"epoch=(\d{3,})-step=(\d{8,})", re.ASCII)
_MAX_CHANGES_SHOWN = 8
_MAX_PICKLE_BYTES = 16 << 20
"""Most bytes of what the state holds besides the tensors' numbers; ResNet-152 has 0.5 MB."""
_PICKLED = re.compile(r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch [A-Z][A-Za-z0-9]{0,19}Storage")
"""The classes that a state may contain besides plain values."""


class Damaged(Fault):
    """A checkpoint is not complete: it was written, copied or removed in part, or changed since."""


@dataclass(frozen=True)
class Identity:
    """Whose checkpoint it is. A run resumes only from checkpoints of its own identity."""

    recipe_hash: str
    data_digest: str
    """Digests of the train and the val beton."""
    class_names: tuple[str, ...] = ()
    """Class names by label; empty: written before checkpoints kept them."""

    def matches(self, other: Identity) -> bool:
        """Whether both are of the same run. Class names that one side does not know are not compared."""
        same = (self.recipe_hash, self.data_digest) == (other.recipe_hash, other.data_digest)
        known = self.class_names and other.class_names
        return same and (not known or self.class_names == other.class_names)


@dataclass(frozen=True)
class CheckpointMetadata:
    """The content of `checkpoint.json`."""

    epoch: int
    step: int
    identity: Identity
    recipe: Mapping[str, Any]
    metrics: Mapping[str, float]
    files: Mapping[str, str]
    pictures: Mapping[str, Any] = field(default_factory=dict)
    """How the pictures of the train beton were converted: `exif`, `background`, `max_side`. Empty in checkpoints of
    versions that did not keep it."""
    schema_version: int = SCHEMA_VERSION


def checkpoint_name(epoch: int, step: int) -> str:
    return f"epoch={epoch:03d}-step={step:08d}"


def step_of(name: str) -> int | None:
    """The step in a checkpoint's name, or None if it is not the name of a checkpoint."""
    match = _NAME.fullmatch(name)
    return int(match.group(2)) if match else None


def write_checkpoint(directory: Path, *, state: Mapping[str, Any], metadata: CheckpointMetadata) -> None:
    """Writes state and metadata into the existing, empty `directory`, both fsynced, the metadata last.

    `metadata.files` is filled in here.
    """
    digest = digest_state()
    with create(directory / STATE) as file:
        try:
            torch.save(dict(state), _Digesting(file, digest))  # type: ignore[arg-type]  # it needs no more
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk, of which PyTorch 2.14 says "unexpected pos"
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())
    # Last, and only when the state is on the disk: metadata that exist say that the checkpoint is complete.
    files = {STATE: f"{ALGORITHM}:{digest.hexdigest()}"}
    with create(directory / METADATA) as file:
        file.write(json.dumps({**asdict(metadata), "files": files}, indent=2, sort_keys=True).encode())
        file.flush()
        os.fsync(file.fileno())


def verify_checkpoint(directory: Path, where: str = "") -> CheckpointMetadata:
    """The metadata of a complete checkpoint, after reading all of it.

    Args:
        where: its name in error messages, if `directory` is a copy.

    Raises:
        Damaged: the metadata is missing or invalid, the digest of the state differs, or the state is not one.
        Fault: storage does not respond, which says nothing about the checkpoint.
    """
    where = where or str(directory)
    try:
        return _verify(directory, where)
    except Unfit as error:
        raise Damaged(f"{where}: {Path(error.filename).name} {error.strerror}: the checkpoint is damaged") from None
    except OSError as error:
        if error.errno == errno.EIO:  # a bad sector; all other errors may be temporary
            raise Damaged(f"{where}: cannot be read: {error.strerror}: the checkpoint is damaged") from None
        raise Fault(f"{where}: cannot be read: {error.strerror or error}") from None


def _verify(directory: Path, where: str) -> CheckpointMetadata:
    try:
        metadata = parse_metadata(read_small(directory / METADATA, MAX_RECORD_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{where}: has no {METADATA}: the checkpoint is incomplete") from None
    except ValueError as error:
        raise Damaged(f"{where}: its {METADATA} cannot be read ({error}): the checkpoint is damaged") from None
    if step_of(directory.name) not in (None, metadata.step):
        raise Damaged(f"{where}: its {METADATA} is of step {metadata.step}: the checkpoint is damaged")
    expected = metadata.files[STATE]
    try:
        with open_state(directory / STATE) as file:
            found = digest_stream(file, parse_digest(expected).algorithm)
            if found != expected:
                raise Damaged(f"{where}/{STATE}: digest {found}, expected {expected}: the checkpoint is damaged")
            require_plain(file)
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{where}/{STATE}: is missing: the checkpoint is damaged") from None
    except ValueError as error:
        raise Damaged(f"{where}/{STATE}: {error}: the checkpoint is damaged") from None
    return metadata


def parse_metadata(content: bytes) -> CheckpointMetadata:
    """ValueError unless it is metadata with the digest of the state and of nothing else."""
    metadata = read_record(CheckpointMetadata, content)
    if metadata.schema_version not in _ALGORITHM_OF:
        known = " and ".join(map(str, _ALGORITHM_OF))
        raise ValueError(f"is of schema {metadata.schema_version}, this version reads {known}")
    if min(metadata.epoch, metadata.step) < 0:
        raise ValueError(f"is of epoch {metadata.epoch} and step {metadata.step}")
    if set(metadata.files) != {STATE}:
        raise ValueError(f"has the digests of {len(metadata.files)} files, expected that of {STATE}")
    digest = parse_digest(metadata.files[STATE])
    if digest.is_tree or digest.algorithm != _ALGORITHM_OF[metadata.schema_version]:
        raise ValueError(f"has a digest that does not match schema {metadata.schema_version}")
    return metadata


def load_state(directory: Path, device: torch.device, net: nn.Module | None = None) -> dict[str, Any]:
    """The saved state of a checkpoint that `verify_checkpoint` has passed, tensors on `device`.

    Raises Damaged if it is far larger than a state of `net` can be.
    """
    path = directory / STATE
    with open_state(path) as file:
        return read_state(file, str(path), device, net)


def read_state(file: BinaryIO, where: str, device: torch.device, net: nn.Module | None) -> dict[str, Any]:
    """As `load_state`, from an open file."""
    file.seek(0, os.SEEK_END)
    num_bytes = file.tell()
    largest = None if net is None else _MAX_COPIES * _bytes_of(net) + _MAX_OTHER_BYTES
    if largest is not None and num_bytes > largest:
        raise Damaged(f"{where}: has {num_bytes:,} bytes, a state of this net at most {largest:,}")
    file.seek(0)
    try:
        loaded: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)  # runs no code of the file
    except RuntimeError as error:  # also what a GPU raises: only the archive's own errors are damage
        if "PytorchStreamReader" not in str(error):
            raise
        raise Damaged(f"{where}: {one_line(error)}: the checkpoint is damaged") from None
    return loaded


def _bytes_of(net: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in net.state_dict().values())


def require_same(found: CheckpointMetadata, expected: Identity, recipe: Recipe, where: str) -> None:
    """UserError, with what differs, unless the checkpoint in `where` is of this recipe and these data."""
    if found.identity.recipe_hash != expected.recipe_hash:
        changes = recipe_changes(found.recipe, recipe.model_dump(mode="json"))
        differs = ", ".join(changes[:_MAX_CHANGES_SHOWN]) + (", ..." if len(changes) > _MAX_CHANGES_SHOWN else "")
        raise UserError(
            f"{where}: this run began with another recipe: {differs or 'no key that this version knows'} "
            f"(hash {found.identity.recipe_hash} -> {expected.recipe_hash}); use a new --name, or undo the "
            "change; a new run can continue it with other settings: --fork"
        )
    names, theirs = found.identity.class_names, expected.class_names
    differ = difference(names, theirs, "the run", "data_root") if names and theirs else None
    if found.identity.data_digest != expected.data_digest:
        raise UserError(
            f"{where}: this run was trained on data {found.identity.data_digest}, data_root now holds "
            f"{expected.data_digest}{f' ({differ})' if differ else ''}; use a new --name, or the data that the run "
            "began with"
        )
    if differ:
        raise UserError(
            f"{where}: data_root holds this run's images under other class names: {differ}; use a new --name, or the "
            "manifests that the run began with"
        )


# `state.pt` is a zip of tensors, as `torch.save` writes it, and is inspected before it is loaded. `weights_only` keeps
# it from running code, but not from taking all memory: by compressed entries, storages larger than the file, tensors
# larger than their storages, byte arrays of any size. A file with any of these is rejected, whatever its digest.


def open_state(path: Path) -> BinaryIO:
    return os.fdopen(open_regular(path, os.O_RDONLY), "rb")


def require_plain(file: BinaryIO) -> None:
    """ValueError with the reason unless the file holds plain values, and tensors no larger than itself."""
    num_bytes = file.seek(0, os.SEEK_END)
    try:
        _require_plain_pickle(_read_pickle(file, num_bytes))
        file.seek(0)
        state = torch.load(file, map_location="meta", weights_only=True)
    except (OSError, MemoryError, ValueError):
        raise
    except Exception as error:  # noqa: BLE001 - a damaged file raises a dozen kinds
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
        if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE_BYTES:
            raise ValueError("has no data.pkl, or one that is too large")
        return archive.read(pickles[0])


def _require_plain_pickle(data: bytes) -> None:
    for operation, argument, _ in pickletools.genops(data):
        if operation.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"has the pickle operation {operation.name}")
        if operation.name == "GLOBAL" and not _PICKLED.fullmatch(str(argument)):
            raise ValueError(f"refers to {str(argument)[:80]!a}")


def _tensors(state: object) -> Iterator[torch.Tensor]:
    """Visits each container once: they may refer to each other, and to themselves."""
    waiting, seen = [state], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            waiting += item.values() if isinstance(item, dict) else item


class _Digesting:
    """A file that is written sequentially, and digested on the way."""

    def __init__(self, file: BinaryIO, state: Any) -> None:
        self._file, self._state = file, state

    def write(self, data: bytes | memoryview) -> int:
        self._state.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()
