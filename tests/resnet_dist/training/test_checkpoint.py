"""One checkpoint: complete or damaged, of this run or refused, and never more trusted than plain tensors."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_run as small
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_run import IDENTITY

from data_prep.beton.digest import digest_bytes
from resnet_dist.errors import Fault, UserError
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.training import checkpoint
from resnet_dist.training.checkpoint import (
    METADATA,
    STATE,
    CheckpointMetadata,
    Damaged,
    checkpoint_name,
    load_state,
    require_same,
    step_of,
    verify_checkpoint,
    write_checkpoint,
)
from resnet_dist.training.checkpoint_manager import newest_complete, read_metadata

CPU = torch.device("cpu")


@pytest.fixture
def newest(tmp_path: Path) -> Path:
    """The newest of two checkpoints."""
    small.save(tmp_path, 10)
    return small.save(tmp_path, 20, top1=97.5, loss=float("nan"))


def falls_back(newest: Path) -> str:
    """The warning with which the checkpoint before it is used: one line that names the damaged one."""
    with newest_complete(FolderStorage(newest.parent)) as found:
        assert found is not None
        assert found.name == "epoch=001-step=00000010"
        (warning,) = found.warnings
    assert warning.startswith(f"{newest}")
    assert "\n" not in warning
    return warning


def rewrite(directory: Path, **fields: object) -> None:
    tree = json.loads((directory / METADATA).read_text()) | fields
    (directory / METADATA).write_text(json.dumps(tree))


def replace_state(directory: Path, data: bytes) -> None:
    """With the digest that goes with it, as whoever may write there can."""
    (directory / STATE).write_bytes(data)
    rewrite(directory, files={STATE: digest_bytes(data)})


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_round_trip(tmp_path: Path) -> None:
    directory = small.save(tmp_path, 25, top1=97.5)
    metadata = verify_checkpoint(directory)
    assert (metadata.epoch, metadata.step, metadata.identity, metadata.metrics) == (2, 25, IDENTITY, {"top1": 97.5})
    state = load_state(directory, CPU)
    assert state["step"] == 25
    assert torch.equal(state["net"]["w"], torch.arange(3.0))


def test_names() -> None:
    assert checkpoint_name(7, 12345) == "epoch=007-step=00012345"
    assert step_of("epoch=007-step=00012345") == 12345
    assert step_of("epoch=1234-step=123456789") == 123456789
    assert [step_of(n) for n in ("epoch=7", "recipe.yaml", "epoch=007-step=00012345.tmp")] == [None] * 3


def test_another_recipe_or_other_data_are_refused_naming_the_difference() -> None:
    recipe = small.recipe()
    found = CheckpointMetadata(1, 10, IDENTITY, recipe.model_dump(mode="json"), {}, files={})
    require_same(found, IDENTITY, recipe, "runs/r")
    faster = small.recipe(optim={"lr": 0.02})
    with pytest.raises(UserError, match=r"runs/r: .*optim\.lr 0\.05 -> 0\.02 .*recipe -> other.*new --name"):
        require_same(found, replace(IDENTITY, recipe_hash="other"), faster, "runs/r")
    with pytest.raises(UserError, match=r"trained on data data, data_root now holds other"):
        require_same(found, replace(IDENTITY, data_digest="other"), recipe, "runs/r")
    with pytest.raises(UserError, match=r"under other class names: .*the manifests that the run began with"):
        require_same(found, replace(IDENTITY, class_names=("ant", "wasp")), recipe, "runs/r")


def test_a_full_disk_is_reported_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's zip writer hides it; /dev/full gives what a full disk gives."""
    monkeypatch.setattr(checkpoint, "create", lambda path: Path("/dev/full").open("wb"))  # noqa: SIM115
    metadata = CheckpointMetadata(0, 1, IDENTITY, {}, {}, files={})
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path, state={"net": {"w": torch.zeros(100_000)}}, metadata=metadata)


# Damage


@pytest.mark.parametrize("missing", [METADATA, STATE])
def test_a_half_copied_checkpoint_is_damaged(newest: Path, missing: str) -> None:
    (newest / missing).unlink()
    with pytest.raises(Damaged, match=r"has no checkpoint\.json|state\.pt: is missing"):
        verify_checkpoint(newest)
    falls_back(newest)


def test_a_flipped_bit_is_damage_in_checkpoints_of_both_schemas(newest: Path) -> None:
    whole = (newest / STATE).read_bytes()
    digests = {1: f"xxh3_128:{xxhash.xxh3_128_hexdigest(whole)}", 2: digest_bytes(whole)}
    for schema_version, digest in digests.items():
        (newest / STATE).write_bytes(whole)
        rewrite(newest, schema_version=schema_version, files={STATE: digest})
        assert verify_checkpoint(newest).step == 20
        flip_a_bit(newest / STATE)
        assert f"expected {digest}: the checkpoint is damaged" in falls_back(newest)


