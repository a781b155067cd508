"""What `import data_prep` and `import resnet_dist` offer: documented, light until used, with examples that run."""

from __future__ import annotations

import doctest
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import data_prep
import resnet_dist

ROOT = Path(__file__).parents[1]
PACKAGES = pytest.mark.parametrize("package", [data_prep, resnet_dist], ids=["data_prep", "resnet_dist"])
WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in ("data_prep", "resnet_dist")
    for path in (ROOT / package).rglob("*.py")
    if "\n>>> " in path.read_text(encoding="utf-8").replace("\n    >>>", "\n>>>")
)


@PACKAGES
def test_every_name_is_there_and_documented(package: ModuleType) -> None:
    for name in package.__all__:
        assert getattr(package, name).__doc__, name


@PACKAGES
def test_an_unknown_name_is_an_attribute_error(package: ModuleType) -> None:
    with pytest.raises(AttributeError, match="no attribute 'convertt'"):
        package.convertt  # noqa: B018


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_the_examples_in_docstrings_run(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    results = doctest.testmod(import_module(module))
    assert results.attempted > 0
    assert results.failed == 0


@PACKAGES
def test_importing_a_package_loads_no_library(package: ModuleType) -> None:
    libraries = {"numpy", "PIL", "ray", "torch", "mlflow", "typer", "fsspec"}
    code = f"import sys, {package.__name__}; print(sorted({libraries} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout == "[]\n"
