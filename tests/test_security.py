"""What SECURITY.md promises, as far as files can show it."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from resnet_dist.training.checkpoint import STATE, load_state, require_plain

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[1]
PACKAGES = ("data_prep", "resnet_dist")
# Alone may build an unpickler: one to which every name is an inert stand-in.
READS_PICKLES = {"data_prep/sources/datasets/cifar.py"}
# Read what their own processes put into a folder that only this user may enter, and what they just pickled themselves.
PICKLES_TO_ITSELF = {"resnet_dist/evaluation/evaluate.py", "data_prep/bench.py"}
# Looks through a zip whose entries it requires to be stored as they are, and unpacks none to disk.
READS_ZIPS = {"resnet_dist/training/checkpoint.py"}
FORBIDDEN_CALLS = {
    "eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "marshal.loads", "shelve.open",
    "dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads", "joblib.load",
    "yaml.full_load", "yaml.unsafe_load", "yaml.load_all", "yaml.full_load_all", "yaml.unsafe_load_all",
    "tarfile.open", "zipfile.ZipFile", "shutil.unpack_archive", "tempfile.mktemp", "torch.hub.load",
}  # fmt: skip
SECRETS = {
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "an AWS key": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "a GitHub token": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{36}\b"),
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}\b"),
    "a Slack token": re.compile(r"\bxox[abpr]-[A-Za-z0-9-]{10,}"),
    "a Google key": re.compile(r"\bAIza[0-9A-Za-z_-]{35}\b"),
}
# In files that start something: a name of a secret with a value that is no reference to the environment.
WRITTEN_DOWN = re.compile(
    r"""(?ix) \b[\w.-]*(?:password|passwd|secret|token|api_?key|access_?key(?!_id))[\w.-]*
        (?:\s*=|:)\s* ["']? (?!\$|\{|\.\.\.|null|true|false|token\b|disabled\b|required\b|["'\s]) [\w+/=-]{6,}"""
)


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def text_of(path: Path) -> str:
    data = path.read_bytes()
    return "" if b"\0" in data else data.decode("utf-8", "replace")


def modules() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keywords(call: ast.Call) -> dict[str, str]:
    return {keyword.arg or "**": ast.unparse(keyword.value) for keyword in call.keywords}


def test_no_file_holds_a_secret() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {what}"
        for path in tracked_files()
        for what, pattern in SECRETS.items()
        if pattern.search(text_of(path))
    ]
    assert found == []


def test_no_deployment_file_has_a_password_written_down() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {hit.group()}"
        for path in tracked_files()
        if path.is_relative_to(ROOT / "cluster") or path.suffix in {".env", ".ini", ".cfg"}
        for line in text_of(path).splitlines()
        if (hit := WRITTEN_DOWN.search(line.partition("#")[0]))
        and not re.search(r"secretKeyRef|secretName|--from-literal|valueFrom", line)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("line", "is_one"),
    [
        ("POSTGRES_PASSWORD: hunter2hunter2", True),
        ("export AWS_SECRET_ACCESS_KEY='abcdefghijkl'", True),
        ("RAY_AUTH_TOKEN=0123456789abcdef", True),
        ("POSTGRES_PASSWORD: ${MLFLOW_DB_PASSWORD:?export it first}", False),
        ("RAY_AUTH_MODE=token", False),
        ("AWS_ACCESS_KEY_ID: resnet-dist", False),  # a user's name
        ("HttpTokens: required", False),
        ("AWS_SECRET_ACCESS_KEY: ${AWS_SECRET_ACCESS_KEY:-}", False),
    ],
)
def test_state_counted_as_written(line: str, is_one: bool) -> None:
    assert bool(WRITTEN_DOWN.search(line)) == is_one


