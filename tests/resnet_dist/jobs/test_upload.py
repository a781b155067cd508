"""Which files `submit` sends."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from resnet_dist.errors import UserError
from resnet_dist.jobs.upload import _require_fits, read_upload


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A git checkout with one of each: tracked, ignored, untracked, secret, left out by its name."""
    folder = tmp_path / "repo"
    files = {
        ".gitignore": "*.bin\nrecipes/forced.yaml\n",
        "code/a.py": "1\n",
        "resnet_dist/data/r.yaml": "",  # only the folder `data` at the top is left out
        "recipes/r.yaml": "x: 1\n",
        "recipes/forced.yaml": "x: 1\n",
        "keys/server.pem": "secret\n",
        "runs/r.yaml": "",
    }
    write(folder, files)
    mine = ["-c", "user.name=n", "-c", "user.email=e@e", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "-f", *files], [*mine, "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", str(folder), *words], check=True)
    untracked = ["recipes/it's [new]!.yaml", "new.bin", "notes/todo.txt", "code/b.py", "code/__pycache__/a.pyc", ".env"]
    write(folder, dict.fromkeys(untracked, "x"))
    return folder


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_only_tracked_files_are_sent_and_the_rest_is_reported(folder: Path) -> None:
    upload = read_upload(folder)
    sent = {".gitignore": 26, "code/a.py": 2, "recipes/r.yaml": 5, "resnet_dist/data/r.yaml": 0}
    assert upload.files == sent
    assert upload.warnings() == [
        "not sent, because git does not track it: code/b.py, notes/, recipes/it's [new]!.yaml",
        "not sent (named as secrets are): keys/server.pem",
    ]
    assert upload.require_sent(folder / "recipes/r.yaml") == "recipes/r.yaml"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("recipes/it's [new]!.yaml", r"git does not track it; `git add "),
        ("new.bin", r"git does not track it"),
        ("recipes/forced.yaml", r"\.gitignore"),
        ("keys/server.pem", r"its name is a secret's"),
        (".env", r"its name is a secret's"),
        ("runs/r.yaml", r"`submit` leaves it out; copy it elsewhere"),
        ("none.yaml", r"does not exist"),
        ("../outside.yaml", r"is outside .*; move it there, or give --working-dir"),
    ],
)
def test_a_file_that_the_job_needs_and_is_not_sent_is_refused(folder: Path, name: str, why: str) -> None:
    (folder.parent / "outside.yaml").touch()
    with pytest.raises(UserError, match=why):
        read_upload(folder).require_sent(folder / name)


def test_too_many_untracked_files_are_reported(folder: Path) -> None:
    write(folder, {f"code/{number}.jpg": "" for number in range(2001)})
    with pytest.raises(UserError, match=r"2,00\d files that git does not track are beside .* and 2,00\d more; move"):
        read_upload(folder)


def test_without_git_all_but_secrets_and_data_are_sent(folder: Path) -> None:
    shutil.rmtree(folder / ".git")
    tracked = {".gitignore", "code/a.py", "recipes/r.yaml", "resnet_dist/data/r.yaml"}
    upload = read_upload(folder)
    assert upload.files.keys() == {*tracked, "code/b.py", "notes/todo.txt", "recipes/it's [new]!.yaml"}
    assert upload.warnings() == []


def test_files_too_large_for_a_head_even_when_packed_are_refused(tmp_path: Path) -> None:
    files = {"zeros": 5_000_000, "noise": 3_000_000}
    (tmp_path / "zeros").write_bytes(bytes(5_000_000))
    (tmp_path / "noise").write_bytes(random.Random(0).randbytes(3_000_000))
    _require_fits(tmp_path, files, limit_bytes=8_000_000)
    _require_fits(tmp_path, files, limit_bytes=3_100_000)
    with pytest.raises(UserError, match="the upload is 8 MB, and a head takes 3 MB; the largest: zeros 5 MB, noise 3"):
        _require_fits(tmp_path, files, limit_bytes=2_900_000)
