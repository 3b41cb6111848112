"""Heads of requests within bounds: uvicorn keeps whatever a client sends as one, for as long as it likes."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from miniserve.api.errors import ApiError

MAX_HEAD_BYTES = 64 * 1024
"""Most of a head that is not complete yet; what comes with one read may be more."""
HEAD_SECONDS = 60.0
"""How long a head may take to arrive."""


class BoundedHeads(HttpToolsProtocol):
    """A connection that refuses heads without an end."""

    _bytes = 0
    _whole = False
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client has come: the first head is due."""
        super().connection_made(transport)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        self._arrived()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """The first bytes of a request."""
        super().on_message_begin()
        self._expect()

    def on_headers_complete(self) -> None:
        """The end of its head."""
        self._arrived()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The end of its body."""
        super().on_message_complete()
        self._whole, self._bytes = False, 0

    def data_received(self, data: bytes) -> None:
        """Bytes of a head or a body."""
        self._bytes += len(data)
        super().data_received(data)
        if not self._whole and self._bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse()

    def _expect(self) -> None:
        self._whole = False
        if self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _arrived(self) -> None:
        self._whole = True
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _refuse(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            error = ApiError(
                431, f"The head of a request may have {MAX_HEAD_BYTES} bytes: send fewer and shorter headers."
            )
            body = error.response("").body
            head = f"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Length: {len(body)}\r\n"
            self.transport.write(
                f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + bytes(body)
            )
        self.transport.close()
