from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resnet_dist.tracking.spool import Metrics, Spool, Tags, Text
from resnet_dist.tracking.sync import (
    LANES,
    MAX_POINTS,
    MAX_TAGS,
    REJECTED_NAME,
    Batch,
    Delivery,
    Refused,
    Superseded,
    Unavailable,
    cursor_file,
    halves,
    next_points,
    next_text,
    too_large,
)


class MemoryServer:
    """Keeps points as MLflow does: the same (key, time, step, value) twice is one. Fails as told."""

    def __init__(self, script=()):
        self.script = iter(script)
        self.points = {}
        self.tags = {}
        self.texts = {}
        self.arrivals = []

    def newest_steps(self):
        self._maybe_fail()
        newest = {}
        for key, _, step, _ in self.points:
            newest[key] = max(step, newest.get(key, step))
        return newest

    def send(self, batch):
        assert batch
        assert not too_large(batch)
        failure = next(self.script, "ok")
        if failure == "lost on the way":
            raise Unavailable(failure)
        if any("bad" in point.key for point in batch.points) or any("bad" in key for key, _ in batch.tags):
            raise Refused("bad name")
        for point in batch.points:
            identity = (point.key, point.time_ms, point.step, point.value)
            if identity not in self.points:
                self.points[identity] = True
                self.arrivals.append((point.key, point.step))
        self.tags.update(batch.tags)
        if batch.text:
            self.texts[batch.text.path] = batch.text.content
        if failure == "answer lost":
            raise Unavailable(failure)

    def _maybe_fail(self):
        if next(self.script, "ok") != "ok":
            raise Unavailable("down")


def deliver_all(delivery, attempts=1000):
    for _ in range(attempts):
        try:
            if delivery.send_next() == 0:
                return
        except Unavailable:
            pass
    raise AssertionError("never finished")


events_lists = st.lists(
    st.one_of(
        st.integers(1, 400).map(lambda n: Metrics(0, 5, 1, {f"m{i}": float(i) for i in range(n)})),
        st.integers(1, 60).map(lambda n: Tags(0, 5, {f"t{i}": "v" for i in range(n)})),
        st.just(Text(0, 5, "a.txt", "content")),
    ),
    max_size=12,
)


@given(events_lists)
@settings(max_examples=60)
def test_batches_hold_everything_in_order_within_the_limits(events):
    points, texts, start = [], 0, 0
    while start < len(events):
        batch, num_events = next_points(events[start:], {})
        assert num_events >= 1
        assert batch.text is None
        assert not too_large(batch)
        points += [(point.key, point.value) for point in batch.points]
        start += num_events
    start = 0
    while start < len(events):
        batch, num_events = next_text(events[start:])
        assert num_events >= 1
        assert not batch.points
        assert not batch.tags
        texts += batch.text is not None
        start += num_events
    assert points == [pair for event in events if isinstance(event, Metrics) for pair in event.values.items()]
    assert texts == sum(isinstance(event, Text) for event in events)


def test_the_later_tag_stands():
    batch, num_events = next_points([Tags(1, 5, {"a": "1", "b": "1"}), Tags(2, 5, {"a": "2"})], {})
    assert num_events == 2
    assert dict(batch.tags) == {"a": "2", "b": "1"}


def test_an_event_larger_than_a_call_is_cut(tmp_path):
    spool = Spool(tmp_path)
    spool.append_metrics({f"m{i}": 1.0 for i in range(3 * MAX_POINTS)}, 1)
    spool.append_tags({f"t{i}": "v" for i in range(2 * MAX_TAGS + 1)})
    spool.close(30)
    server = MemoryServer()
    deliver_all(Delivery(tmp_path, "points", server))
    assert [key for key, _ in server.arrivals] == [f"m{i}" for i in range(3 * MAX_POINTS)]
    assert len(server.tags) == 2 * MAX_TAGS + 1


def test_halving_ends_at_single_things():
    batch, _ = next_points([Metrics(1, 5, 1, {"a": 1.0, "b": 2.0, "c": 3.0}), Tags(2, 5, {"t": "1"})], {})
    single, stack = [], [batch]
    while stack:
        part = stack.pop(0)
        parts = halves(part)
        if parts is None:
            single.append(part)
        else:
            stack = [*parts, *stack]
    assert [len(part.points) + len(part.tags) for part in single] == [1, 1, 1, 1]
    assert Batch(points=batch.points, tags=batch.tags) == batch


