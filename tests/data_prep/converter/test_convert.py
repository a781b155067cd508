"""A conversion in one process: the bytes it makes, what it refuses, how it continues."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import native as native_library
from data_prep.beton.layout import MODE_JPEG
from data_prep.beton.manifest import load_manifest, manifest_path
from data_prep.beton.reader import BetonReader
from data_prep.converter.context import ThisProcess
from data_prep.converter.convert import PUBLISHING, convert
from data_prep.converter.encode import Encoded
from data_prep.converter.output import FileOutput, work_path
from data_prep.converter.plan import (
    IN_SOURCE,
    UNIT_SAMPLES,
    BadSampleReport,
    PartWriter,
    WorkUnit,
    make_plan,
    part_name,
    read_part,
)
from data_prep.converter.settings import BadPolicy, ConvertSettings
from data_prep.converter.verify import verify
from data_prep.converter.write import WriteTask
from data_prep.errors import Fault, Interrupted, UserError
from data_prep.jpeg.check import decode
from data_prep.runtime.stop import StopFlag
from data_prep.sources.base import Sample, SourceDescription
from data_prep.sources.datasets.builtin import Synthetic
from data_prep.sources.image_folder import ImageFolder
from data_prep.sources.splits import SplitRequest

THREE_UNITS = Synthetic(num_samples=2 * UNIT_SAMPLES + 100, min_side=8, max_side=12, file_format="png")

needs_c = pytest.mark.skipif(not native_library.is_built(), reason="without the C all files are read whole at first")


@pytest.fixture(scope="module")
def three_units(tmp_path_factory: pytest.TempPathFactory, convert_here) -> Path:
    """The beton of `THREE_UNITS`."""
    beton = tmp_path_factory.mktemp("three-units") / "a.beton"
    convert_here(THREE_UNITS, None, beton)
    return beton


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- the bytes --------------------------------------------------------------------------------------------------------


def test_a_golden_beton(tmp_path: Path, convert_here) -> None:
    """Raw pixels of a lossless source: these bytes depend on no encoder, and must never change."""
    output = tmp_path / "golden.beton"
    outcome = convert_here(
        "synthetic", "n=40,size=90..130,classes=7,format=png", output, encode="raw", page_bytes=2 << 20
    )
    assert (
        hashlib.sha256(output.read_bytes()).hexdigest()
        == "313e9355d7f4f30331c154139e056af086fd3d470f9b07a6a078cf54ae66da33"
    )
    assert outcome.manifest.digest == "blake3_tree:12520fa6ac4a2a79621b2e349a1ed06aa0ac1a7d7fc2c2477326a87970907bf1"


def test_a_beton_is_its_images_in_order(three_units: Path) -> None:
    reader = BetonReader(three_units)
    assert len(reader) == len(THREE_UNITS)
    assert reader.manifest.num_untouched == 0  # PNGs
    for i in (0, UNIT_SAMPLES - 1, UNIT_SAMPLES, len(THREE_UNITS) - 1):
        stored = np.asarray(Image.open(io.BytesIO(reader.image_bytes(i))))
        assert np.abs(stored.astype(int) - THREE_UNITS.pixels(i)).mean() < 4
        assert reader.label(i) == i % 10
    assert names_in(three_units.parent) == ["a.beton", "a.manifest.json", "a.paths.txt.gz", "a.samples.bin"]


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_units_cover_every_sample_once_and_the_digest_knows_everything() -> None:
    source = SourceDescription("s", "here", "train", "identity", "state")
    plan = make_plan(2300, source, ConvertSettings(), {"pillow": "1"})
    assert [(u.number, u.start, u.stop) for u in plan.units] == [(0, 0, 1024), (1, 1024, 2048), (2, 2048, 2300)]
    others = [
        make_plan(2301, source, ConvertSettings(), {"pillow": "1"}),
        make_plan(2300, source, ConvertSettings(max_side=5), {"pillow": "1"}),
        make_plan(2300, source, ConvertSettings(), {"pillow": "2"}),
        make_plan(
            2300, SourceDescription("s", "here", "train", "identity", "other"), ConvertSettings(), {"pillow": "1"}
        ),
    ]
    assert len({plan.digest, *(other.digest for other in others)}) == 5


# --- parts ------------------------------------------------------------------------------------------------------------


def write_part(output: FileOutput, unit: WorkUnit, digest: str) -> Path:
    path = work_path(output.path) / part_name(unit.number)
    with output.writing(part_name(unit.number)) as file:
        part = PartWriter(file, digest, unit)
        part.put(10, Encoded(b"first", MODE_JPEG, 4, 5, untouched=False), 1, b"A" * 16, spill=True)
        part.put_bad(BadSampleReport(11, "key", "reason"))
        part.put(12, Encoded(b"second", MODE_JPEG, 6, 7, untouched=True), 2, b"B" * 15 + b"\0", spill=False)
        assert not path.exists()
        part.finish()
    return path


@pytest.fixture
def file_output(tmp_path: Path) -> FileOutput:
    output = FileOutput(tmp_path / "a.beton", "here")
    work_path(output.path).mkdir()
    return output


def test_a_damaged_part_is_noticed(file_output: FileOutput) -> None:
    unit, digest = WorkUnit(3, 10, 13), "d" * 32
    path = write_part(file_output, unit, digest)
    assert names_in(path.parent) == ["unit-000003.part"]
    part = read_part(file_output, digest, unit)
    assert part.rows["size"].tolist() == [5, 0, 6]
    assert part.rows["spill"].tolist() == [0, 0, IN_SOURCE]
    assert part.rows["width"].tolist() == [5, 0, 7]
    assert [content.tobytes() for content in part.rows["content"]] == [b"A" * 16, bytes(16), b"B" * 15 + b"\0"]
    assert part.bad == [BadSampleReport(11, "key", "reason")]
    whole = path.read_bytes()
    assert whole.startswith(b"first")
    assert b"second" not in whole
    shutil.copy(path, path.with_name(part_name(4)))
    for other_digest, other_unit in (("e" * 32, unit), (digest, WorkUnit(4, 10, 13))):
        with pytest.raises(Fault, match="is damaged or of another conversion"):
            read_part(file_output, other_digest, other_unit)
    for at in range(5, len(whole)):  # the spilled image itself is compared with its row when it is used
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(Fault, match="is damaged or of another conversion"):
            read_part(file_output, digest, unit)
    for cut_short in (whole[:-1], whole[1:], whole[:20], b""):
        path.write_bytes(cut_short)
        with pytest.raises(Fault, match="is damaged or of another conversion"):
            read_part(file_output, digest, unit)


def test_an_unfinished_part_leaves_nothing(file_output: FileOutput) -> None:
    def stop_half_way() -> None:
        with file_output.writing(part_name(0)) as file:
            PartWriter(file, "d" * 32, WorkUnit(0, 0, 3)).put(
                0, Encoded(b"x", MODE_JPEG, 4, 5, False), 1, b"A" * 16, spill=True
            )
            raise Interrupted(15)

    with pytest.raises(Interrupted):
        stop_half_way()
    assert names_in(work_path(file_output.path)) == []


# --- resuming ---------------------------------------------------------------------------------------------------------


class StopAfter(ThisProcess):
    """Stops after so many units and ranges."""

    def __init__(self, num_items: int) -> None:
        super().__init__(StopFlag())
        self.num_items = num_items

    def run(self, task, job, items):
        for item in items:
            if self.num_items == 0:
                break
            yield task(job, item)
            self.num_items -= 1
        raise Interrupted(signal.SIGTERM)


@pytest.mark.parametrize(("num_items", "num_units"), [(0, 0), (2, 2), (4, 3)])
def test_a_stopped_conversion_leaves_no_beton_and_resumes_to_the_same_files(
    num_items: int, num_units: int, tmp_path: Path, three_units: Path, convert_here
) -> None:
    output = tmp_path / "a.beton"
    with pytest.raises(Interrupted):
        convert(THREE_UNITS, output, workers=StopAfter(num_items))
    assert names_in(tmp_path) == ["a.beton.work"]
    for target in work_path(output).glob("*.unfinished"):
        assert len(list(work_path(output).glob("range-*"))) == 1
        os.truncate(target, 1000)  # as after a power cut: the note is there, the bytes are not
    assert convert_here(THREE_UNITS, None, output).num_units_resumed == num_units
    assert names_in(tmp_path) == ["a.beton", "a.manifest.json", "a.paths.txt.gz", "a.samples.bin"]
    for name in names_in(tmp_path):
        assert (tmp_path / name).read_bytes() == (three_units.parent / name).read_bytes()


def test_parts_of_another_plan_or_damaged_ones_are_not_resumed(tmp_path: Path, convert_here) -> None:
    output = tmp_path / "a.beton"
    with pytest.raises(Interrupted):
        convert(THREE_UNITS, output, workers=StopAfter(2))
    part = work_path(output) / part_name(0)
    part.write_bytes(part.read_bytes()[:-1])
    (work_path(output) / "unit-000002.part.host-1.tmp").write_bytes(b"scrap")
    kept = shutil.copytree(work_path(output), tmp_path / "b.beton.work")
    assert convert_here(THREE_UNITS, None, output).num_units_resumed == 1
    assert kept.exists()
    assert convert_here(THREE_UNITS, None, tmp_path / "b.beton", quality=80).num_units_resumed == 0


def test_done_is_done(tmp_path: Path, convert_here) -> None:
    output = tmp_path / "a.beton"
    first = convert_here("synthetic", "n=5", output)
    stamp = output.stat().st_mtime_ns
    work_path(output).mkdir()  # left by a kill after the manifest was written
    again = convert_here("synthetic", "n=5", output)
    assert names_in(tmp_path) == ["a.beton", "a.manifest.json", "a.paths.txt.gz", "a.samples.bin"]
    assert (first.already_done, again.already_done) == (False, True)
    assert again.manifest == first.manifest == load_manifest(output)
    assert output.stat().st_mtime_ns == stamp
    older = json.loads(manifest_path(output).read_text())
    del older["source"]["left_out"]  # as manifests were once
    manifest_path(output).write_text(json.dumps(older))
    assert convert_here("synthetic", "n=5", output).already_done
    for location, settings in (("n=6", {}), ("n=5", {"quality": 50})):
        with pytest.raises(UserError, match="was made from another source or with other settings"):
            convert_here("synthetic", location, output, **settings)


def test_a_beton_without_manifest_is_not_overwritten_unless_it_is_ours(tmp_path: Path, convert_here) -> None:
    output = tmp_path / "a.beton"
    output.write_bytes(b"something else")
    with pytest.raises(UserError, match="exists without a manifest"):
        convert_here("synthetic", "n=5", output)
    assert output.read_bytes() == b"something else"
    work_path(output).mkdir()  # of a conversion that had not come to that
    with pytest.raises(UserError, match="exists without a manifest"):
        convert_here("synthetic", "n=5", output)
    (work_path(output) / PUBLISHING).touch()  # killed between the beton and its manifest
    assert not convert_here("synthetic", "n=5", output).already_done
    assert load_manifest(output).num_samples == 5


def test_two_conversions_do_not_share_an_output(tmp_path: Path, convert_here) -> None:
    output = tmp_path / "a.beton"
    with FileOutput(output, "here").owned(), pytest.raises(UserError, match="another data-prep is writing it"):
        convert_here("synthetic", "n=5", output)
    assert convert_here("synthetic", "n=5", output).manifest.num_samples == 5


# --- bad samples ------------------------------------------------------------------------------------------------------


def test_bad_samples_are_all_listed_and_nothing_is_written(image_tree: Path, tmp_path: Path, convert_here) -> None:
    good = (image_tree / "cat" / "0.JPEG").read_bytes()
    (image_tree / "cat" / "1.JPEG").write_bytes(good[: len(good) // 2])
    (image_tree / "dog" / "0.JPEG").write_bytes(b"")
    (image_tree / "emu" / "1.JPEG").write_bytes(b"<html>not found</html>")
    output = tmp_path / "a.beton"

    with pytest.raises(UserError) as error:
        convert_here("image-folder", str(image_tree), output)

    assert "3 of 6 images cannot be stored (first: cat/1.JPEG is damaged: Premature end" in str(error.value)
    assert str(output.with_suffix(".bad-samples.tsv")) in str(error.value)
    listed = [line.split("\t") for line in output.with_suffix(".bad-samples.tsv").read_text().splitlines()]
    assert [row[:2] for row in listed] == [
        ["index", "key"],
        ["1", "cat/1.JPEG"],
        ["2", "dog/0.JPEG"],
        ["5", "emu/1.JPEG"],
    ]
    assert [row[2] for row in listed[2:]] == ["is empty", "is a web page; the download went wrong: load the file again"]
    assert not output.exists()
    assert not manifest_path(output).exists()

    for name in ("cat/1", "dog/0", "emu/1"):
        (image_tree / f"{name}.JPEG").write_bytes(good)
    assert convert_here("image-folder", str(image_tree), output).manifest.num_samples == 6
    assert not output.with_suffix(".bad-samples.tsv").exists()


def test_quarantine_leaves_bad_samples_out_and_lists_them(image_tree: Path, tmp_path: Path, convert_here) -> None:
    good = (image_tree / "cat" / "0.JPEG").read_bytes()
    (image_tree / "cat" / "1.JPEG").write_bytes(good[: len(good) // 2])
    (image_tree / "emu" / "0.JPEG").write_bytes(b"")
    output = tmp_path / "a.beton"

    for max_bad, allowed in (("0.1%", 0), ("1", 1), ("33%", 1)):
        with pytest.raises(UserError, match=f"2 of 6 images cannot be stored, --max-bad {max_bad} allows {allowed}"):
            convert_here("image-folder", str(image_tree), output, max_bad=max_bad)
        assert not output.exists()
        assert len(output.with_suffix(".bad-samples.tsv").read_text().splitlines()) == 3

    manifest = convert_here("image-folder", str(image_tree), output, max_bad="34%").manifest
    assert not output.with_suffix(".bad-samples.tsv").exists()
    assert [(q["index"], q["key"]) for q in manifest.quarantined] == [(1, "cat/1.JPEG"), (4, "emu/0.JPEG")]
    assert manifest.quarantined[1]["reason"] == "is empty"
    listed = [line.split("\t")[:2] for line in output.with_suffix(".quarantine.tsv").read_text().splitlines()]
    assert listed == [["index", "key"], ["1", "cat/1.JPEG"], ["4", "emu/0.JPEG"]]
    assert manifest.class_counts == (1, 2, 1)
    reader = BetonReader(output)
    kept = ["cat/0", "dog/0", "dog/1", "emu/1"]
    assert [bytes(reader.image_bytes(i)) for i in range(4)] == [
        (image_tree / f"{name}.JPEG").read_bytes() for name in kept
    ]
    assert reader.labels.tolist() == [0, 1, 1, 2]

    assert convert_here("image-folder", str(image_tree), output, max_bad="2").already_done
    with pytest.raises(UserError, match="exists and leaves out 2 bad samples, more than allowed now"):
        convert_here("image-folder", str(image_tree), output)


def test_salvage_stores_what_decodes_of_damaged_jpegs_and_names_them(
    image_tree: Path, tmp_path: Path, convert_here, picture, image_file
) -> None:
    good = image_file(picture(64, 64), quality=95)
    (image_tree / "cat" / "0.JPEG").write_bytes(good)
    (image_tree / "cat" / "1.JPEG").write_bytes(good[: len(good) // 2])
    (image_tree / "dog" / "0.JPEG").write_bytes(good[: good.index(b"\xff\xda") + 14])  # all headers, no data
    (image_tree / "dog" / "1.JPEG").write_bytes(good[:100])
    output, tree = tmp_path / "a.beton", str(image_tree)
    with pytest.raises(UserError, match=r"2 of 6 images cannot be stored, --max-bad 1 allows 1 \(first: dog/0"):
        convert_here("image-folder", tree, output, on_error="reencode", max_bad="1")

    manifest = convert_here("image-folder", tree, output, on_error="reencode", max_bad="2").manifest
    assert [q["key"] for q in manifest.quarantined] == ["dog/0.JPEG", "dog/1.JPEG"]
    assert [(s["index"], s["key"]) for s in manifest.salvaged] == [(1, "cat/1.JPEG")]
    assert "Premature end of JPEG file" in manifest.salvaged[0]["reason"]
    assert output.with_suffix(".salvaged.tsv").read_text().splitlines()[1].startswith("1\tcat/1.JPEG\tis damaged:")
    reader = BetonReader(output)
    whole, half = (decode(bytes(reader.image_bytes(i)), 64, 64).astype(int) for i in (0, 1))
    off = np.abs(whole - half).max(axis=(1, 2))
    assert off[:12].max() < 16 < off[-16:].min()  # the upper part is the picture's

    assert verify(output, source="image-folder", input=tree, split="all").ok
    assert convert_here("image-folder", tree, output, on_error="reencode", max_bad="2").already_done
    with pytest.raises(UserError, match="was made from another source or with other settings"):
        convert_here("image-folder", tree, output, max_bad="2")


def test_salvage_of_sound_images_is_what_any_conversion_makes(image_tree: Path, tmp_path: Path, convert_here) -> None:
    first = convert_here("image-folder", str(image_tree), tmp_path / "a.beton")
    again = convert_here("image-folder", str(image_tree), tmp_path / "a.beton", on_error="reencode", max_bad="0")
    assert again.already_done
    assert again.manifest == first.manifest


def test_a_class_that_lost_all_its_images_is_reported(image_tree: Path, tmp_path: Path, convert_here) -> None:
    for file in (image_tree / "emu").iterdir():
        file.write_bytes(b"")
    for _ in range(2):  # the second time it is done already
        outcome = convert_here("image-folder", str(image_tree), tmp_path / "a.beton", max_bad="2")
        assert outcome.warnings == ("classes of which every image was bad, so that none is left: emu",)


def test_only_bad_samples_make_no_beton(image_tree: Path, tmp_path: Path, convert_here) -> None:
    for file in image_tree.rglob("*.JPEG"):
        file.write_bytes(b"")
    with pytest.raises(
        UserError,
        match=r"none of its images can be stored \(first: cat/0.JPEG is empty\); all are listed in .*bad-samples.tsv",
    ):
        convert_here("image-folder", str(image_tree), tmp_path / "a.beton", max_bad="100%")
    assert not (tmp_path / "a.beton").exists()


@pytest.mark.parametrize("value", ["-1", "1.5", "101%", "x", "%", "", "-1%"])
def test_max_bad_is_a_number_or_a_share(value: str) -> None:
    with pytest.raises(UserError, match=r"expected a number, or a share such as 0\.1%"):
        BadPolicy("quarantine", value)
    assert BadPolicy("quarantine", "0.1%").limit(1_281_167) == 1281
    assert BadPolicy("quarantine", "7").limit(3) == 7
    assert BadPolicy("fail", "7").limit(3) == 0


def test_a_file_lost_after_listing_ends_the_conversion(image_tree: Path, tmp_path: Path, convert_here) -> None:
    source = open_tree(image_tree)
    (image_tree / "dog" / "1.JPEG").unlink()
    with pytest.raises(Fault, match=r"dog/1\.JPEG: changed while"):
        convert_here(source, None, tmp_path / "a.beton")
    assert not (tmp_path / "a.beton").exists()


def test_a_label_outside_the_classes_is_a_bad_sample(tmp_path: Path, convert_here) -> None:
    source = Synthetic(num_samples=3)
    source.class_names = ("one", "two")
    with pytest.raises(UserError, match=r"synthetic-0000002 has label 2, expected 0\.\.1"):
        convert_here(source, None, tmp_path / "a.beton")


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_dangling_links_and_pipes_are_reported_without_delay(image_tree: Path, tmp_path: Path, convert_here) -> None:
    (image_tree / "cat" / "lost.JPEG").symlink_to(tmp_path / "nowhere")
    os.mkfifo(image_tree / "dog" / "pipe.JPEG")
    (image_tree / "emu" / "link.JPEG").symlink_to(image_tree / "emu" / "0.JPEG")
    output = tmp_path / "a.beton"
    with pytest.raises(UserError, match="2 of 9 images cannot be stored"):
        convert_here("image-folder", str(image_tree), output)
    listed = [line.split("\t")[1:] for line in output.with_suffix(".bad-samples.tsv").read_text().splitlines()[1:]]
    reason = "cannot be read: is not a file, nor a link to one"
    assert listed == [["cat/lost.JPEG", reason], ["dog/pipe.JPEG", reason]]


def test_the_outputs_name_and_folder_are_checked(tmp_path: Path, convert_here) -> None:
    with pytest.raises(UserError, match=r"expected a name that ends in \.beton"):
        convert_here("synthetic", "n=5", tmp_path / "a.bin")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        convert_here("synthetic", "n=5", tmp_path / "file" / "a.beton")


class Tampering(ThisProcess):
    """Does something between the reading of the units and the writing of the ranges."""

    def __init__(self, tamper) -> None:
        super().__init__(StopFlag())
        self.tamper = tamper

    def run(self, task, job, items):
        for item in items:
            if isinstance(item, WriteTask) and self.tamper is not None:
                self.tamper(job)
                self.tamper = None
            yield task(job, item)


def convert_tampered(source, output: Path, tamper, input_: Path | None = None, **settings):
    location = None if input_ is None else str(input_)
    return convert(source, output, input=location, settings=ConvertSettings(**settings), workers=Tampering(tamper))


def test_a_part_that_changes_under_us_ends_the_conversion(tmp_path: Path, three_units: Path, convert_here) -> None:
    output = tmp_path / "a.beton"

    def damage(job) -> None:
        with (work_path(job.output.path) / part_name(1)).open("r+b") as file:
            file.write(b"X")

    with pytest.raises(Fault, match=r"synthetic-0001024: changed while the data set was being converted"):
        convert_tampered(THREE_UNITS, output, damage)
    assert names_in(tmp_path) == ["a.beton.work"]
    assert {"unit-000000.part", "unit-000002.part"} <= set(names_in(work_path(output)))
    assert "unit-000001.part" not in names_in(work_path(output))
    assert convert_here(THREE_UNITS, None, output).num_units_resumed == 2
    assert output.read_bytes() == three_units.read_bytes()


def open_tree(image_tree: Path) -> ImageFolder:
    return ImageFolder.open(str(image_tree), SplitRequest(None, explicit=False))


def flip_bit(file: Path, at: int) -> None:
    """With the same times: only a digest shows it."""
    status, data = file.stat(), bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda file: flip_bit(file, -20), "decode"),
        (lambda file: file.unlink(), "decode"),
        (lambda file: flip_bit(file, 30), "headers"),
        (lambda file: flip_bit(file, -20), "headers"),
    ],
    ids=["a byte", "gone", "a byte of the head", "a byte of the tail"],
)
def test_a_source_file_that_changes_before_it_is_written_ends_the_conversion(
    change, check: str, image_tree: Path, tmp_path: Path, convert_here
) -> None:
    output, file = tmp_path / "a.beton", image_tree / "dog" / "1.JPEG"
    good = file.read_bytes()
    with pytest.raises(Fault, match=r"dog/1\.JPEG: changed while .*; run the same command again"):
        convert_tampered(open_tree(image_tree), output, lambda _: change(file), check=check)
    assert names_in(tmp_path) == ["a.beton.work", "tree"]
    file.write_bytes(good)
    assert convert_here("image-folder", str(image_tree), output).manifest.num_samples == 6


def test_a_source_that_grows_meanwhile_ends_the_conversion(image_tree: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.beton"

    def add_a_file(_: object) -> None:
        shutil.copy(image_tree / "dog" / "1.JPEG", image_tree / "emu" / "2.JPEG")

    with pytest.raises(Fault, match=r"tree: changed while it was being converted; no beton was written"):
        convert_tampered("image-folder", output, add_a_file, image_tree)
    assert names_in(tmp_path) == ["a.beton.work", "tree"]


def test_an_output_folder_that_vanishes_ends_the_conversion(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "a.beton"
    with pytest.raises(Fault, match=r"cannot be written: No such file or directory; fix that"):
        convert_tampered(THREE_UNITS, output, lambda job: shutil.rmtree(job.output.work_shown))
    assert not output.exists()


KILLED = """
import sys
from pathlib import Path
from data_prep.converter.convert import convert
from data_prep.converter.settings import ConvertSettings
from data_prep.sources.datasets.builtin import Synthetic

