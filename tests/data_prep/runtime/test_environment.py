"""How a command corrects its environment before anything else reads it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.runtime.environment import (
    Corrected,
    Machine,
    blamed,
    cleaned,
    cluster_address,
    correct_environment,
    corrected,
    private_folder,
    unusable,
    without_proxy,
)
from data_prep.runtime.exit_codes import ending
from data_prep.runtime.import_path import CODE_ROOT, behind, hiding

SAFE = {"PYTHONSAFEPATH": "1"}


def correct(environment: dict[str, str], **machine: Any) -> Corrected:
    defaults = {"folder": "/work", "home": "/root", "has_user_name": True, "encoding": "utf-8"}
    return corrected({"HOME": "/", **SAFE, **environment}, Machine(**{**defaults, **machine}))


def changes(environment: dict[str, str], **machine: Any) -> dict[str, str | None]:
    """Variables that are set, and None for those that are unset."""
    found = correct(environment, **machine)
    assert found.mistakes == []
    before, after = {"HOME": "/", **SAFE, **environment}, found.environment
    return {key: after.get(key) for key in before | after if before.get(key) != after.get(key)}


def mistake(environment: dict[str, str], **machine: Any) -> str:
    (line,) = correct(environment, **machine).mistakes
    return line


@pytest.mark.parametrize(
    ("given_value", "meant"),
    [
        (None, None),
        ("", None),
        ("  ", None),
        ("''", None),
        ("local", None),
        ("LOCAL", None),
        ("auto", "auto"),
        ("head", "head:6379"),
        ("head:6380", "head:6380"),
        (' "head:6380/" \n', "head:6380"),
        ("10.0.0.1", "10.0.0.1:6379"),
        ("[::1]:6380", "[::1]:6380"),
        ("::1", "[::1]:6379"),
        ("fe80::1%eth0", "[fe80::1%eth0]:6379"),
        ("ray://head", "ray://head:10001"),
        ("ray://head:1/", "ray://head:1"),
        ("my_head-1.local:6379", "my_head-1.local:6379"),
    ],
)
def test_what_a_ray_address_means(given_value: str | None, meant: str | None) -> None:
    assert cluster_address(given_value, "RAY_ADDRESS") == meant
    assert cluster_address(meant, "RAY_ADDRESS") == meant


@pytest.mark.parametrize(
    ("given_value", "told"),
    [
        ("http://head:8265", r"RAY_ADDRESS=http://head:8265: is a dashboard, .* give head:6379"),
        ("HTTPS://head", r"is a dashboard, .* give head:6379"),
        ("redis://head:6379", r"is not the address of a Ray cluster; give HEAD:6379, auto or local"),
        ("head:port", r"is not the address"),
        ("head:0", r"is not the address"),
        ("head:70000", r"is not the address"),
        ("head 6379", r"is not the address"),
        ("me:pw@head:6379", r"is not the address"),
        ("[::1", r"is not the address"),
        (":6379", r"is not the address"),
        ("[::1]6379", r"is not the address"),
    ],
)
def test_invalid_ray_addresses(given_value: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        cluster_address(given_value, "RAY_ADDRESS")


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_is_an_address_or_refused_by_name(text: str) -> None:
    try:
        address = cluster_address(text, "RAY_ADDRESS")
    except UserError:
        return
    assert address in (None, "auto") or str(address).rpartition(":")[2].isascii()
    assert cluster_address(address, "RAY_ADDRESS") == address


def test_empty_and_quoted_variables_are_what_was_meant() -> None:
    assert cleaned(" \"'x'\" ") == "x"
    given_values = {
        "RAY_ADDRESS": "",
        "RAY_API_SERVER_ADDRESS": " 'http://h:1' ",
        "RAY_worker_niceness": " ",
        "OMP_NUM_THREADS": "",
        "TMPDIR": "",
        "PATH": "",
    }
    assert changes(given_values) == {
        "RAY_ADDRESS": None,
        "RAY_API_SERVER_ADDRESS": "http://h:1",
        "RAY_worker_niceness": None,
        "OMP_NUM_THREADS": None,
        "TMPDIR": None,
    }


def test_a_valid_environment_is_unchanged() -> None:
    assert (
        changes({"PATH": "/bin", "RAY_ADDRESS": "head:6379", "OMP_NUM_THREADS": "4,2", "RAY_event_stats": "true"}) == {}
    )


def test_correcting_twice_changes_nothing_more() -> None:
    environment = {"HOME": "", "TMPDIR": "/nowhere", "HTTP_PROXY": "http://p:1", "PYTHONPATH": ":x:", "RAY_ADDRESS": ""}
    correct_environment("test", environment)
    once = dict(environment)
    correct_environment("test", environment)
    assert environment == once
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(Path.cwd() / "x"), CODE_ROOT]
    assert "TMPDIR" not in environment
    assert Path(environment["HOME"]).is_dir()


@pytest.mark.parametrize("key", ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"])
@pytest.mark.parametrize("value", ["abc", "0", "-1", "1.5", "4 4", "$(nproc)"])
def test_a_number_of_threads_that_is_none(key: str, value: str) -> None:
    assert mistake({key: value}) == f"{key}={value}: is not a number of threads; give 1, 2, ... or unset it"


def test_variables_that_crash_ray_are_named() -> None:
    given_values = {"RAY_worker_niceness": "abc", "RAY_gcs_storage": "memory", "RAY_event_stats": "1"}
    told = mistake(given_values, crashes_ray=lambda some: "RAY_worker_niceness" in some)
    assert told.startswith("RAY_worker_niceness=abc: cannot be read by Ray")
    assert mistake({"RAY_AUTH_MODE": "tokn"}) == "RAY_AUTH_MODE=tokn: is neither token nor disabled"


def test_ray_itself_ends_at_such_a_value() -> None:
    environment = {**os.environ, "RAY_worker_niceness": "abc"}
    done = subprocess.run(
        [sys.executable, "-m", "data_prep", "verify", "none.beton"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "RAY_worker_niceness=abc: cannot be read by Ray" in done.stderr


def test_names_of_files_are_read_as_utf8_or_nothing_starts() -> None:
    told = mistake({"LC_ALL": "en_US.ISO-8859-1"}, encoding="iso8859-1")
    assert told.startswith("LC_ALL=en_US.ISO-8859-1: file names would be read as iso8859-1")
    assert "PYTHONUTF8=1" in told


def test_a_missing_temporary_folder_is_skipped() -> None:
    found = correct({"TMPDIR": "/gone"}, unusable=lambda _: "does not exist")
    assert "TMPDIR" not in found.environment
    assert found.notes == ["TMPDIR=/gone: does not exist; temporary files go to /tmp"]
    assert changes({"TMPDIR": "scratch"}) == {"TMPDIR": "/work/scratch"}


def test_a_user_without_home_or_name_gets_both(tmp_path: Path) -> None:
    nobody = {"home": "", "has_user_name": False, "temporary": str(tmp_path)}
    done = changes({"HOME": ""}, **nobody)
    assert done["HOME"] == str(tmp_path / f"ray-{os.getuid()}")
    assert done["USER"] == done["LOGNAME"] == f"uid-{os.getuid()}"
    assert changes({"HOME": "/nowhere", "USER": "ann"}, **nobody).keys() == {"HOME"}
    assert changes({"HOME": "/nowhere"}) == {"HOME": "/root"}


def test_no_proxy_is_used_on_this_machine_or_for_the_cluster() -> None:
    local = "localhost,127.0.0.1,::1"
    assert changes({"http_proxy": "http://p:1"}) == {"no_proxy": local, "NO_PROXY": local}
    given_values = {
        "HTTPS_PROXY": "http://p:1",
        "no_proxy": "a.b",
        "NO_PROXY": "c.d",
        "RAY_ADDRESS": "head",
        "RAY_API_SERVER_ADDRESS": "http://dash.x.y:8265",
    }
    both = f"a.b,c.d,{local},me,head,dash.x.y"
    assert changes(given_values, names=("me",)) == {"no_proxy": both, "NO_PROXY": both}
    public = changes({"ALL_PROXY": "http://p:1", "RAY_API_SERVER_ADDRESS": "https://ray.example.com"})
    assert public["no_proxy"] == local
    assert without_proxy({"HTTP_PROXY": "http://p:1", "NO_PROXY": "*"}, ["h"]) == {}
    assert without_proxy({"HTTP_PROXY": ""}, ["h"]) == {}


def make(folder: Path, *names: str) -> None:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("raise RuntimeError('imported in the place of another')\n")


def test_files_that_hide_other_modules(tmp_path: Path) -> None:
    make(tmp_path / "here", "statistics.py", "yaml/__init__.py", "os.py", "mine.py", "torch/notes.txt", "test.py")
    make(tmp_path / "there", "yaml/__init__.py", "mine2.py")
    path = [str(tmp_path / "here"), str(tmp_path / "there")]
    assert list(hiding(str(tmp_path / "here"), path)) == ["statistics.py", "yaml"]
    (tmp_path / "here" / "yaml-6.dist-info").mkdir()  # packages lie there on purpose
    assert list(hiding(str(tmp_path / "here"), path)) == ["statistics.py"]
    assert list(hiding(str(tmp_path / "nowhere"), path)) == []
    assert list(hiding(CODE_ROOT, [CODE_ROOT, *sys.path])) == []
    assert list(hiding(str(Path(os.__file__).parent), sys.path)) == []


def test_pythonpath_without_the_current_folder_and_without_what_hides_others() -> None:
    assert changes({"PYTHONPATH": ":lib: :/x"}, code="/code")["PYTHONPATH"] == "/work/lib:/x:/code"
    told = mistake({"PYTHONPATH": "/x"}, hiding=lambda folder: ["random.py", "yaml"] if folder == "/x" else [])
    assert told.startswith("/x/random.py: hides the module of that name that is needed (as yaml), because PYTHONPATH")
    assert mistake({}, code="/code", hiding=lambda folder: ["queue.py"]).startswith("/code/queue.py: hides")


def test_the_folder_of_the_command_is_searched_last() -> None:
    path = ["/here", "", "/python", "/x/site-packages", "/more"]
    assert behind(path, ("/here", "/x/site-packages")) == ["/python", "/x/site-packages", "/more", "/here", ""]


@pytest.mark.parametrize("package", ["data_prep", "resnet_dist"])
def test_modules_beside_a_command_are_not_imported(package: str, tmp_path: Path) -> None:
    make(tmp_path, "dataclasses.py", "typer/__init__.py", "random.py", "statistics.py", "socket.py", "queue.py")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    command = [sys.executable, "-m", package, "no-such-command"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (2, f"{package.replace('_', '-')}: No such command 'no-such-command'.\n")
    done = subprocess.run(
        command,
        env={**environment, "PYTHONPATH": f"{environment.get('PYTHONPATH', '')}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert f"{tmp_path}/dataclasses.py: hides the module of that name" in done.stderr


@pytest.mark.parametrize("package", ["data_prep", "resnet_dist"])
def test_a_folder_that_is_gone(package: str, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    program = (
        f"import os, runpy, sys; os.chdir({str(tmp_path / 'gone')!r}); os.rmdir(os.getcwd())\n"
        "sys.argv = ['x', 'show']\n"
        f"runpy.run_module({package!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    told = "the folder in which this command was started is gone; change to another"
    assert (done.returncode, done.stderr.partition(": ")[2]) == (2, f"{told}\n")


def test_help_is_there_whatever_the_environment() -> None:
    command = [sys.executable, "-m", "data_prep", "verify", "--help"]
    environment = {**os.environ, "OMP_NUM_THREADS": "many", "RAY_ADDRESS": "http://x"}
    assert subprocess.run(command, env=environment, capture_output=True, timeout=120).returncode == 0


def test_an_error_names_the_variable_that_it_quotes() -> None:
    environment = {"RAY_LOG_MONITOR_MAX_OPEN_FILES": "abc", "HOME": "abc", "RAY_X": ""}
    with pytest.raises(ValueError) as raised:
        int(environment["RAY_LOG_MONITOR_MAX_OPEN_FILES"])
    told = blamed(raised.value, environment)
    assert told is not None
    assert told.startswith("RAY_LOG_MONITOR_MAX_OPEN_FILES=abc: cannot be read (invalid literal")
    assert ending(raised.value, environment) == (2, told)
    assert blamed(ValueError("x"), environment) is None


def test_a_private_folder_is_nobody_elses(tmp_path: Path) -> None:
    folder = private_folder(str(tmp_path))
    assert folder == tmp_path / f"ray-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert private_folder(str(tmp_path)) == folder
    assert private_folder(str(folder)) == folder
    folder.chmod(0o777)
    assert private_folder(str(tmp_path)) == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    folder.symlink_to(tmp_path)
    other = private_folder(str(tmp_path))
    assert other not in (None, folder)
    assert other is not None
    assert other.stat().st_mode & 0o777 == 0o700
    assert private_folder("/proc") is None
    (tmp_path / "file").touch()
    assert [unusable(str(tmp_path / name)) for name in ("", "none", "file")] == [
        "",
        "does not exist",
        "is not a folder",
    ]
    assert unusable("/proc") not in ("", "does not exist")
