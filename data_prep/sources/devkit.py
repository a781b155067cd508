"""ILSVRC2012's devkit: what its ILSVRC2012_IDs mean, and the validation set's labels in terms of them."""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from data_prep.errors import UserError
from data_prep.sources.imagenet import WNID
from data_prep.sources.places import Place, read_small
from data_prep.sources.tar_index import walk_tar

GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
META = "data/meta.mat"
MAX_ID_DIGITS = 9
COMPRESSED, TAG_BYTES, MAT_HEADER_BYTES = 15, 8, 128
"""Of MATLAB's files, version 5: a kind of element, its head, and that of the file."""
MAX_UNPACKED_BYTES = 64 << 20
"""The real one unpacks to some 4 MB."""


@dataclass(frozen=True)
class Devkit:
    wnids: tuple[str, ...]
    """Of the classes that have images, ascending: their places are the labels."""
    label_of_id: dict[int, int]
    """ILSVRC2012_ID -> label."""
    val_ids: tuple[int, ...]
    """ILSVRC2012_ID of validation image 1, 2, ..."""


def read_devkit(place: Place) -> Devkit:
    """`place`: ILSVRC2012_devkit_t12.tar.gz, or the folder it unpacks to. UserError when it is not that."""
    files = _read_files(place)
    wnid_of_id = _read_meta(files[META], f"{place.shown}: {META}")
    wnids = tuple(sorted(wnid_of_id.values()))
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    lines = files[GROUND_TRUTH].split()
    val_ids = tuple(int(line) for line in lines if line.isdigit() and len(line) <= MAX_ID_DIGITS)
    bad = next((number for number in val_ids if number not in wnid_of_id), None)
    if len(val_ids) != len(lines) or not val_ids or bad is not None:
        raise UserError(
            f"{place.shown}: {GROUND_TRUTH}: expected one ILSVRC2012_ID a line, found {bad or 'other text'}"
        )
    return Devkit(wnids, {number: label_of[wnid] for number, wnid in wnid_of_id.items()}, val_ids)


def _read_files(place: Place) -> dict[str, bytes]:
    kind = place.kind()
    if kind is None:
        raise UserError(f"{place.shown}: does not exist; name the devkit (ILSVRC2012_devkit_t12.tar.gz) with --devkit")
    if kind == "folder":
        return {name: read_small(place.child(name), MAX_UNPACKED_BYTES, "the devkit") for name in (GROUND_TRUTH, META)}
    try:
        with place.open() as file:
            return _unpack(file, place.shown)
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{place.shown}: cannot be unpacked: {error}; download it again") from None


def _unpack(file: BinaryIO, where: str) -> dict[str, bytes]:
    magic = file.read(2)
    file.seek(0)
    unpacking = gzip.GzipFile(fileobj=file) if magic == b"\x1f\x8b" else file
    data = unpacking.read(MAX_UNPACKED_BYTES + 1)
    if len(data) > MAX_UNPACKED_BYTES:
        raise UserError(f"{where}: unpacks to more than {MAX_UNPACKED_BYTES:,} bytes: this is not the devkit")
    found: dict[str, bytes] = {}
    for member in walk_tar(lambda start, length: data[start : start + length], 0, len(data), where):
        for wanted in (GROUND_TRUTH, META):
            if member.name == wanted or member.name.endswith("/" + wanted):
                if wanted in found:
                    raise UserError(f"{where}: holds {wanted} twice; expected ILSVRC2012_devkit_t12.tar.gz")
                found[wanted] = data[member.offset : member.offset + member.num_bytes]
    missing = [wanted for wanted in (GROUND_TRUTH, META) if wanted not in found]
    if missing:
        raise UserError(f"{where}: holds no {missing[0]}; expected ILSVRC2012_devkit_t12.tar.gz")
    return found


def _read_meta(data: bytes, where: str) -> dict[int, str]:
    """ILSVRC2012_ID -> wnid, of the synsets without children: the others have no images of their own."""
    import numpy as np
    from scipy.io import loadmat

    def column(name: str) -> list[object]:
        """A struct array, or a struct of arrays."""
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
