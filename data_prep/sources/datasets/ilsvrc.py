"""The official ILSVRC2012 archives, read in place: nothing is unpacked to disk.

`--input` is the folder with `ILSVRC2012_img_train.tar` (a tar of one `<wnid>.tar` per class),
`ILSVRC2012_img_val.tar` (no folders) and `ILSVRC2012_devkit_t12.tar.gz`, or one of the two image archives. Samples are
in the order of the same images in folders per class: by wnid, then by name.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from data_prep.errors import UserError
from data_prep.shown import shown
from data_prep.sources.base import NO_OPTIONS, SourceOptions
from data_prep.sources.file_source import ArchiveSource, FileListing, is_image_name, skipped_notes
from data_prep.sources.files.find import storage_path
from data_prep.sources.files.listing import FileRanges, RecordedFile, list_each, record
from data_prep.sources.files.paths import StoragePath, read_small
from data_prep.sources.files.tar import TarEntry, read_members, walk_tar
from data_prep.sources.imagenet import VAL_NAME, WNID, label_map
from data_prep.sources.splits import SplitRequest, choose_split

ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
CLASS_TAR = re.compile(r"(n\d{8})\.tar")

GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
META = "data/meta.mat"
MAX_ID_DIGITS = 9
COMPRESSED, TAG_BYTES, MAT_HEADER_BYTES = 15, 8, 128
"""MATLAB files, version 5: the type of a compressed element, the sizes of an element's tag and of the file's header."""
MAX_UNPACKED_BYTES = 64 << 20
"""Largest devkit; the real one unpacks to some 4 MB."""


class Listed(NamedTuple):
    """One image; sorts into the order of samples."""

    label: int
    name: str
    """`<wnid>/<file>`, as it would be in folders per class."""
    offset: int
    num_bytes: int


class Ilsvrc(ArchiveSource):
    _has_class_archives = False

    @classmethod
    def open(cls, location: str, split: SplitRequest, options: SourceOptions = NO_OPTIONS) -> Self:
        given = storage_path(location)
        archive, name = _find_archive(given, split)
        beside = given.child(DEVKIT) if archive is not given else archive.parent().child(DEVKIT)
        kit = storage_path(options.devkit) if options.devkit else beside if beside.kind() == "file" else None
        devkit = read_devkit(kit) if kit else None
        if name == "train":
            return cls._open_train(record(archive), devkit)
        if devkit is None:
            raise UserError(f"{archive.shown}: its labels are in {DEVKIT}; put that beside, or name it with --devkit")
        return cls._open_val(record(archive), devkit)

    @classmethod
    def _open_train(cls, archive: RecordedFile, devkit: Devkit | None) -> Self:
        where = archive.path.shown
        members = list(_walk(archive, where))
        tars: dict[str, TarEntry] = {}
        for member in members:
            match = CLASS_TAR.fullmatch(member.name.rpartition("/")[2])
            if match is not None and tars.setdefault(match[1], member) != member:
                raise UserError(f"{where}: holds {match[0]} twice; download it again")
        if not tars:
            raise UserError(f"{where}: holds no class archives; expected <wnid>.tar")
        class_names = devkit.wnids if devkit else tuple(sorted(tars))
        unknown = set(tars) - set(class_names)
        if unknown:
            raise UserError(
                f"{where}: {min(unknown)}.tar is not a class of the devkit; is it the devkit of this archive?"
            )
        label_of = label_map(class_names)

        def list_class(wnid: str) -> list[TarEntry]:
            return list(_walk(archive, f"{where}: {wnid}.tar", tars[wnid]))

        images: list[Listed] = []
        taken = set(tars.values())
        left_out = [member.name for member in members if member not in taken]
        for wnid, listed in zip(sorted(tars), list_each(list_class, sorted(tars)), strict=True):
            found = [m for m in listed if is_image_name(m.name)]
            images += sorted(Listed(label_of[wnid], f"{wnid}/{m.name}", m.offset, m.num_bytes) for m in found)
            left_out += [f"{wnid}.tar/{m.name}" for m in listed if not is_image_name(m.name)]
            _require_each_once([m.name for m in found], f"{where}: {wnid}.tar")
        without = sorted(set(class_names) - {image.name[:9] for image in images})
        notes = [f"{len(without):,} classes have no images, first {without[0]}"] if without else []
        return cls._of(archive, "train", class_names, images, left_out, notes)

    @classmethod
    def _open_val(cls, archive: RecordedFile, devkit: Devkit) -> Self:
        where = archive.path.shown
        images: list[Listed] = []
        left_out: list[str] = []
        for member in _walk(archive, where):
            name = member.name.rpartition("/")[2]
            match = VAL_NAME.match(name)
            if match is None or not is_image_name(name):
                left_out.append(member.name)
                continue
            number = int(match[1])
            if not 1 <= number <= len(devkit.val_ids):
                raise UserError(f"{where}: {name}: the devkit knows the images 1..{len(devkit.val_ids):,}")
            label = devkit.label_of_id[devkit.val_ids[number - 1]]
            images.append(Listed(label, f"{devkit.wnids[label]}/{name}", member.offset, member.num_bytes))
        _require_each_once([image.name.rpartition("/")[2].partition(".")[0] for image in images], where)
        notes = []
        if len(images) != len(devkit.val_ids):
            notes.append(f"holds {len(images):,} of the {len(devkit.val_ids):,} images that the devkit knows")
        return cls._of(archive, "val", devkit.wnids, sorted(images), left_out, notes)

    @classmethod
    def _of(
        cls,
        archive: RecordedFile,
        split: str,
        class_names: tuple[str, ...],
        images: list[Listed],
        left_out: list[str],
        notes: list[str],
    ) -> Self:
        labels, sizes, offsets = (
            np.array(column, dtype=np.int64)
            for column in ([i.label for i in images], [i.num_bytes for i in images], [i.offset for i in images])
        )
        listing = FileListing(class_names, [image.name for image in images], labels, sizes)
        ranges = FileRanges([archive], np.zeros(len(images), dtype=np.int32), offsets, sizes)
        named = [shown(name) for name in sorted(left_out)]
        opened = cls("ilsvrc", archive.path.shown, split, listing, ranges, len(left_out), named)
        opened.description.label_checks.extend(notes)
        opened.notes = tuple(skipped_notes(opened.description))
        opened._has_class_archives = split == "train"
        return opened

    def key(self, index: int) -> str:
        """`<archive>/[<wnid>.tar/]<file>`."""
        wnid, _, name = self._names[index].partition("/")
        archive = self._ranges.file_of(index).name
        return f"{archive}/{wnid}.tar/{name}" if self._has_class_archives else f"{archive}/{name}"


def _find_archive(given: StoragePath, split: SplitRequest) -> tuple[StoragePath, str]:
    """The archive of the split that was asked for, and the split's name."""
    if given.kind() == "folder":
        found = {name: given.child(archive) for name, archive in ARCHIVES.items()}
        available = {name: path for name, path in found.items() if path.kind() == "file"}
        if not available:
            raise UserError(f"--input {given.shown}: holds none of {', '.join(ARCHIVES.values())}")
        name = choose_split(sorted(available), split, given.shown)
        return available[name], name
    if given.kind() is None:
        raise UserError(f"--input {given.shown}: does not exist; expected the folder of the archives, or one of them")
    first = next(_walk(record(given), given.shown), None)
    name = (first.name if first else "").rpartition("/")[2]
    if CLASS_TAR.fullmatch(name):
        return given, choose_split(["train"], split, given.shown)
    if VAL_NAME.match(name):
        return given, choose_split(["val"], split, given.shown)
    hint = "; the test images' labels were never published" if "_test_" in name else ""
    raise UserError(
        f"{given.shown}: begins with {shown(name) or 'nothing'}: neither the train nor the val archive{hint}"
    )


