"""A sample gives one result per epoch; no fault hangs, leaks or goes unnoticed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from data_prep.beton.digest import digest_file
from data_prep.beton.layout import METADATA_START
from data_prep.beton.manifest import load_manifest, write_manifest
from data_prep.beton.reader import BetonReader
from data_prep.converter.verify import verify
from resnet_dist.config.recipe import CenterCrop, PadCrop, RandomResizedCrop
from resnet_dist.data import decoder as decoder_module
from resnet_dist.data import ffcv_kernel
from resnet_dist.data.batch import Batch
from resnet_dist.data.loader import BetonLoader, EpochThread
from resnet_dist.data.native_kernel import NativeKernel
from resnet_dist.data.order import replacement_ids
from resnet_dist.errors import Fault, UserError

OpenLoader = Callable[..., BetonLoader]
WriteBeton = Callable[[Path, list[Any]], Path]
Pixels = NDArray[np.uint8]

PAD = PadCrop(kind="pad_crop", size=32)
ALL = np.arange(40)


def pixels_by_id(batches: list[Batch]) -> dict[int, bytes]:
    return {int(i): image.numpy().tobytes() for b in batches for i, image in zip(b.sample_ids, b.images, strict=True)}


def digest(batches: list[Batch]) -> str:
    return hashlib.sha256(b"".join(b.images.numpy().tobytes() for b in batches)).hexdigest()


def decoding_threads() -> int:
    """Of Python and of the kernel; those of an epoch and those that serve all epochs."""
    names = [comm.read_text().strip() for comm in Path("/proc/self/task").glob("*/comm")]
    return names.count("beton-decode") + sum(isinstance(t, EpochThread) for t in threading.enumerate())


def consume_badly(loader: BetonLoader) -> None:
    for _ in loader.epoch(0, ALL):
        raise RuntimeError("the consumer")


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


# What a batch is


def test_batches_come_in_the_order_given(photo_beton: Path, open_loader: OpenLoader) -> None:
    ids = np.array([3, 39, 0, 7, 7, 12, 1], dtype=np.int64)
    loader = open_loader(photo_beton, batch_size=3)
    assert list(loader.epoch(0, ids[:0])) == []
    batches = list(loader.epoch(0, ids))
    assert [b.sample_ids.tolist() for b in batches] == [[3, 39, 0], [7, 7, 12], [1]]
    assert [b.labels.tolist() for b in batches] == [[3, 9, 0], [7, 7, 2], [1]]
    assert [tuple(b.images.shape) for b in batches] == [(3, 48, 48, 3), (3, 48, 48, 3), (1, 48, 48, 3)]
    assert all((b.images.dtype, b.labels.dtype) == (torch.uint8, torch.int64) for b in batches)


def test_a_batch_is_not_written_to_later(photo_beton: Path, open_loader: OpenLoader) -> None:
    """Stock ffcv decodes into a ring of five buffers; here are ten batches, all kept."""
    loader = open_loader(photo_beton, batch_size=4)
    kept, seen = [], []
    for batch in loader.epoch(0, ALL):
        kept.append(batch)
        seen.append(batch.images.clone())
    assert len(kept) == 10
    assert all(torch.equal(batch.images, images) for batch, images in zip(kept, seen, strict=True))


@pytest.mark.parametrize("sizes", [[5], [8, 3], [1, 2, 3, 4], [40], [64]])
def test_sizes_repeat_and_change_no_pixel(sizes: list[int], photo_beton: Path, open_loader: OpenLoader) -> None:
    reference = pixels_by_id(list(open_loader(photo_beton).epoch(1, ALL)))
    loader = open_loader(photo_beton, batch_size=2, reads_ahead=True)
    batches = list(loader.epoch(1, ALL, sizes=sizes))
    assert pixels_by_id(batches) == reference
    assert np.concatenate([b.sample_ids for b in batches]).tolist() == ALL.tolist()
    lengths, expected = [len(b.labels) for b in batches], [sizes[k % len(sizes)] for k in range(len(batches))]
    assert lengths[:-1] == expected[:-1]
    assert 0 < lengths[-1] <= expected[-1]


def test_sizes_must_be_positive(photo_beton: Path, open_loader: OpenLoader) -> None:
    for sizes in ([], [3, 0]):
        with pytest.raises(ValueError, match="sizes must be positive"):
            open_loader(photo_beton).epoch(0, ALL, sizes=sizes)


def test_numbers_travel_with_their_batch(photo_beton: Path, open_loader: OpenLoader) -> None:
    """They are made on the loader's thread, from 0 in every epoch, and belong to the batch."""
    threads, reused = set(), np.zeros(2, np.int64)

    def numbers(k: int) -> NDArray[np.int64]:
        threads.add(threading.current_thread())
        reused[:] = k, -(2**63) + k
        return reused[: k % 3]

    loader = open_loader(photo_beton)
    for _ in range(2):
        found = [b.numbers for b in loader.epoch(0, ALL, sizes=[8, 3], numbers=numbers)]
        assert [t.tolist() for t in found] == [[k, -(2**63) + k][: k % 3] for k in range(7)]
        assert {t.dtype for t in found} == {torch.int64}
    assert all(isinstance(thread, EpochThread) for thread in threads)
    assert [b.numbers.tolist() for b in loader.epoch(0, ALL[:8])] == [[]]


