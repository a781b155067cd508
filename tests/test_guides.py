"""The guides under docs/: every command in them is accepted by the real command lines and uses files that exist."""

from __future__ import annotations

import base64
import json
import random
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer

import data_prep.cli
import resnet_dist.cli
from resnet_dist.config.loading import load_profile, load_recipe, load_space
from resnet_dist.tracking.models import model_note

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("[0-9]_*.md"))
LOADERS: dict[str, Callable[..., Any]] = {
    "recipes": load_recipe,
    "profiles": load_profile,
    "tune_spaces": load_space,
}
MADE_ON_THE_WAY = {"tune_spaces/search_2.yaml"}
OF_THE_SYSTEM = {
    "cd",
    "curl",
    "export",
    "for",
    "git",
    "ls",
    "printf",
    "source",
    "ssh",
    "docker",
    "kubectl",
    "sbatch",
    "kustomize",
}


def commands(page: Path) -> Iterator[str]:
    """The indented lines, joined where a line ends with a backslash; not those of code blocks in other languages."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    text = text.replace("\\\n    ", "")
    for line in text.splitlines():
        if line.startswith("    ") and line.strip():
            yield re.sub(r"^\(umask 077; (.*)\)$", r"\1", line.strip())


OWN_IMAGES = ROOT / "docs" / "your_own_images.md"
ALL = [(page, command) for page in (*PAGES, OWN_IMAGES) for command in commands(page)]


def named(commands: list[tuple[Path, str]]) -> Any:
    return pytest.mark.parametrize(
        "command", [c for _, c in commands], ids=[f"{p.stem[0]}: {c[:60]}" for p, c in commands]
    )


def command_line(program: str) -> Any:
    """The click command behind a program's name."""
    if program == "ray":
        from ray.scripts.scripts import cli

        return cli
    if program == "mlflow":
        from mlflow.cli import cli

        return cli
    app = {"resnet-dist": resnet_dist.cli.app, "data-prep": data_prep.cli.app}[program]
    return typer.main.get_command(app)


def parse(command: Any, name: str, words: list[str], parent: Any = None) -> None:
    """Parses `words` as the program would, down to the last subcommand, and runs nothing. Raises click's UsageError."""
    context = command.make_context(name, words, parent=parent)
    rest = [*context._protected_args, *context.args] if hasattr(command, "commands") else []
    if rest:
        sub_name, sub_command, sub_words = command.resolve_command(context, rest)
        parse(sub_command, sub_name, sub_words, context)


def words_of(command: str) -> list[str]:
    """Without variables set in front."""
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    return words


def test_there_are_five_pages_that_link_each_other() -> None:
    assert [page.stem[0] for page in PAGES] == list("12345")
    for page in PAGES:
        links = set(re.findall(r"\]\((\d_\w+\.md)\)", page.read_text()))
        assert links == {other.name for other in PAGES}
        assert page.name in (ROOT / "README.md").read_text() or page.stem[0] != "1"


def test_every_line_is_a_command_of_a_known_program() -> None:
    ours = {"resnet-dist", "data-prep", "ray", "mlflow", "make"}
    for page, command in ALL:
        subprocess.run(["bash", "-n", "-c", command], check=True)
        program = words_of(command)[0]
        script = (ROOT / program).is_file() and "/" in program
        assert script or program in ours | OF_THE_SYSTEM, f"{page.name}: {command}"


@named([(p, c) for p, c in ALL if words_of(c)[0] in ("resnet-dist", "data-prep", "ray", "mlflow")])
def test_the_program_takes_it(command: str) -> None:
    program, *words = words_of(command)
    parse(command_line(program), program, words)


class Echo(BaseHTTPRequestHandler):
    """Answers with what was posted."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Not to the tests' output."""


