"""A conversion in one process: the bytes it makes, what it refuses, how it continues."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.beton.manifest import load_manifest, manifest_path
from data_prep.beton.reader import BetonReader
from data_prep.convert.config import ConvertSettings
from data_prep.convert.part import PartWriter, is_finished, open_part, part_path
from data_prep.convert.plan import UNIT_SAMPLES, WorkUnit, make_plan
from data_prep.convert.progress import NoProgress
from data_prep.convert.run import bad_samples_path, convert, encode_in_this_process
from data_prep.convert.stop import StopFlag, Stopped
from data_prep.convert.work_folder import work_folder, work_path
from data_prep.errors import Fault, UserError
from data_prep.sources.base import SourceDescription
from data_prep.sources.synthetic import Synthetic

THREE_UNITS = Synthetic(num_samples=2 * UNIT_SAMPLES + 100, min_side=8, max_side=12, file_format="png")


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
    assert outcome.manifest.digest == "xxh3_128:7856575c3986efff5e2c7cd279f32524"


def test_a_beton_is_its_images_in_order(tmp_path: Path, convert_here) -> None:
    output = tmp_path / "a.beton"
    outcome = convert_here(THREE_UNITS, None, output)
    reader = BetonReader(output)
    assert len(reader) == len(THREE_UNITS)
    assert outcome.manifest.num_untouched == 0  # PNGs
    for i in (0, UNIT_SAMPLES - 1, UNIT_SAMPLES, len(THREE_UNITS) - 1):
        stored = np.asarray(Image.open(io.BytesIO(reader.image_bytes(i))))
        assert np.abs(stored.astype(int) - THREE_UNITS.pixels(i)).mean() < 4
        assert reader.label(i) == i % 10
    assert names_in(tmp_path) == ["a.beton", "a.manifest.json"]


def test_the_same_source_gives_the_same_files_again(tmp_path: Path, convert_here) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        convert_here(THREE_UNITS, None, tmp_path / name / "a.beton")
    for file in ("a.beton", "a.manifest.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_units_cover_every_sample_once_and_the_digest_knows_everything() -> None:
    source = SourceDescription("s", "here", "train", "identity", "state")
    plan = make_plan(1300, source, ConvertSettings(), {"pillow": "1"})
    assert [(u.number, u.start, u.stop) for u in plan.units] == [(0, 0, 512), (1, 512, 1024), (2, 1024, 1300)]
    others = [
        make_plan(1301, source, ConvertSettings(), {"pillow": "1"}),
        make_plan(1300, source, ConvertSettings(max_side=5), {"pillow": "1"}),
        make_plan(1300, source, ConvertSettings(), {"pillow": "2"}),
        make_plan(
            1300, SourceDescription("s", "here", "train", "identity", "other"), ConvertSettings(), {"pillow": "1"}
        ),
    ]
    assert len({plan.digest, *(other.digest for other in others)}) == 5


# --- parts ------------------------------------------------------------------------------------------------------------


def test_a_damaged_part_is_noticed(tmp_path: Path) -> None:
    unit, digest = WorkUnit(3, 10, 12), "d" * 32
    path = part_path(tmp_path, unit)
    with PartWriter(path, digest, unit) as part:
        for data in (b"first", b"second"):
            part.append(data, mode=0, untouched=True, height=4, width=5, label=1)
        assert not path.exists()
        part.finish()
    assert names_in(tmp_path) == ["unit-000003.part"]
    with open_part(path, digest, unit) as read:
        assert b"".join(read.payload()) == b"firstsecond"
        assert read.rows["size"].tolist() == [5, 6]
    whole = path.read_bytes()
    assert is_finished(path, digest, unit)
    assert not is_finished(path, "e" * 32, unit)
    assert not is_finished(path, digest, WorkUnit(4, 10, 12))
    for damaged in (whole[:-1], whole[1:], b""):
        path.write_bytes(damaged)
        assert not is_finished(path, digest, unit)
    for damaged in (b"F" + whole[1:], whole[:12] + b"\xff" + whole[13:]):  # in the images, in the rows
        path.write_bytes(damaged)
        with open_part(path, digest, unit) as read, pytest.raises(Fault, match="its bytes changed"):
            list(read.payload())
        assert not path.exists()


def test_an_unfinished_part_leaves_nothing(tmp_path: Path) -> None:
    unit = WorkUnit(0, 0, 2)
    with PartWriter(part_path(tmp_path, unit), "d" * 32, unit) as part:
        part.append(b"first", mode=0, untouched=True, height=4, width=5, label=1)
        assert len(names_in(tmp_path)) == 1
    assert names_in(tmp_path) == []


# --- going on ---------------------------------------------------------------------------------------------------------


class StopAfter(StopFlag):
    """Stops at the n-th look."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def check(self) -> None:
        self.looks -= 1
        if self.looks < 0:
            raise Stopped(signal.SIGTERM)