def test_nothing_is_run_or_unpacked_that_came_as_data() -> None:
    found = [(name, call) for name, tree in modules() for call, _ in calls(tree) if call in FORBIDDEN_CALLS]
    allowed = {(name, "zipfile.ZipFile") for name in READS_ZIPS}
    found = [hit for hit in found if hit not in allowed]
    assert [hit for hit in found if hit[0] not in PICKLES_TO_ITSELF or not hit[1].startswith("pickle.")] == []
    unpicklers = {name for name, tree in modules() if "Unpickler" in ast.unparse(tree)}
    assert unpicklers == READS_PICKLES
    shells = [name for name, tree in modules() for _, call in calls(tree) if keywords(call).get("shell") == "True"]
    assert shells == []
    arrays = [name for name, tree in modules() for _, call in calls(tree) if "allow_pickle" in keywords(call)]
    assert arrays == []


def test_weights_are_loaded_as_weights_only() -> None:
    loads = [(name, keywords(call)) for name, tree in modules() for what, call in calls(tree) if what == "torch.load"]
    assert loads
    assert [name for name, given in loads if given.get("weights_only") != "True"] == []


def test_yaml_is_read_by_one_safe_loader() -> None:
    """`parse_yaml` bounds what it builds; nothing else parses YAML."""
    from resnet_dist.config import yaml_text

    parsers = {
        name for name, tree in modules() for what, _ in calls(tree) if re.fullmatch(r"yaml\.\w*(load|parse)", what)
    }
    assert parsers <= {"resnet_dist/config/yaml_text.py"}
    loaders = [value for value in vars(yaml_text).values() if isinstance(value, type) and "Loader" in value.__name__]
    assert [issubclass(loader, yaml.SafeLoader) for loader in loaders] == [True]


class Harm:
    """Unpickled, it would leave a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return Path.touch, (self.marker,)  # type: ignore[return-value]


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    torch.save({"net": Harm(marker)}, tmp_path / STATE)
    with (tmp_path / STATE).open("rb") as file, pytest.raises(ValueError, match="refers to"):
        require_plain(file)
    with pytest.raises(UnpicklingError):
        load_state(tmp_path, torch.device("cpu"))
    assert not marker.exists()


LOCKS = ("requirements.lock", "cluster/mlflow/requirements.lock")


def pins_of(lock: str) -> dict[Requirement, int]:
    """Each pinned requirement, and how many hashes it has."""
    text = (ROOT / lock).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    return {Requirement(line.partition("--hash")[0]): line.count("--hash=sha256:") for line in lines}


@pytest.mark.parametrize("lock", LOCKS)
def test_the_lock_pins_everything_once_and_by_hash(lock: str) -> None:
    pins = pins_of(lock)
    assert len(pins) > 60
    assert [str(pin) for pin, num_hashes in pins.items() if num_hashes == 0] == []
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "==", pin
        assert "*" not in specifier.version, pin
        assert pin.url is None, pin
    counts = Counter(canonicalize_name(pin.name) for pin in pins)
    assert [name for name, count in counts.items() if count > 1] == []


def test_the_lock_covers_the_projects_requirements() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"]["dev"])]
    pinned = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins_of("requirements.lock")}
    for requirement in asked:
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in the lock"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} but {version} in the lock"


def deployments() -> Iterator[tuple[str, Any]]:
    for path in sorted((ROOT / "cluster").rglob("*.y*ml")):
        for tree in yaml.safe_load_all(path.read_text()):
            if isinstance(tree, dict):
                yield path.relative_to(ROOT).as_posix(), tree


def compose_services() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, tree in deployments():
        for service, spec in tree.get("services", {}).items() if "compose" in name else ():
            yield f"{name}: {service}", spec


def test_containers_can_gain_no_rights() -> None:
    services = dict(compose_services())
    assert len(services) >= 7
    for name, spec in services.items():
        assert spec.get("cap_drop") == ["ALL"], name
        assert spec.get("security_opt") == ["no-new-privileges:true"], name
        assert not spec.get("privileged"), name


def test_nodes_are_administrators_of_nothing() -> None:
    """Whoever submits a job reads its nodes' environment."""
    nodes = {name: spec for name, spec in compose_services() if re.search(r": (head|worker|convert)$", name)}
    assert len(nodes) == 3
    for name, spec in nodes.items():
        assert spec["environment"]["MLFLOW_TRACKING_USERNAME"] == "nodes", name
        assert spec["environment"]["AWS_ACCESS_KEY_ID"] == "nodes", name
        assert not re.search("ADMIN|BUCKET_PASSWORD|DB_PASSWORD", str(spec)), name


