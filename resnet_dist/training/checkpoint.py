"""The checkpoint directory: `epoch=007-step=00012345/` with the state, and a card that proves whole and whose it is.

`checkpoint.json` is written last and holds the digest of every other file, so a directory that was copied only in part
is told from a whole one by reading it.
"""

from __future__ import annotations

import errno
import json
import os
import pickletools
import re
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from data_prep.beton.class_names import difference
from data_prep.beton.digest import ALGORITHM, Algorithm, digest_state, digest_stream, parse_digest
from data_prep.beton.files import Unfit, create, open_regular, read_small
from resnet_dist.config.loading import MAX_RECORD_BYTES, read_record
from resnet_dist.config.recipe import Recipe, recipe_changes
from resnet_dist.errors import Fault, UserError
from resnet_dist.storage.base import TEMPORARY, RunStorage

CARD = "checkpoint.json"
STATE = "state.pt"
SCHEMA_VERSION = 2
_ALGORITHM_OF: Mapping[int, Algorithm] = {1: "xxh3_128", SCHEMA_VERSION: ALGORITHM}
"""By schema version: those that are read. The digests of the first find accidents only."""
_MAX_COPIES, _MAX_OTHER_BYTES = 12, 64 << 20
"""A state may have: the net, its average, what optimizer and reduction keep, twice the bytes for 16-bit nets."""
_NAME = re.compile(r"epoch=(\d{3,})-step=(\d{8,})", re.ASCII)
_MAX_CHANGES_SHOWN = 8
_OF_THE_MEDIUM = (errno.EIO,)
"""What a disk says of its own bad places; everything else may pass."""


class Damaged(Fault):
    """A checkpoint is not whole: written, copied or removed in part, or changed since."""


@dataclass(frozen=True)
class Identity:
    """Whose checkpoint it is. Training goes on only from a checkpoint with an equal identity."""

    recipe_hash: str
    data_digest: str
    """Digests of the train and the val beton."""
    class_names: tuple[str, ...] = ()
    """By label; empty: written before checkpoints kept them."""

    def is_of(self, other: Identity) -> bool:
        """Whether both are of one run; class names that one side does not know are not compared."""
        same = (self.recipe_hash, self.data_digest) == (other.recipe_hash, other.data_digest)
        known = self.class_names and other.class_names
        return same and (not known or self.class_names == other.class_names)


@dataclass(frozen=True)
class Card:
    """What `checkpoint.json` says."""

    epoch: int
    step: int
    identity: Identity
    recipe: Mapping[str, Any]
    metrics: Mapping[str, float]
    files: Mapping[str, str]
    pictures: Mapping[str, Any] = field(default_factory=dict)
    """How the train beton's pictures became pixels: `exif`, `background`, `max_side` of its conversion. Empty in
    checkpoints of versions that did not keep it."""
    schema_version: int = SCHEMA_VERSION


def checkpoint_name(epoch: int, step: int) -> str:
    return f"epoch={epoch:03d}-step={step:08d}"


def step_of(name: str) -> int | None:
    """The step in a checkpoint's name, or None if it is no checkpoint's name."""
    match = _NAME.fullmatch(name)
    return int(match.group(2)) if match else None


def save_checkpoint(directory: Path, *, state: Mapping[str, Any], card: Card) -> None:
    """Writes state and card into the existing, empty `directory`, both fsynced, the card last."""
    digest = digest_state()
    with create(directory / STATE) as file:
        try:
            torch.save(dict(state), Digesting(file, digest))  # type: ignore[arg-type]  # it asks for no more
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk: PyTorch 2.14 says "unexpected pos" instead
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())
    files = {STATE: f"{ALGORITHM}:{digest.hexdigest()}"}
    with create(directory / CARD) as file:
        file.write(json.dumps({**asdict(card), "files": files}, indent=2, sort_keys=True).encode())
        file.flush()
        os.fsync(file.fileno())


def read_card(directory: Path, where: str = "") -> Card:
    """The card of a whole checkpoint; Damaged if the card is missing, a file's digest differs, or the state is none.

    `where` names it in errors, if `directory` is not where it lies. Fault if storage does not give what it has: that
    says nothing of the checkpoint.
    """
    where = where or str(directory)
    try:
        return _read_card(directory, where)
    except Unfit as error:
        raise Damaged(f"{where}: {Path(error.filename).name} {error.strerror}: the checkpoint is damaged") from None
    except OSError as error:
        if error.errno in _OF_THE_MEDIUM:
            raise Damaged(f"{where}: cannot be read: {error.strerror}: the checkpoint is damaged") from None
        raise Fault(f"{where}: cannot be read: {error.strerror or error}") from None


