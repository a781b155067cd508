"""A beton back into class folders. JPEGs are written byte for byte as they are stored, raw pixels as PNG."""

from __future__ import annotations

import io
import os
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_prep.beton.edit import CheckedChunks
from data_prep.beton.files import remove_folder, require_space
from data_prep.beton.layout import MODE_JPEG
from data_prep.beton.samples import Samples, pixels_of
from data_prep.errors import Fault, UserError
from data_prep.sources.file_source import SUFFIXES

MAX_NAME_BYTES = 200
"""Of a folder or file; file systems take 255."""
_ARCHIVE = re.compile(r"\.(tar|tgz|tar\.gz)$", re.IGNORECASE)


@dataclass(frozen=True)
class ExtractReport:
    folder: Path
    num_original: int
    """Files with the bytes of the source's file."""
    num_jpeg: int
    """Other JPEGs: encoded by `convert`, or it is not known whether they were."""
    num_png: int
    """Images that are stored as pixels."""
    renamed: dict[str, str]
    """Class names that cannot be the names of folders, and the folders."""
    is_sorted: bool
    """Whether `convert --source image-folder` gives the classes the same labels without `--classes`."""


def extract(
    beton: str | Path, folder: str | Path, on_written: Callable[[int, int], None] = lambda *_: None
) -> ExtractReport:
    """Writes every sample of a beton as a file `folder/<class>/<name>`.

    A name is that of the source's file, also in folders below the class, where the paths file has it; otherwise the
    sample's index. The stored bytes are compared with the manifest first.

    Args:
        folder: must not exist, or be empty. It gets its name when it is complete.
        on_written: called with the bytes written so far and in all; may raise to stop.

    Raises:
        UserError: the beton is not complete, or `folder` has files.
        Fault: the beton is damaged, or the disk is full.
    """
    samples, folder = Samples(Path(beton)), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output {folder}: exists and is not an empty folder; choose another name")
    unfinished = folder.with_name(folder.name + ".unfinished")
    class_folders = folder_names(samples.manifest.class_names)
    total = int(samples.reader.sizes.sum())
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        require_space(unfinished, total)
        try:
            unfinished.mkdir()
        except FileExistsError:
            raise UserError(
                f"{unfinished}: exists: another data-prep is writing it, or was killed; in that case remove it"
            ) from None
        try:
            counts = _write_all(samples, unfinished, class_folders, total, on_written)
            os.sync()  # so that after a power cut the folder has all of its files
            unfinished.replace(folder)
        finally:
            remove_folder(unfinished)
    except OSError as error:
        raise Fault(f"{error.filename or folder}: cannot be written: {error.strerror or error}") from None
    names = samples.manifest.class_names
    renamed = {name: made for name, made in zip(names, class_folders, strict=True) if name != made}
    return ExtractReport(folder, *counts, renamed, class_folders == sorted(class_folders))


def _write_all(
    samples: Samples, root: Path, class_folders: list[str], total: int, on_written: Callable[[int, int], None]
) -> tuple[int, int, int]:
    from PIL import Image

    reader, class_names, digits = samples.reader, samples.manifest.class_names, len(str(len(samples) - 1))
    checked, taken, done = CheckedChunks(reader), set[str](), 0
    num_original = num_jpeg = num_png = 0
    for name in class_folders:
        (root / name).mkdir()
    for index in range(len(samples)):
        start, num_bytes, label = int(reader.pointers[index]), int(reader.sizes[index]), reader.label(index)
        checked.require(start, start + num_bytes)
        if reader.mode(index) == MODE_JPEG:
            data, end, is_original = reader.image_bytes(index), ".jpg", samples.is_original(index)
            # The source's own file keeps its name, right or wrong.
            ends: tuple[str, ...] = (".jpg", ".jpeg") if is_original is False else SUFFIXES
            num_original, num_jpeg = num_original + (is_original is True), num_jpeg + (is_original is not True)
        else:
            file = io.BytesIO()
            Image.fromarray(pixels_of(reader, index)).save(file, "PNG")
            data, end, ends, num_png = file.getbuffer(), ".png", (".png",), num_png + 1
        below = _below_class(samples.path(index), class_names[label]) or f"{index:0{digits}d}{end}"
        below += "" if below.lower().endswith(ends) else end
        path = f"{class_folders[label]}/{below}"
        if _folded(path) in taken:
            stem, _, end = path.rpartition(".")
            path = f"{stem} ({index}).{end}"
        taken.add(_folded(path))
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        with (root / path).open("xb") as opened:
            opened.write(data)
        done += num_bytes
        on_written(done, total)
    return num_original, num_jpeg, num_png


def folder_names(class_names: tuple[str, ...]) -> list[str]:
    """A folder for each class: its name, as far as that is a safe and different one on any file system."""
    folders: list[str] = []
    taken: set[str] = set()
    for label, name in enumerate(class_names):
        folder = _safe(name)
        if folder is None or _folded(folder) in taken:
            folder = f"{_safe(name[:40]) or 'class'} ({label})"
        while _folded(folder) in taken:  # a class has that very name
            folder += "_"
        taken.add(_folded(folder))
        folders.append(folder)
    return folders


def _folded(name: str) -> str:
    """Equal for names that some file systems do not tell apart."""
    return unicodedata.normalize("NFC", name).casefold()


def _safe(name: str) -> str | None:
    """A name for a file or folder, with unsafe characters as `%2F`, and a dot at the beginning too: it would be hidden.
    None if it would be too long."""
    escaped = "".join(
        c if c.isprintable() and c not in "/\\" and not (c == "." and place == 0) else _percent(c)
        for place, c in enumerate(name)
    )
    return escaped if escaped and len(escaped.encode()) <= MAX_NAME_BYTES else None


def _percent(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", errors="surrogateescape"))


def _below_class(path: str, class_name: str) -> str | None:
    """The path below its class's folder; all of it where no folder has the class's name, but without archives. None if
    it is not the path of a file with a suffix, or not safe."""
    parts = [part for part in path.split("/") if not _ARCHIVE.search(part)]
    if class_name in parts[:-1]:
        parts = parts[parts.index(class_name) + 1 :]
    safe = [_safe(part) for part in parts]
    if not parts or not re.search(r"\.[A-Za-z0-9]{1,5}$", parts[-1]) or safe != parts or sum(map(len, parts)) > 1000:
        return None
    return "/".join(parts)
