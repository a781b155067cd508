"""Checkpoints that others wrote or damaged are reported, the one before is used, and memory stays bounded."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.beton.digest import digest_bytes
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.training.checkpoint import (
    METADATA,
    STATE,
    CheckpointMetadata,
    Damaged,
    Identity,
    checkpoint_name,
    load_state,
    newest_complete,
    read_metadata,
    verify_checkpoint,
    write_checkpoint,
)
from resnet_dist.training.checkpoint_manager import keep_if_best, open_best

IDENTITY = Identity("a" * 16, "train=1 val=2", ("ant", "bee"))


def save(run_dir: Path, step: int) -> Path:
    directory = run_dir / checkpoint_name(step // 10, step)
    directory.mkdir(parents=True)
    metadata = CheckpointMetadata(
        step // 10, step, IDENTITY, {"seed": 1}, {"val/top1": 97.5, "val/loss": float("nan")}, files={}
    )
    write_checkpoint(directory, state={"net": {"w": torch.arange(3.0)}, "step": step}, metadata=metadata)
    return directory


@pytest.fixture
def newest(tmp_path: Path) -> Path:
    """The newest of two checkpoints."""
    save(tmp_path, 10)
    return save(tmp_path, 20)


def falls_back(newest: Path) -> str:
    """The warning with which the checkpoint before it is used."""
    with newest_complete(FolderStorage(newest.parent)) as found:
        assert found is not None
        assert found.name == "epoch=001-step=00000010"
        (warning,) = found.warnings
    assert warning.startswith(f"{newest}")
    assert "\n" not in warning
    return warning


def rewrite(checkpoint: Path, **fields: object) -> None:
    tree = json.loads((checkpoint / METADATA).read_text()) | fields
    (checkpoint / METADATA).write_text(json.dumps(tree))


def replace_state(checkpoint: Path, data: bytes) -> None:
    """With the digest that goes with it, as whoever may write there can."""
    (checkpoint / STATE).write_bytes(data)
    rewrite(checkpoint, files={STATE: digest_bytes(data)})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"files": None}, "files: "),
        ({"files": {}}, "has the digests of 0 files"),
        ({"files": {STATE: 5}}, "files.state.pt: "),
        ({"files": {STATE: "xxh3_128:" + "0" * 32}}, "a digest that does not match schema 2"),
        ({"files": {STATE: "blake3_tree:" + "0" * 64}}, "a digest that does not match schema 2"),
        ({"files": {STATE: "blake3:x"}}, "is not a digest"),
        ({"files": {"../../etc/passwd": "blake3:" + "0" * 64}}, "has the digests of 1 files"),
        ({"epoch": "1"}, "epoch: "),
        ({"step": True}, "step: "),
        ({"step": -20}, "is of epoch 2 and step -20"),
        ({"step": 21}, "is of step 21"),
        ({"metrics": {"val/top1": "97"}}, "metrics.val/top1: "),
        ({"metrics": []}, "metrics: "),
        ({"recipe": "x"}, "recipe: "),
        ({"identity": "x"}, "identity: "),
        ({"identity": {"recipe_hash": 1, "data_digest": "d"}}, "identity.recipe_hash: "),
        ({"identity": {"recipe_hash": "a", "data_digest": "d", "class_names": "ab"}}, "identity.class_names: "),
        ({"schema_version": 9}, "is of schema 9, this version reads 1 and 2"),
        ({"schema_version": "2"}, "schema_version: "),
    ],
)
def test_a_card_with_a_wrong_field_gives_way_to_the_one_before(
    newest: Path, fields: dict[str, object], reason: str
) -> None:
    rewrite(newest, **fields)
    assert reason in falls_back(newest)


@pytest.mark.parametrize(
    "text",
    ["", "null", "[" * 100_000, '{"a":' * 500, '{"step": 1, "step": 2}', "9" * 5000, "\0", '"' + "x" * (17 << 20)],
)
def test_a_checkpoint_with_invalid_metadata_is_skipped_for_the_one_before(newest: Path, text: str) -> None:
    (newest / METADATA).write_text(text)
    falls_back(newest)
    assert read_metadata(FolderStorage(newest.parent), newest.name) is None


@pytest.mark.parametrize("name", [METADATA, STATE])
@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "device"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(newest: Path, name: str, kind: str) -> None:
    path = newest / name
    data = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        (newest.parent / "elsewhere").write_bytes(data)
        path.symlink_to(newest.parent / "elsewhere")
    else:
        path.symlink_to("/dev/zero")
    falls_back(newest)


def test_best_weights_with_a_hostile_card_are_passed_over(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    metadata = CheckpointMetadata(1, 10, IDENTITY, {}, {"val/top1": 50.0}, files={})
    keep_if_best(storage, {"w": torch.zeros(1)}, metadata)
    (tmp_path / "best" / checkpoint_name(2, 20)).mkdir()
    os.mkfifo(tmp_path / "best" / checkpoint_name(2, 20) / METADATA)
    with open_best(storage, IDENTITY) as found:
        assert found is not None
        assert found.name == f"best/{checkpoint_name(1, 10)}"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(
    name=st.sampled_from(["epoch", "step", "identity", "recipe", "metrics", "files", "schema_version"]), value=ANYTHING
)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_of_a_field_is_read_or_damaged(newest: Path, name: str, value: object) -> None:
    whole = (newest / METADATA).read_text()
    rewrite(newest, **{name: value})
    try:
        verify_checkpoint(newest)
    except Damaged as damaged:
        assert "\n" not in str(damaged)  # noqa: PT017
    finally:
        (newest / METADATA).write_text(whole)


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_state_with_other_bytes_is_loaded_or_damaged(newest: Path, data: st.DataObject) -> None:
    """Whatever the digest says: whoever writes the one may write the other."""
    whole = (newest / STATE).read_bytes()
    start = data.draw(st.integers(0, len(whole) - 1))
    replace_state(
        newest, whole[:start] + data.draw(st.binary(max_size=8)) + whole[start + data.draw(st.integers(0, 8)) :]
    )
    try:
        load_state(verify_checkpoint(newest).step and newest, torch.device("cpu"))
    except Damaged as damaged:
        assert "\n" not in str(damaged)  # noqa: PT017
    finally:
        replace_state(newest, whole)


def test_checkpoints_of_the_version_before_are_used(newest: Path) -> None:
    digest = f"xxh3_128:{xxhash.xxh3_128_hexdigest((newest / STATE).read_bytes())}"
    rewrite(newest, schema_version=1, files={STATE: digest})
    assert verify_checkpoint(newest).step == 20
    state = bytearray((newest / STATE).read_bytes())
    state[len(state) // 2] ^= 1
    (newest / STATE).write_bytes(state)
    assert "digest xxh3_128:" in falls_back(newest)


# --- states whose digest is right


def saved(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def deflated(data: bytes, zeros: int) -> bytes:
    """Its storage larger by so many zeros, which take no place."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name) + (bytes(zeros) if "/data/" in name else b""))
    return target.getvalue()


