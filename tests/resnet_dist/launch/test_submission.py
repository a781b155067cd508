"""What `submit` makes of its words, before anything is sent: no Ray here."""

from __future__ import annotations

import json
import re
import shlex
from datetime import UTC, datetime
from pathlib import Path

import pytest

from resnet_dist.config.profile import Profile, Workers
from resnet_dist.errors import UserError
from resnet_dist.launch.submission import (
    auth_settings,
    job_arguments,
    jobs_address,
    plan_submission,
    require_sent,
)

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "resnet_dist/recipes/digits_resnet20.yaml"
PROFILE_FILE = ROOT / "cluster/profiles/laptop.yaml"
PROFILE = Profile(
    workers=Workers(min=2, max=2),
    cpus_per_worker=1,
    data_root="s3://b/data",
    cache="/nvme",
    storage="/s",
    tracking_uri="http://mlflow:5000",
    env={"NCCL_DEBUG": "WARN"},
)


def arguments(command: str, *given: str, name: str | None = None) -> tuple[str, tuple[str, ...]]:
    sets = ["workers=2"]
    return job_arguments(command, given, profile_file=PROFILE_FILE, profile_sets=sets, name=name, working_dir=ROOT)


def test_files_become_relative_and_the_name_is_the_one_train_gives() -> None:
    name, words = arguments("train", str(RECIPE), "--set", "model.name=resnet8", "--json")
    assert name.startswith("digits_resnet20-")
    assert name != arguments("train", str(RECIPE))[0]
    assert words == (
        *("resnet_dist/recipes/digits_resnet20.yaml", "--set", "model.name=resnet8", "--json"),
        *("--on", "cluster/profiles/laptop.yaml", "--profile-set", "workers=2", "--name", name),
    )


