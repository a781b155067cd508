from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_dist.tracking.spool import Metrics, Opened, Tags, Text, decode, encode, unseen

characters = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
names = st.text(characters, max_size=20)
paths = st.from_regex(r"[a-z]{1,5}(/[a-z.]{1,5}x){0,2}", fullmatch=True)
numbers = st.integers(0, 2**60)
records = st.one_of(
    st.builds(Metrics, numbers, numbers, numbers, st.dictionaries(names, st.floats(), max_size=4)),
    st.builds(Tags, numbers, numbers, st.dictionaries(names, names, max_size=4)),
    st.builds(Text, numbers, numbers, paths, st.text(characters, max_size=200)),
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
        assert (back.seq, back.time_ms, back.step) == (record.seq, record.time_ms, record.step)
        assert {k: bits(v) for k, v in back.values.items()} == {k: bits(v) for k, v in record.values.items()}
    else:
        assert back == record


@given(records, st.data())
def test_a_torn_line_is_never_taken_for_a_record(record, data):
    line = encode(record)[:-1]
    with pytest.raises(ValueError):
        decode(line[: data.draw(st.integers(0, len(line) - 1))])


@pytest.mark.parametrize(
    "line", [b"", b"{}", b"[1]", b"3", b"null", b'{"kind":"metrics"}', b'{"kind":"x"}', b"\0" * 64]
)
def test_a_foreign_line_is_an_error(line):
    with pytest.raises(ValueError, match=r"spool|JSON|Expecting"):
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
        '"content":"\\ud800"', '"content":"\\u0000"', '"content":5', '"seq":1e400', '"seq":true', '"seq":-1',
        f'"seq":{10**30}', '"seq":NaN', '"time_ms":"now"', '"content":' + "[" * 100_000,
    ],
)  # fmt: skip
def test_what_would_stop_the_sending_is_no_record(field):
    fields = {"kind": '"text"', "seq": "1", "time_ms": "1", "path": '"a.txt"', "content": '"x"'}
    key, _, value = field.partition(":")
    fields[key.strip('"')] = value
    line = "{" + ",".join(f'"{key}":{value}' for key, value in fields.items()) + "}"
    with pytest.raises(ValueError, match="not a line of a spool"):
        decode(line.encode())


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 9)), max_size=40))
def test_of_every_key_only_growing_steps_are_seen(calls):
    newest: dict[str, int] = {}
    logged: list[tuple[str, int]] = []
    for key, step in calls:
        new = unseen({key: 1.0}, step, newest)
        newest.update(dict.fromkeys(new, step))
        logged += [(key, step)] if new else []
    for key in "ab":
        steps = [step for k, step in logged if k == key]
        assert steps == sorted(set(steps))
        assert max(steps, default=None) == max((step for k, step in calls if k == key), default=None)