SERVING = [
    *(
        text
        for page in (ROOT / "README.md", *PAGES, OWN_IMAGES)
        for text in re.findall(r"^    (printf .*?invocations.*?)$", page.read_text().replace("\\\n", ""), re.MULTILINE)
    ),
    model_note("models:/m-1", "run", 1).replace("\\\n", "").splitlines()[-1].strip(),
]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("shell", ["bash", "sh"])
@pytest.mark.parametrize("command", SERVING)
def test_the_command_that_asks_a_served_model_takes_large_pictures(tmp_path: Path, command: str, shell: str) -> None:
    """An argument of a program ends at 128 KiB."""
    picture = random.Random(0).randbytes(3_000_000)
    (tmp_path / "x").write_bytes(picture)
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = re.sub(r"PICTURE(\.\w+)?", "x", command).replace("localhost:5001", f"127.0.0.1:{server.server_port}")
        done = subprocess.run([shell, "-c", here], cwd=tmp_path, capture_output=True, timeout=60, check=True)
        server.shutdown()
    (sent,) = json.loads(done.stdout)["inputs"]["image"]
    assert base64.b64decode(sent, validate=True) == picture


def test_a_wrong_option_would_be_found() -> None:
    with pytest.raises(Exception, match="--workers"):
        parse(command_line("resnet-dist"), "resnet-dist", ["train", "r.yaml", "--on", "p.yaml", "--workers", "3"])


def test_files_and_targets_that_commands_name_are_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page, command in ALL:
        words = words_of(command)
        if words[0] == "make":
            assert set(words[1:]) <= targets, f"{page.name}: {command}"
        for word in words:
            if re.match(r"(resnet_dist|cluster|tune_spaces|tests|docs)/", word) and word not in MADE_ON_THE_WAY:
                assert (ROOT / word).exists(), f"{page.name}: {word}"


def test_recipes_profiles_and_overrides_are_valid() -> None:
    num_loaded = 0
    for _, command in ALL:
        words = words_of(command)
        overrides = [value for option, value in pairwise(words) if option == "--set"]
        for word in words:
            folder = Path(word).parent.name
            if folder in LOADERS and word.endswith(".yaml") and word not in MADE_ON_THE_WAY:
                LOADERS[folder](ROOT / word, overrides if folder != "profiles" else [])
                num_loaded += 1
    assert num_loaded > 10


@named([(p, c) for p, c in ALL if c.startswith("resnet-dist submit") and "--dry-run" in c])
def test_dry_runs_of_submit_print_the_job(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    command_line("resnet-dist").main(words_of(command)[1:], standalone_mode=False)
    assert "ray job submit --address http://" in capsys.readouterr().out


def folders_of(package: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", package], cwd=ROOT, check=True, capture_output=True, text=True)
    files = (Path(file).relative_to(package) for file in listed.stdout.splitlines())
    return {file.parts[0] for file in files if len(file.parts) > 1} - {"native", "results"}


@pytest.mark.parametrize("package", ["data_prep", "resnet_dist"])
def test_the_readme_tree_names_every_folder_of_a_package(package: str) -> None:
    tree = (ROOT / "README.md").read_text().partition("## The tree")[2]
    section = re.search(rf"^    {package}/ .*\n((?:      .*\n)*)", tree, re.MULTILINE)
    assert section
    assert set(re.findall(r"^      (\w+)/ ", section[1], re.MULTILINE)) == folders_of(package)


def test_the_package_readme_names_every_folder() -> None:
    table = (ROOT / "resnet_dist" / "README.md").read_text().partition("## Folders")[2]
    assert set(re.findall(r"^\| `(\w+)/` ", table, re.MULTILINE)) == folders_of("resnet_dist")


NAMED_FILE = re.compile(r"`([\w.-]+(?:/[\w.*-]+)*\.(?:py|md|sh))`")


@pytest.mark.parametrize("place", ["README.md", "SECURITY.md", "docs", "cluster", "tests", "data_prep", "resnet_dist"])
def test_files_that_are_named_exist(place: str) -> None:
    """Named in a document or docstring by a path, or the end of one. Results keep the names of their time."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True)
    files = listed.stdout.splitlines()
    missing = [
        f"{file} names {name}"
        for file in files
        if file.startswith(place) and file.endswith((".md", ".py")) and "/results/" not in file
        for name in NAMED_FILE.findall((ROOT / file).read_text(encoding="utf-8"))
        if not any(fnmatch(other, f"*{name.removeprefix('../')}") for other in files)
    ]
    assert missing == []
