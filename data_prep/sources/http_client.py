"""HTTP within bounds, for fsspec: a server that sends more than was asked for, something else, or nothing for a while,
ends a request with one line."""

from __future__ import annotations

import re
from typing import Any

import aiohttp

from data_prep.sources.places import MAX_SAMPLE_BYTES
from data_prep.sources.remote import NotAsAsked

MAX_PAGE_BYTES = 64 << 20
"""Of a page of links, as which a server lists a folder."""
MAX_REFUSAL_BYTES = 64 << 10
"""Of what comes with a refusal."""
PIECE_BYTES = 256 << 10
TIMEOUT = aiohttp.ClientTimeout(total=300, sock_connect=30, sock_read=60)
RANGE = re.compile(r"bytes=(\d+)-(\d+)")
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class BoundedResponse(aiohttp.ClientResponse):
    async def read(self) -> bytes:
        if self._body is None:
            try:
                self._body = await self._read_within(self._limit())
            except BaseException:
                self.close()
                raise
        return await super().read()

    def _limit(self) -> int:
        """How many bytes may come. NotAsAsked when they are not those that were asked for."""
        if self.status >= 400:
            return MAX_REFUSAL_BYTES
        asked = RANGE.fullmatch(self.request_info.headers.get("Range", ""))
        if asked is None:
            return MAX_PAGE_BYTES if self.content_type == "text/html" else MAX_SAMPLE_BYTES
        start, last = int(asked[1]), int(asked[2])
        sent = CONTENT_RANGE.fullmatch(self.headers.get("Content-Range", "").strip())
        if self.status == 206 and (sent is None or (int(sent[1]) == start and int(sent[2]) <= last)):
            return last - start + 1
        whole = self.content_length
        if self.status == 200 and start == 0 and whole is not None and whole <= last + 1:
            return whole
        raise NotAsAsked("the server does not send the part of a file that it is asked for (range requests)")

    async def _read_within(self, limit: int) -> bytes:
        pieces, size = [], 0
        async for piece in self.content.iter_chunked(PIECE_BYTES):
            size += len(piece)
            if size > limit:
                if self.status >= 400:
                    break
                raise NotAsAsked(f"the server sends more than the {limit:,} bytes that may come")
            pieces.append(piece)
        return b"".join(pieces)


async def bounded_session(**options: Any) -> aiohttp.ClientSession:
    """For fsspec's `get_client`. Data is asked for as it is: parts of a compressed answer are of no use."""
    return aiohttp.ClientSession(
        response_class=BoundedResponse, timeout=TIMEOUT, headers={"Accept-Encoding": "identity"}, **options
    )
