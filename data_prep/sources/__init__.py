"""Where images come from: one small class per kind of storage, found by name and imported only when asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import import_module
from typing import NamedTuple

from data_prep.errors import UserError
from data_prep.sources.base import Source, SourceClass
from data_prep.sources.splits import SplitRequest


class SourceKind(NamedTuple):
    where: str
    """Module and class."""
    takes: tuple[str, ...] = ()
    """Names of `SourceOptions` that it understands."""


TABLE_OPTIONS = ("labels", "class_order", "image_column", "label_column")

SOURCES = {
    "cifar10": SourceKind("data_prep.sources.cifar:Cifar10"),
    "cifar100": SourceKind("data_prep.sources.cifar:Cifar100"),
    "digits": SourceKind("data_prep.sources.builtin:Digits"),
    "hf-parquet": SourceKind("data_prep.sources.hf_parquet:HfParquet", TABLE_OPTIONS),
    "ilsvrc": SourceKind("data_prep.sources.ilsvrc:Ilsvrc", ("devkit",)),
    "image-folder": SourceKind(
        "data_prep.sources.image_folder:ImageFolder",
        ("labels", "file_column", "label_column", "class_order", "folders_are"),
    ),
    "kaggle": SourceKind("data_prep.sources.kaggle:Kaggle"),
    "synthetic": SourceKind("data_prep.sources.builtin:Synthetic"),
    "webdataset": SourceKind("data_prep.sources.webdataset:WebDataset", TABLE_OPTIONS),
}
"""`--source` name -> where it is."""


@dataclass(frozen=True)
class SourceOptions:
    """What only some sources understand; None: not given."""

    labels: str | None = None
    """image-folder: a file with the class of every image. hf-parquet, webdataset: one with the class names in label
    order."""
    devkit: str | None = None
    """ilsvrc: ILSVRC2012_devkit_t12.tar.gz, where it does not lie beside the images."""
    class_order: str | None = None
    """`text` or `number`, see `class_order.order_classes`; of labels that are texts in tables and shards, too."""
    image_column: str | None = None
    """hf-parquet: the column of images. webdataset: the ending of their files."""
    label_column: str | None = None
    """hf-parquet: the column of labels. webdataset: the ending of their files, or their key in the `.json`.
    image-folder: the column of `labels` with the classes, by title or number from 1."""
    file_column: str | None = None
    """image-folder: the same of the files."""
    folders_are: str | None = None
    """image-folder: `classes` or `splits`, where that is not clear."""


def require_known(name: str) -> None:
    if name not in SOURCES:
        raise UserError(f"--source {name}: unknown; known sources: {', '.join(sorted(SOURCES))}")


def open_source(
    name: str,
    location: str | None,
    split: SplitRequest,
    options: SourceOptions = SourceOptions(),  # frozen
) -> Source:
    """Opens a source for reading. `location` is `--input`: a local path or a URL that fsspec reads.

    UserError when it cannot be found or understood.
    """
    require_known(name)
    kind = SOURCES[name]
    given = {option: value for option, value in asdict(options).items() if value is not None}
    for option in given:
        if option not in kind.takes:
            takers = ", ".join(other for other, its in SOURCES.items() if option in its.takes)
            raise UserError(f"--{option.replace('_', '-')}: --source {name} takes none; it belongs to {takers}")
    module, _, attribute = kind.where.partition(":")
    source_class: SourceClass = getattr(import_module(module), attribute)
    return source_class.open(location, split, **given)
