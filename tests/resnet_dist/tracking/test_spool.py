"""Lines, files, reader and writer of a spool: exact, complete, and never damaged by another writer."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import threading
from itertools import takewhile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_dist.errors import Fault
from resnet_dist.tracking.spool import (
    BadLine,
    Metrics,
    Opened,
    Tags,
    Text,
    decode,
    encode,
    file_number,
    follow,
    read_events,
    spool_files,
)
from resnet_dist.tracking.tracker import Spool

characters = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
names = st.text(characters, max_size=20)
paths = st.from_regex(r"[a-z]{1,5}(/[a-z.]{1,5}x){0,2}", fullmatch=True)
numbers = st.integers(0, 2**60)
records = st.one_of(
    st.builds(Metrics, numbers, numbers, st.dictionaries(names, st.floats(), max_size=4)),
    st.builds(Tags, numbers, st.dictionaries(names, names, max_size=4)),
    st.builds(Text, numbers, paths, st.text(characters, max_size=200)),
    st.builds(Opened, numbers, names, numbers, st.dictionaries(names, numbers, max_size=3)),
)


def bits(value: float) -> object:
    return "nan" if math.isnan(value) else value.hex()


@given(records)
def test_a_record_survives_its_line_to_the_bit(record):
    line = encode(record)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert line.isascii()
    back = decode(line)
    if isinstance(record, Metrics):
        assert (back.time_ms, back.step) == (record.time_ms, record.step)
        assert {k: bits(v) for k, v in back.values.items()} == {k: bits(v) for k, v in record.values.items()}
    else:
        assert back == record


@given(records, st.data())
def test_a_torn_line_is_never_taken_for_a_record(record, data):
    line = encode(record)[:-1]
    with pytest.raises(ValueError):
        decode(line[: data.draw(st.integers(0, len(line) - 1))])


@pytest.mark.parametrize(
    "line", [b"", b"{}", b"[1]", b"3", b"null", b'{"kind":"metrics"}', b'{"kind":"x","time_ms":1}', b"\0" * 64]
)
def test_a_foreign_line_is_an_error(line):
    with pytest.raises(ValueError, match="not a line of a spool"):
        decode(line)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(records, st.data())
def test_whatever_a_field_holds_a_line_is_a_record_or_an_error(record, data):
    fields = json.loads(encode(record))
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(json_values)
    try:
        back = decode(json.dumps(fields).encode())
    except ValueError:
        return
    encode(back)


@pytest.mark.parametrize(
    "field",
    [
        '"path":"../../x"', '"path":"/etc/x"', '"path":"a/../../x"', '"path":""', '"path":"a\\u0000"',
        '"path":"..\\\\x"',
        '"content":"\\ud800"', '"content":"\\u0000"', '"content":5', '"time_ms":1e400', '"time_ms":true',
        '"time_ms":-1', f'"time_ms":{10**30}', '"time_ms":NaN', '"time_ms":"now"', '"content":' + "[" * 100_000,
    ],
)  # fmt: skip
def test_invalid_values_that_would_stop_sending_are_rejected(field):
    fields = {"kind": '"text"', "time_ms": "1", "path": '"a.txt"', "content": '"x"'}
    key, _, value = field.partition(":")
    fields[key.strip('"')] = value
    line = "{" + ",".join(f'"{key}":{value}' for key, value in fields.items()) + "}"
    with pytest.raises(ValueError, match="not a line of a spool"):
        decode(line.encode())


def steps_of(folder: Path) -> list[int]:
    return [event.step for event in read_events(folder)]


def log(folder: Path, *steps: int, value: float = 1.0) -> Spool:
    """A closed spool that got these steps."""
    spool = Spool(folder)
    for step in steps:
        spool.metrics({"loss": value}, step)
    spool.close()
    return spool


def test_lines_are_the_events_in_the_order_logged(tmp_path):
    spool = Spool(tmp_path)
    spool.metrics({"loss": 0.5, "lr": 0.1}, step=10)
    spool.tags({"host": "node-1"})
    spool.text("notes/a.txt", "grüße\n" * 3)
    spool.close()
    opened, line, *_ = (json.loads(line) for line in spool.path.read_text().splitlines())
    assert (opened["kind"], opened["pid"], opened["kept_bytes"]) == ("opened", os.getpid(), {})
    assert line == {"kind": "metrics", "time_ms": line["time_ms"], "step": 10, "values": {"loss": 0.5, "lr": 0.1}}
    metrics, tags, text = read_events(tmp_path)
    assert metrics == Metrics(line["time_ms"], step=10, values={"loss": 0.5, "lr": 0.1})
    assert tags == Tags(tags.time_ms, values={"host": "node-1"})
    assert text == Text(text.time_ms, path="notes/a.txt", content="grüße\n" * 3)
    assert metrics.time_ms <= tags.time_ms <= text.time_ms


def test_a_restart_drops_replayed_steps(tmp_path):
    first = Spool(tmp_path)
    for step in range(1, 8):
        first.metrics({"loss": float(step)}, step)
    first.metrics({"val/top1": 0.1}, 4)
    first.close()
    second = Spool(tmp_path)  # resumes at step 4
    for step in range(5, 10):
        second.metrics({"loss": -1.0, "val/top1": 0.2}, step)
    second.close()
    events = list(read_events(tmp_path))
    loss = [(event.step, event.values["loss"]) for event in events if "loss" in event.values]
    assert loss == [(step, float(step)) for step in range(1, 8)] + [(8, -1.0), (9, -1.0)]
    assert [event.step for event in events if "val/top1" in event.values] == [4, 5, 6, 7, 8, 9]


def test_a_file_ends_where_a_power_cut_damaged_it(tmp_path):
    """What was logged after that is computed and logged again."""
    first = log(tmp_path, 1, 2, 3, 4)
    lines = first.path.read_bytes().splitlines(keepends=True)
    lines[2] = b"\0" * len(lines[2])
    first.path.write_bytes(b"".join(lines))
    second = log(tmp_path, 2, 3)
    assert steps_of(tmp_path) == [1, 2, 3]
    second.path.write_bytes(second.path.read_bytes()[:-5])  # a torn line
    assert steps_of(tmp_path) == [1, 2]
    for _ in range(2):
        log(tmp_path, 3)
        assert steps_of(tmp_path) == [1, 2, 3]


def test_a_writer_killed_at_any_moment_leaves_a_spool_that_can_be_continued(tmp_path):
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from resnet_dist.tracking.spool import read_events\nfrom resnet_dist.tracking.tracker import Spool\n"
        "spool = Spool(Path(sys.argv[1]))\n"
        # as if training resumed at an older checkpoint
        "start = max((event.step for event in read_events(Path(sys.argv[1]))), default=0) - 20\n"
        "for step in range(max(start, 1), 10**9):\n"
        "    spool.metrics({'loss': float(step), 'pad' * 50: 0.0}, step)\n"
        "    if step % 50 == 0: print(spool.persist(60) and step, flush=True)\n"
    )
    for num_lines in (1, 7, 3):
        with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as process:
            for _ in range(num_lines):
                promised = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
        steps = steps_of(tmp_path)
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) >= promised  # nothing that was persisted is lost


def test_a_writer_that_was_given_up_for_dead_spoils_nothing(tmp_path):
    old = Spool(tmp_path)
    old.metrics({"loss": 1.0}, 1)
    assert old.persist(30)
    assert old.is_newest()
    new = Spool(tmp_path)
    assert not old.is_newest()
    assert new.is_newest()
    old.metrics({"loss": -7.0}, 2)
    new.metrics({"loss": 2.0}, 2)
    old.close()
    new.close()
    assert [(e.step, e.values["loss"]) for e in read_events(tmp_path)] == [(1, 1.0), (2, 2.0)]


def test_a_writer_killed_before_its_first_line_counts_for_nothing(tmp_path):
    log(tmp_path, 1)
    (tmp_path / "00000-00002.jsonl").write_bytes(b'{"kind":"ope')
    assert steps_of(tmp_path) == [1]
    third = log(tmp_path, 2)
    assert [path.name for path, _ in spool_files(tmp_path)] == [f"00000-0000{n}.jsonl" for n in (1, 2, 3)]
    assert third.path.name == "00000-00003.jsonl"
    assert steps_of(tmp_path) == [1, 2]


def test_the_lease_orders_the_files_and_locks_out_older_drivers(tmp_path):
    for lease, expected in ((None, "00000-00001"), (2, "00002-00001"), (2, "00002-00002"), (None, "00002-00003")):
        spool = Spool(tmp_path, lease=lease)
        assert spool.path.stem == expected
        spool.close()
    with pytest.raises(Fault, match="another driver has taken over"):
        Spool(tmp_path, lease=1)
    assert [file_number(name) for name in ("00002-00003.jsonl", "0002.jsonl", "rejected.jsonl", "\u00b2.jsonl")] == [
        (2, 3), (0, 2), None, None
    ]  # fmt: skip


def test_many_processes_opening_at_once_get_a_file_each(tmp_path):
    spools: list[Spool] = []
    threads = [threading.Thread(target=lambda: spools.append(Spool(tmp_path))) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(s.path.name for s in spools) == [f"00000-{n:05d}.jsonl" for n in range(1, 13)]
    assert sum(s.is_newest() for s in spools) == 1
    for spool in spools:
        spool.close()


def test_appending_never_waits_for_storage(tmp_path, monkeypatch):
    spool = Spool(tmp_path)
    opening = spool.durable_bytes
    storage_answers = threading.Event()
    real_fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (storage_answers.wait(60), real_fsync(fd)))
    for step in range(1, 2001):
        spool.metrics({"loss": 0.0}, step)
    assert not spool.persist(timeout_s=0.2)
    assert spool.durable_bytes == opening
    storage_answers.set()
    assert spool.persist(timeout_s=60)
    assert spool.durable_bytes == spool.path.stat().st_size
    spool.close()
    assert steps_of(tmp_path) == list(range(1, 2001))


def test_full_storage_loses_nothing_and_leaves_complete_lines(tmp_path, monkeypatch):
    monkeypatch.setattr("resnet_dist.tracking.tracker._RETRY_WRITE_S", 0.01)
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
        spool.metrics({"loss": 0.25}, step)
    assert spool.persist(60)
    spool.close()
    monkeypatch.undo()
    assert next(outcomes, "used up") == "used up"
    assert steps_of(tmp_path) == list(range(1, 51))
    assert spool.path.read_bytes().count(b"\n") == 51


def test_reading_continues_where_it_stopped_and_not_past_the_limit(tmp_path):
    spool = Spool(tmp_path)
    spool.metrics({"loss": 1.0}, 1)
    assert spool.persist(30)
    limit = spool.durable_bytes
    spool.metrics({"loss": 1.0}, 2)
    spool.text("big.txt", "x" * 500_000)
    spool.metrics({"loss": 1.0}, 3)
    assert spool.persist(30)
    events = follow(tmp_path, {}, lambda: limit)
    first, nothing, still_nothing = (next(events) for _ in range(3))
    assert (first.step, nothing, still_nothing) == (1, None, None)
    limit = spool.durable_bytes - 1
    rest = list(takewhile(lambda event: event is not None, events))
    assert [type(event) for event in rest] == [Metrics, Text]
    assert len(rest[1].content) == 500_000
    limit += 1
    assert next(events).step == 3
    spool.close()


def test_a_line_longer_than_any_of_a_spool_is_passed_over(tmp_path, monkeypatch):
    spool = log(tmp_path, 1)
    with spool.path.open("ab") as file:
        file.write(b"x" * 2500 + b"\n" + encode(Metrics(1, step=2, values={"loss": 1.0})))
    monkeypatch.setattr("resnet_dist.tracking.spool.MAX_LINE_BYTES", 1000)
    assert steps_of(tmp_path) == [1, 2]
    assert sum(isinstance(e, BadLine) for e in takewhile(lambda e: e is not None, follow(tmp_path, {}))) == 3


def test_a_closed_spool_takes_nothing(tmp_path):
    spool = log(tmp_path)
    spool.close()
    with pytest.raises(RuntimeError, match="closed"):
        spool.metrics({"loss": 1.0}, 1)
