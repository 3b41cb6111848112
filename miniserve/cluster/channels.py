"""The wires: every process has one inbox, and a process that knows its address can put an `Envelope` there.

ZeroMQ PUSH to PULL over `ipc://` sockets in the run's 0700 directory. Messages of one sender arrive in order, sending
never blocks, and what a dead process did not read is gone with it.
"""

import contextlib
import logging
from dataclasses import dataclass, field

import msgspec
import zmq

from miniserve.cluster.messages import Envelope, Message

log = logging.getLogger("miniserve.channels")

_decoder = msgspec.msgpack.Decoder(Envelope)
_encoder = msgspec.msgpack.Encoder()


@dataclass(eq=False)
class Outboxes:
    """Sends to any number of inboxes as `sender`; connects on first use."""

    context: zmq.Context
    sender: str
    epoch: int
    sockets: dict[str, zmq.Socket] = field(default_factory=dict)

    def send(self, address: str, body: Message) -> None:
        """Queue a message for the inbox at `address`; returns at once."""
        socket = self.sockets.get(address)
        if socket is None:
            socket = self.sockets[address] = self.context.socket(zmq.PUSH)
            socket.set_hwm(0)  # an engine must not wait for a reader; messages are small and bounded by the turns
            socket.linger = 0
            socket.connect(address)
        # The owner of that inbox is dead, which the supervisor notices.
        with contextlib.suppress(zmq.Again):
            socket.send(_encoder.encode(Envelope(self.sender, self.epoch, body)), zmq.NOBLOCK)

    def forget(self, address: str) -> None:
        """Close the way to an inbox whose owner is gone."""
        if socket := self.sockets.pop(address, None):
            socket.close(0)

    def close(self, linger_ms: int = 0) -> None:
        for socket in self.sockets.values():
            socket.close(linger_ms)
        self.sockets.clear()


class Inbox:
    """Receives at `address` (bound here)."""

    def __init__(self, context: zmq.Context, address: str) -> None:
        self._socket = context.socket(zmq.PULL)
        self._socket.set_hwm(0)
        self._socket.bind(address)

    def receive(self, timeout_ms: int = 0) -> list[Envelope]:
        """All messages that are here, waiting up to `timeout_ms` for the first. What is none of ours is dropped."""
        if timeout_ms and not self._socket.poll(timeout_ms):
            return []
        messages: list[Envelope] = []
        while True:
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            try:
                messages.append(decode(data))
            except msgspec.MsgspecError as error:
                log.error("dropped a message that is none of ours: %s", error)

    def close(self) -> None:
        self._socket.close(0)


def decode(data: bytes) -> Envelope:
    """Raises `msgspec.MsgspecError` if `data` is no envelope."""
    try:
        return _decoder.decode(data)
    except UnicodeDecodeError as error:  # the one thing that msgspec does not report as its own
        raise msgspec.DecodeError(f"a string is not UTF-8: {error}") from error