def convert_until(looks: int, output: Path):
    stop = StopAfter(looks)
    return convert(
        THREE_UNITS,
        ConvertSettings(),
        output,
        encode_units=encode_in_this_process(stop),
        progress=NoProgress(),
        stop=stop,
    )


def test_a_stopped_conversion_goes_on_to_the_same_bytes(tmp_path: Path, convert_here) -> None:
    convert_here(THREE_UNITS, None, tmp_path / "a.beton")
    expected = (tmp_path / "a.beton").read_bytes()
    for looks in range(6):  # two looks per unit
        output = tmp_path / str(looks) / "a.beton"
        with pytest.raises(Stopped):
            convert_until(looks, output)
        assert not output.exists()
        assert not manifest_path(output).exists()
        outcome = convert_here(THREE_UNITS, None, output)
        assert outcome.num_units_taken_over == (looks + 1) // 2
        assert output.read_bytes() == expected
        assert names_in(output.parent) == ["a.beton", "a.manifest.json"]


def test_a_stop_while_assembling_leaves_no_beton(tmp_path: Path, convert_here) -> None:
    output = tmp_path / "a.beton"
    with pytest.raises(Stopped):
        convert_until(6, output)
    assert names_in(tmp_path) == ["a.beton.work"]
    assert convert_here(THREE_UNITS, None, output).num_units_taken_over == 3


def test_parts_of_another_plan_or_damaged_ones_are_not_taken_over(tmp_path: Path, convert_here) -> None:
    output = tmp_path / "a.beton"
    with pytest.raises(Stopped):
        convert_until(4, output)
    part = part_path(work_path(output), WorkUnit(0, 0, UNIT_SAMPLES))
    part.write_bytes(part.read_bytes()[:-1])
    (work_path(output) / "unit-000002.part.host-1.tmp").write_bytes(b"scrap")
    kept = shutil.copytree(work_path(output), tmp_path / "b.beton.work")
    assert convert_here(THREE_UNITS, None, output).num_units_taken_over == 1
    assert kept.exists()
    assert convert_here(THREE_UNITS, None, tmp_path / "b.beton", quality=80).num_units_taken_over == 0


def test_done_is_done(tmp_path: Path, convert_here) -> None:
    output = tmp_path / "a.beton"
    first = convert_here("synthetic", "n=5", output)
    stamp = output.stat().st_mtime_ns
    again = convert_here("synthetic", "n=5", output)
    assert (first.already_done, again.already_done) == (False, True)
    assert again.manifest == first.manifest == load_manifest(output)
    assert output.stat().st_mtime_ns == stamp
    for location, settings in (("n=6", {}), ("n=5", {"quality": 50})):
        with pytest.raises(UserError, match="was made from another source or with other settings"):
            convert_here("synthetic", location, output, **settings)


def test_a_beton_without_manifest_is_not_overwritten_unless_it_is_ours(tmp_path: Path, convert_here) -> None:
    output = tmp_path / "a.beton"
    output.write_bytes(b"something else")
    with pytest.raises(UserError, match="exists without a manifest"):
        convert_here("synthetic", "n=5", output)
    assert output.read_bytes() == b"something else"
    work_path(output).mkdir()  # killed between the beton and its manifest
    assert not convert_here("synthetic", "n=5", output).already_done
    assert load_manifest(output).num_samples == 5


