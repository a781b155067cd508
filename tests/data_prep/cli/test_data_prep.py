"""The command as people and scripts use it: exit codes, one-line errors, the last line in JSON."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from data_prep.beton.manifest import load_manifest
from data_prep.beton.reader import BetonReader
from data_prep.converter.output import work_path

pytestmark = pytest.mark.system

WAIT_LIMIT_S = 120.0


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def convert(data_prep: Run) -> Run:
    return partial(data_prep, "convert", "--source", "synthetic", "--workers", "0", "--output")


def test_convert_then_verify_then_convert_again(data_prep: Run, convert: Run, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "val.beton"
    first = convert(output, "--input", "n=12,size=16", "--json")
    assert first.returncode == 0, first.stderr
    made = json.loads(first.stdout.splitlines()[-1])
    expected = {"ok": True, "path": str(output), "num_samples": 12, "num_classes": 10, "already_done": False}
    assert expected.items() <= made.items()
    assert made["digest"].startswith("blake3_tree:")

    checked = data_prep("verify", output, "--decode", "all", "--json")
    assert checked.returncode == 0, checked.stderr
    report = json.loads(checked.stdout.splitlines()[-1])
    assert report == {
        "ok": True,
        "path": str(output),
        "digest": made["digest"],
        "protects_against": "forgery",
        "num_samples": 12,
        "num_decoded": 12,
        "problems": [],
    }

    against = ["--source", "synthetic", "--split", "val", "--input"]
    compared = data_prep("verify", output, *against, "n=12,size=16")
    assert compared.returncode == 0, compared.stderr
    assert compared.stdout.startswith(
        f"{output}: complete: every byte has the digest in its manifest (blake3); 12 of its 12 images decoded; "
        "as many match synthetic"
    )
    differs = data_prep("verify", output, *against, "n=12,size=16,seed=1")
    assert differs.returncode == 1
    assert "12 of 12 samples are not what the source gives: 0 (synthetic-0000000: other bytes)" in differs.stderr

    again = convert(output, "--input", "n=12,size=16", "--json")
    assert again.returncode == 0
    assert "already done, nothing to do" in again.stdout
    assert json.loads(again.stdout.splitlines()[-1])["already_done"] is True


def test_own_images_from_a_folder_to_two_betons(data_prep: Run, image_tree: Path, tmp_path: Path) -> None:
    """Splits and classes are reported; the same images in both splits, or other classes in one of them, are refused."""

    def make(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        source = ("--source", "image-folder", "--input", str(image_tree), "--workers", "0")
        return data_prep("convert", *source, "--output", tmp_path / name, *arguments)

    whole = make("train.beton")
    assert whole.returncode == 2
    assert "is not divided into splits, but the output's name (train) asks for a split" in whole.stderr
    for split, classes in (("Training", ("cat", "dog", "emu")), ("Testing", ("cat", "emu"))):
        for name in classes:
            (image_tree / split / name).mkdir(parents=True)
            shutil.copy(image_tree / name / "0.JPEG", image_tree / split / name)
    for name in ("cat", "dog", "emu"):
        shutil.rmtree(image_tree / name)
    (image_tree / "Testing" / "cat" / "1.heic").touch()
    train = make("train.beton")
    assert (train.returncode, "3 images of 3 classes, split Training" in train.stdout) == (0, True)
    other = make("val.beton")
    assert other.returncode == 2
    assert "class 1 is 'dog' in" in other.stderr
    assert f"say --classes {tmp_path}/train.beton" in other.stderr
    val = make("val.beton", "--classes", str(tmp_path / "train.beton"), "--json")
    assert val.returncode == 0, val.stderr
    assert load_manifest(tmp_path / "val.beton").class_counts == (1, 0, 1)
    notes = json.loads(val.stdout.splitlines()[-1])["notes"]
    assert [line.partition("note: ")[2] for line in val.stderr.splitlines() if "note: " in line] == notes
    assert notes[0].startswith("1 file skipped, not an image suffix (.heic 1): cat/1.heic")
    assert notes[1] == f"1 of the 3 classes of {tmp_path}/train.beton have no images here: dog"


def test_verify_of_a_damaged_beton_ends_with_1(data_prep: Run, convert: Run, tmp_path: Path) -> None:
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
    assert report["problems"][0].endswith("the images of 3 samples are there: 0, 1, 2")
    assert report["problems"][1].startswith("1 of 3 images do not decode: 0 (")
    assert [f"data-prep: {output}: {problem}" for problem in report["problems"]] == result.stderr.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--source"),
        (["convert", "--source", "digits"], "--output"),
        (["convert", "--source", "digits", "--output", "a.beton", "--workers", "-1"], "--workers"),
        (["convert", "--source", "digits", "--output", "a.beton", "--workers", "two"], "--workers"),
        (["convert", "--source", "digit", "--output", "a.beton"], "--source digit: unknown; known sources: "),
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
        (["convert", "--source", "digits", "--output", "a.beton", "--raw-share", "0.5"], "for --encode mixed"),
        (["convert", "--source", "digits", "--output", "a.beton", "--max-bad", "5"], "--on-error quarantine"),
        (["convert", "--source", "digits", "--output", "a.beton", "--on-error", "skip"], "--on-error skip: expected"),
        (["subset", "none.beton", "--output", "a.beton", "--first", "5"], "none.beton: does not exist"),
        (["subset", "none.beton", "--output", "a.beton"], "say what to keep"),
        (["merge", "none.beton", "no.beton", "--output", "a.beton"], "none.beton: does not exist"),
        (["stage", "none.beton", "--to", "cache"], "none.manifest.json: does not exist"),
        (["verify", "none.beton"], "none.beton: does not exist"),
        (["verify", "none.beton", "--input", "images"], "add --source NAME to compare"),
        (["inspect", "--source", "image-folder", "--input", "zip:///x"], "zip:///x: cannot be read: Is a directory"),
        (["verify", "."], "is a folder; expected a .beton"),
        (["merge", ".", "..", "--output", "a.beton"], "is a folder; expected a .beton"),
        (["convert", "--source", "image-folder", "--input", "", "--output", "a.beton"], "--input: is empty; leave it"),
        (["inspect", "--source", "image-folder", "--input", ".", "--classes", " "], "--classes: is empty; leave it"),
        (["verify", "none.beton", "--decode", "some"], "--decode some: expected all or a number"),
        (["turn"], "turn"),
    ],
)
def test_mistakes_end_with_2_and_one_line(
    data_prep: Run, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = data_prep(*arguments)
    assert result.returncode == 2
    if arguments:  # without any, the help is shown
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert message in result.stderr
        assert result.stderr.startswith("data-prep: ")
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_has_its_json_line_too(data_prep: Run, tmp_path: Path) -> None:
    result = data_prep("verify", tmp_path / "none.beton", "--json")
    last = json.loads(result.stdout.splitlines()[-1])
    assert (last["ok"], last["exit_code"]) == (False, 2)
    assert last["error"] in result.stderr


def test_the_address_of_a_dashboard_is_the_users_mistake(
    data_prep: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")  # the address of the job server, a likely mistake
    result = data_prep("convert", "--source", "digits", "--output", tmp_path / "a.beton")
    assert result.returncode == 2, result.stderr
    assert "RAY_ADDRESS=http://127.0.0.1:8265: is a dashboard, which takes jobs; give 127.0.0.1:6379" in result.stderr


def test_an_odd_environment_is_put_in_order_for_ray_and_its_workers(tmp_path: Path) -> None:
    """Empty and dead values, a folder too long for a socket, and files beside the command named like modules."""
    here = tmp_path / "here"
    for name in ("statistics.py", "random.py", "numpy/__init__.py", "PIL/__init__.py", "socket.py"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("raise RuntimeError('imported in the place of another')\n")
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    odd = {
        "RAY_ADDRESS": " '' ",
        "RAY_worker_niceness": "",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "",
        "TMPDIR": str(deep),
        "HTTP_PROXY": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
        "HOME": str(tmp_path / "none"),
        "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:",
    }
    environment = {**os.environ, **odd}
    for key in ("RAY_TMPDIR", "NO_PROXY", "no_proxy"):
        environment.pop(key, None)
    command = [sys.executable, "-m", "data_prep", "convert", "--source", "synthetic", "--input", "n=12,size=16"]
    command += ["--output", str(tmp_path / "val.beton"), "--workers", "1"]
    result = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=WAIT_LIMIT_S)
    assert result.returncode == 0, result.stderr
    assert "12 images of 10 classes" in result.stdout


def test_out_of_memory_is_reported_as_such(tmp_path: Path) -> None:
    """Ray's memory monitor ends every worker: to it, any memory in use is too much."""
    command = [sys.executable, "-m", "data_prep", "convert", "--source", "synthetic", "--input", "n=400,size=256"]
    command += ["--output", str(tmp_path / "val.beton"), "--workers", "1"]
    too_much = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "100"}
    environment = {**os.environ, **too_much, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT_LIMIT_S)
    assert result.returncode == 1, result.stderr
    last = result.stderr.splitlines()[-1]
    lost = r"(samples 0\.\.399|bytes [\d.,]+) were lost 4 times"  # a worker may have finished reading when it is killed
    assert re.search(lost + r", last: node \S+ ran out of memory \([\d.]+ of [\d.]+ GB", last)


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
    assert stderr.splitlines()[-1] == f"data-prep: stopped by {number.name}; the same command resumes"
    assert not output.exists()