@given(
    failures=st.lists(st.sampled_from(["ok", "lost on the way", "answer lost"]), max_size=30),
    restarts=st.lists(st.integers(0, 4), max_size=6),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_point_arrives_once_and_in_order_whatever_fails(tmp_path_factory, failures, restarts):
    folder = tmp_path_factory.mktemp("spool")
    server = MemoryServer(failures)
    step = 0
    for num_attempts in [*restarts, None]:
        spool = Spool(folder)
        for new in range(max(step - 3, 0), step + 7):  # every attempt begins three steps before the last one's end
            spool.append_metrics({"loss": float(new), "lr": 0.1}, new)
        step += 6
        spool.append_text("recipe.yaml", f"attempt at {step}")
        spool.close(30)
        for lane in LANES:
            delivery = Delivery(folder, lane, server)
            if num_attempts is None:
                deliver_all(delivery)
            for _ in range(num_attempts or 0):
                try:
                    delivery.send_next()
                except Unavailable:
                    continue
    wanted = [(key, n) for n in range(step + 1) for key in ("loss", "lr")]
    assert server.arrivals == wanted
    assert len(server.points) == len(wanted)
    assert server.texts == {"recipe.yaml": f"attempt at {step}"}


def test_an_answer_lost_before_the_cursor_was_written_adds_no_point(tmp_path):
    spool = Spool(tmp_path)
    spool.append_metrics({"loss": 1.0}, 1)
    spool.close(30)
    server = MemoryServer()
    deliver_all(Delivery(tmp_path, "points", server))
    cursor_file(tmp_path, "points").write_text('{"seq": 0, "server_steps": {}}')
    again = Delivery(tmp_path, "points", server)
    assert again.send_next() == 1
    assert len(server.points) == 1


@pytest.mark.parametrize("damage", ["", "{", '{"seq": "x"}', "[]"])
def test_a_damaged_cursor_costs_nothing(tmp_path, damage):
    spool = Spool(tmp_path)
    for step in range(10):
        spool.append_metrics({"loss": 1.0}, step)
    spool.close(30)
    server = MemoryServer()
    deliver_all(Delivery(tmp_path, "points", server))
    cursor_file(tmp_path, "points").write_text(damage)
    deliver_all(Delivery(tmp_path, "points", server))
    assert server.arrivals == [("loss", step) for step in range(10)]


def test_a_new_spool_of_an_old_run_leaves_out_what_the_server_has(tmp_path):
    server = MemoryServer()
    old = Spool(tmp_path / "node-1")
    for step in range(1, 11):
        old.append_metrics({"loss": float(step)}, step)
    old.close(30)
    deliver_all(Delivery(tmp_path / "node-1", "points", server))
    new = Spool(tmp_path / "node-2")  # another disk: resumes at step 7, knows nothing
    for step in range(8, 15):
        new.append_metrics({"loss": -1.0, "val/loss": 2.0}, step)
    new.close(30)
    first = Delivery(tmp_path / "node-2", "points", server)
    first.send_next()
    deliver_all(Delivery(tmp_path / "node-2", "points", server))
    losses = {step: value for key, _, step, value in server.points if key == "loss"}
    assert losses == {step: float(step) if step <= 10 else -1.0 for step in range(1, 15)}
    assert sorted(step for key, _, step, _ in server.points if key == "val/loss") == list(range(8, 15))
    assert len(server.points) == 14 + 7


def test_the_server_is_asked_for_its_steps_only_before_the_first_batch(tmp_path):
    """Asked later it would name this spool's own steps, and an unacknowledged batch would be left out."""
    spool = Spool(tmp_path)
    spool.append_metrics({"a": 1.0}, 5)
    assert spool.persist(30)
    server = MemoryServer()
    deliver_all(Delivery(tmp_path, "points", server))
    server.newest_steps = lambda: pytest.fail("asked again")
    spool.append_metrics({"a": 1.0}, 6)
    spool.close(30)
    deliver_all(Delivery(tmp_path, "points", server))
    assert server.arrivals == [("a", 5), ("a", 6)]


def test_what_the_server_refuses_does_not_hold_up_the_rest(tmp_path):
    spool = Spool(tmp_path)
    for step in range(20):
        values = {"loss": 1.0, "lr": 0.1} | ({"bad|name": 3.0} if step == 7 else {})
        spool.append_metrics(values, step)
    spool.append_tags({"bad tag": "x", "good": "y"})
    spool.append_metrics({"loss": 1.0}, 20)
    spool.close(30)
    server = MemoryServer()
    delivery = Delivery(tmp_path, "points", server)
    deliver_all(delivery)
    assert [step for key, step in server.arrivals if key == "loss"] == list(range(21))
    assert server.tags == {"good": "y"}
    assert delivery.num_rejected == 2
    rejected = (tmp_path / REJECTED_NAME).read_text().splitlines()
    assert len(rejected) == 2
    assert "bad|name at step 7 = 3.0" in rejected[0]
    assert "bad tag" in rejected[1]


def test_texts_that_cannot_be_stored_do_not_hold_up_the_points(tmp_path):
    spool = Spool(tmp_path)
    spool.append_text("recipe.yaml", "seed: 1")
    spool.append_metrics({"loss": 1.0}, 1)
    spool.close(30)
    server = MemoryServer(["lost on the way"] * 3)
    texts, points = Delivery(tmp_path, "texts", server), Delivery(tmp_path, "points", MemoryServer())
    for _ in range(3):
        with pytest.raises(Unavailable):
            texts.send_next()
    assert texts.acknowledged_seq == 0
    deliver_all(points)
    assert points.acknowledged_seq == 2
    deliver_all(texts)
    assert texts.acknowledged_seq == 2
    assert server.texts == {"recipe.yaml": "seed: 1"}


def test_a_superseded_writer_sends_nothing_more(tmp_path):
    server = MemoryServer()
    old = Spool(tmp_path)
    old.append_metrics({"loss": 1.0}, 1)
    assert old.persist(30)
    delivery = Delivery(tmp_path, "points", server, may_send=old.is_newest)
    assert delivery.send_next() == 1
    new = Spool(tmp_path)
    old.append_metrics({"loss": -1.0}, 2)
    assert old.persist(30)
    with pytest.raises(Superseded):
        delivery.send_next(old.durable[1])
    assert server.arrivals == [("loss", 1)]
    old.close(30)
    new.close(30)
