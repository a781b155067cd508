"""Which code ran: git's commit and the changes since, without secrets and of limited size."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from resnet_dist.code_version import CodeVersion, library_versions, read_code_version, shortened


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One commit with some files of one line."""
    git(tmp_path, "init", "-q")
    for name in (".env", "plain.txt", "p.yaml", "latin.txt"):
        (tmp_path / name).write_text("one\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_the_code_version_is_gits(repository: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    assert read_code_version(repository) == CodeVersion(commit, dirty=False, diff="")
    (repository / "plain.txt").write_text("two\n")
    (repository / "b.txt").write_text("new\n")
    changed = read_code_version(repository)
    assert changed is not None
    assert (changed.commit, changed.dirty) == (commit, True)
    assert "untracked: b.txt" in changed.diff
    assert "-one\n+two" in changed.diff


def test_a_folder_without_git_has_no_code_version(tmp_path: Path) -> None:
    assert read_code_version(tmp_path) is None


def test_secrets_are_not_in_the_changes(repository: Path) -> None:
    (repository / ".env").write_text("WORD=hunter1\n")
    (repository / "server.key").write_text("hunter2\n")
    (repository / "p.yaml").write_text("tracking_uri: http://me:hunter3@mlflow:5000\nenv: {GITHUB_PAT: hunter4}\n")
    (repository / "latin.txt").write_bytes("fünf\n".encode("latin-1"))
    git(repository, "mv", "plain.txt", "my_secret.txt")
    git(repository, "add", ".env", "server.key")
    changed = read_code_version(repository)
    assert changed is not None
    assert "hunter" not in changed.diff
    assert "+tracking_uri: http://***@mlflow:5000\n+env: {GITHUB_PAT: ***}" in changed.diff
    assert [line for line in changed.diff.splitlines() if line.startswith("left out by its name: ")] == [
        f"left out by its name: {name}" for name in (".env", "my_secret.txt", "server.key")
    ]


def test_a_change_of_any_size_is_cut_with_a_note(repository: Path) -> None:
    (repository / "plain.txt").write_text("more and more\n" * 1_000_000)
    changed = read_code_version(repository)
    assert changed is not None
    assert len(changed.diff) < 300_000
    assert shortened("abc", 3) == "abc"
    assert shortened("äbc", 3) == "äb\n... cut here: 1 more bytes\n"


def test_versions_name_what_makes_the_numbers() -> None:
    assert {"python", "torch", "ray", "numpy", "mlflow", "ffcv"} <= set(library_versions())
