"""Batches of a beton in a given order: `BetonLoader` is all that training sees of decoding, threads and ffcv.

One loader serves all epochs of a process. What a batch holds depends on (beton, transform, decoder, seed, epoch, sample
ids) only: not on threads, batch size, worker count or where an epoch was resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from itertools import count
from pathlib import Path
from shlex import quote

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.beton.digest import CHUNK_BYTES, chunk_digest
from data_prep.beton.manifest import Manifest
from data_prep.beton.reader import BetonReader
from resnet_dist.config.recipe_data import OnBadSample
from resnet_dist.data.batch import Batch
from resnet_dist.data.crops import Transform, require_sides
from resnet_dist.data.decoders import KeyedDecoder
from resnet_dist.data.device_copies import batch_places
from resnet_dist.data.epoch_thread import EpochThread
from resnet_dist.data.kernels import Decoder
from resnet_dist.data.read_ahead import ReadAhead, first_uses
from resnet_dist.errors import UserError

_BATCHES_READ_AHEAD = 16
"""Samples of 16 batches of 64 lie in about 13 pages of 8 MiB: a second of reading for a disk of 100 MB/s."""


class BetonLoader:
    """Decodes samples of one beton under one transform, `batch_size` at a time, on `num_threads` threads.

    A batch's tensors are the consumer's own: nothing writes to them later. With `reads_ahead` the pages of the file are
    asked for before they are due, which pays where samples come in `order.page_permutation`. `wait_limit_s` is the
    longest wait for one batch. `size_at` gives the images' size in an epoch, px, in the place of the transform's. With
    `num_copies` there are that many times as many ids (see `order.train_order`). UserError when beton and manifest or
    transform do not belong together, or `decoder` was not built.
    """

    def __init__(
        self,
        beton: Path,
        manifest: Manifest,
        transform: Transform,
        *,
        decoder: Decoder,
        batch_size: int,
        seed: int,
        num_threads: int,
        device: torch.device,
        on_bad_sample: OnBadSample = "error",
        reads_ahead: bool = False,
        wait_limit_s: float = 300.0,
        size_at: Callable[[int], int] | None = None,
        num_copies: int = 1,
    ) -> None:
        reader = open_reader(beton, manifest)
        require_sides(beton, manifest, transform)
        self._labels = reader.labels
        self._num_ids = num_copies * len(reader.labels)
        self._file = np.asarray(np.memmap(beton, np.uint8, mode="r"))
        self.page_of_sample: NDArray[np.int64] = reader.pointers // reader.page_bytes
        """[num_samples]: in which page of the beton a sample lies."""
        self._page_bytes = reader.page_bytes
        self._beton = beton
        self._batch_size = batch_size
        self._reads_ahead = reads_ahead
        self._device = device
        self._wait_limit_s = wait_limit_s
        self._size_at = size_at or (lambda _: transform.size)
        self._decoders: dict[int, KeyedDecoder] = {}

        def open_decoder(size: int) -> KeyedDecoder:
            sized = transform.model_copy(update={"size": size})
            return KeyedDecoder(reader, sized, decoder, seed, num_threads, on_bad_sample)

        self._open_decoder = open_decoder
        self._decoder_at(0)  # what cannot be opened is told now

    def epoch(self, epoch: int, sample_ids: NDArray[np.int64]) -> Generator[Batch, None, None]:
        """Batches of `batch_size` in the order of `sample_ids` [any length]; the last may be short.

        id + k * number of samples is copy k of a sample, augmented by draws of its own.

        Raises Fault for a sample that does not decode or a batch that does not come; whatever ends the iteration, also
        leaving it early, ends its thread.
        """
        if sample_ids.ndim != 1 or not np.issubdtype(sample_ids.dtype, np.integer):
            raise ValueError(f"sample_ids must be a 1-D integer array, got {sample_ids.dtype} {sample_ids.shape}")
        if len(sample_ids) and not 0 <= sample_ids.min() <= sample_ids.max() < self._num_ids:
            raise ValueError(f"sample_ids {sample_ids.min()}..{sample_ids.max()} of {self._num_ids} samples")
        return self._batches(epoch, sample_ids.astype(np.int64))

    def close(self) -> None:
        """Ends the decoding threads, without waiting."""
        for decoder in self._decoders.values():
            decoder.close()

    def _decoder_at(self, epoch: int) -> KeyedDecoder:
        """Of the epoch's size: a thread that is still ending another epoch has its own."""
        size = self._size_at(epoch)
        if size not in self._decoders:
            self._decoders[size] = self._open_decoder(size)
        return self._decoders[size]

    def _batches(self, epoch: int, sample_ids: NDArray[np.int64]) -> Generator[Batch, None, None]:
        uses = first_uses(self.page_of_sample, sample_ids % len(self._labels)) if self._reads_ahead else []
        with ReadAhead(self._beton, self._page_bytes, uses, _BATCHES_READ_AHEAD * self._batch_size) as hints:
            yield from self._decoded(epoch, sample_ids, hints)

    def _decoded(self, epoch: int, sample_ids: NDArray[np.int64], hints: ReadAhead) -> Generator[Batch, None, None]:
        decoder = self._decoder_at(epoch)
        thread = EpochThread(
            str(self._beton),
            partial(decoder.decode, self._file, epoch),
            batch_places(decoder.size, self._device, self._batch_size),
            self._labels,
            sample_ids,
            self._batch_size,
            self._wait_limit_s,
        )
        try:
            for place in count(0, self._batch_size):
                hints.reached(place)
                if (batch := thread.next_batch()) is None:
                    return
                yield batch
        finally:
            thread.close()


def open_reader(beton: Path, manifest: Manifest) -> BetonReader:
    """Sizes first: a mapped file that is shorter than its pointers kills the process with SIGBUS.

    Then the digests of what is no image: headers and tables. The images' are `data-prep verify`'s business: 140 GB take
    minutes to read.
    """
    if not beton.is_file():
        raise UserError(f"{beton}: does not exist")
    if (actual_bytes := beton.stat().st_size) != manifest.beton_bytes:
        raise UserError(f"{beton}: has {actual_bytes} bytes, its manifest says {manifest.beton_bytes}")
    reader = BetonReader(beton)
    if len(reader) != manifest.num_samples:
        raise UserError(f"{beton}: has {len(reader)} samples, its manifest says {manifest.num_samples}")
    _require_digests(beton, manifest, reader)
    return reader


def _require_digests(beton: Path, manifest: Manifest, reader: BetonReader) -> None:
    if manifest.chunk_bytes != CHUNK_BYTES or not len(reader):
        return
    first_image, last_image = int(reader.pointers.min()), int((reader.pointers + reader.sizes).max())
    last_chunk = (manifest.beton_bytes - 1) // CHUNK_BYTES
    chunks = {*range(first_image // CHUNK_BYTES + 1), *range(last_image // CHUNK_BYTES, last_chunk + 1)}
    with beton.open("rb") as file:
        for chunk in sorted(chunks):
            file.seek(chunk * CHUNK_BYTES)
            if chunk_digest(file.read(CHUNK_BYTES), manifest.algorithm) != manifest.chunks[chunk]:
                raise UserError(
                    f"{beton}: bytes from {chunk * CHUNK_BYTES} on do not have the digest that its manifest tells: "
                    f"`data-prep verify {quote(str(beton))}` tells what changed; copy or convert it again"
                )
