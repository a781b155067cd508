"""How `submit` handles its arguments before anything is sent: no cluster."""

from __future__ import annotations

import json
import random
import re
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import typer

from resnet_dist.cli.submit import read_command
from resnet_dist.code_version import CODE_KEY, CodeVersion, as_text, from_text, read_code_version
from resnet_dist.config.profile import Profile, Workers
from resnet_dist.errors import UserError
from resnet_dist.jobs.submission import (
    Submission,
    auth_settings,
    job_lines,
    jobs_address,
    plan_submission,
    ray_command,
)
from resnet_dist.jobs.upload import Upload

ROOT = Path(__file__).parents[3]
RECIPE = "resnet_dist/recipes/digits_resnet20.yaml"
SPACE = "tune_spaces/digits_smoke.yaml"
LAPTOP = "cluster/profiles/laptop.yaml"
SENT = (RECIPE, SPACE, LAPTOP, "tune_spaces/digits_lr.yaml")
UPLOAD = Upload(ROOT, dict.fromkeys(SENT, 1), excludes=("/data",), tracked=None, untracked=())
PROFILE = Profile(
    workers=Workers(min=2, max=2),
    cpus_per_worker=1,
    data_root="s3://b/data",
    cache="/nvme",
    storage="/s",
    tracking_uri="http://mlflow:5000",
    env={"NCCL_DEBUG": "WARN"},
)


def plan(*words: str, name: str | None = None, code: CodeVersion | None = None, **profile: Any) -> Submission:
    changed = PROFILE.model_copy(update=profile)
    return plan_submission(
        read_command(words[0], words[1:], changed, ROOT / LAPTOP, name),
        changed,
        ROOT / LAPTOP,
        ["workers=2"],
        address="http://h:8265",
        upload=UPLOAD,
        python="python",
        now=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        code=code,
    )