def _require_each_once(names: Sequence[str], where: str) -> None:
    """UserError when an archive has two images of one name."""
    if len(set(names)) != len(names):
        name = next(name for name, count in Counter(names).items() if count > 1)
        raise UserError(f"{where}: holds {shown(name)} twice; download it again")


def _walk(archive: RecordedFile, where: str, within: TarEntry | None = None) -> Iterator[TarEntry]:
    """The files of the archive, or of a tar that is a member of it."""
    start = within.offset if within else 0
    stop = start + within.num_bytes if within else archive.status.num_bytes
    with closing(archive.path.reader(archive.status)) as reader:
        yield from walk_tar(reader.read_at, start, stop, where)


# --- the devkit: what ILSVRC2012_IDs mean, and the validation set's labels in terms of them ---------------------------


@dataclass(frozen=True)
class Devkit:
    wnids: tuple[str, ...]
    """The classes that have images, ascending: the position is the label."""
    label_of_id: dict[int, int]
    """ILSVRC2012_ID -> label."""
    val_ids: tuple[int, ...]
    """ILSVRC2012_ID of validation image 1, 2, ..."""


def read_devkit(path: StoragePath) -> Devkit:
    """`path`: ILSVRC2012_devkit_t12.tar.gz, or the folder it unpacks to. UserError when it is not that."""
    files = _read_files(path)
    wnid_of_id = _read_meta(files[META], f"{path.shown}: {META}")
    wnids = tuple(sorted(wnid_of_id.values()))
    label_of = label_map(wnids)
    lines = files[GROUND_TRUTH].split()
    val_ids = tuple(int(line) for line in lines if line.isdigit() and len(line) <= MAX_ID_DIGITS)
    bad = next((number for number in val_ids if number not in wnid_of_id), None)
    if len(val_ids) != len(lines) or not val_ids or bad is not None:
        raise UserError(f"{path.shown}: {GROUND_TRUTH}: expected one ILSVRC2012_ID a line, found {bad or 'other text'}")
    return Devkit(wnids, {number: label_of[wnid] for number, wnid in wnid_of_id.items()}, val_ids)


