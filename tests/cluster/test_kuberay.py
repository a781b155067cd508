"""KubeRay's manifests: valid by schema and by Ray's own autoscaler, and consistent with the profiles in them."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import validate_config

from resnet_dist.config.loading import load_profile, load_recipe
from resnet_dist.config.profile import Profile

sys.path.insert(0, str(Path(__file__).parent))
from kustomize import apply, render
from ray_schema import schema_of

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "cluster/kuberay"
FOLDERS = sorted(p.parent.relative_to(KUBERAY).as_posix() for p in KUBERAY.rglob("kustomization.yaml"))
RUNNABLE = [f for f in FOLDERS if f != "base"]
TRAINING = [f for f in RUNNABLE if "train" in f or "overlays" in f]
RAY_KINDS = {"RayCluster", "RayJob"}
Tree = dict[str, Any]


def ray_tree(folder: str) -> Tree:
    (tree,) = (t for t in render(KUBERAY / folder) if t["kind"] in RAY_KINDS)
    return tree


def cluster_of(tree: Tree) -> Tree:
    spec: Tree = tree["spec"]
    return spec["rayClusterSpec"] if tree["kind"] == "RayJob" else spec


def pods_of(tree: Tree) -> dict[str, Tree]:
    cluster = cluster_of(tree)
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **groups}


def env_of(pod: Tree) -> dict[str, str]:
    return {e["name"]: e["value"] for e in pod["spec"]["containers"][0]["env"] if "value" in e}


def profile_of(folder: str, tmp_path: Path) -> Profile:
    maps = [t for t in render(KUBERAY / folder) if t["kind"] == "ConfigMap"]
    file = tmp_path / "profile.yaml"
    file.write_text(maps[0]["data"]["profile.yaml"])
    return load_profile(file)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here")
@pytest.mark.parametrize("folder", FOLDERS)
def test_kubectl_renders_the_same(folder: str) -> None:
    command = ["kubectl", "kustomize", KUBERAY / folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    by_name = lambda tree: (tree["kind"], tree["metadata"]["name"])  # noqa: E731
    assert sorted(yaml.safe_load_all(done.stdout), key=by_name) == sorted(render(KUBERAY / folder), key=by_name)


@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_kubernetes_own_kinds_are_valid(version: str) -> None:
    trees = {json.dumps(tree): tree for folder in FOLDERS for tree in render(KUBERAY / folder)}
    for tree in trees.values():
        if tree["kind"] not in RAY_KINDS:
            kubernetes_validate.validate(tree, version, strict=True)


@pytest.mark.parametrize("folder", RUNNABLE)
def test_ray_kinds_are_valid_and_their_pods_are_pods(folder: str) -> None:
    tree = ray_tree(folder)
    jsonschema.validate(tree, schema_of(tree["kind"]))
    for name, pod in pods_of(tree).items():
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": pod["spec"]}
        kubernetes_validate.validate(whole, "1.37", strict=True)


@pytest.mark.parametrize("path", ["/spec/submissionModee", "/spec/rayClusterSpec/workerGroupSpecs/0/maxReplica"])
def test_a_misspelt_key_would_be_found(path: str) -> None:
    tree = ray_tree("jobs/train")
    apply(tree, "add", path, 1)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree, schema_of("RayJob"))


@pytest.mark.parametrize("folder", RUNNABLE)
def test_rays_autoscaler_reads_the_groups(folder: str) -> None:
    tree = ray_tree(folder)
    config = _derive_autoscaling_config_from_ray_cr({"metadata": tree["metadata"], "spec": cluster_of(tree)})
    validate_config(config)
    types = config["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    for name in types.keys() - {"headgroup"}:
        resources = types[name]["resources"]
        assert resources.get("GPU", 0) == (0 if name == "cpu" else 8)
        assert resources["CPU"] >= 16
        assert types[name]["min_workers"] <= types[name]["max_workers"]


@pytest.mark.parametrize("folder", RUNNABLE)
def test_pods_have_what_they_need_and_no_secret_is_committed(folder: str) -> None:
    trees = render(KUBERAY / folder)
    names = {(t["kind"], t["metadata"]["name"]) for t in trees}
    assert not any(kind == "Secret" for kind, _ in names)
    tree = ray_tree(folder)
    assert cluster_of(tree)["authOptions"] == {"mode": "token"}
    assert cluster_of(tree)["rayVersion"] == ray.__version__
    assert tree["metadata"]["annotations"] == {"ray.io/overwrite-container-cmd": "true"}
    for pod in pods_of(tree).values():
        volumes = {v["name"]: v for v in pod["spec"]["volumes"]}
        for volume in volumes.values():
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in names
            if config_map := volume.get("configMap"):
                assert ("ConfigMap", config_map["name"]) in names
        (container,) = pod["spec"]["containers"]
        assert {m["name"] for m in container["volumeMounts"]} == volumes.keys()
        if container["resources"]["limits"].get("nvidia.com/gpu"):
            assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    redis = cluster_of(tree)["gcsFaultToleranceOptions"]["redisAddress"].split(":")[0]
    assert ("Service", redis) in names


@pytest.mark.parametrize("folder", RUNNABLE)
def test_a_drain_is_longer_than_a_checkpoint_and_shorter_than_the_pods_grace(folder: str) -> None:
    for name, pod in pods_of(ray_tree(folder)).items():
        if name in {"gpu", "spot"}:
            drain = float(env_of(pod)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
            assert 60 <= drain < pod["spec"]["terminationGracePeriodSeconds"]
        assert pod["spec"]["containers"][0]["args"] == ['ulimit -n 65536; eval "exec $KUBERAY_GEN_RAY_START_CMD"']


@pytest.mark.parametrize("folder", [*TRAINING, "jobs/tune"])
def test_the_profile_fits_the_pods(folder: str, tmp_path: Path) -> None:
    profile = profile_of(folder, tmp_path)
    tree = ray_tree(folder)
    (group,) = cluster_of(tree)["workerGroupSpecs"]
    container = group["template"]["spec"]["containers"][0]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert profile.workers.max <= gpus * group["maxReplicas"]
    if folder != "jobs/tune":
        assert profile.workers.min == gpus * group["minReplicas"]
    assert profile.cpus_per_worker * gpus < int(container["resources"]["requests"]["cpu"])
    mounted = [m["mountPath"] for m in container["volumeMounts"]]
    for path in (profile.data_root, profile.cache, profile.storage):
        assert path is not None
        assert any(path.startswith(mount) for mount in mounted)
    wait = float(yaml.safe_load(tree["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
    assert profile.failure.stop_grace_s < wait


@pytest.mark.parametrize("folder", TRAINING)
def test_the_recipe_has_a_micro_batch_for_every_worker(folder: str, tmp_path: Path) -> None:
    words = shlex.split(ray_tree(folder)["spec"]["entrypoint"])
    assert words[:2] == ["resnet-dist", "train"]
    recipe_file = ROOT / words[2].removeprefix("/opt/resnet-dist/")
    sets = [value for flag, value in pairwise(words) if flag == "--set"]
    recipe = load_recipe(recipe_file, sets)
    assert recipe.train.num_micro_batches >= profile_of(folder, tmp_path).workers.max
    # Linear scaling, as the recipe's own rate is for its own global batch.
    assert recipe.optim.lr == pytest.approx(0.1 * recipe.train.global_batch_size / 256)


def test_the_sweeps_space_is_the_projects_own() -> None:
    own = yaml.safe_load((ROOT / "tune_spaces/imagenet_resnet152_proxy.yaml").read_text())
    here = yaml.safe_load((KUBERAY / "jobs/tune/space.yaml").read_text())
    assert Path(here.pop("base")).name == Path(own.pop("base")).name
    assert here == own


def test_only_the_heads_reach_redis() -> None:
    policies = {t["metadata"]["name"]: t["spec"] for t in render(KUBERAY / "base") if t["kind"] == "NetworkPolicy"}
    (rule,) = policies["redis"]["ingress"]
    assert {p["podSelector"]["matchLabels"]["ray.io/node-type"] for p in rule["from"]} == {"head", "redis-cleanup"}
    assert policies["ray"]["podSelector"]["matchExpressions"][0]["key"] == "ray.io/cluster"


def test_the_head_gets_the_password_that_the_operator_only_names(tmp_path: Path) -> None:
    """KubeRay writes `--redis-password=$REDIS_PASSWORD` into KUBERAY_GEN_RAY_START_CMD (pod.go, v1.4 to v1.7)."""
    (script,) = pods_of(ray_tree("cluster"))["head"]["spec"]["containers"][0]["args"]
    (tmp_path / "ray").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "ray").chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "REDIS_PASSWORD": "s3 cret",
        "KUBERAY_GEN_RAY_START_CMD": 'ray start --head --block --redis-password="$REDIS_PASSWORD"',
    }
    script = script.replace("ulimit -n 65536; ", "")  # this machine may not allow it
    done = subprocess.run(["/bin/bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["start", "--head", "--block", "--redis-password=s3 cret"]
