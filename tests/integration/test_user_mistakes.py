"""A user's mistake: one readable line on stderr, exit code 2, nothing started, nothing left behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from resnet_dist.cli import main

ROOT = Path(__file__).parents[2]


def message_of(cli: Any, *extra: str, **environment: str) -> str:
    """The one line of a real process."""
    done = cli.run(cli.train_command(*extra), **environment)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return str(done.stderr)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--set", "optim.lrr=0.1"], ["optim.lrr", "unknown key", "did you mean lr?"]),
        (["--set", "train.total_epochs=many"], ["train.total_epochs", "'many'"]),
        (["--set", "train.micro_batch_size=48"], ["global_batch_size (128)", "multiple of micro_batch_size (48)"]),
        (["--set", "data.dataset=nowhere"], ["nowhere/train.beton", "does not exist", "data-prep convert"]),
        (["--set", "model.num_classes=7"], ["holds 10 classes", "model.num_classes = 7"]),
        (["--set", "model.name=resnet21"], ["resnet21", "resnet20"]),
        (["--set", "data.train.size=28"], ["pad_crop needs images of 28 x 28 px"]),
        (["--set", "schedule.warmup.epochs=99"], ["schedule.warmup.epochs"]),
        (["--set", "train.global_batch_size=4096"], ["4096", "1442 samples"]),
        (["--profile-set", "workers=3"], ["3 workers", "2 micro-batches"]),
        (["--profile-set", "workers=two"], ["workers", "'two'"]),
        (["--profile-set", "storage=/proc/runs"], ["storage /proc/runs is not writable"]),
        (["--profile-set", "tracking_uri=./mlruns"], ["tracking_uri", "sqlite:///"]),
        (["--name", "a/b"], ["--name a/b"]),
        (["--no-such-flag"], ["no-such-flag"]),
    ],
)
def test_a_mistake_is_reported_before_anything_starts(
    cli: Any,
    extra: list[str],
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", cli.train_command(*extra))
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out, len(err.splitlines())) == (2, "", 1)
    for part in expected:
        assert part in err
    assert not (cli.folder / "runs" / "run").exists()


def test_a_real_process_says_one_line(cli: Any) -> None:
    assert "optim.lrr: unknown key" in message_of(cli, "--set", "optim.lrr=0.1")


def test_too_few_cpus_says_what_was_found(cli: Any, head: Any) -> None:
    err = message_of(cli, "--profile-set", "cpus_per_worker=6", RAY_ADDRESS=head.address)
    assert "2 workers of 6 CPUs and 0 GPUs, the cluster holds 1" in err
    assert "8 CPUs" in err
    assert "2 workers of 1 CPUs and 1 GPUs, the cluster holds 0" in message_of(
        cli, "--profile-set", "gpus_per_worker=1", RAY_ADDRESS=head.address
    )


def test_no_cluster_at_the_address(cli: Any) -> None:
    assert "no Ray cluster at 127.0.0.1:1" in message_of(cli, RAY_ADDRESS="127.0.0.1:1")


def test_a_beton_cut_short_is_noticed(cli: Any, tmp_path: Path) -> None:
    shutil.copytree(cli.data_root, tmp_path / "data")
    beton = tmp_path / "data" / "digits" / "train.beton"
    with beton.open("r+b") as file:
        file.truncate(beton.stat().st_size - 1000)
    assert "its manifest says" in message_of(cli, "--profile-set", f"data_root={tmp_path / 'data'}")


def test_dry_run_starts_nothing(cli: Any) -> None:
    done = cli.run(cli.train_command("--dry-run"))
    assert done.returncode == 0, done.stderr
    for part in ("global_batch_size: 128", "1,442 in", "355 in", "steps per epoch    11", "[1, 1] micro-batches"):
        assert part in done.stdout
    assert not (cli.folder / "runs" / "run").exists()
