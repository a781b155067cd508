"""Ranges written before later images are read equal those of the finished beton, or are written again."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.beton import layout, ranges
from data_prep.beton.layout import lay_out
from data_prep.beton.manifest import load_manifest
from data_prep.beton.statistics import NUM_SUMS
from data_prep.converter.context import ThisProcess
from data_prep.converter.convert import ConvertReport, convert
from data_prep.converter.output import FileOutput
from data_prep.converter.plan import PART_ROW, UNIT_SAMPLES, UnitPart, WorkUnit
from data_prep.converter.settings import BadPolicy, ConvertSettings
from data_prep.converter.write import AllRanges, EarlyRanges, WriteTask, write_rows
from data_prep.errors import Fault, Interrupted, UserError
from data_prep.runtime.stop import StopFlag
from data_prep.sources.base import Sample
from data_prep.sources.image_folder import ImageFolder
from data_prep.sources.splits import SplitRequest

MIB = 1 << 20
NUM_FILES = 2 * UNIT_SAMPLES + 100
PAGE_BYTES = 2 * MIB


# --- which ranges -----------------------------------------------------------------------------------------------------


NO_SUMS = np.zeros(NUM_SUMS, np.int64)


@given(
    sizes=st.lists(st.integers(0, PAGE_BYTES) | st.just(PAGE_BYTES), min_size=1, max_size=60),
    cuts=st.sets(st.integers(1, 59)),
    range_bytes=st.sampled_from([MIB, 3 * MIB, 8 * MIB]),
)
def test_they_are_those_of_the_finished_beton(sizes: list[int], cuts: set[int], range_bytes: int) -> None:
    """Size 0: the sample cannot be stored. Parts of any length."""
    rows = np.zeros(len(sizes), dtype=PART_ROW)
    rows["size"], rows["check"], rows["spill"] = sizes, np.arange(len(sizes)) + 7, -1
    bounds = [0, *sorted(at for at in cuts if at < len(sizes)), len(sizes)]
    early = EarlyRanges("target", num_samples=len(sizes), page_bytes=PAGE_BYTES, range_bytes=range_bytes)
    tasks: list[WriteTask] = []
    for number, (start, stop) in enumerate(pairwise(bounds)):
        tasks += early.add(UnitPart(WorkUnit(number, start, stop), rows[start:stop], [], NO_SUMS))

    beton = lay_out(rows[rows["size"] > 0], PAGE_BYTES)
    ranges_of_all = AllRanges("target", beton, write_rows(rows, 0), range_bytes)
    if early.pages_start == beton.pages_start:
        assert all(ranges_of_all.task(task.range.number).digest() == task.digest() for task in tasks)
    last = int((beton.allocations["ptr"] + beton.allocations["size"]).max(initial=0))
    first = -(-layout.pages_start(len(sizes), PAGE_BYTES) // range_bytes)
    assert [task.range.number for task in tasks] == list(range(first, last // range_bytes))


def test_a_digest_tells_ranges_apart() -> None:
    rows = np.zeros(3, dtype=PART_ROW)
    rows["size"] = 100
    samples = write_rows(rows, 0)
    other = samples.copy()
    other["check"][1] = 1
    beton = lay_out(rows, PAGE_BYTES)
    rows["label"] = 1
    relabelled = lay_out(rows, PAGE_BYTES)
    all_ranges = [AllRanges("t", *one, 64 * MIB) for one in ((beton, samples), (beton, other), (relabelled, samples))]
    assert [len(ranges) for ranges in all_ranges] == [1, 1, 1]
    assert len({ranges.task(0).digest() for ranges in all_ranges}) == 3


# --- conversions ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "RANGE_BYTES", 8 * MIB)


class Watched(ThisProcess):
    """What is done, in order: `unit 0`, `range 1`, ...; stops after so much of it."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__(StopFlag())
        self.done: list[str] = []
        self.stop_after = stop_after

    def run(self, task: Any, job: Any, items: Iterator[Any]) -> Any:
        for item in items:
            if len(self.done) == self.stop_after:
                raise Interrupted(15)
            kind, number = ("unit", item.number) if isinstance(item, WorkUnit) else ("range", item.range.number)
            self.done.append(f"{kind} {number}")
            yield task(job, item)


def run(
    tree: Path, output: Path, pool: ThisProcess | None = None, max_bad: str | None = None, **settings: Any
) -> ConvertReport:
    return convert(
        ImageFolder.open(str(tree), SplitRequest(None, explicit=False)),
        output,
        settings=ConvertSettings(**{"page_bytes": PAGE_BYTES, **settings}),
        bad_policy=BadPolicy("quarantine", max_bad) if max_bad else BadPolicy(),
        workers=pool or 0,
    )