def test_kuberay_workers_hold_no_token_of_kubernetes() -> None:
    groups = [group for name, tree in deployments() if "kuberay" in name and "overlays" not in name
              for group in worker_groups(tree)]  # fmt: skip
    assert len(groups) >= 6
    for group in groups:
        assert group["template"]["spec"].get("automountServiceAccountToken") is False, group["groupName"]


def worker_groups(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield from (group for group in tree.get("workerGroupSpecs", ()) if "template" in group)
        for value in tree.values():
            yield from worker_groups(value)


@pytest.mark.parametrize(
    ("hosts", "is_good"),
    [
        ("mlflow.example.org:5000,10.0.0.7:*,[::1]:5000,localhost", True),
        ("10.*", False),  # 10.evil.example is a name that anybody can own
        ("mlflow.example.org:5000,*", False),
        ("*.example.org", False),
        ("a b", False),
    ],
)
def test_the_mlflow_server_accepts_full_names_only(hosts: str, is_good: bool) -> None:
    """A wrong PG_USER ends the script behind the check."""
    env = {"PATH": "/usr/bin:/bin", "ALLOWED_HOSTS": hosts, "PG_USER": "!"}
    server = ROOT / "cluster/mlflow/server.sh"
    done = subprocess.run(["bash", server], env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert ("ALLOWED_HOSTS" not in done.stderr) == is_good
    given = [
        host
        for name, tree in deployments()
        for host in re.findall(r"allowed-hosts=(?:\$\{\w+:-)?([^}\s']+)", str(tree))
    ]
    assert given
    for host in ",".join(given).split(","):
        assert re.fullmatch(r"[\w.-]+(:(\d+|\*))?", host), host


def test_the_licence_is_there() -> None:
    assert (ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")


def test_kuberay_clusters_ask_for_a_token() -> None:
    for name, tree in deployments():
        kind = tree.get("kind")
        if kind in ("RayCluster", "RayJob") and "template" not in tree:
            spec = tree["spec"].get("rayClusterSpec", {}) if kind == "RayJob" else tree["spec"]
            # A patch of an overlay says only what it changes; a job may use a cluster that is there.
            if "headGroupSpec" in spec and "rayVersion" in spec:
                assert spec.get("authOptions", {}).get("mode") == "token", name


def test_everything_else_that_starts_ray_requires_a_token() -> None:
    code: dict[Path, str] = {}
    for path in tracked_files():
        if path.is_relative_to(ROOT / "cluster") and path.suffix != ".md" and "kuberay" not in path.parts:
            lines = [line.partition("#")[0] for line in text_of(path).splitlines()]
            code[path.parent] = code.get(path.parent, "") + "\n".join(lines)
    for folder, text in code.items():
        if re.search(r"\bray (start|symmetric-run)\b", text):
            assert re.search(r"RAY_AUTH_MODE[\"']?\s*[:=]\s*[\"']?token", text), f"{folder}: starts Ray without a token"


def test_every_test_that_the_security_page_names_is_there() -> None:
    named = re.findall(r"`((?:tests/|test_)[\w/.*]+)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 15
    for name in named:
        pattern = name if name.startswith("tests/") else f"tests/**/{name}"
        assert list(ROOT.glob(pattern.rstrip("/"))), name


def test_ray_tokens_are_made_readable_for_their_owner_alone() -> None:
    """`ray get-auth-token --generate` leaves its file to the umask."""
    pages = [
        path
        for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*"), *(ROOT / "cluster").rglob("*"))
        if path.is_file()
    ]
    lines = [line for page in pages for line in page.read_text(encoding="utf-8", errors="ignore").splitlines()]
    made = [line for line in lines if "get-auth-token --generate" in line]
    assert len(made) >= 4
    assert [line for line in made if "(umask 077; ray get-auth-token --generate)" not in line] == []