def _read_files(path: StoragePath) -> dict[str, bytes]:
    kind = path.kind()
    if kind is None:
        raise UserError(f"{path.shown}: does not exist; name the devkit (ILSVRC2012_devkit_t12.tar.gz) with --devkit")
    if kind == "folder":
        return {name: read_small(path.child(name), MAX_UNPACKED_BYTES, "the devkit") for name in (GROUND_TRUTH, META)}
    limits = {"max_bytes": MAX_UNPACKED_BYTES, "max_unpacked_bytes": MAX_UNPACKED_BYTES}
    try:
        with path.open() as file:
            files = read_members(file, (GROUND_TRUTH, META), path.shown, DEVKIT, **limits)
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path.shown}: cannot be unpacked: {error}; download it again") from None
    missing = next((name for name in (GROUND_TRUTH, META) if name not in files), None)
    if missing is not None:
        raise UserError(f"{path.shown}: holds no {missing}; expected {DEVKIT}")
    return files


def _read_meta(data: bytes, where: str) -> dict[int, str]:
    """ILSVRC2012_ID -> wnid, of the synsets without children; all others have no images."""
    import numpy as np
    from scipy.io import loadmat

    def column(name: str) -> list[object]:
        """A field of a struct array, or of a struct of arrays."""
        cells = [np.ravel(cell) for cell in np.ravel(synsets[name])]
        return [value.item() if hasattr(value, "item") else value for cell in cells for value in cell]

    try:
        _check_unpacked(data)
        synsets = np.atleast_1d(loadmat(io.BytesIO(data), squeeze_me=True)["synsets"])
        ids, wnids = column("ILSVRC2012_ID"), column("WNID")
        children = column("num_children") if "num_children" in (synsets.dtype.names or ()) else [0] * len(ids)
        rows = zip(ids, wnids, children, strict=True)
        leaves = [(int(float(str(n))), str(wnid).strip()) for n, wnid, count in rows if float(str(count)) == 0]
    except Exception as error:  # noqa: BLE001  # scipy's reader raises many kinds on a damaged file
        raise UserError(
            f"{where}: cannot be read ({type(error).__name__}: {error}); download the devkit again"
        ) from None
    wnid_of_id = dict(leaves)
    bad = next((wnid for _, wnid in leaves if not WNID.fullmatch(wnid)), None)
    if not leaves or bad is not None or len(wnid_of_id) != len(leaves) or len({w for _, w in leaves}) != len(leaves):
        raise UserError(f"{where}: expected one wnid for each ILSVRC2012_ID, found {bad or 'doubles or nothing'}")
    return wnid_of_id


def _check_unpacked(data: bytes) -> None:
    """ValueError when the compressed elements of a MATLAB file unpack to more than MAX_UNPACKED_BYTES."""
    left = MAX_UNPACKED_BYTES
    at = MAT_HEADER_BYTES
    order = "<" if data[126:128] == b"IM" else ">"
    while at + TAG_BYTES <= len(data):
        kind, num_bytes = struct.unpack_from(f"{order}II", data, at)
        at += TAG_BYTES + num_bytes
        if kind == COMPRESSED:
            left -= len(zlib.decompressobj().decompress(data[at - num_bytes : at], left + 1))
            if left < 0:
                raise ValueError(f"unpacks to more than {MAX_UNPACKED_BYTES:,} bytes")
