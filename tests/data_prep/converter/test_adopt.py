"""A beton without a manifest gets one, if all of it can be trained on. Real stock betons: `beton/test_ffcv.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.beton import layout
from data_prep.beton.manifest import load_manifest
from data_prep.beton.reader import BetonReader
from data_prep.converter.adopt import adopt
from data_prep.converter.verify import verify
from data_prep.errors import Fault, UserError


@pytest.fixture
def stock(tmp_path: Path, convert_here) -> Path:
    """Eight samples of classes 0, 1, 2, half of them raw, with the allocation table in another order."""
    output = tmp_path / "val.beton"
    convert_here("synthetic", "n=8,size=32..64,classes=3", output, encode="mixed", raw_share=0.5)
    for beside in tmp_path.glob("val.*"):
        if beside != output:
            beside.unlink()
    data = bytearray(output.read_bytes())
    table = np.frombuffer(data, dtype=layout.ALLOCATION, offset=len(data) - 8 * layout.ALLOCATION.itemsize).copy()
    data[len(data) - table.nbytes :] = table[::-1].tobytes()
    output.write_bytes(data)
    return output


def set_label(beton: Path, value: int) -> None:
    data = np.frombuffer(bytearray(beton.read_bytes()), dtype=np.uint8)
    rows = data[layout.METADATA_START :][: 8 * layout.SAMPLE_METADATA.itemsize].view(layout.SAMPLE_METADATA)
    rows["label"][3] = value
    beton.write_bytes(data.tobytes())


def test_an_adopted_beton_is_as_good_as_a_converted_one(stock: Path, data_prep: Callable[..., object]) -> None:
    before = stock.read_bytes(), stock.stat().st_mtime_ns
    manifest = adopt(stock)
    assert (stock.read_bytes(), stock.stat().st_mtime_ns) == before
    assert manifest == load_manifest(stock)
    assert (manifest.class_names, manifest.class_counts) == (("0", "1", "2"), (3, 3, 2))
    assert manifest.statistics["num_images"] == 8
    assert (manifest.source["name"], manifest.source["split"]) == ("adopted", "val")
    report = verify(stock)
    assert (report.problems, report.num_decoded) == ((), 8)
    (stock.parent / "names").write_text("cat\ndog\nemu\nowl\n")
    result = data_prep("adopt", stock, "--classes", stock.parent / "names")  # again, with names
    assert (result.returncode, "8 images of 4 classes" in result.stdout) == (0, True)
    assert load_manifest(stock).class_counts == (3, 3, 2, 0)


def test_damage_and_odd_labels_are_named(stock: Path) -> None:
    with pytest.raises(UserError, match=r"sample 2 has label 2, and 2 classes are listed \(a, b\): is it the list of"):
        adopt(stock, ["a", "b"])
    with pytest.raises(UserError, match="class_names: class 1 is"):
        adopt(stock, ["a", "", "c"])
    set_label(stock, -1)
    with pytest.raises(UserError, match=r"sample 3 has label -1; .* regression are not supported"):
        adopt(stock)
    set_label(stock, 0)
    reader = BetonReader(stock)
    jpeg = np.flatnonzero(reader.modes == layout.MODE_JPEG)[:2]
    data = bytearray(stock.read_bytes())
    for index in jpeg:
        end = int(reader.pointers[index] + reader.sizes[index])
        data[end - 200 : end] = bytes(200)
    stock.write_bytes(data)
    with pytest.raises(UserError, match=rf"2 of 8 samples cannot be trained on: {jpeg[0]} \(.*, {jpeg[1]} \("):
        adopt(stock)
    stock.write_bytes(data[:-30])
    with pytest.raises(UserError, match="cut short or damaged"):
        adopt(stock)
    assert [path.name for path in stock.parent.iterdir()] == ["val.beton"]


def test_a_beton_that_changes_or_has_a_manifest_is_not_adopted(stock: Path, convert_here) -> None:
    def grow(done: int, total: int) -> None:
        with stock.open("ab") as file:
            file.write(b"x")

    with pytest.raises(Fault, match="changed while it was read"):
        adopt(stock, on_decoded=grow)
    made = stock.with_name("made.beton")
    convert_here("synthetic", "n=2", made)
    with pytest.raises(UserError, match="has a manifest beside it already"):
        adopt(made)
