"""Measure how long steps of a model take here, and write a hardware profile for `miniserve simulate --hardware`.

    .venv/bin/python scripts/profile_hardware.py smollm2-135m --workers 2 --out here.json

Each copy of `measure` builds an engine as a worker does and times its runner on steps of known shapes. As many run at
once as there will be workers, each with its share of the cores: they slow each other down, as workers do. Last a server
of one worker is asked, for what HTTP, the frontend and messages add to a turn.
"""

import asyncio
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from miniserve.bench.replay.answer import Answer, ask, session
from miniserve.bench.simulate.hardware import Hardware
from miniserve.cli.flags import Parser, add_flags, filled
from miniserve.cluster.messages import Envelope, Message, Report, Run, StepTime
from miniserve.config import ConfigError, EngineConfig
from miniserve.hub.fetch import DEFAULT_MODEL
from miniserve.hub.resolve import resolve
from miniserve.sampling_params import SamplingParams
from miniserve.scheduler.observations import non_negative_fit
from miniserve.worker.engine import Engine
from scripts.harness import running

REPEATS = 7
"""Measurements of each shape, of which the median counts."""
CHUNKS = (10, 20, 40, 80, 160, 320, 640, 1280, 2560)
"""Tokens of prompts: no powers of two, since what kernels fill up belongs to the cost."""
CONTEXTS = (0, 256, 1024, 2048, 4096, 8192)
BATCHES = (1, 2, 4, 8, 16, 32)
COSTS = "base", "chunk_overhead", "per_token", "per_pair", "per_context", "per_sequence", "per_kv_token"
"""What of `Hardware` is fitted to the steps."""
PROMPT = 1024
"""Tokens of the turns that a server is asked for."""
LARGEST = 6144
"""Tokens that one step may look back on in all: a CPU should be done with this in a minute."""
MODULE = "scripts.profile_hardware"


class Measured(msgspec.Struct):
    """What one copy has measured: its device, all but `COSTS`; and `steps`, which are (chunk, context before it,
    decodes, their tokens in all, seconds)."""

    device: Hardware
    steps: list[tuple[int, int, int, int, float]]


def profile(config: EngineConfig, out: Path) -> None:
    """Measure as many engines at once as `config.workers` says, and write the profile. Raises `ConfigError`."""
    files = resolve(config.model, progress=lambda line: print(line, file=sys.stderr))
    engine = msgspec.json.encode(msgspec.structs.replace(config, model=str(files.folder)))
    command = [sys.executable, "-c", f"import sys, {MODULE}; sys.exit({MODULE}.measure())"]
    run = partial(subprocess.run, command, input=engine, stdout=subprocess.PIPE)
    with ThreadPoolExecutor(config.workers) as pool:
        copies = [copy.result() for copy in [pool.submit(run) for _ in range(config.workers)]]
    if any(copy.returncode for copy in copies):
        raise ConfigError("The measurement failed; what it said is above.")
    found = [msgspec.json.decode(copy.stdout, type=Measured) for copy in copies]
    hardware = fit(found, f"{found[0].device.name}-{Path(config.model).name}")
    hardware = msgspec.structs.replace(hardware, message_seconds=asyncio.run(message_seconds(config)))
    out.write_bytes(msgspec.json.format(msgspec.json.encode(hardware), indent=1) + b"\n")
    print(quality(hardware, found), file=sys.stderr)


def fit(found: list[Measured], name: str) -> Hardware:
    """The constants that come nearest to the measured steps: least squares of the relative error, none below zero."""
    steps = [step for copy in found for step in copy.steps]
    # What the constants are multiplied by in `Hardware`'s formula.
    rows = np.array([(1.0, n > 0, n, n * (c + n / 2), c if n else 0, b, s) for n, c, b, s, _ in steps])
    seconds = np.array([step[4] for step in steps])
    weights = non_negative_fit(rows / seconds[:, None], np.ones(len(steps)), 1e-6)
    return msgspec.structs.replace(
        found[0].device,
        name=name,
        overhead=statistics.mean(copy.device.overhead for copy in found),
        kv_tokens=min(copy.device.kv_tokens for copy in found),
        transfer_bytes_per_second=statistics.mean(copy.device.transfer_bytes_per_second for copy in found),
        **dict(zip(COSTS, weights.tolist(), strict=True)),
    )


