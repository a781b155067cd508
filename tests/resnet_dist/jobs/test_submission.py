"""How `submit` handles its arguments before anything is sent: no cluster."""

from __future__ import annotations

import json
import random
import re
import shlex
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
import typer

from resnet_dist.cli.submit import require_understood
from resnet_dist.code_version import CODE_KEY, CodeVersion, as_text, from_text, read_code_version
from resnet_dist.config.profile import Profile, Workers
from resnet_dist.errors import UserError
from resnet_dist.jobs.client import files_to_send
from resnet_dist.jobs.submission import (
    Submission,
    Upload,
    auth_settings,
    job_arguments,
    job_lines,
    jobs_address,
    packed_bytes,
    plan_submission,
    ray_command,
    read_checkout,
    require_fits,
)

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "resnet_dist/recipes/digits_resnet20.yaml"
UPLOAD = Upload(ROOT, None)
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
    return job_arguments(command, given, profile_file=PROFILE_FILE, profile_sets=sets, name=name, upload=UPLOAD)


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
def test_files_with_secrets_are_not_submitted(given: tuple[str, ...], profile: Profile, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        plan_submission(
            *("train", given, profile),
            name="n", address="http://h:8265", upload=UPLOAD, python="python", now=datetime(2026, 1, 1, tzinfo=UTC),
        )  # fmt: skip
    assert "MLFLOW_TRACKING_PASSWORD" in str(caught.value)
    assert "hun" not in str(caught.value)


def test_files_named_like_secrets_are_not_sent(tmp_path: Path) -> None:
    for name in (".env", "server.PEM", "my_secrets.yaml"):
        (tmp_path / name).write_text("x: 1")
        with pytest.raises(UserError, match="left out of what is sent"):
            Upload(tmp_path, None).require_sent(tmp_path / name)


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


def test_the_line_contains_the_complete_job() -> None:
    submission = plan_submission(
        "convert",
        ("--source", "digits", "--output", "/d/it's.beton"),
        PROFILE,
        name="n",
        address="http://h:8265",
        upload=UPLOAD,
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
def test_paths_that_only_this_machine_sees_are_refused(
    command: str, given: tuple[str, ...], changed: dict[str, str], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        plan_submission(
            command,
            given,
            PROFILE.model_copy(update=changed),
            name="n",
            address="http://h:8265",
            upload=UPLOAD,
            python="python",
            now=datetime(2026, 1, 2, tzinfo=UTC),
        )


def test_a_file_that_does_not_travel_is_refused(tmp_path: Path) -> None:
    for place in ("runs", "resnet_dist/data", ".venv-x"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "r.yaml").touch()
    assert Upload(tmp_path, None).require_sent(tmp_path / "resnet_dist/data/r.yaml") == "resnet_dist/data/r.yaml"
    for place in ("runs", ".venv-x"):
        with pytest.raises(UserError, match=r"is left out of what is sent"):
            Upload(tmp_path, None).require_sent(tmp_path / place / "r.yaml")
    with pytest.raises(UserError, match=r"is outside .*; move it there, or give --working-dir"):
        Upload(tmp_path, None).require_sent(RECIPE)
    with pytest.raises(UserError, match=r"does not exist"):
        Upload(tmp_path, None).require_sent(tmp_path / "none.yaml")


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


def repository(folder: Path) -> Path:
    """A git checkout with one of each: tracked, changed, ignored, untracked, secret."""
    folder.mkdir()
    files = {
        ".gitignore": "*.bin\nrecipes/forced.yaml\n",
        "code/a.py": "1\n",
        "recipes/r.yaml": "x: 1\n",
        "recipes/forced.yaml": "x: 1\n",
        "keys/server.pem": "secret\n",
        "recipes/it's [new]!.yaml": "x: 1\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    mine = ["-c", "user.name=n", "-c", "user.email=e@e", "-c", "commit.gpgsign=false"]
    tracked = ["code", "recipes/r.yaml", "recipes/forced.yaml", "keys", ".gitignore"]
    for words in (["init", "-q"], ["add", "-f", *tracked], [*mine, "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", str(folder), *words], check=True)
    (folder / "code/a.py").write_text("2\n")
    for name in ("new.bin", "notes/todo.txt", "code/b.py", "code/__pycache__/a.pyc", ".env"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


def test_only_tracked_files_are_sent_and_the_rest_is_reported(tmp_path: Path) -> None:
    folder = repository(tmp_path / "repo")
    upload = Upload(folder, read_checkout(folder))
    submission = plan(upload)
    assert files_to_send(submission) == {".gitignore": 26, "code/a.py": 2, "recipes/r.yaml": 5}
    assert upload.notes() == [
        "not sent, because git does not track it: code/b.py, notes/, recipes/it's [new]!.yaml",
        "not sent (named as secrets are): keys/server.pem",
    ]
    assert upload.require_sent(folder / "recipes/r.yaml") == "recipes/r.yaml"
    for name, told in (
        ("recipes/it's [new]!.yaml", r"git does not track it, so it is not sent to the cluster; `git add "),
        ("recipes/forced.yaml", r"\.gitignore names it"),
        ("new.bin", r"git does not track it"),
        ("keys/server.pem", r"server\.pem is left out"),
        (".env", r"\.env is left out"),
    ):
        with pytest.raises(UserError, match=told):
            upload.require_sent(folder / name)


def test_too_many_untracked_files_are_reported(tmp_path: Path) -> None:
    folder = repository(tmp_path / "repo")
    for number in range(2001):
        (folder / "code" / f"{number}.jpg").touch()
    with pytest.raises(UserError, match=r"2,00\d files that git does not track are beside .* and 2,?\d+ more; move"):
        read_checkout(folder)


def test_without_git_all_but_secrets_and_data_travel(tmp_path: Path) -> None:
    folder = repository(tmp_path / "repo")
    shutil.rmtree(folder / ".git")
    assert read_checkout(folder) is None
    sent = files_to_send(plan(Upload(folder, None)))
    assert sent.keys() == {
        ".gitignore",
        "code/a.py",
        "code/b.py",
        "recipes/r.yaml",
        "notes/todo.txt",
        "recipes/it's [new]!.yaml",
    }


def plan(upload: Upload, profile: Profile = PROFILE, code: CodeVersion | None = None) -> Submission:
    return plan_submission(
        *("train", (), profile),
        name="n", address="http://h:8265", upload=upload, python="python",
        now=datetime(2026, 1, 1, tzinfo=UTC), code=code,
    )  # fmt: skip


def test_the_version_of_the_code_travels(tmp_path: Path) -> None:
    folder = repository(tmp_path / "repo")
    code = read_code_version(folder)
    assert code is not None
    assert "+2" in code.diff
    submission = plan(Upload(folder, None), code=code)
    assert submission.metadata["resnet-dist-commit"] == code.commit
    assert from_text(submission.env[CODE_KEY]) == code
    upload = tmp_path / "upload"
    upload.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CODE_KEY, submission.env[CODE_KEY])
        assert read_code_version(upload) == code
    large = CodeVersion("c" * 40, True, "".join(map(chr, random.Random(0).choices(range(33, 127), k=200_000))))
    text = as_text(large)
    assert len(text) <= 24_000
    cut = from_text(text)
    assert cut is not None
    assert (cut.commit, cut.dirty) == (large.commit, True)
    assert cut.diff.splitlines()[-1].startswith("... cut here: ")
    for garbage in ("", "x", "eJw=", "é", "AAAA"):
        assert from_text(garbage) is None


def test_code_too_large_for_a_head_is_refused_before_it_is_sent() -> None:
    files = {"a.py": 10_000_000, "big.npy": 500_000_000, "b.bin": 110_000_000}
    require_fits(files, 620_000_000, lambda *_: pytest.fail("fits anyhow"))
    require_fits(files, 100_000_000, lambda paths, most: 90_000_000)
    told = r"the upload is 620 MB, and a head takes 100 MB; the largest: big.npy 500 MB, b.bin 110 MB, a.py 10 MB"
    with pytest.raises(UserError, match=told):
        require_fits(files, 100_000_000, lambda paths, most: None)


def test_the_size_when_packed(tmp_path: Path) -> None:
    (tmp_path / "zeros").write_bytes(bytes(5_000_000))
    (tmp_path / "noise").write_bytes(random.Random(0).randbytes(3_000_000))
    assert (packed_bytes(tmp_path, ["zeros"], 100_000) or 100_000) < 50_000
    assert packed_bytes(tmp_path, ["zeros", "noise"], 100_000) is None


def test_all_relative_paths_are_reported_at_once() -> None:
    changed = {"data_root": "data", "storage": "runs", "cache": "nvme", "tracking_uri": "sqlite:///m.db"}
    with pytest.raises(
        UserError, match=r"data_root data, storage runs, cache nvme: are relative .*; tracking_uri sqlite"
    ):
        plan(UPLOAD, PROFILE.model_copy(update=changed))


@pytest.mark.parametrize("name", ["a b", "a/b", "../x", "", "-x", "é", "x" * 129, "a\n"])
def test_an_invalid_name_is_refused_before_anything_is_sent(name: str) -> None:
    with pytest.raises(UserError, match="use letters, digits"):
        arguments("convert", "--output", "/d/x/train.beton", name=name or "/")


def test_a_conversion_is_named_after_any_path() -> None:
    assert arguments("convert", "--output", "/d/my data (2)/train.beton")[0] == "convert-my-data-2-train"


def test_where_jobs_go_whatever_way_it_is_written() -> None:
    environment = {"RAY_API_SERVER_ADDRESS": " 'http://h:8265/' "}
    assert jobs_address(None, PROFILE, environment) == "http://h:8265"
    assert jobs_address("", PROFILE, {"RAY_ADDRESS": "http://head:8265"}) == "http://head:8265"
    assert jobs_address(None, PROFILE, {"RAY_ADDRESS": "head:6379"}) == "http://127.0.0.1:8265"
    for wrong in ("http://", "http:// x", "ray://h:10001", "https://me:hunter2@h"):
        with pytest.raises(UserError) as told:
            jobs_address(wrong, PROFILE, {})
        assert "hunter2" not in str(told.value)


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
    ("command", "given", "told"),
    [
        ("train", (str(RECIPE), "--jsno"), "No such option: --jsno"),
        ("train", (str(RECIPE), "more"), "unexpected extra argument"),
        ("train", (str(RECIPE), "--set", "optim.lrr=2"), "did you mean lr?"),
        ("train", (str(RECIPE), "--set", "train.micro_batch_size=128"), "every worker needs one"),
        ("train", (str(RECIPE), "--set", "model.name=resnet21"), "resnet21"),
        ("tune", (str(ROOT / "tune_spaces/digits_smoke.yaml"), "--set", "trails=2"), "trails"),
        ("tune", (str(ROOT / "tune_spaces/digits_smoke.yaml"), "--seed", "1"), "No such option: --seed"),
        ("convert", ("--source", "digist", "--output", "/x/train.beton"), "--source digist: unknown"),
        ("convert", ("--output", "/x/train.beton"), "--source"),
        (
            "convert",
            ("--source", "digits", "--output", "/x/train.beton", "--encode", "raw", "--quality", "1"),
            "quality",
        ),
    ],
)
def test_arguments_that_the_command_would_refuse_are_refused_here(
    command: str, given: tuple[str, ...], told: str
) -> None:
    with pytest.raises((UserError, typer.TyperException)) as refused:
        require_understood(command, given, PROFILE, PROFILE_FILE, "n")
    message = refused.value.format_message() if isinstance(refused.value, typer.TyperException) else str(refused.value)
    assert told in message


def test_arguments_that_the_command_accepts_are_accepted_here() -> None:
    require_understood("train", (str(RECIPE), "--json", "--set", "optim.lr=0.2"), PROFILE, PROFILE_FILE, "n")
    require_understood("tune", (str(ROOT / "tune_spaces/digits_smoke.yaml"),), PROFILE, PROFILE_FILE, "n")
    require_understood("convert", ("--source", "digits", "--output", "/x/train.beton"), PROFILE, PROFILE_FILE, "n")
