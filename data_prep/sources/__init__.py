"""The registry of sources: found by name, imported only when used. `base.py` says how to add one."""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from typing import NamedTuple

from data_prep.errors import UserError
from data_prep.shown import shown
from data_prep.sources.base import NO_OPTIONS, Source, SourceOptions
from data_prep.sources.files.paths import without_credentials
from data_prep.sources.labels import CLASS_ORDERS, GIVEN
from data_prep.sources.splits import ANY_SPLIT, FOLDERS_ARE, SplitRequest

__all__ = ["SOURCES", "Source", "SourceOptions", "open_source", "require_known"]


class SourceKind(NamedTuple):
    where: str
    """Module and class."""
    needs: str = ""
    """What `--input` has to name; empty: the source takes no input."""
    takes: tuple[str, ...] = ()
    """Names of the `SourceOptions` that it understands."""


TABLE_OPTIONS = ("labels", "class_order", "image_column", "label_column")
FOLDER_OPTIONS = ("labels", "file_column", "label_column", "class_order", "folders_are")

SOURCES = {
    "cifar10": SourceKind("datasets.cifar:Cifar10", "cifar-10-python.tar.gz, or its folder"),
    "cifar100": SourceKind("datasets.cifar:Cifar100", "cifar-100-python.tar.gz, or its folder"),
    "digits": SourceKind("datasets.builtin:Digits"),
    "hf-parquet": SourceKind(
        "hf_parquet:HfParquet", "a folder of parquet files, one file, or a glob", takes=TABLE_OPTIONS
    ),
    "ilsvrc": SourceKind(
        "datasets.ilsvrc:Ilsvrc",
        "the folder that holds ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar",
        takes=("devkit",),
    ),
    "image-folder": SourceKind(
        "image_folder:ImageFolder", "the folder that holds one folder per class", takes=FOLDER_OPTIONS
    ),
    "kaggle": SourceKind(
        "datasets.kaggle:Kaggle", "the folder that holds LOC_synset_mapping.txt and ILSVRC/Data/CLS-LOC"
    ),
    "synthetic": SourceKind("datasets.builtin:Synthetic"),
    "webdataset": SourceKind(
        "webdataset:WebDataset", "a folder of tars, a glob, or a pattern with braces", takes=TABLE_OPTIONS
    ),
}
"""Name for `--source` -> what it is."""

CHOICES = {"class_order": CLASS_ORDERS, "folders_are": FOLDERS_ARE}


def require_known(name: str) -> None:
    if name not in SOURCES:
        raise UserError(f"--source {name}: unknown; known sources: {', '.join(sorted(SOURCES))}")


def open_source(
    name: str,
    location: str | None = None,
    split: SplitRequest = ANY_SPLIT,
    options: SourceOptions = NO_OPTIONS,
) -> Source:
    """Opens a source for reading.

    >>> source = open_source("synthetic", "n=3,classes=2")
    >>> source.class_names, source[2].key, source[2].label
    (('class-0', 'class-1'), 'synthetic-0000002', 0)

    Args:
        location: `--input`, a local path or a URL that fsspec reads; None: not given.

    Raises:
        UserError: it cannot be found, read or understood, or does not take one of the options.
    """
    require_known(name)
    kind = SOURCES[name]
    _check_options(name, options)
    if location is None and kind.needs:
        raise UserError(f"--source {name} needs --input: {kind.needs}")
    module, _, attribute = kind.where.partition(":")
    source_class: type[Source] = getattr(import_module(f"{__name__}.{module}"), attribute)
    try:
        return source_class.open(location or "", split, options)
    except OSError as error:
        where = error.filename or without_credentials(location or name)
        reason = (error.strerror or str(error)).removeprefix(f"{where}: ")  # errors of URLs begin with them
        raise UserError(f"{where}: cannot be read: {reason}") from None


def _check_options(name: str, options: SourceOptions) -> None:
    for option, value in asdict(options).items():
        if value is None:
            continue
        flag = f"--{option.replace('_', '-')}"
        if option not in SOURCES[name].takes:
            takers = ", ".join(other for other, kind in SOURCES.items() if option in kind.takes)
            raise UserError(f"{flag}: --source {name} does not take it; it belongs to {takers}")
        known = CHOICES.get(option, (value,))
        if value not in known and (option, value) != ("class_order", GIVEN):
            raise UserError(f"{flag} {shown(value)}: expected one of {', '.join(known)}")
