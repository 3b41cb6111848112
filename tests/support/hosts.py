"""Hosts that are network namespaces of this machine, each with a cable to one switch; and a Ray cluster over them.

Linux gives a new thread the namespace of the one that starts it: a test that has entered the first host (`Hosts.enter`)
is on it with all that it starts.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLONE_NEWNET = 0x40000000
WITH_SUMS = """
import array, fcntl, socket, struct, sys
off = array.array("I", [0x17, 0])  # ETHTOOL_STXCSUM
asked = struct.pack("16sP", sys.argv[1].encode(), off.buffer_info()[0])
fcntl.ioctl(socket.socket(), 0x8946, asked)  # SIOCETHTOOL
"""
_libc = ctypes.CDLL(None, use_errno=True)


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done


def possible() -> bool:
    """Whether this user may make namespaces here, and Ray is installed."""
    if os.geteuid() or shutil.which("ip") is None or not (Path(sys.prefix) / "bin/ray").exists():
        return False
    made = run("ip", "netns", "add", "ms-probe", check=False).returncode == 0
    run("ip", "netns", "delete", "ms-probe", check=False)
    return made


class Hosts:
    """`count` hosts with the addresses 10.77.0.1 and on; 0 is the one the tests are on."""

    def __init__(self, count: int) -> None:
        self.names = [f"ms-h{n}" for n in range(count)]
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY)
        self.remove()
        run("ip", "netns", "add", "ms-switch")
        run("ip", "-n", "ms-switch", "link", "add", "br0", "type", "bridge")
        run("ip", "-n", "ms-switch", "link", "set", "br0", "up")
        for n, name in enumerate(self.names):
            run("ip", "netns", "add", name)
            run("ip", "-n", "ms-switch", "link", "add", f"c{n}", "type", "veth", "peer", "name", "eth0", "netns", name)
            run("ip", "-n", "ms-switch", "link", "set", f"c{n}", "master", "br0", "up")
            run("ip", "-n", name, "addr", "add", f"{self.address(n)}/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "eth0", "up")
            run("ip", "-n", name, "link", "set", "lo", "up")

    @staticmethod
    def address(n: int) -> str:
        return f"10.77.0.{n + 1}"

    def enter(self, n: int = 0) -> None:
        """This thread, and those it starts from now on, are on host `n`."""
        handle = os.open(f"/run/netns/{self.names[n]}", os.O_RDONLY)
        self._set(handle)
        os.close(handle)

    def leave(self) -> None:
        self._set(self._home)

    def _set(self, handle: int) -> None:
        assert _libc.setns(handle, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())

    def cut(self, n: int, *, mend: bool = False) -> None:
        """Pull the cable of host `n` out, or plug it in."""
        run("ip", "-n", "ms-switch", "link", "set", f"c{n}", "up" if mend else "down")

    def part(self, one: int, other: int, *, mend: bool = False) -> None:
        """Two hosts do not reach each other, but all others; or they do again."""
        for n, them in ((one, other), (other, one)):
            run("ip", "-n", self.names[n], "route", "del" if mend else "add", "blackhole", self.address(them))

    @contextmanager
    def disturbed(self, n: int, seconds: float, loss: float) -> Iterator[None]:
        """What comes to host `n` and leaves it takes so many seconds, and this share of it is lost."""
        run("ip", "-n", "ms-switch", "link", "add", "r0", "type", "veth", "peer", "name", "r1")
        run("ip", "-n", "ms-switch", "link", "set", "r0", "up")
        run("ip", "-n", "ms-switch", "link", "set", "r1", "master", "br0", "up")
        run("ip", "-n", "ms-switch", "link", "set", f"c{n}", "nomaster")
        # Frames that a program sends have no sums that an interface would add.
        for name in self.names:
            run("ip", "netns", "exec", name, sys.executable, "-c", WITH_SUMS, "eth0")
        script = str(Path(__file__).with_name("relay.py"))
        command = ["ip", "netns", "exec", "ms-switch", sys.executable, script, f"c{n}", "r0", str(seconds), str(loss)]
        relay = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert relay.stdout is not None
        relay.stdout.readline()
        try:
            yield
        finally:
            relay.kill()
            relay.wait()
            run("ip", "-n", "ms-switch", "link", "delete", "r0")
            run("ip", "-n", "ms-switch", "link", "set", f"c{n}", "master", "br0")

    def command(self, n: int, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.names[n], *command]

    def start_ray(self, n: int, cpus: int = 1) -> None:
        """A raylet on host `n`; the first one is the head."""
        # Each is a host to Ray, with a shorter patience than its own, so that tests see what comes after it.
        environment = os.environ | {
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "1000",
            "RAY_health_check_failure_threshold": "12",
            "RAY_DISABLE_MEMORY_MONITOR": "1",
            "RAY_memory_monitor_refresh_ms": "0",
        }
        role = (
            ["--head", "--port=6379", "--include-dashboard=false"] if n == 0 else [f"--address={self.address(0)}:6379"]
        )
        ray = str(Path(sys.prefix) / "bin/ray")
        rest = ["--disable-usage-stats", "--object-store-memory=80000000"]
        command = [ray, "start", *role, f"--node-ip-address={self.address(n)}", f"--num-cpus={cpus}", *rest]
        done = subprocess.run(self.command(n, *command), env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def kill_raylet(self, n: int) -> None:
        for pid in self.pids(n):
            if Path(f"/proc/{pid}/comm").read_text() == "raylet\n":
                os.kill(pid, signal.SIGKILL)

    def pids(self, n: int) -> list[int]:
        """All processes on a host."""
        return [int(pid) for pid in run("ip", "netns", "pids", self.names[n]).stdout.split()]

    def remove(self) -> None:
        """End all that runs on the hosts, and delete them."""
        for name in [*self.names, "ms-switch"]:
            for pid in run("ip", "netns", "pids", name, check=False).stdout.split():
                if int(pid) != os.getpid():
                    os.kill(int(pid), signal.SIGKILL)
            run("ip", "netns", "delete", name, check=False)
