"""Image data sets -> `.beton` files with manifests. Start with README.md; imports nothing of `resnet_dist`.

    convert(source, output, ...)     make a beton, or resume an interrupted conversion
    convert_splits(source, folder)   train.beton and val.beton of one source, divided by a `SplitRule`
    open_beton(path)                 labels, sizes and stored bytes, without ffcv
    verify(path, ...)                compare a beton with its manifest, and with its source
    subset(...), merge(...)          betons from betons, without encoding again
    extract(path, folder)            a beton back into class folders
    adopt(path, class_names)         a manifest for a beton that ffcv's own writer made
    stage(source, folder)            a complete local copy of a beton on shared or object storage

>>> import data_prep, tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     outcome = data_prep.convert("digits", f"{folder}/val.beton")
...     report = data_prep.verify(f"{folder}/val.beton")
...     beton = data_prep.open_beton(f"{folder}/val.beton")
>>> len(beton), beton.manifest.num_classes, report.ok
(355, 10, True)

`ConvertSettings` are the options for storing images, `BadPolicy` those for bad samples. Errors: `UserError` (a mistake
the caller can fix), `Fault` (something broke), both with one readable line. What is not named here is private.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.beton.edit import Selection, merge, subset
    from data_prep.beton.manifest import Manifest
    from data_prep.beton.reader import BetonReader, open_beton
    from data_prep.beton.stage import stage
    from data_prep.converter.adopt import adopt
    from data_prep.converter.convert import ConvertReport, convert
    from data_prep.converter.extract import ExtractReport, extract
    from data_prep.converter.settings import BadPolicy, ConvertSettings
    from data_prep.converter.split import SplitRule, convert_splits
    from data_prep.converter.verify import VerifyReport, verify
    from data_prep.errors import Fault, UserError
    from data_prep.sources import SourceOptions

__all__ = [
    "BadPolicy",
    "BetonReader",
    "ConvertReport",
    "ConvertSettings",
    "ExtractReport",
    "Fault",
    "Manifest",
    "Selection",
    "SourceOptions",
    "SplitRule",
    "UserError",
    "VerifyReport",
    "adopt",
    "convert",
    "convert_splits",
    "extract",
    "merge",
    "open_beton",
    "stage",
    "subset",
    "verify",
]
_MODULES = {
    "beton.edit": ("Selection", "merge", "subset"),
    "beton.manifest": ("Manifest",),
    "beton.reader": ("BetonReader", "open_beton"),
    "beton.stage": ("stage",),
    "converter.adopt": ("adopt",),
    "converter.convert": ("ConvertReport", "convert"),
    "converter.extract": ("ExtractReport", "extract"),
    "converter.settings": ("BadPolicy", "ConvertSettings"),
    "converter.split": ("SplitRule", "convert_splits"),
    "converter.verify": ("VerifyReport", "verify"),
    "errors": ("Fault", "UserError"),
    "sources": ("SourceOptions",),
}


def __getattr__(name: str) -> Any:
    """Imports the names above on first use: `import data_prep` alone imports neither numpy nor Pillow."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"data_prep.{module}"), name)
    raise AttributeError(f"module 'data_prep' has no attribute {name!r}")
