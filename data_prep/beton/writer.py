"""Writes one beton: pages by position, then the tables, the header last, then fsync and rename.

The digests are taken on the way. They cover the bytes in file order, which is possible before the file is whole because
the layout, and with it every byte but the images, is known before the first page is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from data_prep.beton import layout
from data_prep.beton.digest import Digester, FileDigest
from data_prep.beton.files import publish, write_at
from data_prep.beton.pages import BetonLayout


class PayloadReader(Protocol):
    """The images' bytes, one after another in sample order."""

    def readinto(self, buffer: memoryview, /) -> int: ...


def write_beton(
    final: Path,
    plan: BetonLayout,
    payload: PayloadReader,
    *,
    temporary: Path,
    after_page: Callable[[int], None] = lambda _: None,
) -> FileDigest:
    """Writes `temporary`, which must lie on the file system of `final`, and renames it to `final` once it is whole.

    `after_page` gets the number of pages written; what it raises stops the writing. EOFError when `payload` ends early,
    ValueError when it holds more than the layout says. The temporary file is removed on every error.
    """
    digester = Digester()
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            os.ftruncate(descriptor, plan.total_bytes)
            front_matter = plan.front_matter()
            digester.update(front_matter)
            digester.update(bytes(plan.pages_start - len(front_matter)))
            _write_pages(descriptor, plan, payload, digester, after_page)
            table = plan.allocations.tobytes()
            digester.update(table)
            write_at(descriptor, table, plan.allocation_table_ptr)
            write_at(descriptor, front_matter[layout.HEADER.itemsize :], layout.HEADER.itemsize)
            write_at(descriptor, front_matter[: layout.HEADER.itemsize], 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        publish(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)
    return digester.finish()


def _write_pages(
    descriptor: int,
    plan: BetonLayout,
    payload: PayloadReader,
    digester: Digester,
    after_page: Callable[[int], None],
) -> None:
    page = memoryview(bytearray(plan.page_bytes))
    zeros = bytes(plan.page_bytes)
    for number in range(plan.num_pages):
        used = plan.used_bytes(number)
        _fill(page[:used], payload)
        page[used:] = zeros[used:]
        digester.update(page)
        # The zeros behind the metadata and at the end of a page are holes in the file: not written, read as zeros.
        write_at(descriptor, page[:used], plan.pages_start + number * plan.page_bytes)
        after_page(number + 1)
    if payload.readinto(memoryview(bytearray(1))):
        raise ValueError("there are more encoded bytes than the layout holds")


def _fill(buffer: memoryview, payload: PayloadReader) -> None:
    while len(buffer):
        count = payload.readinto(buffer)
        if count == 0:
            raise EOFError(f"the encoded images end {len(buffer)} bytes early")
        buffer = buffer[count:]
