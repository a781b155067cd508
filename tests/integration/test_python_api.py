"""The public functions, as docs/python.md and the packages' docstrings use them."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

import data_prep
import resnet_dist

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("package", [data_prep, resnet_dist], ids=lambda package: package.__name__)
def test_every_public_name_is_there_and_explained(package: object) -> None:
    for name in package.__all__:  # type: ignore[attr-defined]
        assert getattr(package, name).__doc__, name


def test_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("resnet_dist", "cluster"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    assert (
        doctest.testfile(str(ROOT / "docs" / "python.md"), module_relative=False, optionflags=doctest.ELLIPSIS).failed
        == 0
    )


def test_examples_of_the_docstrings_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for package in (data_prep, resnet_dist):
        found = doctest.testmod(package)
        assert found.attempted > 0
        assert found.failed == 0
