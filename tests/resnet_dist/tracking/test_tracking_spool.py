from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from resnet_dist.tracking.spool import Metrics, Spool, SpoolReader, Tags, Text, parse, segments


def read_all(folder: Path, **kwargs):
    reader = SpoolReader(folder)
    events = []
    while chunk := reader.read(**kwargs):
        events += chunk
    return events


def numbered(events):
    return [(event.seq, event.step) for event in events]


def test_what_is_appended_is_read_in_order(tmp_path):
    spool = Spool(tmp_path)
    spool.append_metrics({"loss": 0.5, "lr": 0.1}, step=10)
    spool.append_tags({"host": "node-1"})
    spool.append_text("notes/a.txt", "grüße\n" * 3)
    assert spool.close(timeout_s=30)
    metrics, tags, text = read_all(tmp_path)
    assert metrics == Metrics(1, metrics.time_ms, 10, {"loss": 0.5, "lr": 0.1})
    assert tags == Tags(2, tags.time_ms, {"host": "node-1"})
    assert text == Text(3, text.time_ms, "notes/a.txt", "grüße\n" * 3)
    assert metrics.time_ms <= tags.time_ms <= text.time_ms


def test_reopening_continues_the_numbering_and_drops_replayed_steps(tmp_path):
    first = Spool(tmp_path)
    for step in range(1, 8):
        first.append_metrics({"loss": float(step)}, step)
    first.append_metrics({"val/top1": 0.1}, 4)
    first.close(30)
    second = Spool(tmp_path)  # resumes at step 4
    assert second.newest_steps == {"loss": 7, "val/top1": 4}
    for step in range(5, 10):
        second.append_metrics({"loss": -1.0, "val/top1": 0.2}, step)
    second.close(30)
    events = read_all(tmp_path)
    assert [event.seq for event in events] == list(range(1, 14))
    loss = [(event.step, event.values["loss"]) for event in events if "loss" in event.values]
    assert loss == [(step, float(step)) for step in range(1, 8)] + [(8, -1.0), (9, -1.0)]
    top1 = [event.step for event in events if "val/top1" in event.values]
    assert top1 == [4, 5, 6, 7, 8, 9]


def test_a_torn_last_line_is_dropped_and_counted(tmp_path):
    first = Spool(tmp_path)
    for step in (1, 2, 3):
        first.append_metrics({"loss": 1.0}, step)
    first.close(30)
    whole = first.path.read_bytes()
    first.path.write_bytes(whole[:-5])
    second = Spool(tmp_path)
    assert second.num_dropped_lines == 1
    assert second.last_seq == 2
    assert second.newest_steps == {"loss": 2}
    second.append_metrics({"loss": 1.0}, 3)
    second.close(30)
    assert numbered(read_all(tmp_path)) == [(1, 1), (2, 2), (3, 3)]
    third = Spool(tmp_path)  # the torn line stays dropped and is not counted again
    third.close(30)
    assert third.num_dropped_lines == 0
    assert numbered(read_all(tmp_path)) == [(1, 1), (2, 2), (3, 3)]


def test_a_damaged_middle_ends_the_segment_there(tmp_path):
    first = Spool(tmp_path)
    for step in (1, 2, 3, 4):
        first.append_metrics({"loss": 1.0}, step)
    first.close(30)
    lines = first.path.read_bytes().splitlines(keepends=True)
    lines[2] = b"\0" * len(lines[2])  # what a power cut leaves of pages that never reached the disk
    first.path.write_bytes(b"".join(lines))
    second = Spool(tmp_path)
    second.close(30)
    assert second.newest_steps == {"loss": 1}
    assert second.last_seq == 4  # those numbers are taken: `sync` may have sent what stands behind the damage
    assert numbered(read_all(tmp_path)) == [(1, 1)]


def test_a_writer_killed_at_any_moment_leaves_a_spool_that_goes_on(tmp_path):
    program = (
        "import sys\nfrom pathlib import Path\nfrom resnet_dist.tracking.spool import Spool\n"
        "spool = Spool(Path(sys.argv[1]), sync_interval_s=0.01)\n"
        "start = spool.newest_steps.get('loss', 0) - 20\n"  # as if training resumed at an older checkpoint
        "for step in range(max(start, 1), 10**9):\n"
        "    spool.append_metrics({'loss': float(step), 'pad' * 50: 0.0}, step)\n"
        "    if step % 50 == 0: print(spool.persist(60) and spool.last_seq, flush=True)\n"
    )
    promised = 0
    for num_lines in (1, 7, 3):
        with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as process:
            for _ in range(num_lines):
                promised = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
        spool = Spool(tmp_path)
        spool.close(30)
        events = read_all(tmp_path)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert [event.step for event in events] == list(range(1, len(events) + 1))
        assert spool.last_seq == len(events) >= promised  # nothing that was persisted is lost


