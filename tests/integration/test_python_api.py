"""The page about Python: its code runs from top to bottom, on a Ray of this machine."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_code_on_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("resnet_dist", "cluster"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    page = str(ROOT / "docs" / "python.md")
    assert doctest.testfile(page, module_relative=False, optionflags=doctest.ELLIPSIS).failed == 0
