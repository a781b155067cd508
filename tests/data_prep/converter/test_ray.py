"""Conversions through Ray: the same bytes for any number of workers, through lost workers, stops and kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RaySystemError

from data_prep.beton.manifest import manifest_path
from data_prep.converter import ray_pool as cluster_cpus
from data_prep.converter.context import Progress
from data_prep.converter.convert import ConvertReport, convert
from data_prep.converter.output import work_path
from data_prep.converter.plan import UNIT_SAMPLES
from data_prep.converter.ray_pool import MAX_LOSSES, TASKS_AHEAD, RayPool
from data_prep.errors import Fault, Interrupted, UserError
from data_prep.runtime.stop import StopFlag
from data_prep.sources.base import Sample, Source
from data_prep.sources.datasets.builtin import Synthetic
from data_prep.sources.image_folder import ImageFolder
from data_prep.sources.splits import SplitRequest

pytestmark = pytest.mark.system

NUM_SAMPLES = 4 * UNIT_SAMPLES + 7
SOURCE = Synthetic(num_samples=NUM_SAMPLES, min_side=16, max_side=24, file_format="png")
MANY = Synthetic(num_samples=6 * UNIT_SAMPLES, min_side=64, max_side=96)
"""Encoded again: seconds of work, so that a kill finds some done and some not."""
COMMAND = [
    *(sys.executable, "-m", "data_prep", "convert", "--source", "synthetic", "--json"),
    *("--input", MANY.description.location, "--encode", "jpeg", "--workers", "2"),
]
WAIT_LIMIT_S = 120.0


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[str]:
    """One local Ray of four logical CPUs for this file; yields its address."""
    context = ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield context.address_info["gcs_address"]
    ray.shutdown()


def run(
    source: Source, output: Path, workers: int, progress: Notes | None = None, stop: StopFlag | None = None
) -> ConvertReport:
    progress, stop = progress or Notes(), stop or StopFlag()
    with RayPool(workers, None, progress, stop) as pool:
        return convert(source, output, workers=pool, progress=progress, stop=stop)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, convert_here) -> tuple[bytes, bytes]:
    """Beton and manifest of `SOURCE`, made without Ray."""
    output = tmp_path_factory.mktemp("expected") / "a.beton"
    convert_here(SOURCE, None, output)
    return output.read_bytes(), manifest_path(output).read_bytes()


@pytest.fixture(scope="module")
def expected_many(tmp_path_factory: pytest.TempPathFactory, convert_here) -> str:
    """Digest of `MANY`, made without Ray."""
    output = tmp_path_factory.mktemp("expected") / "many.beton"
    return convert_here(MANY, None, output, encode="jpeg").manifest.digest


@pytest.mark.parametrize(
    ("workers", "notes"),
    [(1, []), (9, ["the Ray cluster has 4 CPUs: until it has more, as many workers, not 9"])],
)
def test_any_number_of_workers_makes_the_same_files(
    workers: int, notes: list[str], tmp_path: Path, expected: tuple[bytes, bytes]
) -> None:
    output, progress = tmp_path / "a.beton", Notes()
    run(SOURCE, output, workers, progress)
    assert progress.lines == notes
    assert (output.read_bytes(), manifest_path(output).read_bytes()) == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.beton",
        "a.manifest.json",
        "a.paths.txt.gz",
        "a.samples.bin",
    ]


def test_workers_write_complete_ranges_while_others_read(
    large_tree: Path, tmp_path: Path, convert_here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.beton.ranges.RANGE_BYTES", 8 << 20)
    read: list[int] = []
    written_of: list[tuple[int, int]] = []

    class Watching(Notes):
        def encoded(self, samples: int, total: int, *_: object) -> None:
            read.append(samples)

        def written(self, num_bytes: int, total: int | None, by_node: object = None) -> None:
            written_of.append((num_bytes, total or 0))

    source = ImageFolder.open(str(large_tree), SplitRequest(None, explicit=False))
    run(source, tmp_path / "a.beton", 2, Watching())
    expected = convert_here(source, None, tmp_path / "b.beton").manifest
    assert (tmp_path / "a.beton").read_bytes() == (tmp_path / "b.beton").read_bytes()
    assert read == [0, *sorted(read[1:])]
    assert [total for _, total in written_of] == [0] * 5 + [expected.beton_bytes] * 3
    assert written_of[4][0] == 5 * (8 << 20)
    assert written_of[-1][0] == expected.beton_bytes


def test_the_clusters_cpus_are_asked_for_again_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [{"CPU": 1.0}, {"CPU": 3.0}, {}, RaySystemError("the head is gone"), *[{"CPU": 2.0}] * 9]
    asked = threading.Event()

    def slowly() -> dict[str, float]:
        assert asked.wait(60)
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    asked.set()
    monkeypatch.setattr(cluster_cpus.ray, "cluster_resources", slowly)
    monkeypatch.setattr(cluster_cpus, "ASKED_EVERY_S", -1.0)
    cpus = cluster_cpus.ClusterCpus()
    asked.clear()
    assert [cpus.latest() for _ in range(5)] == [1] * 5  # the head does not answer
    asked.set()
    seen = []
    while not seen or seen[-1] != 2:
        seen.append(cpus.latest())
    assert [n for n, _ in groupby(seen)] in ([1, 3, 2], [3, 2])  # never none: a head that restarts knows no nodes


def test_as_many_tasks_as_the_cluster_has_cpus_or_the_user_wants() -> None:
    def at_a_time(workers: int | None, address: str | None, num_cpus: int) -> int:
        return RayPool(workers, address, Notes(), StopFlag())._max_tasks(num_cpus)

    assert [at_a_time(None, "there:1", n) for n in (0, 1, 8)] == [1, 1, 8]
    assert [at_a_time(4, "there:1", n) for n in (0, 8)] == [4, 4]
    assert [at_a_time(2, None, n) for n in (2, 8)] == [2 + TASKS_AHEAD, 2]


def deadly(marker: Path, deaths: int) -> Source:
    """`SOURCE`, but reading sample 1500 kills the worker, so many times. A local class travels to workers by value."""

    class Deadly(Synthetic):
        def __getitem__(self, index: int) -> Sample:
            if index == 1500:
                before = marker.read_text() if marker.exists() else ""
                if len(before) < deaths:
                    marker.write_text(before + "x")
                    os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)

    return Deadly(num_samples=NUM_SAMPLES, min_side=16, max_side=24, file_format="png")


def test_lost_workers_cost_their_unit_and_nothing_else(tmp_path: Path, expected: tuple[bytes, bytes]) -> None:
    progress = Notes()
    output = tmp_path / "a.beton"
    run(deadly(tmp_path / "deaths", MAX_LOSSES), output, 2, progress)
    assert output.read_bytes() == expected[0]
    assert len(progress.lines) == MAX_LOSSES
    assert all(line.startswith("samples 1024..2047 were lost and are done again: ") for line in progress.lines)


def test_workers_lost_while_writing_cost_their_range_and_nothing_else(tmp_path: Path, convert_here) -> None:
    marker = tmp_path / "reads"

    class DeadlyAtSecondReading(Synthetic):
        """Its own bytes are placed straight from the source, as those of files are; that kills two workers."""

        def __getitem__(self, index: int) -> Sample:
            if index == 1500:
                before = marker.read_text() if marker.exists() else ""
                marker.write_text(before + "x")
                if len(before) in (1, 2):
                    os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)

    source = DeadlyAtSecondReading(num_samples=NUM_SAMPLES, min_side=16, max_side=24)
    source.description = replace(source.description, location="/files")
    progress = Notes()
    manifest = run(source, tmp_path / "a.beton", 2, progress).manifest
    assert manifest.num_untouched == NUM_SAMPLES
    assert len(progress.lines) == 2
    assert all(line.startswith("bytes 0..") and "were lost and are done again: " in line for line in progress.lines)
    assert marker.read_text() == "xxxx"
    convert_here(Synthetic(num_samples=NUM_SAMPLES, min_side=16, max_side=24), None, tmp_path / "b.beton")
    assert (tmp_path / "a.beton").read_bytes() == (tmp_path / "b.beton").read_bytes()


def test_a_worker_with_other_libraries_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_prep.converter import convert as module

    versions = module.encoder_versions() | {"pillow": "1.0"}
    monkeypatch.setattr(module, "encoder_versions", lambda: versions)
    with pytest.raises(UserError, match=r"has other libraries than the driver \(pillow .*, not 1\.0\)"):
        run(Synthetic(num_samples=5), tmp_path / "a.beton", 1)


def test_a_unit_that_always_kills_its_worker_ends_the_conversion(tmp_path: Path) -> None:
    with pytest.raises(Fault, match=r"samples 1024\.\.2047 were lost 4 times, last: "):
        run(deadly(tmp_path / "deaths", 99), tmp_path / "a.beton", 2)
    assert not (tmp_path / "a.beton").exists()


def test_an_error_in_a_task_is_named(tmp_path: Path) -> None:
    class Broken(Synthetic):
        def __getitem__(self, index: int) -> Sample:
            return Sample(b"", 0, "bad")

        def key(self, index: int) -> str:
            raise KeyError("no such thing")

    with pytest.raises(Fault, match=r"samples 0\.\.4 cannot be converted: KeyError: 'no such thing'"):
        run(Broken(num_samples=5), tmp_path / "a.beton", 1)


def test_bad_samples_of_all_units_are_gathered(tmp_path: Path) -> None:
    class Holes(Synthetic):
        def __getitem__(self, index: int) -> Sample:
            return Sample(b"", 0, self.key(index)) if index % 1000 == 3 else super().__getitem__(index)

    with pytest.raises(UserError, match="5 of 4,103 images cannot be stored"):
        run(Holes(num_samples=NUM_SAMPLES, min_side=8, max_side=8), tmp_path / "a.beton", 2)
    listed = (tmp_path / "a.bad-samples.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed[1:]] == ["3", "1003", "2003", "3003", "4003"]


def test_a_stop_ends_the_tasks_and_the_next_run_resumes(tmp_path: Path, expected: tuple[bytes, bytes]) -> None:
    class StopOnFirstReport(Notes):
        def encoded(self, samples: int, total: int, source_bytes: int, bad: int, by_node: Mapping[str, int]) -> None:
            if samples:
                os.kill(os.getpid(), signal.SIGTERM)

    with StopFlag() as stop, pytest.raises(Interrupted):
        run(SOURCE, tmp_path / "a.beton", 1, StopOnFirstReport(), stop)
    outcome = run(SOURCE, tmp_path / "a.beton", 1)
    assert outcome.num_units_resumed == 1
    assert (tmp_path / "a.beton").read_bytes() == expected[0]


def start(output: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "--output", str(output)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_a_part(process: subprocess.Popen[str], output: Path) -> None:
    limit = time.monotonic() + WAIT_LIMIT_S
    while not list(work_path(output).glob("*.part")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, "no part was written"
        time.sleep(0.02)


def test_a_job_on_a_running_cluster_stops_on_sigterm_and_resumes(
    cluster: str, tmp_path: Path, expected_many: str
) -> None:
    """As `ray job submit` runs it: RAY_ADDRESS names the cluster."""
    output = tmp_path / "all.beton"
    process = start(output, RAY_ADDRESS=cluster)
    wait_for_a_part(process, output)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=WAIT_LIMIT_S)
    assert process.returncode == 143, stderr
    assert json.loads(stdout.splitlines()[-1])["ok"] is False
    assert stderr.splitlines()[-1] == "data-prep: stopped by SIGTERM; the same command resumes"
    assert "Traceback" not in stderr
    assert not output.exists()

    process = start(output, RAY_ADDRESS=cluster)
    stdout, stderr = process.communicate(timeout=WAIT_LIMIT_S)
    assert process.returncode == 0, stderr
    last = json.loads(stdout.splitlines()[-1])
    assert last["num_units_taken_over"] >= 1
    assert (last["ok"], last["path"], last["digest"]) == (True, str(output), expected_many)
    assert f"connecting to Ray at {cluster}" in stderr


def test_a_killed_driver_costs_only_the_units_in_flight(tmp_path: Path, expected_many: str) -> None:
    """SIGKILL to a driver with a local Ray; the next run resumes from what was finished and makes the same bytes."""
    output = tmp_path / "all.beton"
    process = start(output)
    wait_for_a_part(process, output)
    process.kill()
    assert process.wait(WAIT_LIMIT_S) == -signal.SIGKILL  # its workers may live on for a while and hold its pipes
    assert not output.exists()

    process = start(output)
    stdout, stderr = process.communicate(timeout=WAIT_LIMIT_S)
    assert process.returncode == 0, stderr
    last = json.loads(stdout.splitlines()[-1])
    assert last["digest"] == expected_many
    assert last["num_units_taken_over"] >= 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "all.beton",
        "all.manifest.json",
        "all.paths.txt.gz",
        "all.samples.bin",
    ]
