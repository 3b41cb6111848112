"""The wires: every process has one inbox, and a process that knows its address can put an `Envelope` there.

ZeroMQ PUSH to PULL, on one host over `ipc://` sockets in the run's 0700 directory, between hosts over TCP with CURVE:
encrypted, and closed to all who do not have the `Keys` of the run. Messages of one sender arrive in order, sending
never blocks, and what a dead process did not read is gone with it. A connection to another host that breaks, or over
which nothing comes through any more, may have lost messages: it is `broken`.
"""

import contextlib
import logging
from dataclasses import dataclass, field

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from miniserve.cluster.messages import Envelope, Message

log = logging.getLogger("miniserve.channels")

BEAT_MS, SILENT_MS = 1000, 5000
"""Between hosts: how often a side asks whether the other one is there, and how long it waits for the answer."""

BREAKS = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)

_decoder = msgspec.msgpack.Decoder(Envelope)
_encoder = msgspec.msgpack.Encoder()


class Keys(msgspec.Struct, frozen=True):
    """A pair of CURVE keys made for one run, which all its processes have, in Z85. The public one is as secret as the
    other: a stranger without it cannot even greet (rfc.zeromq.org/spec/26, HELLO)."""

    public: str
    secret: str

    @classmethod
    def make(cls) -> "Keys":
        return cls(*(key.decode() for key in zmq.curve_keypair()))

    def guard(self, socket: zmq.Socket, *, inbox: bool) -> None:
        """What it binds or connects to from now on is for processes with these keys; a silent peer is given up."""
        socket.heartbeat_ivl = BEAT_MS
        socket.heartbeat_timeout = socket.heartbeat_ttl = socket.connect_timeout = SILENT_MS
        socket.curve_publickey, socket.curve_secretkey = self.public.encode(), self.secret.encode()
        if inbox:
            socket.curve_server = True
        else:
            socket.curve_serverkey = self.public.encode()


@dataclass(eq=False)
class Outboxes:
    """Sends to any number of inboxes as `sender`; connects on first use."""

    context: zmq.Context
    sender: str
    epoch: int
    keys: Keys
    sockets: dict[str, zmq.Socket] = field(default_factory=dict)
    monitors: dict[str, zmq.Socket] = field(default_factory=dict)

    def send(self, address: str, body: Message) -> None:
        """Queue a message for the inbox at `address`; returns at once."""
        socket = self.sockets.get(address)
        if socket is None:
            socket = self.sockets[address] = self.context.socket(zmq.PUSH)
            socket.set_hwm(0)  # an engine must not wait for a reader; messages are small and bounded by the turns
            socket.linger = 0
            if address.startswith("tcp:"):
                self.keys.guard(socket, inbox=False)
                socket.ipv6 = "[" in address
                self.monitors[address] = socket.get_monitor_socket(BREAKS)
            socket.connect(address)
        # The owner of that inbox is dead, which the supervisor notices.
        with contextlib.suppress(zmq.Again):
            socket.send(_encoder.encode(Envelope(self.sender, self.epoch, body)), zmq.NOBLOCK)

    def broken(self) -> set[str]:
        """Addresses on other hosts to which the connection broke, or could not be made, since the last call."""
        found = set()
        for address, monitor in self.monitors.items():
            with contextlib.suppress(zmq.Again):
                while parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK)):
                    found.add(address)
        return found

    def forget(self, address: str, linger_ms: int = 0) -> None:
        """Close the way to an inbox whose owner is gone, or once what is on its way has left, within `linger_ms`."""
        if self.monitors.pop(address, None) is not None:
            self.sockets[address].disable_monitor()
        if socket := self.sockets.pop(address, None):
            socket.close(linger_ms)

    def close(self, linger_ms: int = 0) -> None:
        for address in list(self.sockets):
            self.forget(address, linger_ms)


class Inbox:
    """Receives at `address` (bound here), and with `host`, an address of ours, also at the TCP port `far` of it."""

    def __init__(self, context: zmq.Context, address: str, keys: Keys, host: str = "") -> None:
        """Raises `zmq.ZMQError` where there can be no such socket."""
        self.socket = context.socket(zmq.PULL)
        self.socket.set_hwm(0)
        self.socket.bind(address)
        self.far = ""
        if host:
            keys.guard(self.socket, inbox=True)
            self.socket.ipv6 = ":" in host
            self.socket.bind(f"tcp://[{host}]:*" if ":" in host else f"tcp://{host}:*")
            self.far = self.socket.last_endpoint.decode()

    def receive(self, timeout_ms: int = 0) -> list[Envelope]:
        """All messages that are here, waiting up to `timeout_ms` for the first. What is none of ours is dropped."""
        if timeout_ms and not self.socket.poll(timeout_ms):
            return []
        messages: list[Envelope] = []
        with contextlib.suppress(zmq.Again):
            while True:
                data = self.socket.recv(zmq.NOBLOCK)
                try:
                    messages.append(decode(data))
                except msgspec.MsgspecError as error:
                    log.error("dropped a message that is none of ours: %s", error)
        return messages

    def close(self) -> None:
        self.socket.close(0)


def decode(data: bytes) -> Envelope:
    """Raises `msgspec.MsgspecError` if `data` is no envelope."""
    try:
        return _decoder.decode(data)
    except UnicodeDecodeError as error:  # the one thing that msgspec does not report as its own
        raise msgspec.DecodeError(f"a string is not UTF-8: {error}") from error
