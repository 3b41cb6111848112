"""Where a server listens: ports of one and of two kinds of addresses, Unix sockets."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from miniserve.cli.serve import bind, bind_path
from miniserve.config import ConfigError


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
Bound = Callable[..., list[socket.socket]]


@pytest.fixture
def bound() -> Iterator[Bound]:
    with ExitStack() as stack:

        def listening(host: str, port: int = 0) -> list[socket.socket]:
            return [stack.enter_context(listener) for listener in bind(host, port)]

        yield listening


def reached(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True


def test_an_address_of_one_kind_is_one_socket(bound: Bound) -> None:
    [listener] = bound("127.0.0.1")
    port = listener.getsockname()[1]
    assert reached("127.0.0.1", port)
    assert not reached("::1", port)


@ipv6
@pytest.mark.parametrize("chosen", [False, True])
def test_localhost_is_one_port_of_both_kinds(bound: Bound, chosen: bool) -> None:
    port = 0
    if chosen:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
    listeners = bound("localhost", port)
    assert [listener.getsockname()[0] for listener in listeners] == ["127.0.0.1", "::1"]
    [port_of_both] = {listener.getsockname()[1] for listener in listeners}
    assert port_of_both == port or not chosen
    assert reached("127.0.0.1", port_of_both)
    assert reached("::1", port_of_both)


def test_localhost_where_there_is_one_kind_only(bound: Bound, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket.bind

    def without_ipv6(self: socket.socket, address: tuple[object, ...]) -> None:
        if self.family == socket.AF_INET6:
            raise OSError(99, "Cannot assign requested address")
        real(self, address)

    monkeypatch.setattr(socket.socket, "bind", without_ipv6)
    [listener] = bound("localhost")
    assert reached("127.0.0.1", listener.getsockname()[1])


@ipv6
@pytest.mark.parametrize(("address", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_localhost_is_taken_where_either_kind_is(bound: Bound, address: str, family: int) -> None:
    with socket.create_server((address, 0), family=family) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"Port {port} on localhost is taken"):
            bound("localhost", port)
    assert not reached("127.0.0.1", port), "nothing is left half open"


@ipv6
def test_all_addresses_are_those_of_both_kinds(bound: Bound) -> None:
    [listener] = bound("::")
    port = listener.getsockname()[1]
    assert reached("127.0.0.1", port)
    assert reached("::1", port)
    [listener] = bound("::1")
    assert not reached("127.0.0.1", listener.getsockname()[1])


def test_a_host_that_is_none_says_so(bound: Bound) -> None:
    with pytest.raises(ConfigError, match=r"--host .203\.0\.113\.1. cannot be listened at"):
        bound("203.0.113.1")


# --- Unix sockets ---------------------------------------------------------------------------------------------------


def test_a_path_is_open_to_all_users_of_the_machine(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with bind_path(path), socket.socket(socket.AF_UNIX) as client:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o666
        client.connect(path)


def test_a_socket_that_was_left_behind_makes_way(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    bind_path(path).close()
    assert os.path.exists(path)
    with bind_path(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(path)


def test_a_socket_of_a_server_that_lives_stays(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with bind_path(path), socket.socket(socket.AF_UNIX) as client:
        with pytest.raises(ConfigError, match="Another server listens at"):
            bind_path(path)
        client.connect(path)


def test_what_is_no_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    link = tmp_path / "link"
    link.symlink_to(path)
    for one in (path, link, tmp_path):
        with pytest.raises(ConfigError, match=r"--uds .* cannot be listened at: Address already in use"):
            bind_path(str(one))
    assert path.read_text() == "mine"


@pytest.mark.parametrize(("name", "says"), [("x" * 200, "too long"), ("none/socket", "No such file")])
def test_a_path_that_cannot_be_says_so(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"--uds .* cannot be listened at: .*{says}"):
        bind_path(str(tmp_path / name))
