"""Connections of clients of ill will, or none: the server refuses or drops them, and no other client notices.

One server for all, with one stream of another client that goes on all the while; the last test looks at its gaps.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.support.attacks import (
    SECONDS,
    Victim,
    address,
    attacked_server,
    chat,
    check_unharmed,
    head,
    raw,
    streaming_victim,
    wait_for,
)
from tests.support.server_process import Running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with attacked_server(tmp_path_factory.mktemp("attacked")) as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def victim(attacked: Running) -> Iterator[Victim]:
    with streaming_victim(attacked) as another:
        yield another


def test_half_open(attacked: Running) -> None:
    """Beginnings of requests that never end, and clients that leave in every state."""
    request = b'{"prompt": "x", "max_tokens": 4000, "ignore_eos": true, "stream": true}'
    length = f"Content-Length: {len(request)}"
    whole = head("/v1/completions", "Content-Type: application/json", length) + request
    beginnings = [
        b"",
        b"POST",
        head("/v1/completions", length)[:-2],
        head("/v1/completions", length),
        whole[:-5],
        whole,
    ]
    held = [socket.create_connection(address(attacked)) for _ in range(10) for _ in beginnings]
    for connection, data in zip(held, beginnings * 10, strict=True):
        connection.sendall(data)
    wait_for(lambda: attacked.metric("vllm:num_requests_running") > 1)
    assert attacked.get("/health")
    for number, connection in enumerate(held):
        if number % 2:  # a reset, not an orderly end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        connection.close()
    assert chat(attacked).status_code == 200


def test_slow_readers(attacked: Running) -> None:
    """Streams that their clients do not read end all the same, and their KV goes."""
    request = b'{"prompt": "x", "max_tokens": 1500, "ignore_eos": true, "stream": true, "logprobs": 5}'
    whole = head("/v1/completions", "Content-Type: application/json", f"Content-Length: {len(request)}") + request
    readers = []
    for _ in range(6):
        reader = socket.socket()
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        reader.connect(address(attacked))
        reader.sendall(whole)
        readers.append(reader)
    wait_for(lambda: attacked.metric("vllm:num_requests_running") > 1)
    wait_for(lambda: attacked.metric("vllm:num_requests_running") <= 1, seconds=60)
    for reader in readers:
        reader.close()


@pytest.mark.parametrize(
    "lines",
    [
        [f"X-{i}: {i}" for i in range(20_000)],
        ["X-Long: " + "a" * 2**20],
        ["X-Conversation-ID: " + "a" * 5000],
        ["X-Conversation-ID: \xff\xfe"],
        ["Authorization: " + "Bearer " * 5000],
        ["Content-Length: 99999999999999999999999"],
        ["Content-Length: -1"],
        ["Content-Length: 2", "Transfer-Encoding: chunked"],
        ["Content-Length: 2", "Content-Length: 3"],
        ["Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n"],
        ["Transfer-Encoding: chunked\r\n\r\nxyz\r\n"],
        ["Expect: 100-continue", "Content-Length: 99999999999"],
        ["\x00\x01: x"],
        [" folded", " again"],
    ],
)
def test_headers(attacked: Running, lines: list[str]) -> None:
    statuses = raw(attacked, head("/v1/completions", "Content-Type: application/json", *lines), wait=8)
    assert all(400 <= status < 500 or status == 100 for status in statuses)
    assert attacked.get("/health")


def test_headers_without_end(attacked: Running) -> None:
    """A client may not make the server keep whatever it sends as a head."""
    with socket.create_connection(address(attacked), timeout=SECONDS) as client:
        sent = 0
        with suppress(OSError):
            client.sendall(b"GET /health HTTP/1.1\r\n")
            while sent < 64 * 2**20:
                client.sendall(b"X-Filler: " + b"a" * 65_000 + b"\r\n")
                sent += 65_000
        assert sent < 64 * 2**20, "64 MiB of head were taken"


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xaa" * 500,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" + b"\x00garbage\r\n\r\n" * 50,
        b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 300 + b"junk",
        b"GET /" + b"a" * 2**20 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /%ff%00%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /dashboard/../../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"BREW /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v1/models HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET /v1/events HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: eA==\r\nSec-WebSocket-Version: 13\r\n\r\n",
        b"\r\n" * 10_000,
    ],
)
def test_garbage(attacked: Running, data: bytes) -> None:
    raw(attacked, data, wait=5, half_close=True)
    assert attacked.get("/health")


# --- other clients ----------------------------------------------------------------------------------------------------


def test_other_clients_notice_nothing(attacked: Running, victim: Victim, capsys: pytest.CaptureFixture[str]) -> None:
    """This is the last test."""
    check_unharmed(attacked, victim, capsys)
