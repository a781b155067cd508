"""The laptop's cluster in containers: Compose's own check where it is installed, and consistency of its files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from resnet_dist.config.loading import load_profile

FOLDER = Path(__file__).parents[2] / "cluster/compose"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    return tree


def test_secrets_come_from_the_environment_and_ports_stay_here(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        for name, value in service["environment"].items():
            if re.search("SECRET|PASSWORD|TOKEN", name):
                assert re.fullmatch(r"\$\{\w+:\?export \w+ first\}", value), name
    head = (FOLDER / "compose.yaml").read_text().split("\nname:")[0]
    needed = set(re.findall(r"\$\{(\w+):\?", (FOLDER / "compose.yaml").read_text()))
    needed |= set(re.findall(r"\$\{(\w+):\?", (FOLDER / "../mlflow/compose.yaml").read_text()))
    assert needed == set(re.findall(r"(\w+)=\$\(openssl", head))


def test_the_nodes_share_no_folder(compose: dict[str, Any]) -> None:
    for name in ("head", "worker"):
        assert "volumes" not in compose["services"][name]
        assert compose["services"][name]["shm_size"] == "2gb"
    assert compose["services"]["worker"]["deploy"] == {"replicas": 2}
    assert "--num-cpus=0" in compose["services"]["head"]["command"]


def test_the_profile_is_for_these_services(compose: dict[str, Any]) -> None:
    profile = load_profile(FOLDER / "profile.yaml")
    assert (profile.workers.min, profile.workers.max) == (1, compose["services"]["worker"]["deploy"]["replicas"])
    made = re.search(r"mc mb --ignore-existing here/([\w-]+)", compose["services"]["bucket_is_there"]["entrypoint"][-1])
    assert made is not None
    for url in (profile.data_root, profile.storage):
        assert url.startswith(f"s3://{made.group(1)}/")
    assert profile.data_root in compose["services"]["convert"]["command"][-1]
    mlflow = yaml.safe_load((FOLDER / compose["include"][0]["path"]).read_text())
    assert re.match(r"http://(\w+):5000", profile.tracking_uri).group(1) in mlflow["services"]  # type: ignore[union-attr]
    grace = int(compose["x-node"]["stop_grace_period"].removesuffix("s"))
    assert float(compose["x-node"]["environment"]["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) < grace


def test_mlflow_is_reachable_by_the_workers(compose: dict[str, Any]) -> None:
    (include,) = compose["include"]
    (line,) = [line for line in (FOLDER / include["env_file"]).read_text().splitlines() if not line.startswith("#")]
    name, _, hosts = line.partition("=")
    assert f"${{{name}:-" in (FOLDER / include["path"]).read_text()
    tracking = load_profile(FOLDER / "profile.yaml").tracking_uri
    assert tracking.removeprefix("http://") in hosts.split(",")


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="no docker-compose here")
def test_compose_accepts_its_file(compose: dict[str, Any], tmp_path: Path) -> None:
    """Without `name` and `include`, which the version 1 that Debian 12 has does not know yet."""
    file = tmp_path / "compose.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in compose.items() if k not in {"name", "include"}}))
    names = re.findall(r"(\w+)=\$\(openssl", (FOLDER / "compose.yaml").read_text())
    done = subprocess.run(
        ["docker-compose", "-f", file, "config"],
        env={**os.environ, **dict.fromkeys(names, "x" * 16)}, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["services"]["worker"]["environment"]["RAY_AUTH_TOKEN"] == "x" * 16