@pytest.mark.parametrize("file", [str(ROOT / RECIPE), f"./{RECIPE}"])
def test_files_become_relative_and_the_name_is_the_one_train_gives(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = (file, "--set", "model.name=resnet8", "--json")
    planned = plan("train", *words)
    name = planned.metadata["resnet-dist-run"]
    assert re.fullmatch(r"digits_resnet20-[0-9a-f]{8}", name)
    assert name != plan("train", str(ROOT / RECIPE)).metadata["resnet-dist-run"]
    assert planned.entrypoint == (
        *("python", "-m", "resnet_dist", "train", RECIPE, *words[1:]),
        *("--on", LAPTOP, "--profile-set", "workers=2", "--name", name),
    )


def test_a_sweep_is_named_after_its_space_and_its_base_recipe_must_be_sent(tmp_path: Path) -> None:
    planned = plan("tune", str(ROOT / SPACE), "--set", "trials=9")
    assert planned.entrypoint == (
        *("python", "-m", "resnet_dist", "tune", SPACE, "--set", "trials=9"),
        *("--on", LAPTOP, "--profile-set", "workers=2", "--name", "digits_smoke"),
    )
    assert plan("tune", "run", str(ROOT / SPACE)).entrypoint[3:6] == ("tune", "run", SPACE)
    base = tmp_path / "base.yaml"
    base.write_bytes((ROOT / RECIPE).read_bytes())
    with pytest.raises(UserError, match=r"base.yaml: is outside .*; move it there, or give --working-dir"):
        plan("tune", str(ROOT / SPACE), "--set", f"base={base}")


def test_a_conversion_gets_neither_profile_nor_name() -> None:
    words = ("--source", "digits", "--output=s3://b/data/my digits (2)/train.beton")
    planned = plan("convert", *words)
    assert planned.entrypoint == ("python", "-m", "data_prep", "convert", *words)
    assert planned.submission_id == "convert-my-digits-2-train-20260102-030405"


def test_the_printed_line_contains_the_complete_job() -> None:
    words = shlex.split(plan("convert", "--source", "digits", "--output", "/d/it's.beton").command_line(["ray"]))
    assert words[:5] == ["ray", "job", "submit", "--address", "http://h:8265"]
    assert words[-8:] == ["python", "-m", "data_prep", "convert", "--source", "digits", "--output", "/d/it's.beton"]
    env = json.loads(words[words.index("--runtime-env-json") + 1])
    assert env == {"excludes": ["/data"], "env_vars": {"NCCL_DEBUG": "WARN", "RAY_JOB_STOP_WAIT_TIME_S": "90"}}


@pytest.mark.parametrize(
    ("words", "profile", "message"),
    [
        (
            ("convert", "--source", "ilsvrc", "--input", "https://host/a.tar?token=hunter2", "--output", "/t.beton"),
            {},
            "--input https://host/a.tar?token=***",
        ),
        (("train", RECIPE), {"tracking_uri": "http://me:hun/ter2@mlflow"}, "profile's tracking_uri: http://***@mlflow"),
    ],
)
def test_commands_and_profiles_with_secrets_are_not_submitted(
    words: tuple[str, ...], profile: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        plan(*words, **profile)
    assert "MLFLOW_TRACKING_PASSWORD" in str(caught.value)
    assert "hun" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "profile", "message"),
    [
        (
            ("train", str(ROOT / RECIPE)),
            {"data_root": "data", "storage": "runs", "cache": "nvme", "tracking_uri": "sqlite:///m.db"},
            "data_root data, storage runs, cache nvme: are relative to the folder of a job.*; tracking_uri sqlite:///m",
        ),
        (("convert", "--source", "digits", "--output", "x/train.beton"), {}, r"--output x/train.beton: is relative"),
        (
            ("convert", "--source", "ilsvrc", "--input=x", "--output", "/x/train.beton"),
            {"storage": "runs"},
            "^--input x: is relative",
        ),
    ],
)
def test_all_paths_that_only_this_machine_sees_are_refused_at_once(
    words: tuple[str, ...], profile: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan(*words, **profile)


@pytest.mark.parametrize(
    ("option", "profile", "environment", "address"),
    [
        ("http://given:1", "http://mine:1", {"RAY_API_SERVER_ADDRESS": "http://env:1"}, "http://given:1"),
        (None, "http://mine:1/", {"RAY_API_SERVER_ADDRESS": "http://env:1"}, "http://mine:1"),
        (None, None, {"RAY_API_SERVER_ADDRESS": " 'http://env:1/' "}, "http://env:1"),
        ("", None, {"RAY_ADDRESS": "http://head:8265"}, "http://head:8265"),
        (None, None, {"RAY_ADDRESS": "head:6379"}, "http://127.0.0.1:8265"),
        (None, None, {}, "http://127.0.0.1:8265"),
    ],
)
def test_where_jobs_go(option: str | None, profile: str | None, environment: dict[str, str], address: str) -> None:
    assert jobs_address(option, PROFILE.model_copy(update={"jobs_address": profile}), environment) == address


@pytest.mark.parametrize("wrong", ["head:6379", "http://", "http:// x", "ray://h:10001", "https://me:hunter2@h"])
def test_jobs_go_to_a_dashboard_without_a_password(wrong: str) -> None:
    with pytest.raises(UserError, match=r"like http://HEAD:8265|RAY_AUTH_TOKEN_PATH") as refused:
        jobs_address(wrong, PROFILE, {})
    assert "hunter2" not in str(refused.value)


def test_a_token_that_is_there_is_sent(tmp_path: Path) -> None:
    assert auth_settings({}, tmp_path) == {}
    assert auth_settings({"RAY_AUTH_TOKEN_PATH": "/t"}, tmp_path) == {"RAY_AUTH_MODE": "token"}
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").touch()
    assert auth_settings({}, tmp_path) == {"RAY_AUTH_MODE": "token"}
    assert auth_settings({"RAY_AUTH_MODE": "disabled"}, tmp_path) == {}


def test_the_version_of_the_code_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = CodeVersion("c" * 40, True, "+2")
    planned = plan("train", str(ROOT / RECIPE), code=code)
    assert planned.metadata["resnet-dist-commit"] == code.commit
    monkeypatch.setenv(CODE_KEY, planned.runtime_env["env_vars"][CODE_KEY])
    assert read_code_version(tmp_path) == code


def test_a_version_too_long_for_the_environment_is_cut() -> None:
    large = CodeVersion("c" * 40, True, "".join(map(chr, random.Random(0).choices(range(33, 127), k=200_000))))
    text = as_text(large)
    assert len(text) <= 24_000
    cut = from_text(text)
    assert cut is not None
    assert (cut.commit, cut.dirty) == (large.commit, True)
    assert cut.diff.splitlines()[-1].startswith("... cut here: ")


@pytest.mark.parametrize("garbage", ["", "x", "eJw=", "é", "AAAA"])
def test_what_is_no_version_of_the_code_is_none(garbage: str) -> None:
    assert from_text(garbage) is None


@pytest.mark.parametrize("name", ["a b", "a/b", "../x", "/", "-x", "é", "x" * 129, "a\n"])
def test_an_invalid_name_is_refused_before_anything_is_sent(name: str) -> None:
    with pytest.raises(UserError, match="use letters, digits"):
        plan("convert", "--source", "digits", "--output", "/d/x/train.beton", name=name)


def test_printed_commands_work_as_printed(tmp_path: Path) -> None:
    (tmp_path / "ray").touch()
    assert ray_command({}, str(tmp_path / "ray"), tmp_path / "python") == ["ray"]
    ray = ray_command({"RAY_AUTH_MODE": "token"}, "/usr/bin/ray", tmp_path / "python")
    assert ray == ["env", "RAY_AUTH_MODE=token", str(tmp_path / "ray")]
    assert job_lines("http://h:1", "n-1", ray).splitlines() == [
        f"follow it: env RAY_AUTH_MODE=token {tmp_path}/ray job logs --address http://h:1 --follow n-1",
        f"stop it:   env RAY_AUTH_MODE=token {tmp_path}/ray job stop --address http://h:1 n-1",
    ]


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("tarin", (), "submit tarin: takes train, tune, convert"),
        ("train", (RECIPE, "--jsno"), "No such option: --jsno"),
        ("train", (RECIPE, "more"), "unexpected extra argument"),
        ("train", (RECIPE, "--set", "optim.lrr=2"), "did you mean lr?"),
        ("train", (RECIPE, "--set", "train.micro_batch_size=128"), "every worker needs one"),
        ("train", (RECIPE, "--set", "model.name=resnet21"), "resnet21"),
        ("train", (), "RECIPE"),
        ("tune", (SPACE, "--set", "trails=2"), "trails"),
        ("tune", (SPACE, "--set", "base=nowhere.yaml"), "nowhere.yaml: cannot be read"),
        ("tune", (SPACE, "--seed", "1"), "No such option: --seed"),
        ("convert", ("--source", "digist", "--output", "/x/train.beton"), "--source digist: unknown"),
        ("convert", ("--output", "/x/train.beton"), "--source"),
        ("convert", ("--source", "digits", "--output", "/x/t.beton", "--encode", "raw", "--quality", "1"), "quality"),
    ],
)
def test_arguments_that_the_command_would_refuse_are_refused_here(
    command: str, words: tuple[str, ...], message: str
) -> None:
    given = [str(ROOT / word) if word in SENT else word for word in words]
    with pytest.raises((UserError, typer.TyperException)) as refused:
        read_command(command, given, PROFILE, ROOT / LAPTOP, "n")
    error = refused.value
    assert message in (error.format_message() if isinstance(error, typer.TyperException) else str(error))
