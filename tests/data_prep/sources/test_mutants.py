"""Damaged containers (bytes changed, removed, inserted) are read right or refused in one line, in bounded memory."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.data_prep.sources.opening import OpenAllWithin, TarOf

NUM_MUTANTS = 40
"""Of each container."""


def mutant(draw: np.random.Generator, whole: bytes) -> bytes:
    """Some bytes changed, cut out or put in; often in the footer, which says where everything is."""
    data = bytearray(whole)
    for _ in range(int(draw.integers(1, 4))):
        in_footer = draw.random() < 0.6
        at = int(draw.integers(len(data) * 2 // 3 if in_footer else 0, len(data)))
        match draw.integers(4):
            case 0:
                data[at] ^= 1 << int(draw.integers(8))
            case 1:
                data[at : at + 4] = draw.bytes(4)
            case 2:
                del data[at : at + int(draw.integers(1, 30))]
            case _:
                data[at:at] = draw.choice([b"\xff" * 5, b"\0" * 4, b"\x7f\xff\xff\xff"])
    return bytes(data)


def parquet_files() -> list[bytes]:
    """The same rows in several encodings."""
    images, texts = [b"image %d" % i for i in range(12)], ["cat", "dog"] * 6
    names = {"info": {"features": {"label": {"names": ["cat", "dog"]}}}}
    deltas = {"image": "DELTA_BYTE_ARRAY", "label": "DELTA_LENGTH_BYTE_ARRAY"}
    structs = {"image": [{"bytes": image, "path": "x.png"} for image in images], "label": [i % 2 for i in range(12)]}
    kinds: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (structs, {"row_group_size": 5}),
        (structs, {"compression": "none", "use_dictionary": False, "data_page_version": "2.0"}),
        ({"image": images, "label": texts}, {"compression": "zstd"}),
        ({"image": images, "label": texts}, {"use_dictionary": False, "column_encoding": deltas}),
    ]
    files = []
    for columns, options in kinds:
        target = io.BytesIO()
        pq.write_table(pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(names)}), target, **options)
        files.append(target.getvalue())
    return files


def cifar_files(tar_of: TarOf) -> list[bytes]:
    pixels = np.zeros((2, 3072), dtype=np.uint8)
    names = [f"class {label}" for label in range(10)]
    files = []
    for protocol in (0, 2, 5):
        batch = {b"data": pixels, b"labels": [0, 1], b"filenames": [b"a", b"b"]}
        members = {"c/test_batch": batch, "c/batches.meta": {b"label_names": names, b"num_cases_per_batch": 2}}
        files.append(tar_of({name: pickle.dumps(value, protocol) for name, value in members.items()}))
    return files


def shards(tar_of: TarOf) -> list[bytes]:
    members = {}
    for n in range(6):
        members |= {
            f"s/{n}.jpg": b"image %d" % n,
            f"s/{n}.cls": b"%d" % (n % 2),
            f"s/{n}.json": b'{"label": %d}' % (n % 2),
        }
    return [tar_of(members), tar_of({f"{'d/' * 80}{name}": data for name, data in members.items()})]


def test_damaged_containers_are_read_right_or_refused(
    tmp_path: Path, tar_of: TarOf, open_all_within: OpenAllWithin
) -> None:
    draw = np.random.default_rng(0)
    containers = {
        "hf-parquet": (12, parquet_files()),
        "cifar10": (2, cifar_files(tar_of)),
        "webdataset": (6, shards(tar_of)),
    }
    for source, (num_samples, files) in containers.items():
        cases: list[tuple[str, str, dict[str, str]]] = []
        for whole in files:
            for number in range(NUM_MUTANTS):
                path = tmp_path / f"{source}-{len(cases)}{'.parquet' if source == 'hf-parquet' else '.tar'}"
                path.write_bytes(mutant(draw, whole) if number else whole)
                cases.append((source, str(path), {}))
        outcomes = open_all_within(600, cases)
        for (_, path_, _), outcome in zip(cases, outcomes, strict=True):
            assert outcome.startswith(("read ", "refused: ")), (path_, outcome)
            assert outcome.isprintable(), (path_, outcome)
            assert not outcome.startswith("read ") or f" of {num_samples}" in outcome, (path_, outcome)
        assert f"read {num_samples} of {num_samples}" in outcomes
        assert sum(outcome.startswith("refused") for outcome in outcomes) > len(outcomes) // 5