def test_a_writer_that_was_given_up_for_dead_spoils_nothing(tmp_path):
    old = Spool(tmp_path)
    old.append_metrics({"loss": 1.0}, 1)
    assert old.persist(30)
    assert old.is_newest()
    new = Spool(tmp_path)
    assert not old.is_newest()
    assert new.is_newest()
    old.append_metrics({"loss": -7.0}, 2)
    new.append_metrics({"loss": 2.0}, 2)
    assert old.close(30)
    assert new.close(30)
    assert [(e.seq, e.step, e.values["loss"]) for e in read_all(tmp_path)] == [(1, 1, 1.0), (2, 2, 2.0)]
    third = Spool(tmp_path)
    third.close(30)
    assert third.last_seq == 2


def test_a_writer_killed_before_its_first_line_counts_for_nothing(tmp_path):
    first = Spool(tmp_path)
    first.append_metrics({"loss": 1.0}, 1)
    first.close(30)
    (tmp_path / "0002.jsonl").write_bytes(b'{"kind":"ope')
    assert numbered(read_all(tmp_path)) == [(1, 1)]
    third = Spool(tmp_path)
    third.append_metrics({"loss": 1.0}, 2)
    third.close(30)
    assert third.path.name == "0003.jsonl"
    assert [s.path.name for s in segments(tmp_path)] == ["0001.jsonl", "0002.jsonl", "0003.jsonl"]
    assert numbered(read_all(tmp_path)) == [(1, 1), (2, 2)]


def test_many_processes_opening_at_once_get_a_segment_each(tmp_path):
    spools: list[Spool] = []
    threads = [threading.Thread(target=lambda: spools.append(Spool(tmp_path))) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(s.path.name for s in spools) == [f"{n:04d}.jsonl" for n in range(1, 13)]
    assert sum(s.is_newest() for s in spools) == 1
    for spool in spools:
        spool.close(30)


def test_appending_never_waits_for_storage(tmp_path, monkeypatch):
    spool = Spool(tmp_path)
    storage_answers = threading.Event()
    real_fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (storage_answers.wait(60), real_fsync(fd)))
    for step in range(1, 2001):
        spool.append_metrics({"loss": 0.0}, step)
    assert not spool.persist(timeout_s=0.2)
    assert spool.durable[0] == 0
    storage_answers.set()
    assert spool.persist(timeout_s=60)
    assert spool.durable == (2000, spool.path.stat().st_size)
    spool.close(30)
    assert numbered(read_all(tmp_path)) == [(n, n) for n in range(1, 2001)]


def test_full_storage_loses_nothing_and_leaves_whole_lines(tmp_path, monkeypatch):
    monkeypatch.setattr("resnet_dist.tracking.spool._RETRY_WRITE_S", 0.01)
    spool = Spool(tmp_path)
    real_write = os.write
    outcomes = iter([full := object(), 7, full, full, 1, full, 100])

    def write(fd, data):
        outcome = next(outcomes, None) if fd == spool._file else None
        if outcome is full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(fd, data[:outcome])

    monkeypatch.setattr(os, "write", write)
    for step in range(1, 51):
        spool.append_metrics({"loss": 0.25}, step)
    assert spool.close(timeout_s=60)
    monkeypatch.undo()
    assert next(outcomes, "used up") == "used up"
    assert numbered(read_all(tmp_path)) == [(n, n) for n in range(1, 51)]
    assert parse(spool.path.read_bytes()).num_bytes == spool.path.stat().st_size


def test_reading_goes_on_where_it_stopped_and_not_past_the_limit(tmp_path):
    spool = Spool(tmp_path)
    spool.append_metrics({"loss": 1.0}, 1)
    assert spool.persist(30)
    limit = spool.durable[1]
    spool.append_metrics({"loss": 1.0}, 2)
    spool.append_text("big.txt", "x" * 500_000)
    spool.append_metrics({"loss": 1.0}, 3)
    assert spool.persist(30)
    reader = SpoolReader(tmp_path)
    assert [e.seq for e in reader.read(limit)] == [1]
    assert reader.read(limit) == []
    rest = []
    while chunk := reader.read(spool.durable[1], chunk_bytes=64):
        rest += chunk
    assert [e.seq for e in rest] == [2, 3, 4]
    assert len(rest[1].content) == 500_000
    assert reader.num_unread_bytes() == 0
    spool.close(30)


def test_lines_are_json_with_the_fields_the_readme_names(tmp_path):
    spool = Spool(tmp_path)
    spool.append_metrics({"loss": 0.5}, 3)
    spool.close(30)
    opened, metrics = (json.loads(line) for line in spool.path.read_text().splitlines())
    assert opened["kind"] == "opened"
    assert opened["pid"] == os.getpid()
    assert metrics == {"kind": "metrics", "seq": 1, "time_ms": metrics["time_ms"], "step": 3, "values": {"loss": 0.5}}


def test_a_closed_spool_takes_nothing(tmp_path):
    spool = Spool(tmp_path)
    assert spool.close(30)
    assert spool.close(30)
    with pytest.raises(RuntimeError, match="closed"):
        spool.append_metrics({"loss": 1.0}, 1)