def quality(hardware: Hardware, found: list[Measured]) -> str:
    errors = [
        abs((hardware.step_seconds([(n, c)] if n else [], b, s) - hardware.overhead) / seconds - 1)
        for copy in found
        for n, c, b, s, seconds in copy.steps
    ]
    median, p95 = np.quantile(errors, (0.5, 0.95))
    return f"{len(errors)} steps; the profile is off by {median:.0%} (median), {p95:.0%} (p95)"


async def message_seconds(config: EngineConfig) -> float:
    """Half of what the client of a server waits for the first token of a lone turn, beyond the worker's own time.
    Raises `ConfigError` if the server fails, or a turn of it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        given = ["--device", config.device, "--dtype", config.dtype]
        given += ["--threads", str(config.threads)] if config.threads else []
        where = ["--topology", "1D", "--port", url.rpartition(":")[2], "--decision-log", str(log)]
        argv = [sys.executable, "-m", "miniserve", "serve", config.model, *given, *where]
        async with session(None) as http, running(argv, url, http) as server:
            prompt = [7] * min(PROMPT, (server.max_model_len or PROMPT) // 2)
            post = partial(http.post, server.generate_url, data=server.body(prompt, 2))
            times = [await ask(post, server, Answer(len(prompt)), 60.0) for _ in range(REPEATS + 1)]
        if failed := next((turn.error for turn in times if turn.error), ""):
            raise ConfigError(f"The server that was asked for lone turns failed at one: {failed}")
        lines = [msgspec.json.decode(line) for line in log.read_bytes().splitlines()]
    own = [line["prefill"] for line in lines if line["kind"] == "outcome"]
    return max(statistics.median(t.ttft - known for t, known in zip(times[1:], own[1:], strict=True)), 0.0) / 2


# --- one copy -------------------------------------------------------------------------------------------------------


def measure() -> int:
    """Measure with the configuration on stdin, and print a `Measured`."""
    from miniserve.worker.build import build
    from miniserve.worker.sequence import Sequence
    from miniserve.worker.step import Work

    config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig)
    try:
        built = build(config)
    except ConfigError as error:
        print(f"profile_hardware.py: {error}", file=sys.stderr)
        return 1
    engine, shape = built.engine, built.memory.shape
    runner, size = engine.runner, engine.page_tokens
    budget = engine.max_num_batched_tokens
    limit = min(LARGEST, engine.max_model_len - 1, (built.memory.num_pages - 1) * size)

    greedy = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)

    def once(chunk: int, context: int, decodes: int, each: int) -> float:
        work: list[Work] = []
        page = 0
        for count, before in [(1, each - 1)] * decodes + ([(chunk, context)] if chunk else []):
            sequence = Sequence(f"{len(work)}", [7] * (before + count), greedy, 0, b"")
            sequence.computed = before
            sequence.pages = list(range(page, page + -(-(before + count) // size)))
            page += len(sequence.pages)
            work.append(Work.next(sequence, count))
        started = time.perf_counter()
        runner.launch(work)()
        return time.perf_counter() - started

    chunks = [n for n in CHUNKS if n < budget] + [budget]
    shapes = [(n, c, 0, 0) for n in chunks for c in CONTEXTS if n + c <= limit]
    shapes += [(0, 0, b, s) for b in BATCHES for s in (64, 512, 2048, 4096) if b * s <= limit]
    shapes += [(n, c, b, 512) for n, c, b in ((64, 256, 4), (256, 0, 4), (256, 1024, 2)) if n + c + b * 512 <= limit]
    once(*shapes[0])
    rounds = [[once(*shape) for shape in shapes] for _ in range(REPEATS)]  # a slow moment is none of one shape's alone
    times = [statistics.median(each) for each in zip(*rounds, strict=True)]
    steps = [(n, c, b, b * s, seconds) for (n, c, b, s), seconds in zip(shapes, times, strict=True)]
    today = time.strftime("%Y-%m-%d")
    device = Hardware(
        name=built.facts.device,
        source=f"profile_hardware.py, {today}: {built.facts.device}, {built.facts.dtype}, {config.workers} at once",
        base=0.0,
        per_token=0.0,
        per_pair=0.0,
        kv_bytes_per_token=shape.token_bytes,
        layers=len(built.model.layers),
        hidden_size=built.model.hidden_size,
        kv_tokens=built.memory.num_pages * size,
        page_tokens=size,
        max_num_batched_tokens=budget,
        transfer_bytes_per_second=_copy_rate(built.memory.pages, shape.bytes),
        overhead=_overhead(engine, built.layout, built.model.vocab_size),
    )
    sys.stdout.buffer.write(msgspec.json.encode(Measured(device, steps)))
    return 0


@dataclass
class _Nowhere:
    """A worker's outboxes that encode each message, as real ones do, and keep the times of steps."""

    steps: list[StepTime] = field(default_factory=list)

    def send(self, address: str, body: Message) -> None:
        msgspec.msgpack.encode(Envelope("d0", 1, body))
        if isinstance(body, Report):
            self.steps += body.steps

    def forget(self, address: str) -> None: ...


