"""Betons in a bucket: the bytes of a local one, nothing under the final name before they are whole, none done twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.beton import ranges
from data_prep.beton.stage import stage
from data_prep.converter.context import ThisProcess
from data_prep.converter.convert import ConvertReport, convert
from data_prep.converter.object_output import ObjectOutput
from data_prep.converter.output import open_output
from data_prep.converter.plan import WorkUnit
from data_prep.converter.settings import ConvertSettings
from data_prep.converter.split import SplitRule, convert_splits
from data_prep.converter.write import WriteTask
from data_prep.errors import Fault, Interrupted, UserError
from data_prep.runtime.stop import StopFlag
from data_prep.sources import open_source
from data_prep.sources.splits import SplitRequest

pytestmark = pytest.mark.system

SYNTHETIC = "n=2148,size=16..40,classes=3,seed=4"
RANGE_BYTES = 8 << 20


@pytest.fixture(scope="module")
def bucket(object_store: Any) -> Any:
    """boto3's client of a store with the empty bucket `prep`."""
    object_store.create_bucket(Bucket="prep")
    return object_store


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts of an upload; S3 wants 5 MiB of each."""
    monkeypatch.setattr(ranges, "RANGE_BYTES", RANGE_BYTES)


def names(bucket: Any, prefix: str) -> list[str]:
    return [entry["Key"] for entry in bucket.list_objects_v2(Bucket="prep", Prefix=prefix).get("Contents", ())]


def read(bucket: Any, key: str) -> bytes:
    return bucket.get_object(Bucket="prep", Key=key)["Body"].read()


class Watched(ThisProcess):
    """Calls `look(item, number of items so far)` before every item."""

    def __init__(self, look: Any) -> None:
        super().__init__(StopFlag())
        self.look = look
        self.done: list[Any] = []

    def run(self, task: Any, job: Any, items: Any) -> Any:
        for item in items:
            self.look(item, len(self.done))
            self.done.append(item)
            yield task(job, item)


def convert_to(
    output: Any, pool: ThisProcess | None = None, location: str = SYNTHETIC, **settings: Any
) -> ConvertReport:
    source = open_source("synthetic", location, SplitRequest(None, explicit=False))
    return convert(source, output, settings=ConvertSettings(**settings), workers=pool or 0)


def test_a_beton_in_a_bucket_has_the_bytes_of_a_local_one(bucket: Any, tmp_path: Path) -> None:
    local = convert_to(tmp_path / "a.beton", encode="raw")
    remote = convert_to("s3://prep/same/a.beton", encode="raw")
    assert remote.manifest == local.manifest
    assert names(bucket, "same/") == [
        f"same/a{end}" for end in (".beton", ".manifest.json", ".paths.txt.gz", ".samples.bin")
    ]
    for name in names(bucket, "same/"):
        assert read(bucket, name) == (tmp_path / name.removeprefix("same/")).read_bytes()
    assert not bucket.list_multipart_uploads(Bucket="prep").get("Uploads")
    staged = stage("s3://prep/same/a.beton", tmp_path / "cache")
    assert staged.read_bytes() == (tmp_path / "a.beton").read_bytes()
    assert convert_to("s3://prep/same/a.beton", encode="raw").already_done
    with pytest.raises(UserError, match=r"s3://prep/same/a\.beton: exists and was made from another source or with"):
        convert_to("s3://prep/same/a.beton")


def test_both_betons_of_a_divided_source_may_be_in_a_bucket(bucket: Any, tmp_path: Path) -> None:
    remote = convert_splits("synthetic", "s3://prep/both/", SplitRule(0.3), input="n=40,size=16")
    local = convert_splits("synthetic", tmp_path, SplitRule(0.3), input="n=40,size=16")
    assert [report.manifest for report in remote.values()] == [report.manifest for report in local.values()]
    assert remote["val"].path == "s3://prep/both/val.beton"


def test_it_resumes_where_it_was_stopped_and_shows_nothing_before_the_end(bucket: Any, tmp_path: Path) -> None:
    expected = convert_to(tmp_path / "a.beton").manifest
    output, stops = "s3://prep/stopped/a.beton", []

    def stop_at(number: int) -> Any:
        def look(item: Any, count: int) -> None:
            assert "stopped/a.beton" not in names(bucket, "stopped/")
            assert "stopped/a.manifest.json" not in names(bucket, "stopped/")
            if count == number:
                raise Interrupted(15)

        return look

    for number in (1, 2, 2):
        pool = Watched(stop_at(number))
        with pytest.raises(Interrupted):
            convert_to(output, pool)
        stops.append([type(item) for item in pool.done])
    assert stops == [[WorkUnit], [WorkUnit, WorkUnit], [WriteTask, WriteTask]]
    notes = {name: read(bucket, name) for name in names(bucket, "stopped/a.beton.work/range-")}
    (upload,) = bucket.list_multipart_uploads(Bucket="prep")["Uploads"]
    sent = bucket.list_parts(Bucket="prep", Key="stopped/a.beton", UploadId=upload["UploadId"])["Parts"]
    assert [part["PartNumber"] for part in sent] == [1, 2]
    assert [part["ETag"] for part in sent] == [json.loads(note)["receipt"] for note in notes.values()]
    outcome = convert_to(output)
    assert outcome.num_units_resumed == 3
    assert outcome.manifest == expected
    assert read(bucket, "stopped/a.beton") == (tmp_path / "a.beton").read_bytes()
    assert not bucket.list_multipart_uploads(Bucket="prep").get("Uploads")


def test_an_upload_that_is_gone_is_restarted(bucket: Any, tmp_path: Path) -> None:
    output = "s3://prep/gone/a.beton"

    def stop(item: Any, count: int) -> None:
        if count == 5:
            raise Interrupted(15)

    with pytest.raises(Interrupted):
        convert_to(output, Watched(stop))
    (upload,) = bucket.list_multipart_uploads(Bucket="prep")["Uploads"]
    bucket.abort_multipart_upload(Bucket="prep", Key="gone/a.beton", UploadId=upload["UploadId"])
    convert_to(tmp_path / "a.beton")
    assert convert_to(output).num_units_resumed == 3
    assert read(bucket, "gone/a.beton") == (tmp_path / "a.beton").read_bytes()


def test_killed_between_beton_and_manifest_it_is_made_again(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    output = "s3://prep/between/a.beton"
    with monkeypatch.context() as patch:
        patch.setattr(ObjectOutput, "complete", _complete_and_die)
        with pytest.raises(Interrupted):
            convert_to(output)
    assert "between/a.beton" in names(bucket, "between/")
    assert "between/a.manifest.json" not in names(bucket, "between/")
    assert convert_to(output).num_units_resumed == 3
    assert names(bucket, "between/") == [
        "between/a.beton",
        "between/a.manifest.json",
        "between/a.paths.txt.gz",
        "between/a.samples.bin",
    ]


complete = ObjectOutput.complete


def _complete_and_die(output: ObjectOutput, target: str, receipts: Any) -> None:
    complete(output, target, receipts)
    raise Interrupted(9)


def test_of_two_drivers_the_older_one_ends(bucket: Any) -> None:
    output = "s3://prep/two/a.beton"

    def second_comes(item: Any, count: int) -> None:
        if isinstance(item, WriteTask):
            open_output(output).write("owner", b"host-2 token")

    with pytest.raises(UserError, match="another data-prep, on host-2, has taken over"):
        convert_to(output, Watched(second_comes))
    assert "two/a.beton" not in names(bucket, "two/")


def test_bad_samples_and_what_cannot_be_written(bucket: Any, tmp_path: Path) -> None:
    tree = tmp_path / "tree" / "cat"
    tree.mkdir(parents=True)
    (tree / "a.jpg").write_bytes(b"no image")
    source = open_source("image-folder", str(tmp_path / "tree"), SplitRequest(None, explicit=False))
    with pytest.raises(UserError, match=r"all are listed in s3://prep/bad/a\.bad-samples\.tsv"):
        convert(source, "s3://prep/bad/a.beton")
    assert b"cat/a.jpg\tis no picture of a format that is read" in read(bucket, "bad/a.bad-samples.tsv")
    with pytest.raises((UserError, Fault), match=r"s3://no-such-bucket/a\.beton"):
        convert_to("s3://no-such-bucket/a.beton")
    with pytest.raises(UserError, match="betons are written to a file system or to s3://"):
        convert_to("gs://bucket/a.beton")
    bucket.put_object(Bucket="prep", Key="other/a.beton", Body=b"something else")
    with pytest.raises(UserError, match="exists without a manifest"):
        convert_to("s3://prep/other/a.beton")
