"""The files for an MLflow server: secrets stay in the environment, the manifests fit together."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((ROOT / "cluster" / "mlflow" / name).read_text()))


def test_the_compose_file_keeps_secrets_in_the_environment() -> None:
    (compose,) = documents("compose.yaml")
    server, database = compose["services"]["mlflow"], compose["services"]["postgres"]
    assert any(argument.startswith("--allowed-hosts=") for argument in server["command"])
    assert "--app-name=basic-auth" in server["command"]
    assert server["ports"] == ["${BIND:-127.0.0.1}:${PORT:-5000}:5000"]
    for variable in ("PGPASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"):
        assert server["environment"][variable].startswith("${MLFLOW_")
        assert ":?" in server["environment"][variable]
    assert database["environment"]["POSTGRES_PASSWORD"].startswith("${MLFLOW_DB_PASSWORD:?")
    assert "@postgres" in server["environment"]["MLFLOW_BACKEND_STORE_URI"]
    assert ":mlflow@" not in server["environment"]["MLFLOW_BACKEND_STORE_URI"]


def test_the_kubernetes_manifests_fit_together() -> None:
    found = documents("kubernetes.yaml")
    kinds = sorted((d["kind"], d["metadata"]["name"]) for d in found)
    for kind in ("Deployment", "Service", "NetworkPolicy"):
        assert {(kind, "mlflow"), (kind, "postgres")} <= set(kinds)
    assert all(d["metadata"]["namespace"] == "mlflow" and d["apiVersion"] for d in found)
    claims = {d["metadata"]["name"] for d in found if d["kind"] == "PersistentVolumeClaim"}
    for deployment in (d for d in found if d["kind"] == "Deployment"):
        pod, labels = deployment["spec"]["template"]["spec"], deployment["spec"]["template"]["metadata"]["labels"]
        assert deployment["spec"]["selector"]["matchLabels"] == labels
        (container,) = pod["containers"]
        assert container["resources"]["limits"]["memory"]
        assert container["readinessProbe"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert {
            v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v
        } <= claims
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
        for variable in container["env"]:
            secret = any(word in variable["name"] for word in ("PASSWORD", "SECRET"))
            assert ("valueFrom" in variable) is secret, variable["name"]
    (server,) = (d for d in found if (d["kind"], d["metadata"]["name"]) == ("Deployment", "mlflow"))
    arguments = server["spec"]["template"]["spec"]["containers"][0]["args"]
    assert any(a.startswith("--allowed-hosts=") and "mlflow.mlflow.svc.cluster.local:5000" in a for a in arguments)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"AUTH": "maybe"}, "set none or basic"),
        ({"AUTH": "basic"}, "needs MLFLOW_AUTH_ADMIN_PASSWORD"),
        ({"AUTH": "basic", "MLFLOW_AUTH_ADMIN_PASSWORD": "short"}, "12 characters"),
        ({"PG_USER": "x; drop"}, "a-z, 0-9 and _ only"),
        ({"PG_HOST": "db", "VENV": "present"}, "PG_HOST needs MLFLOW_DB_PASSWORD"),
    ],
)
def test_the_server_script_says_what_is_missing(tmp_path: Path, environment: dict[str, str], reason: str) -> None:
    for program in ("mlflow", "python"):
        path = tmp_path / "present" / "bin" / program
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "cluster" / "mlflow" / "server.sh")],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert reason in done.stderr