def _overhead(engine: Engine, layout: str, vocab: int) -> float:
    """Seconds that the worker's loop takes beside each step, with four streams."""
    from miniserve.worker.handoff import Handoffs
    from miniserve.worker.process import Worker

    nowhere = _Nowhere()
    handoffs = Handoffs(engine, 0, layout, 30.0, nowhere.send, lambda peer: None)
    worker = Worker("d0", engine, handoffs, nowhere, "frontend", layout=layout, vocab_size=vocab)
    length = min(128, engine.max_model_len // 4)
    params = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
    runs = [Run(f"{n}", [n + 1] * 16, params, 0) for n in range(4)]
    worker.work([Envelope("frontend", 0, run) for run in runs])
    nowhere.steps.clear()
    started = time.perf_counter()
    while engine.has_work:
        worker.work([])
    loop = time.perf_counter() - started
    return max(loop - sum(step.seconds for step in nowhere.steps), 0.0) / len(nowhere.steps)


def _copy_rate(pages: object, page_bytes: int) -> float:
    """Bytes a second of copying pages one by one, as a handoff does."""
    import torch

    assert isinstance(pages, torch.Tensor)
    count = min(64, len(pages) // 2)
    times = []
    for _ in range(REPEATS + 1):
        times.append(time.perf_counter())
        for page in range(count):
            pages[page].copy_(pages[count + page])
        if pages.device.type == "cuda":
            torch.cuda.synchronize()
    return count * page_bytes / statistics.median(b - a for a, b in pairwise(times))


# --- the command line -----------------------------------------------------------------------------------------------

FLAGS: dict[str, Any] = {
    "model": {"nargs": "?", "default": DEFAULT_MODEL, "help": "as for `miniserve serve`; default: %(default)s"},
    "--device": {"default": "auto", "help": "auto, cpu or cuda"},
    "--dtype": {"default": "auto", "help": "as for `miniserve serve`"},
    "--threads": {
        "type": "positive",
        "default": 0,
        "help": "CPU threads of a worker; default: all cores. One for 1P1D on two",
    },
    "--workers": {"type": "positive", "default": 1, "help": "workers that share this machine, all kept busy"},
    "--out": {"type": "path", "required": True, "metavar": "FILE"},
}


def main(argv: list[str] | None = None) -> int:
    """The exit code. 1: nothing could be measured, or the profile cannot be written."""
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_flags(parser, FLAGS)
    args = parser.parse_args(argv)
    try:
        profile(filled(EngineConfig, args), args.out)
    except (ConfigError, OSError) as error:
        print(f"profile_hardware.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
