"""Where images come from: one small class per kind of storage, found by name and imported only when asked for."""

from __future__ import annotations

from importlib import import_module

from data_prep.errors import UserError
from data_prep.sources.base import Source, SourceClass
from data_prep.sources.splits import SplitRequest

SOURCES = {
    "digits": "data_prep.sources.digits:Digits",
    "hf-parquet": "data_prep.sources.hf_parquet:HfParquet",
    "image-folder": "data_prep.sources.image_folder:ImageFolder",
    "synthetic": "data_prep.sources.synthetic:Synthetic",
}
"""`--source` name -> module and class."""


def open_source(name: str, location: str | None, split: SplitRequest) -> Source:
    """Opens a source for reading. `location` is `--input`. UserError when it cannot be found or understood."""
    if name not in SOURCES:
        raise UserError(f"--source {name}: unknown; known sources: {', '.join(sorted(SOURCES))}")
    if location is not None and "://" in location:
        raise UserError(f"--input {location}: only local paths can be read; copy or mount the data first")
    module, _, attribute = SOURCES[name].partition(":")
    source_class: SourceClass = getattr(import_module(module), attribute)
    return source_class.open(location, split)