@pytest.mark.parametrize(
    ("given", "profile", "told"),
    [
        (
            ("--profile-set", "tracking_uri=http://me:hunter2@mlflow:5000"),
            PROFILE,
            "tracking_uri=http://***@mlflow",
        ),
        (("--input", "https://host/a.tar?token=hunter2"), PROFILE, "--input https://host/a.tar?token=***"),
        (("--set", "x.api_key=hunter2"), PROFILE, "--set x.api_key=***"),
        (("--password", "hunter2"), PROFILE, "--password ***"),
        (
            (),
            PROFILE.model_copy(update={"tracking_uri": "http://me:hun/ter2@mlflow"}),
            "profile's tracking_uri:",
        ),
    ],
)
def test_what_holds_a_secret_is_not_submitted(given: tuple[str, ...], profile: Profile, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        plan_submission(
            *("train", given, profile),
            name="n", address="http://h:8265", working_dir=ROOT, python="python", now=datetime(2026, 1, 1, tzinfo=UTC),
        )  # fmt: skip
    assert "MLFLOW_TRACKING_PASSWORD" in str(caught.value)
    assert "hun" not in str(caught.value)


def test_files_named_like_secrets_are_not_sent(tmp_path: Path) -> None:
    for name in (".env", "server.PEM", "my_secrets.yaml"):
        (tmp_path / name).write_text("x: 1")
        with pytest.raises(UserError, match="left out of what travels"):
            require_sent(tmp_path / name, tmp_path)


def test_a_sweep_is_named_after_its_space_and_its_base_recipe_must_travel() -> None:
    name, words = arguments("tune", str(RECIPE.parents[2] / "tune_spaces/digits_smoke.yaml"), "--set", "trials=9")
    assert name == "digits_smoke"
    assert words == (
        *("tune_spaces/digits_smoke.yaml", "--set", "trials=9"),
        *("--on", "cluster/profiles/laptop.yaml", "--profile-set", "workers=2", "--name", name),
    )
    with pytest.raises(UserError, match=r"nowhere.yaml: does not exist"):
        arguments("tune", str(RECIPE.parents[2] / "tune_spaces/digits_smoke.yaml"), "--set", "base=nowhere.yaml")


def test_a_conversion_gets_neither_profile_nor_name() -> None:
    name, words = arguments("convert", "--source", "digits", "--output=s3://b/data/digits/train.beton")
    assert (name, words) == (
        "convert-digits-train",
        ("--source", "digits", "--output=s3://b/data/digits/train.beton"),
    )


def test_the_line_holds_the_whole_job() -> None:
    submission = plan_submission(
        "convert",
        ("--source", "digits", "--output", "/d/it's.beton"),
        PROFILE,
        name="n",
        address="http://h:8265",
        working_dir=Path(),
        python="python",
        now=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    )
    words = shlex.split(submission.command_line())
    assert words[:7] == ["ray", "job", "submit", "--address", "http://h:8265", "--submission-id", "n-20260102-030405"]
    assert (
        words[-8:]
        == [
            *("--", "python", "-m", "data_prep", "convert"),
            *("--source", "digits", "--output", "/d/it's.beton"),
        ][-8:]
    )
    env = json.loads(words[words.index("--runtime-env-json") + 1])
    assert env["env_vars"] == {"NCCL_DEBUG": "WARN", "RAY_JOB_STOP_WAIT_TIME_S": "90"}
    assert "/data" in env["excludes"]
    assert "data" not in env["excludes"]  # would leave out the package resnet_dist/data


@pytest.mark.parametrize(
    ("command", "given", "changed", "told"),
    [
        ("train", (), {"storage": "runs"}, r"storage runs: is relative to the folder of a job"),
        ("train", (), {"cache": "nvme"}, r"cache nvme: is relative"),
        ("train", (), {"tracking_uri": "sqlite:///runs/m.db"}, r"set tracking_uri to an MLflow server"),
        ("convert", ("--output", "x/train.beton"), {}, r"--output x/train.beton: is relative"),
        ("convert", ("--input=x", "--output", "/x/train.beton"), {}, r"--input x: is relative"),
    ],
)
def test_what_only_this_machine_sees_is_refused(
    command: str, given: tuple[str, ...], changed: dict[str, str], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        plan_submission(
            command,
            given,
            PROFILE.model_copy(update=changed),
            name="n",
            address="http://h:8265",
            working_dir=Path(),
            python="python",
            now=datetime(2026, 1, 2, tzinfo=UTC),
        )


def test_a_file_that_does_not_travel_is_refused(tmp_path: Path) -> None:
    for place in ("runs", "resnet_dist/data", ".venv-x"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "r.yaml").touch()
    assert require_sent(tmp_path / "resnet_dist/data/r.yaml", tmp_path) == "resnet_dist/data/r.yaml"
    for place in ("runs", ".venv-x"):
        with pytest.raises(UserError, match=r"is left out of what travels"):
            require_sent(tmp_path / place / "r.yaml", tmp_path)
    with pytest.raises(UserError, match=r"lies outside .*; move it there, or give --working-dir"):
        require_sent(RECIPE, tmp_path)
    with pytest.raises(UserError, match=r"does not exist"):
        require_sent(tmp_path / "none.yaml", tmp_path)


def test_where_jobs_go() -> None:
    mine = PROFILE.model_copy(update={"jobs_address": "http://mine:1/"})
    assert jobs_address("http://given:1", mine, {"RAY_API_SERVER_ADDRESS": "http://env:1"}) == "http://given:1"
    assert jobs_address(None, mine, {"RAY_API_SERVER_ADDRESS": "http://env:1"}) == "http://mine:1"
    assert jobs_address(None, PROFILE, {"RAY_API_SERVER_ADDRESS": "http://env:1"}) == "http://env:1"
    assert jobs_address(None, PROFILE, {}) == "http://127.0.0.1:8265"
    with pytest.raises(UserError, match="like http://HEAD:8265"):
        jobs_address("head:6379", PROFILE, {})


def test_a_token_that_is_there_is_sent(tmp_path: Path) -> None:
    assert auth_settings({}, tmp_path) == {}
    assert auth_settings({"RAY_AUTH_TOKEN_PATH": "/t"}, tmp_path) == {"RAY_AUTH_MODE": "token"}
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").touch()
    assert auth_settings({}, tmp_path) == {"RAY_AUTH_MODE": "token"}
    assert auth_settings({"RAY_AUTH_MODE": "disabled"}, tmp_path) == {}