@pytest.mark.parametrize("command", ["convert", "inspect", "verify", "merge", "subset", "statistics", "stage"])
def test_help_shows_an_example(data_prep: Run, command: str) -> None:
    result = data_prep(command, "--help")
    assert result.returncode == 0, result.stderr
    assert f"Example: data-prep {command} " in result.stdout


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
from data_prep.cli import main
main()
"""
"""A limit on the size of files acts as the full disk: the write fails halfway."""


@pytest.mark.parametrize("moment", ["while encoding", "while writing"])
def test_a_write_that_fails_is_named_and_leaves_no_beton(moment: str, tmp_path: Path, image_tree: Path) -> None:
    out = tmp_path / "out"
    if moment == "while encoding":
        arguments = ["--source", "synthetic", "--input", "n=200,size=64", "--encode", "raw"]
    else:  # the parts of files whose own bytes are stored are small
        arguments = ["--source", "image-folder", "--input", str(image_tree)]
    command = ["convert", *arguments, "--workers", "0", "--output", str(out / "a.beton")]
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, *command], capture_output=True, text=True, timeout=WAIT_LIMIT_S, check=False
    )
    assert result.returncode == 1
    what = "a.beton.work" if moment == "while encoding" else "a.beton"
    expected = f"data-prep: {out}/{what}: cannot be written: File too large; fix that, then run the same command"
    assert result.stderr.splitlines()[-1].startswith(expected)
    assert "Traceback" not in result.stderr
    assert [p.name for p in out.iterdir()] == ["a.beton.work"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MB; only root can make one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize(("num_samples", "message"), [(150, "GB free"), (400, "No space left on device")])
def test_a_full_disk_is_named_and_the_next_run_resumes(
    data_prep: Run, convert: Run, num_samples: int, message: str, small_disk: Path
) -> None:
    """Raw images of 108 kB: 150 fit once, as parts, but not again as a beton; 400 do not fit at all."""
    output = small_disk / "a.beton"
    arguments = ["--input", f"n={num_samples},size=190", "--encode", "raw"]
    result = convert(output, *arguments)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert message in last
    assert "run the same command again" in last
    assert "Traceback" not in result.stderr
    assert [p.name for p in small_disk.iterdir()] == ["a.beton.work"]
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    assert convert(output, *arguments).returncode == 0
    assert data_prep("verify", output, "--decode", "all").returncode == 0


def test_quarantine_and_mixed_from_the_command_line(data_prep: Run, tmp_path: Path, image_tree: Path) -> None:
    (image_tree / "dog" / "1.JPEG").write_bytes(b"no image")
    command = ["convert", "--source", "image-folder", "--input", image_tree, "--workers", "0", "--json"]
    output = tmp_path / "out" / "a.beton"
    refused = data_prep(*command, "--output", output)
    assert refused.returncode == 2
    assert "leave them out with --on-error quarantine --max-bad N" in refused.stderr
    options = ["--on-error", "quarantine", "--max-bad", "20%", "--encode", "mixed", "--raw-share", "1", "--seed", "7"]
    made = data_prep(*command, "--output", output, *options)
    assert made.returncode == 0, made.stderr
    last = json.loads(made.stdout.splitlines()[-1])
    assert (last["num_samples"], last["num_quarantined"], last["num_untouched"]) == (5, 1, 0)
    assert sorted(p.name for p in output.parent.iterdir()) == [
        "a.beton",
        "a.manifest.json",
        "a.paths.txt.gz",
        "a.quarantine.tsv",
        "a.samples.bin",
    ]


def test_subset_merge_and_stage_from_the_command_line(data_prep: Run, convert: Run, tmp_path: Path) -> None:
    whole = tmp_path / "a.beton"
    digest = json.loads(convert(whole, "--input", "n=12,size=16,classes=3", "--json").stdout.splitlines()[-1])["digest"]
    (tmp_path / "classes").write_text("class-0\nclass-2\n")
    for name, options in {
        "first": ["--first", "6"],
        "every": ["--every", "5"],
        "classes": ["--classes", f"@{tmp_path}/classes"],
    }.items():
        made = data_prep("subset", whole, "--output", tmp_path / f"{name}.beton", *options, "--json")
        assert made.returncode == 0, made.stderr
        report = json.loads(made.stdout.splitlines()[-1])
        expected = {"first": (6, 3), "every": (3, 3), "classes": (8, 2)}[name]
        assert (report["num_samples"], report["num_classes"]) == expected
    (tmp_path / "rest").write_text("\n".join(str(i) for i in range(6, 12)))
    data_prep("subset", whole, "--output", tmp_path / "rest.beton", "--indices", tmp_path / "rest")
    merged = data_prep(
        "merge", tmp_path / "first.beton", tmp_path / "rest.beton", "--output", tmp_path / "b.beton", "--json"
    )
    assert json.loads(merged.stdout.splitlines()[-1])["digest"] == digest

    staged = data_prep("stage", whole, "--to", tmp_path / "cache", "--json")
    assert staged.returncode == 0, staged.stderr
    path = Path(json.loads(staged.stdout.splitlines()[-1])["path"])
    assert path.read_bytes() == whole.read_bytes()
    assert staged.stdout.splitlines()[0] == str(path)


def test_convert_reports_turns_and_takes_a_background(data_prep: Run, tmp_path: Path, image_file, picture) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = tmp_path / "tree" / "cat"
    folder.mkdir(parents=True)
    (folder / "0.jpg").write_bytes(image_file(picture(30, 40), exif=exif))
    (folder / "1.png").write_bytes(image_file(Image.new("RGBA", (8, 8), (9, 9, 9, 0)), "PNG"))
    source = ["--source", "image-folder", "--input", str(tmp_path / "tree"), "--workers", "0", "--encode", "raw"]
    done = data_prep("convert", *source, "--output", tmp_path / "all.beton", "--background", "250,128,1")
    assert (done.returncode, done.stderr) == (0, done.stderr)
    assert (
        "1 images have an EXIF orientation, which was ignored, as torchvision does with JPEGs; --exif apply"
        in done.stdout
    )
    assert load_manifest(tmp_path / "all.beton").settings["background"] == [250, 128, 1]
    assert bytes(BetonReader(tmp_path / "all.beton").image_bytes(1)[:3]) == bytes([250, 128, 1])
    again = data_prep("convert", *source, "--output", tmp_path / "all.beton", "--background", "250,128,1")
    assert "already done" in again.stdout
    for wrong in ("white", "1,2", "1,2,256", "-1,2,3"):
        refused = data_prep("convert", *source, "--output", tmp_path / "b.beton", "--background", wrong)
        assert refused.returncode == 2
        assert f"--background {wrong}: expected R,G,B, each 0..255" in refused.stderr