def run_without_early_ranges(tree: Path, output: Path, max_bad: str | None = None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileOutput, "has_space", lambda self, target, num_bytes: False)
        pool = Watched()
        run(tree, output, pool, max_bad)
    kinds = [name.partition(" ")[0] for name in pool.done]
    assert kinds == sorted(kinds, key=["unit", "range"].index)


@pytest.fixture(scope="module")
def expected(large_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    output = tmp_path_factory.mktemp("expected") / "a.beton"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "RANGE_BYTES", 8 * MIB)
        run_without_early_ranges(large_tree, output)
    return output.read_bytes()


@pytest.mark.parametrize("check", ["decode", "headers"])
def test_ranges_are_written_while_units_are_unread_and_each_once(
    check: str, large_tree: Path, tmp_path: Path, expected: bytes
) -> None:
    pool = Watched()
    run(large_tree, tmp_path / "a.beton", pool, check=check)
    assert (tmp_path / "a.beton").read_bytes() == expected
    assert sorted(pool.done) == [*(f"range {number}" for number in range(6)), "unit 0", "unit 1", "unit 2"]
    before_the_last_unit = pool.done[: pool.done.index("unit 2")]
    assert any(name.startswith("range") for name in before_the_last_unit)
    assert not {"range 0", "range 5"} & set(before_the_last_unit)  # they have the tables, which need all images


@pytest.mark.parametrize("stop_after", [0, 1, 4, 7, 8])
def test_stopped_anywhere_it_resumes_to_the_same_bytes_and_writes_nothing_twice(
    stop_after: int, large_tree: Path, tmp_path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "a.beton"
    pool = Watched(stop_after)
    with pytest.raises(Interrupted):
        run(large_tree, output, pool)
    assert not output.exists()
    numbers: list[int] = []
    write = FileOutput.write_range
    monkeypatch.setattr(
        FileOutput,
        "write_range",
        lambda self, target, part, put: numbers.append(part.number) or write(self, target, part, put),
    )
    outcome = run(large_tree, output)
    assert outcome.num_units_resumed == sum(name.startswith("unit") for name in pool.done)
    written_before = [int(name.partition(" ")[2]) for name in pool.done if name.startswith("range")]
    assert sorted([*written_before, *numbers]) == list(range(6))
    assert output.read_bytes() == expected
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "a.beton",
        "a.manifest.json",
        "a.paths.txt.gz",
        "a.samples.bin",
    ]


def with_a_bad_file(tree: Path, root: Path, number: int) -> Path:
    copy = root / "tree"
    for path in sorted(tree.rglob("*.jpg")):
        (copy / path.parent.name).mkdir(parents=True, exist_ok=True)
        (copy / path.parent.name / path.name).hardlink_to(path)
    bad = sorted(copy.rglob("*.jpg"))[number]
    bad.unlink()
    bad.write_bytes(b"no image")
    return copy


def test_nothing_is_written_once_there_will_be_no_beton(large_tree: Path, tmp_path: Path) -> None:
    pool = Watched()
    with pytest.raises(UserError, match="1 of 2,148 images cannot be stored"):
        run(with_a_bad_file(large_tree, tmp_path, 1030), tmp_path / "a.beton", pool)
    assert {"unit 0", "unit 1", "unit 2"} <= set(pool.done)  # all are read, for the list of bad ones
    assert not [name for name in pool.done[pool.done.index("unit 1") :] if name.startswith("range")]