def test_ids_outside_the_beton_are_refused(photo_beton: Path, open_loader: OpenLoader) -> None:
    loader = open_loader(photo_beton)
    for ids in ([0, 40], [-1]):
        with pytest.raises(ValueError, match="of 40 samples"):
            loader.epoch(0, np.array(ids))
    with pytest.raises(ValueError, match="1-D integer"):
        loader.epoch(0, np.zeros((2, 2), np.int64))


def test_sizes_by_epoch_are_what_a_loader_of_that_size_gives(photo_beton: Path, open_loader: OpenLoader) -> None:
    growing = open_loader(photo_beton, size_at=lambda epoch: 32 + 16 * epoch)
    abandoned = growing.epoch(0, ALL)
    next(abandoned)  # its thread continues with 32 px while others decode
    for epoch, size in ((1, 48), (2, 64), (0, 32)):
        crop = RandomResizedCrop(kind="random_resized_crop", size=size)
        fixed = open_loader(photo_beton, crop)
        assert digest(list(growing.epoch(epoch, ALL))) == digest(list(fixed.epoch(epoch, ALL)))
    assert sum(b.images.shape[1] == 32 for b in abandoned) == 4


def test_copies_are_the_same_samples_under_other_draws(photo_beton: Path, open_loader: OpenLoader) -> None:
    loader = open_loader(photo_beton, num_copies=3, num_threads=2)
    plain = pixels_by_id(list(open_loader(photo_beton).epoch(1, ALL)))
    copies = [list(loader.epoch(1, ALL + 40 * k)) for k in range(3)]
    assert pixels_by_id(copies[0]) == plain
    for k in (1, 2):
        assert [b.labels.tolist() for b in copies[k]] == [b.labels.tolist() for b in copies[0]]
        assert pixels_by_id(copies[k]).keys() == plain.keys()
        assert all(pixels != plain[i] for i, pixels in pixels_by_id(copies[k]).items())
        assert all(b.num_replaced == 0 for b in copies[k])
    assert pixels_by_id(copies[1]) != pixels_by_id(copies[2])
    with pytest.raises(ValueError, match="of 120 samples"):
        loader.epoch(0, np.array([120]))


# What pixels depend on, and on what they do not


@pytest.mark.parametrize(("batch_size", "num_threads"), [(3, 1), (40, 3)])
def test_neither_threads_nor_batches_change_pixels(
    batch_size: int, num_threads: int, photo_beton: Path, open_loader: OpenLoader
) -> None:
    reference = pixels_by_id(list(open_loader(photo_beton).epoch(1, ALL)))
    other = open_loader(photo_beton, batch_size=batch_size, num_threads=num_threads)
    assert pixels_by_id(list(other.epoch(1, ALL))) == reference


def test_epochs_iterated_at_once_do_not_mix(photo_beton: Path, open_loader: OpenLoader) -> None:
    loader = open_loader(photo_beton)
    apart = [list(loader.epoch(epoch, ALL)) for epoch in (0, 1)]
    pairs = list(zip(loader.epoch(0, ALL), loader.epoch(1, ALL), strict=True))
    assert [digest([pair[k] for pair in pairs]) for k in (0, 1)] == [digest(apart[0]), digest(apart[1])]


def test_another_process_makes_libffcvs_same_pixels(photo_beton: Path, open_loader: OpenLoader, tmp_path: Path) -> None:
    """From the kernel on disk; importing ffcv there leaves torch's thread count alone."""
    code = f"""if True:
        import hashlib, json, torch
        torch.set_num_threads(3)
        from pathlib import Path
        import numpy as np
        from resnet_dist.config.recipe import RandomResizedCrop
        from resnet_dist.data import ffcv_kernel
        from resnet_dist.data.decoder import ImageSettings
        from resnet_dist.data.loader import BetonLoader
        settings = ImageSettings(RandomResizedCrop(kind="random_resized_crop", size=48), "ffcv", seed=7)
        loader = BetonLoader(Path({str(photo_beton)!r}), settings, batch_size=5, num_threads=2)
        images = b"".join(b.images.numpy().tobytes() for b in loader.epoch(4, np.arange(40)))
        stats = ffcv_kernel.decode_crop_resize.stats
        print(json.dumps([hashlib.sha256(images).hexdigest(), torch.get_num_threads(),
                          sum(stats.cache_hits.values()), sum(stats.cache_misses.values())]))
    """
    here = digest(list(open_loader(photo_beton, decoder="ffcv").epoch(4, ALL)))
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == [here, 3, 1, 0]


