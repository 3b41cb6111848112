#!/usr/bin/env python3
"""What the one frontend process of a server bears: tokens a second over many streams, and what a token costs it.

    .venv/bin/python scripts/bench_frontend.py [--streams N ...] [--rates R ...] [--seconds S] [--topology 1D]
        [--tokens-a-message K] [--tools] [--rounds N] [--profile FOLDER] [--json FILE]

For each case a server is started by the code of `miniserve serve`, with the default model's tokenizer and chat
template. Its workers are processes of `miniserve.worker` in everything but the model: a runner takes the time that
makes the offered rate and samples made-up tokens, each of four characters, so that a client can count tokens by bytes.
A client process reads streamed chat completions from raw sockets. All have the same clock: a token's delay is from its
worker's report to the read that brings it.

CPU time is that of /proc/PID/stat, which a machine that others use as well does not make much longer: tokens over the
CPU seconds of the frontend's event loop (`core_tokens_s`) are what a core of its own would bear. `others_cpu` is the
share of the machine that all else took, `stolen_cpu` what its hypervisor did. With --profile each case is sampled by
py-spy, if that is installed; the figures of such a run are not to be used.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil

from scripts.harness import flags, show, write

TOKEN_BYTES = 4
"""Of each made-up token's text."""
WARM_SECONDS = 2.0
"""From when all streams have begun to when what they bring counts."""
START_SECONDS = 120
LAG_SECONDS = 0.25
"""A worker that is behind by no more than this makes up for it."""
TICK = os.sysconf("SC_CLK_TCK")
ROOT = Path(__file__).resolve().parents[1]


class Case(msgspec.Struct, frozen=True):
    """What one run is made of: `rate` tokens a second are offered to all `streams` together."""

    streams: int
    rate: int
    topology: str
    tokens_a_message: int
    tools: bool
    seconds: float

    @property
    def interval(self) -> float:
        """Seconds between the steps of a worker."""
        return self.streams * self.tokens_a_message / self.rate


# --- the worker: all but the model ----------------------------------------------------------------------------------


def work(log: str, interval: float, tokens_a_message: int) -> int:
    """Be a worker process that makes up its tokens, and note in `log` when each report is sent."""
    import miniserve.worker.__main__ as process
    from miniserve.cluster.messages import Report
    from miniserve.text.tokenizer import Tokenizer
    from miniserve.worker import build
    from miniserve.worker.engine import Engine
    from miniserve.worker.step import Sampled, Work

    class Step:
        """A launched step, over at a time."""

        def __init__(self, sampled: Sampled, at: float) -> None:
            self.sampled, self.at = sampled, at

        def __call__(self) -> Sampled:
            time.sleep(max(self.at - time.monotonic(), 0.0))
            return self.sampled

    class Drafts:
        """Drafts of one length, all of which hold."""

        def __init__(self, words: list[int]) -> None:
            self.words = words

        def draft(self, tokens: list[int], most: int) -> list[int]:
            at = len(tokens)
            return [self.words[i % len(self.words)] for i in range(at, at + min(tokens_a_message - 1, most))]

        def observe(self, drafted: int, held: int) -> None: ...

    class Runner:
        """Samples the next of its `words`, and takes `interval` seconds for a step that computes no prompt."""

        eos: frozenset[int] = frozenset()

        def __init__(self, words: list[int]) -> None:
            self.words, self.due = words, 0.0

        def launch(self, batch: list[Work]) -> Step:
            now = time.monotonic()
            if all(work.is_decode for work in batch):
                self.due = max(self.due + interval, now - LAG_SECONDS)
            sampled = [(token, None) for work in batch if work.samples for token in self.sample(work)]
            return Step(sampled, self.due)

        def sample(self, work: Work) -> list[int]:
            sequence: Any = work.sequence
            if tokens_a_message > 1:
                sequence.drafter = Drafts(self.words)
            return [*work.draft, self.words[(len(work.sequence.tokens) + len(work.draft)) % len(self.words)]]

    load = build.build

    def built(config: Any, *rest: Any) -> Any:
        made = load(config, *rest)
        tokenizer = Tokenizer.load(Path(config.model))
        texts = {token: tokenizer.token_bytes(token) for token in range(made.model.vocab_size)}
        words = [t for t, text in texts.items() if len(text) == TOKEN_BYTES and text.replace(b" ", b"a").isalpha()]
        engine: Engine = made.engine
        engine.runner = Runner(words)
        if tokens_a_message > 1:
            engine.draft_rows = engine._batching.draft_rows = 10**9
        return made

    class Outboxes(process.Outboxes):
        """Those of a worker, which notes of each report when it goes, and each turn's outputs so far."""

        file = open(f"{log}.{os.getpid()}", "wb", buffering=0)  # noqa: SIM115 - the process ends without warning

        def send(self, address: str, body: Any) -> None:
            if isinstance(body, Report) and body.outputs:
                outputs = [(o.turn, o.index + len(getattr(o, "tokens", ()))) for o in body.outputs]
                self.file.write(msgspec.json.encode((time.monotonic(), outputs)) + b"\n")
            super().send(address, body)

    build.build = built
    process.Outboxes = Outboxes  # type: ignore[misc]
    return process.main()


