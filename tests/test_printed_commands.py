"""Commands in messages can be run as printed: each is passed to the parser of its command line."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import data_prep.cli
import resnet_dist.cli

ROOT = Path(__file__).parents[1]
APPS = {"data-prep": data_prep.cli.app, "resnet-dist": resnet_dist.cli.app}
QUOTED = re.compile(r"`((?:data-prep|resnet-dist) [^`]*)`")
ON_A_LINE = re.compile(r"^(?:next)? {2,}((?:data-prep|resnet-dist) [^\n`]*)$", re.MULTILINE)
VALUE = "1"
"""In place of what is filled in: a name, a path and a number."""


def texts(path: Path) -> list[str]:
    """The strings of a module, put together as they are printed; not what only explains the code."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    parts = {id(value) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for value in node.values}
    found = []
    for node in ast.walk(tree):
        if id(node) in docs or id(node) in parts:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            found.append("".join(v.value if isinstance(v, ast.Constant) else VALUE for v in node.values))  # type: ignore[misc]
    return found


def commands() -> list[str]:
    files = [path for package in ("data_prep", "resnet_dist") for path in sorted((ROOT / package).rglob("*.py"))]
    return sorted({line for file in files for text in texts(file) for line in in_text(text)})


def in_text(text: str) -> list[str]:
    return [match[1].strip() for pattern in (QUOTED, ON_A_LINE) for match in pattern.finditer(text)]


def parse(line: str) -> None:
    """Raises what the command line would, without running anything."""
    program, *words = shlex.split(line)
    command: Any = typer.main.get_command(APPS[program])
    context = None
    while hasattr(command, "commands"):
        context = context or command.make_context(program, list(words), resilient_parsing=True)
        if words[0] not in command.commands:  # `tune SPACE.yaml` is `tune run SPACE.yaml`
            words = ["run", *words]
        command, words = command.commands[words[0]], words[1:]
    if words != ["--help"]:
        command.make_context(program, list(words))


def test_commands_are_found_and_wrong_ones_are_reported() -> None:
    assert len(commands()) > 10
    for line in (
        "data-prep convert --output a.beton",
        "resnet-dist trains",
        "data-prep verify",
        "resnet-dist train --x 1",
    ):
        with pytest.raises((typer.TyperException, KeyError)):
            parse(line)


@pytest.mark.parametrize("line", commands())
def test_a_printed_command_can_be_run(line: str) -> None:
    parse(line)