def _read_card(directory: Path, where: str) -> Card:
    try:
        card = _parse(read_small(directory / CARD, MAX_RECORD_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{where}: has no {CARD}: the checkpoint is incomplete") from None
    except ValueError as error:
        raise Damaged(f"{where}: its {CARD} cannot be read ({error}): the checkpoint is damaged") from None
    if step_of(directory.name) not in (None, card.step):
        raise Damaged(f"{where}: its {CARD} is of step {card.step}: the checkpoint is damaged")
    expected = card.files[STATE]
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
    return card


def glance(storage: RunStorage, name: str) -> Card | None:
    """What the card says, the other files unread; None if there is no readable one."""
    try:
        content = storage.read(f"{name}/{CARD}")
        return None if content is None else _parse(content)
    except (ValueError, Unfit):
        return None


def _parse(content: bytes) -> Card:
    """ValueError unless it is a card that tells the digest of the state, and of nothing else."""
    card = read_record(Card, content)
    if card.schema_version not in _ALGORITHM_OF:
        known = " and ".join(map(str, _ALGORITHM_OF))
        raise ValueError(f"is of schema {card.schema_version}, this version reads {known}")
    if min(card.epoch, card.step) < 0:
        raise ValueError(f"is of epoch {card.epoch} and step {card.step}")
    if set(card.files) != {STATE}:
        raise ValueError(f"tells the digests of {len(card.files)} files, expected that of {STATE}")
    digest = parse_digest(card.files[STATE])
    if digest.is_tree or digest.algorithm != _ALGORITHM_OF[card.schema_version]:
        raise ValueError(f"has a digest that does not go with schema {card.schema_version}")
    return card


def load_state(directory: Path, device: torch.device, net: nn.Module | None = None) -> dict[str, Any]:
    """The saved state, tensors on `device`. Only tensors and plain values are unpickled.

    Damaged if it is no such state, or far larger than one of `net`, if given, can be.
    """
    path = directory / STATE
    with open_state(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        largest = None if net is None else _MAX_COPIES * _bytes_of(net) + _MAX_OTHER_BYTES
        if largest is not None and num_bytes > largest:
            raise Damaged(f"{path}: has {num_bytes:,} bytes, a state of this net at most {largest:,}")
        try:
            require_plain(file)
        except ValueError as error:
            raise Damaged(f"{path}: {error}: the checkpoint is damaged") from None
        file.seek(0)
        loaded: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
    return loaded


def _bytes_of(net: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in net.state_dict().values())


@dataclass(frozen=True)
class Found:
    """A whole checkpoint."""

    name: str
    card: Card
    directory: Path
    """Its files on this machine, as long as it is open."""
    warnings: tuple[str, ...] = ()
    """One for every damaged newer one."""
    damaged: tuple[str, ...] = ()
    """Their names."""


@contextmanager
def opened(storage: RunStorage, name: str) -> Iterator[Found]:
    """The checkpoint `name`, read through. Raises Damaged, and Fault if storage cannot be reached."""
    with storage.fetched(name) as directory:
        yield Found(name, read_card(directory, f"{storage.location}/{name}"), directory)


@contextmanager
def newest_whole(storage: RunStorage) -> Iterator[Found | None]:
    """The newest whole checkpoint, or None. Raises Fault if storage cannot be reached: that says nothing of any."""
    warnings: dict[str, str] = {}
    for name in newest_first(storage.names()):
        with ExitStack() as stack:
            try:
                found = stack.enter_context(opened(storage, name))
            except Damaged as damaged:
                warnings[name] = str(damaged)
                continue
            yield replace(found, warnings=tuple(warnings.values()), damaged=tuple(warnings))
            return
    yield None


def damaged_names(storage: RunStorage) -> tuple[str, ...]:
    """Of the checkpoints newer than the newest whole one; none, if none is whole: what is to be done then is not for us
    to say."""
    with newest_whole(storage) as found:
        return found.damaged if found is not None else ()


def newest_step(storage: RunStorage) -> int:
    """By the names alone; 0 if there is no checkpoint."""
    return max((step for name in storage.names() if (step := step_of(name)) is not None), default=0)


def newest_first(names: Iterable[str]) -> list[str]:
    """The checkpoints among `names`, newest first."""
    steps = [(step, name) for name in names if (step := step_of(name)) is not None]
    return [name for _, name in sorted(steps, reverse=True)]


def prune(storage: RunStorage, keep: int, damaged: Collection[str] = ()) -> None:
    """Removes all checkpoints but the newest `keep`, those in `damaged`, and what interrupted writes left behind.

    Best weights (`best/`) are not counted and stay.
    """
    names = storage.names()
    unfinished = [name for name in names if name.startswith(".") and name.endswith(TEMPORARY)]
    for name in [*unfinished, *damaged, *newest_first(set(names).difference(damaged))[keep:]]:
        storage.remove(name)


def require_same(found: Card, expected: Identity, recipe: Recipe, where: str) -> None:
    """UserError, with what differs, unless the checkpoint in `where` is of this recipe and these data."""
    if found.identity.recipe_hash != expected.recipe_hash:
        changes = recipe_changes(found.recipe, recipe.model_dump(mode="json"))
        differs = ", ".join(changes[:_MAX_CHANGES_SHOWN]) + (", ..." if len(changes) > _MAX_CHANGES_SHOWN else "")
        raise UserError(
            f"{where}: this run began with another recipe: {differs or 'no key that this version knows'} "
            f"(hash {found.identity.recipe_hash} -> {expected.recipe_hash}); use a new --name, or undo the change"
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


# `state.pt`: a zip of tensors as `torch.save` writes it, looked through before it is loaded.


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