def test_what_a_kill_after_the_manifest_left_is_cleared(tmp_path: Path, convert_here) -> None:
    output = tmp_path / "a.beton"
    convert_here("synthetic", "n=5", output)
    work_path(output).mkdir()
    assert convert_here("synthetic", "n=5", output).already_done
    assert names_in(tmp_path) == ["a.beton", "a.manifest.json"]


def test_two_conversions_do_not_share_an_output(tmp_path: Path, convert_here) -> None:
    output = tmp_path / "a.beton"
    plan = make_plan(5, SourceDescription("s", "here", "all", "i", "s"), ConvertSettings(), {})
    with work_folder(output, plan), pytest.raises(UserError, match="another data-prep is writing it"):
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

    assert "3 of 6 images cannot be stored (first: cat/1.JPEG cannot be decoded" in str(error.value)
    assert str(bad_samples_path(output)) in str(error.value)
    listed = [line.split("\t") for line in bad_samples_path(output).read_text().splitlines()]
    assert [row[:2] for row in listed] == [
        ["index", "key"],
        ["1", "cat/1.JPEG"],
        ["2", "dog/0.JPEG"],
        ["5", "emu/1.JPEG"],
    ]
    assert [row[2] for row in listed[2:]] == ["is empty", "is not an image that Pillow knows"]
    assert not output.exists()
    assert not manifest_path(output).exists()

    for name in ("cat/1", "dog/0", "emu/1"):
        (image_tree / f"{name}.JPEG").write_bytes(good)
    assert convert_here("image-folder", str(image_tree), output).manifest.num_samples == 6
    assert not bad_samples_path(output).exists()


def test_a_file_lost_after_listing_is_a_bad_sample(image_tree: Path, tmp_path: Path, convert_here) -> None:
    from data_prep.sources.image_folder import ImageFolder
    from data_prep.sources.splits import SplitRequest

    source = ImageFolder.open(str(image_tree), SplitRequest(None, explicit=False))
    (image_tree / "dog" / "1.JPEG").unlink()
    with pytest.raises(UserError, match=r"1 of 6 .*dog/1\.JPEG cannot be read: No such file or directory"):
        convert_here(source, None, tmp_path / "a.beton")


def test_a_label_outside_the_classes_is_a_bad_sample(tmp_path: Path, convert_here) -> None:
    class Mislabelled(Synthetic):
        @property
        def class_names(self) -> tuple[str, ...]:
            return ("one", "two")

    with pytest.raises(UserError, match=r"synthetic-0000002 has label 2, expected 0\.\.1"):
        convert_here(Mislabelled(num_samples=3), None, tmp_path / "a.beton")


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_the_outputs_name_and_place_are_checked(tmp_path: Path, convert_here) -> None:
    with pytest.raises(UserError, match=r"expected a name that ends in \.beton"):
        convert_here("synthetic", "n=5", tmp_path / "a.bin")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        convert_here("synthetic", "n=5", tmp_path / "file" / "a.beton")


def test_a_part_that_changes_under_us_ends_the_conversion(tmp_path: Path, convert_here) -> None:
    output = tmp_path / "a.beton"

    def encode_then_damage(source, plan, units, folder):
        yield from encode_in_this_process(StopFlag())(source, plan, units, folder)
        with part_path(folder, plan.units[1]).open("r+b") as file:
            file.write(b"X")

    with pytest.raises(Fault, match=r"unit-000001\.part: its bytes changed after they were written"):
        convert(
            THREE_UNITS,
            ConvertSettings(),
            output,
            encode_units=encode_then_damage,
            progress=NoProgress(),
            stop=StopFlag(),
        )
    assert names_in(tmp_path) == ["a.beton.work"]
    assert names_in(work_path(output)) == ["lock", "plan", "unit-000000.part", "unit-000002.part"]
    outcome = convert_here(THREE_UNITS, None, output)
    assert outcome.num_units_taken_over == 2
    convert_here(THREE_UNITS, None, tmp_path / "b.beton")
    assert output.read_bytes() == (tmp_path / "b.beton").read_bytes()


def test_a_signal_sets_the_flag_and_a_second_one_interrupts() -> None:
    from data_prep.convert.stop import stop_on_signals

    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped) as stopped:
            stop.check()
        assert stopped.value.signal_number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