# --- the server -----------------------------------------------------------------------------------------------------


def serve(folder: str, port: int, case: Case, log: str) -> int:
    """`miniserve serve` with such workers."""
    import miniserve.dispatcher
    from miniserve.cli.main import main
    from miniserve.cluster.launch import Launcher, WorkerProcess, WorkerSpec, import_path

    class MadeUp(WorkerProcess):
        """A worker's process that this script is."""

        def __init__(self, spec: WorkerSpec) -> None:
            self.spec = spec
            how = [sys.executable, __file__, "work", log, str(case.interval), str(case.tokens_a_message)]
            quiet = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL}
            self._process = subprocess.Popen(how, **quiet, env=os.environ | import_path())  # type: ignore[call-overload]
            self._process.stdin.write(msgspec.json.encode(spec) + b"\n")
            self._process.stdin.flush()

    class OurLauncher(Launcher):
        def start(self, spec: WorkerSpec, far: str) -> WorkerProcess:
            return MadeUp(spec)

    miniserve.dispatcher.Launcher = OurLauncher  # type: ignore[misc]
    drafts = "--prompt-lookup" if case.tokens_a_message > 1 else "--no-prompt-lookup"
    sizes = f"--kv-cache-memory 2GiB --max-num-batched-tokens 64k --max-num-seqs {case.streams} {drafts}"
    place = f"--port {port} --topology {case.topology} --device cpu --threads 1"
    what = f"--model {folder} --load-format dummy --served-model-name m"
    return main(["serve", *f"{what} {place} {sizes}".split()])


def model_folder(folder: Path) -> Path:
    """The default model with a single layer and a long context, without weights."""
    from miniserve.hub.fetch import DEFAULT_MODEL
    from miniserve.hub.resolve import resolve

    files = resolve(DEFAULT_MODEL)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(files.folder / name, folder)
    config = files.config | {"num_hidden_layers": 1, "max_position_embeddings": 2**17}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# --- the client -----------------------------------------------------------------------------------------------------


TOOL = {
    "name": "run_command",
    "description": "Runs a command in a shell and returns what it prints.",
    "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
}


class Stream:
    """One streamed answer as it comes: `reads` are times and tokens so far."""

    def __init__(self, port: int, number: int, most: int, tools: bool) -> None:
        said = f"This is conversation {number}. Tell me everything you know about number {number * 7919}."
        asked = {"model": "m", "messages": [{"role": "user", "content": said}], "max_tokens": most}
        more = {"tools": [{"type": "function", "function": TOOL}]} if tools else {}
        body = msgspec.json.encode({**asked, **more, "stream": True, "ignore_eos": True})
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: m\r\nContent-Length: {len(body)}\r\n"
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        self.socket.setblocking(False)
        self.id = ""
        self.bytes = self.tokens = self.events = 0
        self.reads: list[tuple[float, int]] = []
        self._rest = b""

    def read(self) -> None:
        """Take in what is there."""
        data = self.socket.recv(2**18)
        now = time.monotonic()
        if not data:
            raise SystemExit(f"stream {self.id} ended: {self._rest[:500]!r}")
        *events, self._rest = (self._rest + data).split(b"\n\n")
        before = self.tokens
        for event in events:
            start = event.find(b'"content":"') + 11
            if start == 10:
                if not event.endswith(b": ping"):
                    raise SystemExit(f"not an event of tokens: {event[:500]!r}")
            elif size := event.find(b'"', start) - start:
                self.bytes += size
                self.events += 1
            else:  # the opening
                at = event.find(b'"id":"') + 6
                self.id = event[at : event.find(b'"', at)].decode()
        self.tokens = self.bytes // TOKEN_BYTES
        if self.tokens > before:
            self.reads.append((now, self.tokens))