def test_one_compilation_serves_every_transform(photo_beton: Path, tile_beton: Path, open_loader: OpenLoader) -> None:
    list(open_loader(photo_beton, decoder="ffcv", num_threads=2).epoch(0, ALL))
    list(open_loader(tile_beton, PAD, decoder="ffcv").epoch(1, np.arange(24)))
    assert len(ffcv_kernel.decode_crop_resize.signatures) == 1


def test_without_a_writable_cache_folder_the_kernel_is_compiled_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core import caching

    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])

    def double(x: int) -> int:
        return 2 * x

    assert ffcv_kernel._compiled(double)(21) == 42


# Faults


def damaged(path: Path, beton: Path, sample_id: int, damage: Callable[[bytes], bytes]) -> Path:
    """A copy of `beton` whose manifest still fits, with the bytes of one image changed."""
    reader = BetonReader(beton)
    file = bytearray(beton.read_bytes())
    start, size = int(reader.pointers[sample_id]), int(reader.sizes[sample_id])
    file[start : start + size] = damage(bytes(file[start : start + size]))
    assert len(file) == beton.stat().st_size
    path.write_bytes(file)
    digest = digest_file(path)  # as if it had been converted so: what is not as converted is refused when it is opened
    write_manifest(path, replace(load_manifest(beton), digest=digest.whole, chunks=digest.chunks))
    return path


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def no_image(data: bytes) -> bytes:
    return bytes(len(data))


def another_size(data: bytes) -> bytes:
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + bytes([0, 16]) + data[at + 2 :]


@pytest.mark.parametrize("decoder", ["native", "ffcv"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, r"its JPEG is broken: \w+"),
        (no_image, r"its JPEG is broken: Not a JPEG file"),
        (another_size, r"the JPEG's size is not the one the beton says"),
    ],
)
def test_a_broken_jpeg_is_named(
    damage: Callable[[bytes], bytes],
    reason: str,
    decoder: str,
    photo_beton: Path,
    tmp_path: Path,
    open_loader: OpenLoader,
) -> None:
    """Stock ffcv continues with the pixels that an earlier image left in the buffer."""
    beton = damaged(tmp_path / "bad.beton", photo_beton, 18, damage)
    loader = open_loader(beton, decoder=decoder, num_threads=2)
    batches = []
    with pytest.raises(Fault, match=rf"sample 18 of {beton} cannot be decoded: {reason}.*data-prep verify"):
        batches.extend(loader.epoch(0, ALL))
    assert [b.sample_ids.tolist() for b in batches] == [list(range(8)), list(range(8, 16))]
    without = np.delete(ALL, 18)
    good = open_loader(photo_beton, decoder=decoder).epoch(0, without)
    assert pixels_by_id(list(loader.epoch(0, without))) == pixels_by_id(list(good))