source = Synthetic(num_samples=6000, min_side=32, max_side=64)
settings = ConvertSettings(encode="mixed", raw_share=0.5, page_bytes=2 << 20)
print("ready", flush=True)
convert(source, Path(sys.argv[1]), settings=settings)
"""


def test_kills_at_random_moments_do_not_change_a_byte(tmp_path: Path) -> None:
    """SIGKILL again and again, each time a little later, until a run comes through."""
    expected, output = tmp_path / "expected.beton", tmp_path / "a.beton"

    def start(path: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    began_s = time.monotonic()
    assert start(expected).wait(timeout=120) == 0
    whole_s = time.monotonic() - began_s
    delays = random.Random(0)
    num_killed = 0
    for attempt in range(50):
        process = start(output)
        try:
            process.wait(timeout=delays.uniform(0, whole_s * (0.3 + 0.1 * attempt)))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            num_killed += 1
            if manifest_path(output).exists():
                assert load_manifest(output) == load_manifest(expected)
    assert process.returncode == 0
    assert num_killed >= 1
    for end in (".beton", ".manifest.json", ".paths.txt.gz", ".samples.bin"):
        assert output.with_suffix(end).read_bytes() == expected.with_suffix(end).read_bytes()
    assert names_in(tmp_path) == [
        f"{name}{end}"
        for name in ("a", "expected")
        for end in (".beton", ".manifest.json", ".paths.txt.gz", ".samples.bin")
    ]


def test_a_jpeg_of_a_file_system_is_not_copied_into_the_parts(image_tree: Path, tmp_path: Path) -> None:
    part_bytes = []
    convert_tampered(
        open_tree(image_tree),
        tmp_path / "a.beton",
        lambda job: part_bytes.append((work_path(job.output.path) / part_name(0)).stat().st_size),
    )
    assert part_bytes[0] < 1000


@needs_c
def test_with_the_check_of_headers_files_are_read_once_and_the_beton_is_the_same(
    image_tree: Path, tmp_path: Path, convert_here, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_tree(image_tree)
    read: list[int] = []
    whole, several = ImageFolder.__getitem__, ImageFolder.read_into
    monkeypatch.setattr(ImageFolder, "__getitem__", lambda self, index: read.append(index) or whole(self, index))
    monkeypatch.setattr(
        ImageFolder, "read_into", lambda self, indices, into: read.extend(indices) or several(self, indices, into)
    )
    by_headers = convert_here(source, None, tmp_path / "a.beton", check="headers").manifest
    assert sorted(read) == list(range(6))
    checked = convert_here("image-folder", str(image_tree), tmp_path / "b.beton").manifest
    assert by_headers.digest == checked.digest
    assert by_headers.num_untouched == checked.num_untouched


@needs_c
def test_a_file_of_which_only_the_ends_can_be_read_is_listed_by_the_next_run(
    image_tree: Path, tmp_path: Path, convert_here, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, several = ImageFolder.__getitem__, ImageFolder.read_into

    def with_a_bad_sector(self: ImageFolder, index: int) -> Sample:
        if self.key(index) == "dog/1.JPEG":
            raise OSError(errno.EIO, "Input/output error")
        return whole(self, index)

    def several_with_a_bad_sector(self: ImageFolder, indices: Sequence[int], into: memoryview) -> None:
        for index in indices:
            with_a_bad_sector(self, index)
        several(self, indices, into)

    monkeypatch.setattr(ImageFolder, "__getitem__", with_a_bad_sector)
    monkeypatch.setattr(ImageFolder, "read_into", several_with_a_bad_sector)
    output = tmp_path / "a.beton"
    with pytest.raises(Fault, match=r"dog/1\.JPEG: only its ends can be read: .*; run the same command again"):
        convert_here(open_tree(image_tree), None, output, max_bad="1", check="headers")
    manifest = convert_here(open_tree(image_tree), None, output, max_bad="1", check="headers").manifest
    assert [bad["key"] for bad in manifest.quarantined] == ["dog/1.JPEG"]
    assert manifest.num_samples == 5


def test_a_signal_sets_the_flag_and_a_second_one_interrupts() -> None:
    before, ends = signal.getsignal(signal.SIGTERM), []
    with StopFlag(end=lambda *end: ends.append(end)) as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.stop_requested(), stop.exit_code) == (True, 143)
        with pytest.raises(Interrupted) as stopped:
            stop.check()
        assert stopped.value.signal_number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
    assert ends == [(130, "unwritten work is repeated")]


@pytest.mark.parametrize("settings", [{}, {"exif": "apply"}, {"check": "headers"}, {"encode": "raw"}])
def test_images_that_carry_a_turn_are_counted(
    settings: dict[str, str], image_tree: Path, image_file, picture, tmp_path: Path, convert_here
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, data in {
        "a.JPEG": image_file(picture(30, 40), exif=exif),
        "b.JPEG": image_file(picture(30, 40), "PNG", exif=exif),
        "c.JPEG": image_file(picture(30, 40), exif=b"Exif\0\0nothing of the kind"),
        "d.JPEG": image_file(picture(30, 40), exif=exif)[:-300],
    }.items():
        (image_tree / "cat" / name).write_bytes(data)
    assert (
        convert_here("image-folder", str(image_tree), tmp_path / "all.beton", max_bad="1", **settings).num_rotated == 2
    )
