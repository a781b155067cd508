"""What `import data_prep` offers: documented, runnable, and light until it is used."""

from __future__ import annotations

import doctest
import subprocess
import sys
from importlib import import_module

import pytest

import data_prep

MODULES_WITH_EXAMPLES = (
    "data_prep.sources",
    "data_prep",
    "data_prep.beton.reader",
    "data_prep.converter.convert",
    "data_prep.converter.verify",
)


@pytest.mark.parametrize("name", data_prep.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    assert getattr(data_prep, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'convertt'"):
        data_prep.convertt  # noqa: B018


@pytest.mark.parametrize("module", MODULES_WITH_EXAMPLES)
def test_the_examples_in_docstrings_run(module: str) -> None:
    results = doctest.testmod(import_module(module))
    assert results.attempted > 0
    assert results.failed == 0


def test_importing_the_package_brings_no_library() -> None:
    code = "import sys, data_prep; print(sorted({'numpy', 'PIL', 'ray', 'typer', 'fsspec'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout == "[]\n"