@pytest.mark.parametrize(("error", "expected"), [(errno.ESTALE, Fault), (errno.EACCES, Fault), (errno.EIO, Damaged)])
def test_storage_that_does_not_respond_is_no_damage(
    error: int, expected: type[Exception], newest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> bytes:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(checkpoint, "read_small", read)
    with pytest.raises(Fault, match="cannot be read") as raised:
        verify_checkpoint(newest)
    assert type(raised.value) is expected


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
def test_metadata_with_a_wrong_field_give_way_to_the_one_before(
    newest: Path, fields: dict[str, object], reason: str
) -> None:
    rewrite(newest, **fields)
    assert reason in falls_back(newest)


@pytest.mark.parametrize(
    "text",
    ["", "null", "[" * 100_000, '{"a":' * 500, '{"step": 1, "step": 2}', "9" * 5000, "\0", '"' + "x" * (17 << 20)],
)
def test_a_checkpoint_with_invalid_metadata_gives_way_to_the_one_before(newest: Path, text: str) -> None:
    (newest / METADATA).write_text(text)
    falls_back(newest)
    assert read_metadata(FolderStorage(newest.parent), newest.name) is None


@pytest.mark.parametrize("name", [METADATA, STATE])
@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "device"])
def test_what_is_no_ordinary_file_is_damage_and_not_waited_for(newest: Path, name: str, kind: str) -> None:
    path = newest / name
    elsewhere = path.rename(newest.parent / "elsewhere")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(elsewhere if kind == "link" else "/dev/zero")
    falls_back(newest)


# Whatever the digest says: whoever writes the one may write the other.

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["epoch", "step", "identity", "recipe", "metrics", "files", "schema_version"]


@given(name=st.sampled_from(FIELDS), value=ANYTHING)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_state_with_other_bytes_is_loaded_or_damaged(newest: Path, data: st.DataObject) -> None:
    whole = (newest / STATE).read_bytes()
    start, length = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 8))
    replace_state(newest, whole[:start] + data.draw(st.binary(max_size=8)) + whole[start + length :])
    try:
        verify_checkpoint(newest)
        load_state(newest, CPU)
    except Damaged as damaged:
        assert "\n" not in str(damaged)  # noqa: PT017
    finally:
        replace_state(newest, whole)


def saved(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def rezipped(data: bytes, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The archive with entries that `change` made of (name, content)."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target.getvalue()


class Calls:
    """Calls a function with these arguments when it is unpickled."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[object, ...]]:
        return self.function, self.arguments


def tensor(size: tuple[int, ...], stride: tuple[int, ...]) -> Calls:
    """A tensor of three numbers whose pickle gives another size."""
    bare = torch.zeros(3).untyped_storage()
    storage = torch.storage.TypedStorage(wrap_storage=bare, dtype=torch.float32, _internal=True)
    return Calls(torch._utils._rebuild_tensor_v2, storage, 0, size, stride, False, OrderedDict())


WHOLE = saved({"net": {"w": torch.zeros(3)}})
BILLION = 1_000_000_000
LARGE = "holds tensors of 4,000,000,00{} bytes, more than"
HOSTILE = {
    "compressed": (
        rezipped(WHOLE, lambda name, old: old + bytes(50_000_000 * ("/data/" in name)), zipfile.ZIP_DEFLATED),
        "has compressed entries",
    ),
    "code": (saved({"net": Calls(print, "a checkpoint ran code")}), "refers to"),
    "a byte array": (saved({"net": {}, "x": Calls(bytearray, 4 * BILLION)}), "refers to"),
    "torch.Tensor": (saved({"net": {}, "x": Calls(torch.Tensor, BILLION)}), "refers to"),
    "a set": (saved({"net": {}, "x": {1, 2}}), "refers to"),
    "a large tensor": (saved({"net": {"w": tensor((BILLION,), (1,))}}), LARGE.format(0)),
    "a repeated one": (saved({"net": {"w": tensor((BILLION,), (0,))}}), "holds a tensor of 4,000,000,000 bytes in 12"),
    "a strided one": (saved({"net": {"w": tensor((2,), (BILLION,))}}), LARGE.format(4)),
    "no net": (saved({"step": 1}), "holds no net"),
    "no dict": (saved([1, 2]), "holds no net"),
    "no zip": (b"rot", "File is not a zip file"),
    "not torch's": (pickle.dumps({"net": {}}), "File is not a zip file"),
    "no pickle": (rezipped(WHOLE, lambda name, old: b"\x80\x02." if name.endswith("data.pkl") else old), ""),
    "another program before it": (b"#!/bin/sh\n" + WHOLE, "something before them"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_state_gives_way_to_the_one_before(newest: Path, what: str) -> None:
    data, reason = HOSTILE[what]
    replace_state(newest, data)
    assert reason in falls_back(newest)


def test_a_state_that_is_far_too_large_for_the_net_is_not_loaded(newest: Path) -> None:
    with (newest / STATE).open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(Damaged, match=r"has 1,073,741,824 bytes, a state of this net at most 67,1\d\d,\d\d\d"):
        load_state(newest, CPU, torch.nn.Linear(3, 3))


def test_states_that_refer_to_themselves_are_read_once(newest: Path) -> None:
    state: dict[str, Any] = {"net": {"w": torch.zeros(3)}}
    state["x"] = state
    level: list[Any] = []
    for _ in range(60):
        level = [level, level]
    replace_state(newest, saved(state | {"y": level}))
    assert verify_checkpoint(newest).step == 20


def test_hostile_states_take_no_memory(tmp_path: Path) -> None:
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
    large = ("compressed", "a byte array", "torch.Tensor", "a large tensor")
    folders = [small.save(tmp_path / what, 20) for what in large]
    for folder in folders:
        replace_state(folder, HOSTILE[folder.parent.name][0])
    command = [sys.executable, "-c", script, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("damaged\n" * len(folders), 0), done.stderr
