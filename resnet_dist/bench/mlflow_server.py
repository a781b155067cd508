"""An MLflow server for fault tests: `mlflow server` with its own sqlite, which can be killed, frozen and restarted."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from resnet_dist.errors import Fault

_START_LIMIT_S = 120.0


class MlflowServer:
    """On a free port of 127.0.0.1; its database and artifacts are in `folder`, its output in `server.log` there.

    It ends with the process that started it, even if that is killed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        wrapper: Sequence[str] = (),
    ) -> None:
        """`options`: further options of `mlflow server`; `wrapper`: a command that starts the command after it."""
        self.folder = folder
        self.database = folder / "mlflow.db"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._options = options
        self._environment = environment or {}
        self._wrapper = wrapper
        self._process: subprocess.Popen[Any] | None = None
        self._guard: subprocess.Popen[Any] | None = None

    @property
    def is_up(self) -> bool:
        """Whether it was started and not killed; it may be frozen."""
        return self._process is not None

    @property
    def pid(self) -> int:
        """The pid of the first process of its group. Raises Fault if it is not up."""
        if self._process is None:
            raise Fault(f"{self.folder}: this MLflow server is not up")
        return self._process.pid

    def start(self) -> None:
        """Returns when it responds; does nothing if it is up. Raises Fault with its output if it does not come up."""
        if self._process is not None:
            return
        command = [*self._wrapper, sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--backend-store-uri", f"sqlite:///{self.database}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts"), *self._options]
        log = self.folder / "server.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                # Without job execution: a dozen processes fewer.
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **self._environment},
                stdout=output,
                stderr=output,
                start_new_session=True,  # its workers outlive a killed parent
            )
        # However this process ends, the pipe to the guard is closed, and the server is not left behind.
        self._guard = subprocess.Popen(
            ["sh", "-c", 'read -r _; kill -s KILL -- "-$0"', str(self._process.pid)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline_s = time.monotonic() + _START_LIMIT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self.kill()
                raise Fault(f"the MLflow server does not come up: {log.read_text(encoding='utf-8')[-2000:]}")
            time.sleep(0.1)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to all of its processes."""
        os.killpg(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to all of its processes; does nothing if it is not up."""
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
            self._guard = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                return True
        except OSError:
            return False
