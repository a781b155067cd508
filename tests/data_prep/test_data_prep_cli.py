"""The command as a person and a script meet it: exit codes, one-line errors, the last line in JSON."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.convert.work_folder import work_path

WAIT_LIMIT_S = 120.0


def data_prep(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_prep", *(str(a) for a in arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_LIMIT_S, check=False)


def convert(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return data_prep("convert", "--source", "synthetic", "--output", output, "--workers", "0", *arguments)


def test_convert_then_verify_then_convert_again(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "val.beton"
    first = convert(output, "--input", "n=12,size=16", "--json")
    assert first.returncode == 0, first.stderr
    made = json.loads(first.stdout.splitlines()[-1])
    expected = {"ok": True, "path": str(output), "num_samples": 12, "num_classes": 10, "already_done": False}
    assert expected.items() <= made.items()
    assert made["digest"].startswith("xxh3_128:")

    checked = data_prep("verify", output, "--decode", "all", "--json")
    assert checked.returncode == 0, checked.stderr
    report = json.loads(checked.stdout.splitlines()[-1])
    assert report == {
        "ok": True,
        "path": str(output),
        "digest": made["digest"],
        "num_samples": 12,
        "num_decoded": 12,
        "problems": [],
    }

    again = convert(output, "--input", "n=12,size=16", "--json")
    assert again.returncode == 0
    assert "already done, nothing to do" in again.stdout
    assert json.loads(again.stdout.splitlines()[-1])["already_done"] is True


def test_verify_of_a_damaged_beton_ends_with_1(tmp_path: Path) -> None:
    output = tmp_path / "a.beton"
    assert convert(output, "--input", "n=3,size=16").returncode == 0
    data = bytearray(output.read_bytes())
    data[8 << 20] ^= 1  # within the first image
    output.write_bytes(data)
    result = data_prep("verify", output, "--json")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["ok"] is False
    assert report["problems"][0].endswith("the images of 3 samples lie there: 0, 1, 2")
    assert report["problems"][1].startswith("1 of 3 images do not decode: 0 (")
    assert [f"data-prep: {output}: {problem}" for problem in report["problems"]] == result.stderr.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--source"),
        (["convert", "--source", "digits"], "--output"),
        (["convert", "--source", "digits", "--output", "a.beton", "--workers", "-1"], "--workers"),
        (["convert", "--source", "digits", "--output", "a.beton", "--workers", "two"], "--workers"),
        (["convert", "--source", "digit", "--output", "a.beton"], "--source digit: unknown; known sources: digits"),
        (
            ["convert", "--source", "synthetic", "--workers", "0", "--output", "a.bin"],
            "expected a name that ends in .beton",
        ),
        (["convert", "--source", "digits", "--output", "a.beton", "--split", "tst"], "holds the splits train, val"),
        (["convert", "--source", "digits", "--output", "a.beton", "--encode", "png"], "--encode png: expected one of"),
        (["convert", "--source", "digits", "--output", "a.beton", "--encode", "raw", "--quality", "9"], "--quality"),
        (["convert", "--source", "digits", "--output", "a.beton", "--page-mib", "3"], "--page-mib 3"),
        (["convert", "--source", "image-folder", "--output", "a.beton", "--input", "/nowhere"], "is not a folder"),
        (["convert", "--source", "image-folder", "--output", "/proc/a.beton"], "needs --input"),
        (["convert", "--source", "digits", "--workers", "0", "--output", "/proc/a.beton"], "cannot be written"),
        (["verify", "none.beton"], "none.beton: does not exist"),
        (["verify", "none.beton", "--decode", "some"], "--decode some: expected all or a number"),
        (["turn"], "turn"),
    ],
)
def test_mistakes_end_with_2_and_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_prep", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_LIMIT_S, check=False, cwd=tmp_path)
    assert result.returncode == 2
    if arguments:  # without any, the help is shown
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert message in result.stderr
        assert result.stderr.startswith("data-prep: ")
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_has_its_json_line_too(tmp_path: Path) -> None:
    result = data_prep("verify", tmp_path / "none.beton", "--json")
    last = json.loads(result.stdout.splitlines()[-1])
    assert (last["ok"], last["exit_code"]) == (False, 2)
    assert last["error"] in result.stderr


def test_a_cluster_that_does_not_answer_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")  # the address of the job server, a likely mistake
    result = data_prep("convert", "--source", "digits", "--output", tmp_path / "a.beton")
    assert result.returncode == 2, result.stderr
    assert "no Ray cluster answers at http://127.0.0.1:8265 (RAY_ADDRESS)" in result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_in_order(number: signal.Signals, code: int, tmp_path: Path) -> None:
    output = tmp_path / "a.beton"
    command = [sys.executable, "-m", "data_prep", "convert", "--source", "synthetic", "--input", "n=20000,size=64"]
    process = subprocess.Popen(
        [*command, "--encode", "jpeg", "--workers", "0", "--output", str(output)], stderr=subprocess.PIPE, text=True
    )
    limit = time.monotonic() + WAIT_LIMIT_S
    while not list(work_path(output).glob("*.part")):
        assert time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=WAIT_LIMIT_S)
    assert process.returncode == code
    assert stderr.splitlines()[-1] == f"data-prep: stopped by {number.name}; the same command goes on from where it was"
    assert not output.exists()


@pytest.mark.parametrize("command", [["--help"], ["convert", "--help"], ["verify", "--help"]])
def test_help_shows_an_example_and_needs_no_heavy_library(command: list[str]) -> None:
    script = (
        "import sys; sys.argv = ['data-prep', *sys.argv[1:]]\n"
        "from data_prep.cli import main\n"
        "try:\n    main()\n"
        "finally:\n"
        "    heavy = {'ray', 'torch', 'pyarrow', 'sklearn', 'PIL', 'ffcv', 'numba'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, *command], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert command == ["--help"] or f"Example: data-prep {command[0]} " in result.stdout


def test_a_full_disk_is_named_and_leaves_no_beton(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the full disk: the write fails half way."""
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "from data_prep.cli import main\n"
        "main()\n"
    )
    arguments = ["convert", "--source", "synthetic", "--input", "n=200,size=64", "--encode", "raw", "--workers", "0"]
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments, "--output", str(tmp_path / "a.beton")],
        capture_output=True,
        text=True,
        timeout=WAIT_LIMIT_S,
        check=False,
    )
    assert result.returncode == 1
    last = (
        f"data-prep: {tmp_path}/a.beton.work: cannot be written: File too large; mend that, then run the same command"
    )
    assert result.stderr.splitlines()[-1].startswith(last)
    assert "Traceback" not in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["a.beton.work"]
    assert not list(work_path(tmp_path / "a.beton").glob("*.part"))