@pytest.mark.parametrize("pages_move", [False, True])
def test_images_that_are_left_out_cost_at_most_time(
    pages_move: bool, large_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = with_a_bad_file(large_tree, tmp_path, 1030)
    if pages_move:  # as when the metadata of one sample less needs a page less
        real = layout.pages_start
        more = lambda count, page_bytes: real(count, page_bytes) + (count == NUM_FILES) * page_bytes  # noqa: E731
        monkeypatch.setattr("data_prep.converter.write.pages_start", more)
    pool = Watched()
    manifest = run(root, tmp_path / "a.beton", pool, max_bad="1").manifest
    assert manifest.num_samples == NUM_FILES - 1
    run_without_early_ranges(root, tmp_path / "b.beton", max_bad="1")
    assert (tmp_path / "a.beton").read_bytes() == (tmp_path / "b.beton").read_bytes()
    assert load_manifest(tmp_path / "a.beton") == load_manifest(tmp_path / "b.beton")
    assert pool.done.count("range 1") == 1 + pages_move


class UntilARange(Watched):
    """Stops before the first range, and keeps an open descriptor, as an orphan in the middle of one has it."""

    descriptor = -1
    offset = 0

    def run(self, task: Any, job: Any, items: Iterator[Any]) -> Any:
        for item in items:
            if isinstance(item, WriteTask):
                self.descriptor = os.open(item.target, os.O_RDWR)
                self.offset = int(item.range.pointers[3])
                raise Interrupted(15)
            yield task(job, item)


class WithAnOrphan(Watched):
    def __init__(self, before: UntilARange) -> None:
        super().__init__()
        self._before = before

    def run(self, task: Any, job: Any, items: Iterator[Any]) -> Any:
        yield from super().run(task, job, items)
        os.pwrite(self._before.descriptor, b"late" * 1000, self._before.offset)


@pytest.mark.parametrize("encode", ["original", "raw"])
def test_an_orphan_with_other_bad_samples_writes_nothing_into_the_beton(
    encode: str, large_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that could not be read for a passing reason: the same plan, another beton."""
    whole = ImageFolder.__getitem__

    def with_a_passing_error(self: ImageFolder, index: int) -> Sample:
        if index == 3:
            raise OSError(errno.EIO, "Input/output error")
        return whole(self, index)

    before = UntilARange()
    with monkeypatch.context() as patch:
        patch.setattr(ImageFolder, "__getitem__", with_a_passing_error)
        with pytest.raises(Interrupted):
            run(large_tree, tmp_path / "a.beton", before, max_bad="1", encode=encode)
    pool = WithAnOrphan(before)
    run(large_tree, tmp_path / "a.beton", pool, encode=encode)
    os.close(before.descriptor)
    assert pool.done.count("range 0") == 1
    run(large_tree, tmp_path / "b.beton", Watched(), encode=encode)
    assert (tmp_path / "a.beton").read_bytes() == (tmp_path / "b.beton").read_bytes()


def test_a_file_that_goes_bad_later_is_left_out_by_the_next_run(
    large_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "a.beton"
    whole, several = ImageFolder.__getitem__, ImageFolder.read_into
    bad = {700, 1500}
    seen: list[int] = []

    def now_bad(self: ImageFolder, index: int) -> Sample:
        seen.append(index)
        if index in bad and seen.count(index) > 1:
            raise OSError(errno.EIO, "Input/output error")
        return whole(self, index)

    def all_now_bad(self: ImageFolder, indices: Sequence[int], into: memoryview) -> None:
        if bad & set(indices):
            raise OSError(errno.EIO, "Input/output error")
        several(self, indices, into)

    monkeypatch.setattr(ImageFolder, "__getitem__", now_bad)
    monkeypatch.setattr(ImageFolder, "read_into", all_now_bad)
    with pytest.raises(Fault, match=r"0700\.jpg: could be read at first, but not now: .*; run the same command again"):
        run(large_tree, output, Watched(), max_bad="2")
    inodes = []
    for _ in range(2):  # the second resumes where the first was stopped
        pool = Watched(4)
        with pytest.raises(Interrupted):
            run(large_tree, output, pool, max_bad="2")
        (target,) = (tmp_path / "a.beton.work").glob("*.unfinished")
        inodes.append(target.stat().st_ino)
    assert inodes[0] == inodes[1]
    manifest = run(large_tree, output, Watched(), max_bad="2").manifest
    assert [sample["index"] for sample in manifest.quarantined] == sorted(bad)
    run_without_early_ranges(large_tree, tmp_path / "b.beton", max_bad="2")
    assert output.read_bytes() == (tmp_path / "b.beton").read_bytes()


@pytest.mark.parametrize(
    ("max_bad", "expected_error"),
    [(None, "1 of 2,148 images cannot be stored"), ("1", r"0700\.jpg: changed while the data set was being converted")],
)
def test_bad_samples_are_all_listed_although_a_file_changes_meanwhile(
    max_bad: str | None, expected_error: str, large_tree: Path, tmp_path: Path
) -> None:
    root = with_a_bad_file(large_tree, tmp_path, 2100)
    file = sorted(root.rglob("*.jpg"))[700]

    class Changing(Watched):
        def run(self, task: Any, job: Any, items: Iterator[Any]) -> Any:
            for number, report in enumerate(super().run(task, job, items)):
                if number == 0:  # with the same times: only the digest tells
                    data, status = file.read_bytes(), file.stat()
                    file.unlink()
                    file.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
                    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
                yield report

    pool = Changing()
    with pytest.raises((UserError, Fault), match=expected_error):
        run(root, tmp_path / "a.beton", pool, max_bad)
    assert {"unit 0", "unit 1", "unit 2"} <= set(pool.done)
    assert not (tmp_path / "a.beton").exists()


def test_without_room_for_more_than_it_takes_all_is_read_first(
    large_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.converter.output.free_bytes", lambda folder: 60 * MIB)
    monkeypatch.setattr("data_prep.beton.files.free_bytes", lambda folder: 20 * MIB)
    pool = Watched()
    with pytest.raises(Fault, match=r"GB free, .* GB are needed; make room there"):
        run(large_tree, tmp_path / "a.beton", pool)
    assert pool.done == ["unit 0", "unit 1", "unit 2"]
    (target,) = (tmp_path / "a.beton.work").glob("*.unfinished")
    assert target.stat().st_blocks == 0