def with_pickle(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            new.writestr(name, change(old.read(name)) if name.endswith("data.pkl") else old.read(name))
    return target.getvalue()


class Allocates:
    def __init__(self, what: Any, *arguments: int) -> None:
        self.what, self.arguments = what, arguments

    def __reduce__(self) -> tuple[Any, tuple[int, ...]]:
        return self.what, self.arguments


class Rebuilt:
    """A tensor whose pickle says more than its storage has."""

    def __init__(self, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.size, self.stride = size, stride

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        bare = torch.zeros(3).untyped_storage()
        storage = torch.storage.TypedStorage(wrap_storage=bare, dtype=torch.float32, _internal=True)
        return torch._utils._rebuild_tensor_v2, (storage, 0, self.size, self.stride, False, OrderedDict())


WHOLE = saved({"net": {"w": torch.zeros(3)}})
BILLION = 1_000_000_000
HOSTILE = {
    "compressed": (deflated(WHOLE, 50_000_000), "has compressed entries"),
    "a byte array": (saved({"net": {}, "x": Allocates(bytearray, 4 * BILLION)}), "refers to"),
    "torch.Tensor": (saved({"net": {}, "x": Allocates(torch.Tensor, BILLION)}), "refers to"),
    "a set": (saved({"net": {}, "x": {1, 2}}), "refers to"),
    "a large tensor": (
        saved({"net": {"w": Rebuilt((BILLION,), (1,))}}),
        "holds tensors of 4,000,000,000 bytes, more than",
    ),
    "a repeated one": (saved({"net": {"w": Rebuilt((BILLION,), (0,))}}), "holds a tensor of 4,000,000,000 bytes in 12"),
    "a strided one": (
        saved({"net": {"w": Rebuilt((2,), (BILLION,))}}),
        "holds tensors of 4,000,000,004 bytes, more than",
    ),
    "no net": (saved({"step": 1}), "holds no net"),
    "no dict": (saved([1, 2]), "holds no net"),
    "no zip": (b"rot", "File is not a zip file"),
    "not torch's": (pickle.dumps({"net": {}}), "File is not a zip file"),
    "no pickle": (with_pickle(WHOLE, lambda _: b"\x80\x02."), ""),
    "another program before it": (b"#!/bin/sh\n" + WHOLE, "something before them"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_state_of_another_kind_gives_way_to_the_one_before(newest: Path, what: str) -> None:
    data, reason = HOSTILE[what]
    replace_state(newest, data)
    assert reason in falls_back(newest)
    with pytest.raises(Damaged):
        load_state(newest, torch.device("cpu"))


def test_a_state_that_is_far_too_large_for_the_net_is_not_loaded(newest: Path) -> None:
    with (newest / STATE).open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(Damaged, match=r"has 1,073,741,824 bytes, a state of this net at most 67,1\d\d,\d\d\d"):
        load_state(newest, torch.device("cpu"), torch.nn.Linear(3, 3))


def test_states_that_refer_to_themselves_are_read_once(newest: Path) -> None:
    state: dict[str, Any] = {"net": {"w": torch.zeros(3)}}
    state["x"] = state
    level: list[Any] = []
    for _ in range(60):
        level = [level, level]
    state["y"] = level
    replace_state(newest, saved(state))
    assert verify_checkpoint(newest).step == 20


def test_hostile_states_take_no_memory(newest: Path) -> None:
    """In a process that may have 200 MB more than it has with PyTorch in it."""
    script = (
        "import resource, sys; from pathlib import Path; import torch\n"
        "from resnet_dist.training.checkpoint import Damaged, verify_checkpoint\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000,) * 2)\n"
        "for path in map(Path, sys.argv[1:]):\n"
        "    try: verify_checkpoint(path)\n"
        "    except Damaged: print('damaged')\n"
    )
    assert resource.getpagesize()
    folders = []
    for number, what in enumerate(("compressed", "a byte array", "torch.Tensor", "a large tensor")):
        folder = save(newest.parent / str(number), 20)
        replace_state(folder, HOSTILE[what][0])
        folders.append(str(folder))
    done = subprocess.run([sys.executable, "-c", script, *folders], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("damaged\n" * len(folders), 0), done.stderr
