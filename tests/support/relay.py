"""`python relay.py ONE OTHER SECONDS LOSS`: passes frames between two interfaces, each after so many seconds,
and loses that share of them. For kernels without `tc netem`; to be run in the namespace of both."""

from __future__ import annotations

import random
import select
import socket
import sys
import time
from collections import deque

ETH_P_ALL = 3


def main(one: str, other: str, seconds: float, loss: float) -> None:
    ends = []
    for name in (one, other):
        end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        end.bind((name, 0))
        ends.append(end)
    late: deque[tuple[float, socket.socket, bytes]] = deque()
    print("passing", flush=True)
    while True:
        rest = max(late[0][0] - time.monotonic(), 0.0) if late else None
        for end in select.select(ends, [], [], rest)[0]:
            data, address = end.recvfrom(2**17)
            if address[2] == socket.PACKET_OUTGOING or random.random() < loss:
                continue
            late.append((time.monotonic() + seconds, ends[1 - ends.index(end)], data))
        while late and late[0][0] <= time.monotonic():
            _, to, data = late.popleft()
            to.send(data)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
