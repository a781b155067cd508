"""The MLflow server's deployment files: valid by Kubernetes' own schema and Compose's, and all names in them exist."""

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


def test_a_misspelt_key_would_be_found(manifests: list[Tree]) -> None:
    wrong = {**manifests[0], "spec": {**manifests[0]["spec"], "accessMode": ["ReadWriteOnce"]}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES_VERSIONS[-1], strict=True)


def test_services_and_policies_reach_a_pod(manifests: list[Tree]) -> None:
    labels = {name: pod["metadata"]["labels"] for name, pod in pods(manifests).items()}
    for name, service in of_kind(manifests, "Service").items():
        assert service["spec"]["selector"].items() <= labels[name].items()
        (container,) = pods(manifests)[name]["spec"]["containers"]
        ports = {port["containerPort"] for port in container["ports"]}
        assert {port["port"] for port in service["spec"]["ports"]} <= ports
    for name, policy in of_kind(manifests, "NetworkPolicy").items():
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels[name].items()
    for name, deployment in of_kind(manifests, "Deployment").items():
        assert deployment["spec"]["selector"]["matchLabels"].items() <= labels[name].items()


def test_everything_a_pod_mounts_exists(manifests: list[Tree]) -> None:
    claims, maps = of_kind(manifests, "PersistentVolumeClaim"), of_kind(manifests, "ConfigMap")
    assert set(claims) == {claim["claimName"] for claim in values_of(manifests, "persistentVolumeClaim")}
    assert set(maps) == {volume["configMap"]["name"] for volume in values_of(manifests, "volumes") for volume in volume
                         if "configMap" in volume}  # fmt: skip
    for pod in pods(manifests).values():
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        assert {mount["name"] for mount in values_of(pod, "volumeMounts") for mount in mount} == volumes


def test_the_secret_has_the_keys_that_the_head_comment_makes(manifests: list[Tree]) -> None:
    head = (MLFLOW / "kubernetes.yaml").read_text().partition("\napiVersion")[0]
    wanted = {(ref["name"], ref["key"]) for ref in values_of(manifests, "secretKeyRef")}
    assert wanted == {("mlflow", key) for key in re.findall(r"--from-literal=([\w-]+)=", head)}


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


def test_compose_stays_on_this_machine_by_default(compose: Tree) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports == ["${BIND:-127.0.0.1}:${PORT:-5000}:5000"]
    for service in compose["services"].values():
        for name, value in service["environment"].items():
            if re.search("PASSWORD|SECRET", name) and value != "":
                assert value.startswith("${"), f"{name} is written down"


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="no docker-compose here")
def test_compose_accepts_its_file(compose: Tree, tmp_path: Path) -> None:
    """Without `name`, which the version 1 that Debian 12 has does not know yet."""
    file = tmp_path / "compose.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in compose.items() if key != "name"}))

    def config(**secrets: str) -> subprocess.Popen[str]:
        command = ["docker-compose", "-f", str(file), "--project-directory", str(MLFLOW), "config"]
        return subprocess.Popen(
            command,
            env={"PATH": os.environ["PATH"], **secrets},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    secrets = {
        "MLFLOW_DB_PASSWORD": "one",
        "MLFLOW_AUTH_ADMIN_PASSWORD": "two",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "three",
    }
    shown = config(**secrets)
    left_out = {name: config(**{k: v for k, v in secrets.items() if k != name}) for name in secrets}
    out, problem = shown.communicate(timeout=60)
    assert shown.returncode == 0, problem
    assert yaml.safe_load(out)["services"]["mlflow"]["environment"]["PGPASSWORD"] == "one"
    for name, process in left_out.items():
        _, problem = process.communicate(timeout=60)
        assert process.returncode != 0
        assert f"export {name} first" in problem