def test_an_error_in_an_operation_reaches_the_consumer(
    photo_beton: Path, open_loader: OpenLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("in the operation")

    monkeypatch.setattr(decoder_module, "crop", fail)
    with pytest.raises(ZeroDivisionError, match="in the operation"):
        next(open_loader(photo_beton).epoch(0, ALL))


def test_an_error_in_numbers_reaches_the_consumer(photo_beton: Path, open_loader: OpenLoader) -> None:
    batches = open_loader(photo_beton).epoch(0, ALL, numbers=lambda k: np.array([1 // (2 - k)]))
    assert [next(batches).numbers.tolist() for _ in range(2)] == [[0], [1]]
    with pytest.raises(ZeroDivisionError):
        next(batches)


def test_a_thread_that_ends_without_an_error_is_noticed(
    photo_beton: Path, open_loader: OpenLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EpochThread, "run", lambda self: None)
    with pytest.raises(Fault, match=r"ended without an error message"):
        next(open_loader(photo_beton, wait_limit_s=3600).epoch(0, ALL))


def test_every_wait_has_a_limit(photo_beton: Path, open_loader: OpenLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(NativeKernel, "decode", lambda *_: released.wait(1))
    with pytest.raises(Fault, match=r"no batch within 0.1 s"):
        next(open_loader(photo_beton, wait_limit_s=0.1).epoch(0, ALL))
    released.set()


def test_a_shortened_file_is_refused_before_it_is_mapped(
    photo_beton: Path, tmp_path: Path, open_loader: OpenLoader
) -> None:
    beton = damaged(tmp_path / "short.beton", photo_beton, 0, lambda data: data)
    os.truncate(beton, beton.stat().st_size // 2)
    with pytest.raises(UserError, match=r"short.beton: has \d+ bytes, its manifest says \d+"):
        open_loader(beton)


# Threads


def test_leaving_an_epoch_early_ends_its_thread(photo_beton: Path, open_loader: OpenLoader) -> None:
    before = decoding_threads()
    loader = open_loader(photo_beton, batch_size=2, num_threads=2)
    for _ in loader.epoch(0, ALL):
        break
    with pytest.raises(RuntimeError, match="the consumer"):
        consume_badly(loader)
    batches = loader.epoch(0, ALL)
    next(batches)
    batches.close()
    loader.epoch(0, ALL)  # never iterated
    assert not any(isinstance(t, EpochThread) for t in threading.enumerate())
    loader.close()
    assert wait_until(lambda: decoding_threads() == before)


# Bad samples that are skipped, and files that are not the manifest's


def test_a_skipped_sample_is_replaced_by_the_same_one_everywhere(
    photo_beton: Path, tmp_path: Path, open_loader: OpenLoader, caplog: pytest.LogCaptureFixture
) -> None:
    beton = damaged(tmp_path / "bad.beton", photo_beton, 18, cut)
    other = next(int(i) for i in replacement_ids(40, 7, 3, 18) if i != 18)
    seen = []
    for batch_size, num_threads in ((8, 1), (3, 2)):
        loader = open_loader(beton, batch_size=batch_size, num_threads=num_threads, on_bad_sample="skip")
        batches = list(loader.epoch(3, ALL))
        assert sum(b.num_replaced for b in batches) == 1
        ids = np.concatenate([b.sample_ids for b in batches])
        assert ids.tolist() == [*range(18), other, *range(19, 40)]
        assert torch.cat([b.labels for b in batches])[18] == other % 10
        seen.append(digest(batches))
    assert seen[0] == seen[1]
    assert f"sample 18 of {beton} cannot be decoded" in caplog.text
    assert f"sample {other} takes its place in epoch 3" in caplog.text


def test_each_copy_of_a_bad_sample_is_replaced_by_a_sample_of_its_own(
    photo_beton: Path, tmp_path: Path, open_loader: OpenLoader
) -> None:
    beton = damaged(tmp_path / "bad.beton", photo_beton, 18, cut)
    copies = np.array([18, 18 + 40, 19, 18 + 80])
    others = [next(int(i) for i in replacement_ids(40, 7, 3, copy) if i != 18) for copy in copies]
    loader = open_loader(beton, num_copies=3, batch_size=4, on_bad_sample="skip")
    (batch,) = loader.epoch(3, copies)
    assert batch.num_replaced == 3
    assert batch.sample_ids.tolist() == [others[0], others[1], 19, others[3]]
    # If classes have shares of their own, by one of its class. Some draws crop what is left of 18.
    loader = open_loader(beton, num_copies=None, replaces_within_class=True, batch_size=20, on_bad_sample="skip")
    (batch,) = loader.epoch(3, 18 + 40 * np.arange(20))
    assert {8, 28, 38} <= set(batch.sample_ids) <= {8, 18, 28, 38}
    assert (batch.labels == 8).all()


@pytest.mark.parametrize(
    ("transform", "advice", "not_advice"),
    [
        (RandomResizedCrop(kind="random_resized_crop", size=48), r"or set data\.on_bad_sample: skip", "An evaluation"),
        (CenterCrop(kind="center_crop", size=48, resize=56), "An evaluation counts every sample", "on_bad_sample"),
    ],
)
def test_the_advice_on_a_bad_sample_is_one_that_helps(
    transform: Any, advice: str, not_advice: str, photo_beton: Path, tmp_path: Path, open_loader: OpenLoader
) -> None:
    """Training may skip it, an evaluation may not; `verify` finds it."""
    beton = damaged(tmp_path / "bad.beton", photo_beton, 18, cut)
    with pytest.raises(Fault, match=advice) as caught:
        list(open_loader(beton, transform).epoch(0, ALL))
    assert not_advice not in str(caught.value)
    assert f"`data-prep verify {beton} --decode all`" in str(caught.value)
    (problem,) = verify(beton, decode=None).problems
    assert problem.startswith("1 of 40 images do not decode: 18 (")


def test_another_file_of_the_same_size_is_refused(photo_beton: Path, tmp_path: Path, open_loader: OpenLoader) -> None:
    beton = damaged(tmp_path / "other.beton", photo_beton, 18, lambda data: data)
    file = bytearray(beton.read_bytes())
    file[METADATA_START + 16] ^= 1  # of sample 0, the label
    beton.write_bytes(file)
    with pytest.raises(UserError, match=r"other.beton: bytes from 0 on do not have the digest in its manifest"):
        open_loader(beton)
