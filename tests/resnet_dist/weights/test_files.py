"""Files of weights as people have them, and what they have instead."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Linear
from torch.optim import SGD

from resnet_dist.errors import UserError
from resnet_dist.weights.files import digest_of, read_file
from resnet_dist.weights.source import read_weights

WEIGHTS = {"conv1.weight": torch.arange(12.0).reshape(2, 6, 1, 1), "bn1.bias": torch.ones(2)}


def saved(folder: Path, content: Any, name: str = "weights.pth", **options: Any) -> Path:
    torch.save(content, folder / name, **options)
    return folder / name


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        {"state_dict": {f"module.{name}": value for name, value in WEIGHTS.items()}, "best_prec1": 91.7},
        {"model": {f"_orig_mod.module.{name}": value for name, value in WEIGHTS.items()}, "epoch": 3},
        {"model": {f"module._orig_mod.{name}": value for name, value in WEIGHTS.items()}},
        {f"model.{name}": value for name, value in WEIGHTS.items()},
        {"state_dict": {name: value + 1 for name, value in WEIGHTS.items()}, "state_dict_ema": WEIGHTS},
        {
            "model": {name: value + 1 for name, value in WEIGHTS.items()},
            "model_ema": {
                "n_averaged": torch.tensor(5),
                **{f"module.{name}": value for name, value in WEIGHTS.items()},
            },
            "optimizer": SGD(Linear(2, 2).parameters(), lr=1.0).state_dict(),
            "args": argparse.Namespace(lr=0.5, path=None),
            "best": np.float64(76.1),
        },
        {"state_dict": WEIGHTS, "ema": {"decay": torch.ones(1)}},
        {"model": {"state_dict": WEIGHTS}},
        {**WEIGHTS, "bn1.num_batches_tracked": torch.tensor(3), "step": torch.tensor(7)},
    ],
)
def test_wrappings_of_other_projects(content: Any, tmp_path: Path) -> None:
    state = read_file(saved(tmp_path, content))
    state.pop("bn1.num_batches_tracked", None)
    assert same(state, WEIGHTS)


def test_every_format_has_the_same_digest(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(WEIGHTS, tmp_path / "w.safetensors")
    files = [
        saved(tmp_path, WEIGHTS, "w.pth"),
        saved(tmp_path, {"state_dict": dict(reversed(WEIGHTS.items()))}, "w.th", _use_new_zipfile_serialization=False),
        tmp_path / "w.safetensors",
    ]
    assert all(same(read_file(path), WEIGHTS) for path in files)
    (digest,) = {read_weights(str(path)).digest for path in files}
    assert len(digest) == 64
    assert digest != digest_of({**WEIGHTS, "bn1.bias": torch.zeros(2)})


def contains_itself() -> dict[str, Any]:
    content: dict[str, Any] = dict(WEIGHTS)
    content["ema"] = content
    return content


class RunsCode:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/ran",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"ResNet-20 gets 91.73 % on CIFAR-10.\n", "is not a file that torch.save or safetensors wrote"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS"),
        (b"PK\x03\x04" + bytes(100), "is damaged or not a file that torch.save wrote"),
        (RunsCode(), r"is a pickle that would run code \((os|posix)\.system\)"),
        (Linear(2, 2), r"is a pickle that would run code \(torch\.nn\.modules\.linear\.Linear\)"),
        (
            {"optimizer": SGD(Linear(2, 2).parameters(), lr=1.0).state_dict()},
            "holds no weights of a net, only optimizer",
        ),
        ([torch.zeros(2)], "holds a list, not weights by name"),
        ({"x.weight": torch.zeros(1).expand(4096, 4096, 64)}, "claims .* more than the file can hold"),
        (contains_itself(), "nests its weights 5 mappings deep"),
        ({"x.weight": torch.eye(3).to_sparse()}, r"its x\.weight is a sparse or nested tensor"),
        ({"x.weight": torch.zeros(3, 3, device="meta")}, r"its x\.weight is on the device meta, without values"),
        ({"x.weight": torch.zeros(3, 3, dtype=torch.int8)}, r"its x\.weight is of torch\.int8: .* are quantised"),
        ({"x.weight": torch.zeros(3, 3).to(torch.float8_e4m3fn)}, r"its x\.weight is of torch\.float8.* quantised"),
        ({"x.weight": torch.zeros(3, 3, dtype=torch.complex64)}, r"its x\.weight is of complex numbers"),
    ],
)
def test_what_is_not_weights_is_one_clear_line(content: Any, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=rf"weights\.pth: {reason}") as caught:
        read_file(path)
    assert "\n" not in str(caught.value)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    whole = saved(tmp_path, WEIGHTS).read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.safetensors").write_bytes(whole[:100])
    torch.jit.script(Linear(2, 2)).save(tmp_path / "program.pt")
    for name, reason in {
        "cut.pth": "is damaged",
        "cut.safetensors": "is damaged or not a safetensors file",
        "program.pt": "is a TorchScript program",
        "missing.pth": "No such file",
    }.items():
        with pytest.raises(UserError, match=rf"{name}: .*{reason}"):
            read_weights(str(tmp_path / name))
