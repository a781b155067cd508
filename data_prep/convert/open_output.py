"""The output that a location means."""

from __future__ import annotations

from pathlib import Path

from data_prep.convert.file_output import FileOutput, machine
from data_prep.convert.output import BETON, Output
from data_prep.errors import UserError
from data_prep.sources.files.places import IS_URL


def open_output(location: Path | str) -> Output:
    """UserError when the name does not end in .beton, or it lies where nothing can be written."""
    if not str(location).endswith(BETON):
        raise UserError(f"--output {location}: expected a name that ends in {BETON}")
    if IS_URL.match(str(location)):
        from data_prep.convert.object_output import ObjectOutput  # brings fsspec

        return ObjectOutput(str(location))
    return FileOutput(Path(location), machine())
