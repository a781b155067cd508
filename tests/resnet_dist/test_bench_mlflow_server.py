"""The MLflow server of benchmarks and tests ends with the process that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STARTER = """
import sys, time
from pathlib import Path
from resnet_dist.bench.mlflow_server import MlflowServer
server = MlflowServer(Path(sys.argv[1]), wrapper=[sys.executable, sys.argv[2]])
server.start()
print(server.pid, flush=True)
time.sleep(60)
"""
ANSWERS = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_does_not_outlive_a_starter_that_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    answers = tmp_path / "answers.py"
    answers.write_text(ANSWERS)
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path), str(answers)], stdout=subprocess.PIPE, text=True
    )
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    os.killpg(pid, signal.SIGSTOP)  # a bench freezes its server
    starter.send_signal(number)
    assert starter.wait(10) == -number
    starter.stdout.close()
    deadline = time.monotonic() + 30
    while not ended(pid):
        assert time.monotonic() < deadline, "the server is still there"
        time.sleep(0.02)