class Clock(msgspec.Struct):
    """CPU seconds so far, by process; those of the server's event loop; of the machine all, idle and stolen ones."""

    at: float
    cpu: dict[str, float]
    machine: list[float]

    @classmethod
    def now(cls, pids: dict[str, list[int]]) -> Clock:
        paths = {name: [f"/proc/{pid}/stat" for pid in of] for name, of in pids.items()}
        paths["loop"] = [f"/proc/{pid}/task/{pid}/stat" for pid in pids["frontend"]]
        cpu = {name: sum(map(cpu_seconds, of)) for name, of in paths.items()}
        fields = [int(n) / TICK for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return cls(time.monotonic(), cpu, [sum(fields), fields[3] + fields[4], fields[7]])


def cpu_seconds(path: str) -> float:
    fields = Path(path).read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


class Seen(msgspec.Struct):
    """What a client has seen: the clock and its tokens and events at both ends of the time that counts, all reads."""

    clocks: list[Clock]
    tokens: list[int]
    events: list[int]
    reads: dict[str, list[tuple[float, int]]]


def ask(port: int, case: Case, pids: dict[str, list[int]], out: str) -> int:
    """Be the client, and write what was `Seen`."""
    pids = {**pids, "client": [os.getpid()]}
    most = int(case.rate / case.streams * (case.seconds + 60))
    streams = [Stream(port, number, most, case.tools) for number in range(case.streams)]
    ready = selectors.EpollSelector()
    for stream in streams:
        ready.register(stream.socket, selectors.EVENT_READ, stream)
    seen = Seen([], [], [], {})

    def read(until: float) -> None:
        while (left := until - time.monotonic()) > 0:
            for key, _ in ready.select(left):
                key.data.read()

    def note() -> None:
        seen.clocks.append(Clock.now(pids))
        seen.tokens.append(sum(stream.tokens for stream in streams))
        seen.events.append(sum(stream.events for stream in streams))

    deadline = time.monotonic() + START_SECONDS
    while not all(stream.tokens for stream in streams):
        if time.monotonic() > deadline:
            raise SystemExit(f"{sum(not stream.tokens for stream in streams)} streams have not begun")
        read(time.monotonic() + 0.1)
    read(time.monotonic() + WARM_SECONDS)
    note()
    read(time.monotonic() + case.seconds)
    note()
    read(time.monotonic() + 1.0)  # what was reported before the end should be seen
    seen.reads = {stream.id: stream.reads for stream in streams}
    Path(out).write_bytes(msgspec.json.encode(seen))
    return 0


# --- a run ----------------------------------------------------------------------------------------------------------


def run(case: Case, profile: Path | None) -> dict[str, Any]:
    """Start a server and a client, and return what they did."""
    with tempfile.TemporaryDirectory() as made:
        folder = model_folder(Path(made))
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        own = [sys.executable, __file__]
        environ = os.environ | {"PYTHONPATH": str(ROOT)}
        said = msgspec.json.encode(case).decode()
        server = subprocess.Popen(
            [*own, "serve", made, str(port), said, f"{made}/log"], stdout=subprocess.DEVNULL, env=environ
        )
        sampler = None
        try:
            wait_for(port, server)
            workers = [child.pid for child in psutil.Process(server.pid).children()]
            pids = msgspec.json.encode({"frontend": [server.pid], "workers": workers}).decode()
            client = subprocess.Popen([*own, "ask", str(port), said, pids, f"{made}/seen"], env=environ)
            if profile is not None and (tool := shutil.which("py-spy", path=Path(sys.executable).parent)):
                time.sleep(WARM_SECONDS + 3)
                file = profile / f"{case.streams}-{case.rate}-{case.tokens_a_message}.txt"
                what = f"record --nonblocking --format raw --rate 400 --duration {max(int(case.seconds) - 3, 1)}"
                sampler = subprocess.Popen([tool, *what.split(), "--pid", str(server.pid), "--output", str(file)])
            if client.wait(START_SECONDS + 2 * case.seconds):
                raise SystemExit("the client failed")
            if sampler is not None:
                sampler.wait(30)
        finally:
            for number in (signal.SIGTERM, signal.SIGTERM):  # to drain, then to stop
                server.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(5)
            server.kill()
            server.wait()
        seen = msgspec.json.decode(Path(f"{made}/seen").read_bytes(), type=Seen)
        logs = [line for file in folder.glob("log.*") for line in file.read_bytes().splitlines()]
        return figures(case, seen, [msgspec.json.decode(line) for line in logs])


def wait_for(port: int, server: subprocess.Popen) -> None:
    """Until the server's workers have started."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as link:
            link.settimeout(30)
            link.sendall(b"GET /health HTTP/1.1\r\nHost: m\r\nConnection: close\r\n\r\n")
            if link.recv(64).startswith(b"HTTP/1.1 200"):
                return
        time.sleep(0.1)
    raise SystemExit("the server did not start")


def figures(case: Case, seen: Seen, reports: list[Any]) -> dict[str, Any]:
    """One row of results, from what the client has seen and the workers have reported."""
    first, last = seen.clocks
    seconds, tokens, events = last.at - first.at, seen.tokens[1] - seen.tokens[0], seen.events[1] - seen.events[0]
    cpu = {name: last.cpu[name] - first.cpu[name] for name in first.cpu}
    total, idle, stolen = (b - a for a, b in zip(first.machine, last.machine, strict=True))
    ours = cpu["frontend"] + cpu["workers"] + cpu["client"]
    counted = [(at, outputs) for at, outputs in reports if first.at <= at < last.at]
    reported, delays, lost = 0, [], 0
    before: dict[str, int] = {}
    for at, outputs in sorted(reports, key=lambda report: report[0]):
        for turn, count in outputs:
            new, before[turn] = count - before.get(turn, 0), count
            if not first.at <= at < last.at:
                continue
            reported += new
            reads = seen.reads.get(turn.rsplit("-", 2)[0], [])
            found = bisect_left(reads, count, key=lambda read: read[1])
            if found < len(reads):
                delays.append(reads[found][0] - at)
            else:
                lost += 1
    p50, p99 = (np.percentile(delays, [50, 99]) * 1e3).tolist() if delays else (None, None)
    return {
        **msgspec.structs.asdict(case),
        "reported_tokens_s": reported / seconds,
        "delivered_tokens_s": tokens / seconds,
        "tokens_an_event": tokens / max(events, 1),
        "reports_s": len(counted) / seconds,
        "frontend_cpu": cpu["frontend"] / seconds,
        "loop_cpu": cpu["loop"] / seconds,
        "frontend_cpu_s_per_1000": cpu["frontend"] / tokens * 1000,
        "loop_cpu_s_per_1000": cpu["loop"] / tokens * 1000,
        "core_tokens_s": tokens / cpu["loop"],
        "loop_us_an_event": cpu["loop"] / max(events, 1) * 1e6,
        "delay_p50_ms": p50,
        "delay_p99_ms": p99,
        "not_seen_after_1s": lost,
        "workers_cpu": cpu["workers"] / seconds,
        "client_cpu": cpu["client"] / seconds,
        "others_cpu": (total - idle - stolen - ours) / total,
        "stolen_cpu": stolen / total,
    }


def main() -> int:
    match sys.argv[1:]:
        case ["work", log, interval, tokens]:
            return work(log, float(interval), int(tokens))
        case ["serve", folder, port, of, log]:
            return serve(folder, int(port), msgspec.json.decode(of, type=Case), log)
        case ["ask", port, of, pids, out]:
            return ask(int(port), msgspec.json.decode(of, type=Case), msgspec.json.decode(pids), out)
    parser = flags(__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[16, 64, 256, 512])
    parser.add_argument("--rates", type=int, nargs="+", default=[1000, 2000, 5000, 10000], metavar="TOKENS_A_SECOND")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--topology", default="1D")
    parser.add_argument("--tokens-a-message", type=int, default=1)
    parser.add_argument("--tools", action="store_true", help="requests have a tool, so answers are searched for calls")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--profile", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    rows = []
    for _ in range(args.rounds):
        for streams in args.streams:
            for rate in args.rates:
                case = Case(streams, rate, args.topology, args.tokens_a_message, args.tools, args.seconds)
                rows.append(row := run(case, args.profile))
                show(row)
                write(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
