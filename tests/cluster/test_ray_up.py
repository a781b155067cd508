"""`ray up`'s files pass Ray's own validator; the spot nodes' script works with both clouds' metadata servers."""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

pytestmark = pytest.mark.system

FOLDER = Path(__file__).parents[2] / "cluster/ray_up"
SCRIPT = FOLDER / "spot_node.sh"
CLOUDS = ("aws", "gcp")


def tree_of(cloud: str) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((FOLDER / f"{cloud}.yaml").read_text())
    return tree


@pytest.mark.parametrize("cloud", CLOUDS)
def test_rays_validator_accepts_it(cloud: str) -> None:
    validate_config(prepare_config(deepcopy(tree_of(cloud))))


@pytest.mark.parametrize("cloud", CLOUDS)
def test_rays_validator_would_find_a_mistake(cloud: str) -> None:
    with pytest.raises(Exception, match=r"max_worker"):
        validate_config(prepare_config({**deepcopy(tree_of(cloud)), "max_worker": 3}))


@pytest.mark.parametrize("cloud", CLOUDS)
def test_head_and_workers_are_what_they_should_be(cloud: str) -> None:
    tree = tree_of(cloud)
    types = tree["available_node_types"]
    head = types[tree["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert "spot" not in str(head).lower()
    assert {types[name]["labels"]["market"] for name in ("gpu", "gpu_spot")} == {"on-demand", "spot"}
    assert "spot" in str(types["gpu_spot"]["node_config"]).lower()
    assert "spot" not in str(types["gpu"]["node_config"]).lower()
    assert sum(t.get("max_workers", 0) for t in types.values()) <= tree["max_workers"]
    assert "--env RAY_AUTH_MODE=token" in tree["docker"]["run_options"]
    assert "--shm-size=16g" in tree["docker"]["run_options"]
    assert set(tree["file_mounts"].values()) == {"~/.ray/auth_token", "cluster/ray_up/spot_node.sh"}
    assert (FOLDER.parents[1] / "cluster/ray_up/spot_node.sh").is_file()  # `ray up` is called from the root


class Metadata(http.server.BaseHTTPRequestHandler):
    """Answers as both clouds do; `notice` is set when the node is to be reclaimed."""

    notice = threading.Event()
    was_polled = threading.Event()

    def do_PUT(self) -> None:
        self._answer(200, "token" if "X-aws-ec2-metadata-token-ttl-seconds" in self.headers else "")

    def do_GET(self) -> None:
        if self.path == "/latest/meta-data/spot/instance-action":
            known = self.headers["X-aws-ec2-metadata-token"] == "token"
            self._answer(200 if known and self.notice.is_set() else 404, '{"action": "terminate"}')
        elif self.path == "/computeMetadata/v1/instance/preempted" and self.headers["Metadata-Flavor"] == "Google":
            self._answer(200, "TRUE" if self.notice.is_set() else "FALSE")
        else:
            self._answer(403, "")
        self.was_polled.set()

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def metadata_server() -> Iterator[str]:
    Metadata.notice.clear()
    Metadata.was_polled.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def node(tmp_path: Path, metadata_server: str) -> Iterator[Any]:
    """Starts the script with a `ray` that prints how it was started and how it ended."""
    fake = tmp_path / "ray"
    fake.write_text(
        f"#!{sys.executable}\n"
        "import os, signal, sys, time\n"
        "def end(*_):\n"
        "    time.sleep(0.5); print('drained', flush=True); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print(*sys.argv[1:], os.environ['RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S'], flush=True)\n"
        "time.sleep(60)\n"
    )
    fake.chmod(0o755)
    started: list[subprocess.Popen[str]] = []

    def start(cloud: str) -> subprocess.Popen[str]:
        env = {
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "METADATA_SERVER": metadata_server,
            "POLL_S": "0.1",
        }
        started.append(
            subprocess.Popen(
                ["bash", SCRIPT, cloud, "--address=h:1"],
                env=env,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return started[0]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(("cloud", "drain_s"), [("aws", "100"), ("gcp", "20")])
def test_a_notice_drains_the_node(node: Any, cloud: str, drain_s: str) -> None:
    process = node(cloud)
    assert process.stdout.readline().split() == ["start", "--block", "--address=h:1", drain_s]
    assert Metadata.was_polled.wait(30)
    assert process.poll() is None
    Metadata.notice.set()
    out, _ = process.communicate(timeout=30)
    assert out.splitlines()[-1] == "drained"
    assert process.returncode == 143


def test_a_signal_to_the_script_is_rays(node: Any) -> None:
    process = node("aws")
    process.stdout.readline()
    assert Metadata.was_polled.wait(30)
    process.terminate()
    out, _ = process.communicate(timeout=30)
    assert out.splitlines() == ["drained"]
    assert process.returncode == 143
