"""Where a worker's peers ask for its pages: a socket in the run's directory, and a TCP port for those on other hosts.

A worker that calls proves that it has the run's key before it gets anything, and so does its peer: each side
answers the other's random number with a MAC. What is carried afterwards is neither encrypted nor signed: it is for
networks where a stranger can connect, not for those where one can change what others send.
"""

import contextlib
import hmac
import logging
import secrets
import socket
import struct
import threading
import time
from queue import SimpleQueue

from miniserve.cluster.messages import Peer

log = logging.getLogger("miniserve.transfer")

GREETING_SECONDS = 5.0
"""How long two sides may take to prove what they are."""
MOST_GREETINGS = 64
"""Callers that prove it at the same time; more are turned away, and peers call again."""
SILENT_SECONDS = 5
"""A connection to another host over which nothing comes through for so long is broken."""
NONCE_BYTES = MAC_BYTES = 32


class TransferError(RuntimeError):
    """The pages did not come: the peer is gone, or stuck."""


class Door:
    """Listens for the peers of a worker, named by `us`, its name and epoch, on the `host` of this name. With an
    `address` of that host also at a TCP port: `far` is how others find it, else "". One thread says who may come."""

    def __init__(self, us: tuple[str, int], run_dir: str, key: bytes, host: str = "", address: str = "") -> None:
        """Raises OSError if there can be no socket in `run_dir`, or none at `address`."""
        self.host = host
        self._us, self._run_dir, self._key = us, run_dir, key
        self._guests: dict[bytes, SimpleQueue[socket.socket | None]] = {}
        self._greeting = threading.Semaphore(MOST_GREETINGS)
        near = socket.socket(socket.AF_UNIX)
        near.bind(self._near(us))
        self._listeners = [near]
        self.far = ""
        if address:
            far = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
            self._listeners.append(far)
            self.far = f"{address} {far.getsockname()[1]}"
        for listener in self._listeners:
            listener.listen()
            threading.Thread(target=self._listen, args=(listener,), daemon=True).start()

    def close(self) -> None:
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def expect(self, peer: tuple[str, int], guests: SimpleQueue[socket.socket | None]) -> None:
        """Put connections of `peer`, its name and epoch, into `guests` from now on."""
        self._guests[_named(peer)] = guests

    def forget(self, peer: tuple[str, int], guests: SimpleQueue[socket.socket | None]) -> None:
        """Turn `peer` away, unless others expect it by now."""
        if self._guests.get(_named(peer)) is guests:
            del self._guests[_named(peer)]

    def call(self, peer: Peer) -> socket.socket:
        """A connection to the door of a peer. Raises OSError or `TransferError` if there is none."""
        if peer.pool.host == self.host:
            channel = socket.socket(socket.AF_UNIX)
            place: str | tuple[str, int] = self._near((peer.name, peer.epoch))
        else:
            address, port = peer.pool.door.split()
            channel, place = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET), (address, int(port))
        try:
            until = time.monotonic() + GREETING_SECONDS
            channel.settimeout(GREETING_SECONDS)
            channel.connect(place)
            name, ours = _named(self._us), secrets.token_bytes(NONCE_BYTES)
            theirs = receive(channel, NONCE_BYTES, until)
            channel.sendall(ours + self._mac(b"asks", theirs, ours, name) + struct.pack("<H", len(name)) + name)
            if not hmac.compare_digest(receive(channel, MAC_BYTES, until), self._mac(b"owns", ours, theirs)):
                raise TransferError("it does not have the key of this run")
            _ready(channel)
        except BaseException:
            channel.close()
            raise
        return channel

    def _near(self, worker: tuple[str, int]) -> str:
        return f"{self._run_dir}/pages-{worker[0]}.{worker[1]}"

    def _mac(self, *parts: bytes) -> bytes:
        return hmac.digest(self._key, b"\0".join(parts), "sha256")

    def _listen(self, listener: socket.socket) -> None:
        while True:
            try:
                channel = listener.accept()[0]
            except OSError as error:
                if listener.fileno() < 0 or error.errno in (None, 22):  # closed, or shut down
                    return
                time.sleep(0.1)  # no file descriptor is left, or the caller has left already
                continue
            if self._greeting.acquire(blocking=False):
                threading.Thread(target=self._greet, args=(channel,), daemon=True).start()
            else:
                channel.close()

    def _greet(self, channel: socket.socket) -> None:
        """Let a caller in that proves what it is."""
        try:
            until, ours = time.monotonic() + GREETING_SECONDS, secrets.token_bytes(NONCE_BYTES)
            channel.settimeout(GREETING_SECONDS)
            channel.sendall(ours)
            theirs, proof = receive(channel, NONCE_BYTES, until), receive(channel, MAC_BYTES, until)
            name = receive(channel, struct.unpack("<H", receive(channel, 2, until))[0], until)
            if hmac.compare_digest(proof, self._mac(b"asks", ours, theirs, name)):
                if (guests := self._guests.get(name)) is not None:
                    channel.sendall(self._mac(b"owns", theirs, ours))
                    _ready(channel)
                    guests.put(channel)
                    return
            elif channel.family != socket.AF_UNIX:
                log.warning("someone at %s asked for pages without the key of this run", channel.getpeername()[0])
        except (OSError, TransferError):
            pass  # A port scan, or a peer that has just died.
        finally:
            self._greeting.release()
        channel.close()


def _named(worker: tuple[str, int]) -> bytes:
    return f"{worker[0]}.{worker[1]}".encode()


def _ready(channel: socket.socket) -> None:
    """It waits without limit from now on; but to another host, only while that answers."""
    channel.settimeout(None)
    if channel.family != socket.AF_UNIX:
        for level, option, value in (
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, SILENT_SECONDS),
            (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENT_SECONDS),
        ):
            channel.setsockopt(level, option, value)


def receive(channel: socket.socket, count: int, until: float | None = None) -> bytes:
    """Exactly `count` bytes, where given by `until` of the monotonic clock. Raises OSError or `TransferError`."""
    data = bytearray(count)
    fill(channel, memoryview(data), until)
    return bytes(data)


def fill(channel: socket.socket, missing: memoryview, until: float | None = None) -> None:
    """As `receive`, into memory that is there."""
    while missing:
        if until is not None:
            channel.settimeout(max(until - time.monotonic(), 1e-3))
        if not (got := channel.recv_into(missing)):
            raise TransferError("the peer has left")
        missing = missing[got:]
