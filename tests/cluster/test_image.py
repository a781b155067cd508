"""The image: linted, and built by the script that builds every laptop. No Docker engine is needed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from resnet_dist.gpus.device import MIN_DRIVERS

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "cluster/Dockerfile"


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def test_it_copies_what_is_there_and_may_be_seen() -> None:
    copied = [
        word for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE) for word in line.split()
    ]
    assert "cluster/setup.sh" in copied
    assert [path for path in copied if not (ROOT / path).exists()] == []
    seen = (ROOT / ".dockerignore").read_text().splitlines()
    assert [path for path in copied if f"!{path}" not in seen] == []


def test_it_ends_as_a_user_without_rights() -> None:
    assert re.findall(r"^USER (\S+)$", DOCKERFILE.read_text(), re.MULTILINE) == ["10001"]


def test_drivers_that_are_named_fit_the_locks_cuda() -> None:
    cuda = re.search(r"^nvidia-cudnn-cu(\d+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert cuda is not None
    floor = MIN_DRIVERS[int(cuda[1])]
    files = [path for path in (ROOT / "cluster").rglob("*") if path.suffix in (".md", ".yaml") or path == DOCKERFILE]
    texts = {path: path.read_text() for path in [*files, ROOT / "docs/3_bring_up_a_cluster.md"]}
    named = {path: {int(branch) for branch in re.findall(r"\bR(\d{3})\b", text)} for path, text in texts.items()}
    assert set().union(*named.values()) == {floor}
    images = [line for text in texts.values() for line in re.findall(r"images/family/(\S+)", text)]
    assert images
    for image in images:
        driver = re.search(r"nvidia-(\d{3})$", image)
        assert driver is not None, image
        assert int(driver[1]) >= floor
