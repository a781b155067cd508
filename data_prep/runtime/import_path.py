"""Puts the current folder last on Python's import path; no folder on PYTHONPATH may hide other modules.

Otherwise a file `random.py` or a folder `yaml/` in the current folder would be imported instead of the real one, here
or in Ray's workers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence

PACKAGES = ("data_prep", "resnet_dist")
CODE_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120 - pathlib may be hidden
"""The folder of both packages: a checkout, the upload of a job, or where packages are installed."""


def begin(command: str) -> None:
    """Corrects `sys.path`; ends the process with exit code 2 if a folder of PYTHONPATH hides other modules. Call it
    before any other import, since their modules may be hidden too.
    """
    look_here_last()
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    folders = dict.fromkeys(entry.strip() for entry in given if entry.strip())
    mistakes = [line for folder in folders if (line := hiding_mistake(folder, list(hiding(folder, sys.path))))]
    if mistakes and "--help" not in sys.argv:
        print(f"{command}: {'; '.join(mistakes)}", file=sys.stderr)
        sys.exit(2)


def hiding_mistake(folder: str, names: Sequence[str]) -> str:
    """A message about `names` in `folder`, which hide other modules; "" if there are none."""
    if not names:
        return ""
    others = f" (as {', '.join(names[1:4])}{' and more' if len(names) > 4 else ''})" if names[1:] else ""
    return (
        f"{folder}/{names[0]}: hides the module of that name that is needed{others}, because PYTHONPATH or this "
        "project's code leads there; rename or move it"
    )


def look_here_last() -> None:
    """Moves the current folder and that of our code to the end of `sys.path`; our packages stay what they are."""
    for package in PACKAGES:
        try:
            __import__(package)
        except ImportError:  # data preparation may be installed alone
            continue
    try:
        here = os.getcwd()  # noqa: PTH109
    except OSError:  # removed meanwhile: nothing can be imported from there
        here = ""
    sys.path[:] = behind(sys.path, (here, CODE_ROOT))


def behind(path: Sequence[str], folders: Sequence[str]) -> list[str]:
    """`path` with `folders` last, except those with installed packages. Pure."""
    moved = {"", *folders}
    last = [entry for entry in path if entry in moved and not is_for_packages(entry)]
    return [*(entry for entry in path if entry not in last), *last]


def is_for_packages(folder: str) -> bool:
    """Whether it holds installed packages, by its name."""
    return folder.rstrip("/").rpartition("/")[2] in ("site-packages", "dist-packages")


def hiding(folder: str, path: Sequence[str]) -> Iterator[str]:
    """The names of files and folders in `folder` that hide a module of Python's or one that `path` leads to.

    `folder` comes before `path`. Other projects' usual names for tests and tools hide nothing that is needed.
    """
    from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

    if not os.path.isdir(folder) or os.path.samefile(folder, os.path.dirname(os.__file__)):  # noqa: PTH112, PTH120, PTH121
        return  # missing, or Python's own modules
    others = [entry for entry in path if entry not in ("", folder)]
    names = sorted(os.listdir(folder))  # noqa: PTH208
    holds_packages = is_for_packages(folder) or any(name.endswith(".dist-info") for name in names)
    for name in names:
        module = _module(folder, name)
        if module is None or module in _UNUSED or module.lstrip("_").startswith(PACKAGES):
            continue
        if BuiltinImporter.find_spec(module) or FrozenImporter.find_spec(module):
            continue  # Python has it before it looks anywhere
        installed = None if holds_packages else PathFinder.find_spec(module, others)
        if module in sys.stdlib_module_names or (installed is not None and installed.origin):
            yield name


_UNUSED = {
    *("antigravity", "benchmark", "benchmarks", "build", "conftest", "doc", "docs", "ensurepip", "example", "examples"),
    *("idlelib", "lib2to3", "pydoc_data", "scripts", "setup", "src", "test", "tests", "this", "tools", "turtle"),
    *("turtledemo", "venv"),
}
"""Common names of modules, none of which is needed here."""


def _module(folder: str, name: str) -> str | None:
    """The name by which Python would import this file or folder."""
    from importlib.machinery import all_suffixes

    if os.path.isfile(os.path.join(folder, name, "__init__.py")):  # noqa: PTH113, PTH118
        return name
    stems = [name.removesuffix(suffix) for suffix in all_suffixes() if name.endswith(suffix)]
    stem = min(stems, key=len, default="")
    return stem if stem.isidentifier() else None
