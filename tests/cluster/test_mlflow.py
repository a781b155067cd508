"""The MLflow server's files: valid by Kubernetes' own schema and Compose's, without secrets, and all names exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
MLFLOW = ROOT / "cluster" / "mlflow"
KUBERNETES_VERSIONS = ("1.29", "1.37")
"""The oldest and the newest that these files are for."""
SECRETS = ("MLFLOW_DB_PASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY")
Tree = dict[str, Any]


@pytest.fixture(scope="module")
def manifests() -> list[Tree]:
    return list(yaml.safe_load_all((MLFLOW / "kubernetes.yaml").read_text()))


@pytest.fixture(scope="module")
def compose() -> Tree:
    tree: Tree = yaml.safe_load((MLFLOW / "compose.yaml").read_text())
    return tree


def of_kind(manifests: list[Tree], kind: str) -> dict[str, Tree]:
    return {tree["metadata"]["name"]: tree for tree in manifests if tree["kind"] == kind}


def pods(manifests: list[Tree]) -> dict[str, Tree]:
    return {name: tree["spec"]["template"] for name, tree in of_kind(manifests, "Deployment").items()}


def values_of(tree: Any, key: str) -> Iterator[Any]:
    """Every value under `key`, however deep."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name == key:
                yield value
            yield from values_of(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from values_of(value, key)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_every_manifest_is_valid(manifests: list[Tree], version: str) -> None:
    for tree in manifests:
        kubernetes_validate.validate(tree, version, strict=True)


def test_services_policies_and_deployments_reach_a_pod(manifests: list[Tree]) -> None:
    labels = {name: pod["metadata"]["labels"] for name, pod in pods(manifests).items()}
    assert labels.keys() == {"mlflow", "postgres"}
    for name, deployment in of_kind(manifests, "Deployment").items():
        assert deployment["spec"]["selector"]["matchLabels"].items() <= labels[name].items()
    for kind in ("Service", "NetworkPolicy"):
        assert of_kind(manifests, kind).keys() == labels.keys()
    for name, policy in of_kind(manifests, "NetworkPolicy").items():
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels[name].items()
    for name, service in of_kind(manifests, "Service").items():
        assert service["spec"]["selector"].items() <= labels[name].items()
        (container,) = pods(manifests)[name]["spec"]["containers"]
        ports = {port["containerPort"] for port in container["ports"]}
        assert {port["port"] for port in service["spec"]["ports"]} <= ports


def test_everything_a_pod_mounts_exists(manifests: list[Tree]) -> None:
    claims, maps = of_kind(manifests, "PersistentVolumeClaim"), of_kind(manifests, "ConfigMap")
    assert set(claims) == {claim["claimName"] for claim in values_of(manifests, "persistentVolumeClaim")}
    assert set(maps) == {volume["configMap"]["name"] for volume in values_of(manifests, "volumes") for volume in volume
                         if "configMap" in volume}  # fmt: skip
    for pod in pods(manifests).values():
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        assert {mount["name"] for mount in values_of(pod, "volumeMounts") for mount in mount} == volumes


def test_secrets_come_from_the_secret_that_the_head_comment_creates(manifests: list[Tree]) -> None:
    head = (MLFLOW / "kubernetes.yaml").read_text().partition("\napiVersion")[0]
    wanted = {(ref["name"], ref["key"]) for ref in values_of(manifests, "secretKeyRef")}
    assert wanted == {("mlflow", key) for key in re.findall(r"--from-literal=([\w-]+)=", head)}
    for variables in values_of(manifests, "env"):
        for variable in variables:
            assert ("valueFrom" in variable) == bool(re.search("PASSWORD|SECRET", variable["name"])), variable["name"]


def test_pods_run_without_rights_and_within_limits(manifests: list[Tree]) -> None:
    for pod in pods(manifests).values():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
            assert "readinessProbe" in container


def test_all_deployments_start_the_same_mlflow(manifests: list[Tree], compose: Tree) -> None:
    locks = [file.read_text() for file in (ROOT / "requirements.lock", MLFLOW / "requirements.lock")]
    (version,) = {found for lock in locks for found in re.findall(r"^mlflow==([^\s;]+)", lock, re.MULTILINE)}
    for file in ("Dockerfile", "server.sh"):
        assert "--require-hashes" in (MLFLOW / file).read_text(), file
    images = [compose["services"]["mlflow"]["image"], *values_of(of_kind(manifests, "Deployment")["mlflow"], "image")]
    assert all(image.endswith(f":{version}") for image in images)
    (in_map,) = of_kind(manifests, "ConfigMap")["mlflow-auth"]["data"].values()
    in_file = (MLFLOW / "auth.ini").read_text()
    settings = [[line for line in text.splitlines() if not line.startswith(";")] for text in (in_map, in_file)]
    assert settings[0] == settings[1]


def test_the_server_answers_to_its_names_only_and_asks_for_a_password(manifests: list[Tree], compose: Tree) -> None:
    in_compose = compose["services"]["mlflow"]["command"]
    in_pod = pods(manifests)["mlflow"]["spec"]["containers"][0]["args"]
    for command in (in_compose, in_pod):
        assert any(word.startswith("--allowed-hosts=") for word in command)
        assert "--app-name=basic-auth" in command
    assert "mlflow.mlflow.svc.cluster.local:5000" in " ".join(in_pod)


def test_compose_stays_on_this_machine_by_default_and_holds_no_secret(compose: Tree) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports == ["${BIND:-127.0.0.1}:${PORT:-5000}:5000"]
    for service in compose["services"].values():
        for name, value in service["environment"].items():
            if re.search("PASSWORD|SECRET", name) and value != "":
                assert re.match(r"\$\{(MLFLOW_\w+:\?|AWS_)", value), f"{name} is written down"
            assert not re.search(r"://[^@/]+:[^@/]+@", str(value)), f"{name} holds a password: {value}"


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="no docker-compose here")
@pytest.mark.parametrize("missing", [None, *SECRETS])
def test_compose_accepts_its_file_with_all_secrets_only(compose: Tree, tmp_path: Path, missing: str | None) -> None:
    """Without `name`, which the version 1 that Debian 12 has does not know yet."""
    file = tmp_path / "compose.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in compose.items() if key != "name"}))
    done = subprocess.run(
        ["docker-compose", "-f", str(file), "--project-directory", str(MLFLOW), "config"],
        env={"PATH": os.environ["PATH"], **{name: "one" for name in SECRETS if name != missing}},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    if missing is None:
        assert done.returncode == 0, done.stderr
        assert yaml.safe_load(done.stdout)["services"]["mlflow"]["environment"]["PGPASSWORD"] == "one"
    else:
        assert done.returncode != 0
        assert f"export {missing} first" in done.stderr


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"AUTH": "maybe"}, "set none or basic"),
        ({"AUTH": "basic"}, "needs MLFLOW_AUTH_ADMIN_PASSWORD"),
        ({"AUTH": "basic", "MLFLOW_AUTH_ADMIN_PASSWORD": "short"}, "12 characters"),
        ({"PG_USER": "x; drop"}, "a-z, 0-9 and _ only"),
        ({"ALLOWED_HOSTS": "10.*"}, "'10.*' is not a complete host name"),
        ({"PG_HOST": "db", "VENV": "/usr"}, "PG_HOST needs MLFLOW_DB_PASSWORD"),
    ],
)
def test_the_server_script_says_what_is_missing(tmp_path: Path, environment: dict[str, str], reason: str) -> None:
    if environment.get("VENV"):  # one that has all it needs
        python = tmp_path / "bin" / "python"
        python.parent.mkdir()
        python.write_text("#!/bin/sh\n")
        python.chmod(0o755)
        environment = {**environment, "VENV": str(tmp_path)}
    done = subprocess.run(
        ["bash", str(MLFLOW / "server.sh")],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert reason in done.stderr
