"""What `miniserve serve` shows: how far the workers have loaded, then a banner of what runs."""

import contextlib
import shlex
import sys
from collections import Counter

from miniserve.cluster.messages import Loading, Ready
from miniserve.config import ServeConfig, format_bytes
from miniserve.dispatcher import Dispatcher
from miniserve.hub.resolve import ModelFiles


def say(line: str, end: str = "\n") -> None:
    """Print to stderr. That its reader has gone (`| tee` dies of Ctrl-C too) is no reason to stop."""
    with contextlib.suppress(OSError):
        print(line, end=end, file=sys.stderr, flush=True)


class LoadingLines:
    """Progress of all workers on one line of a terminal; on anything else a line for each phase."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._state: dict[str, str] = {}

    def show(self, worker: str, loading: Loading) -> None:
        percent = f" {100 * loading.done // loading.total}%" if loading.total else ""
        state = f"{worker}: {loading.phase}{percent}"
        if self._live:
            self._state[worker] = state
            say(f"\r\033[2K{'  '.join(self._state.values())}", end="")  # in place of what the line said before
        elif loading.done == 0:
            say(state)

    def end(self) -> None:
        if self._state:
            say("\r\033[2K", end="")


def banner(config: ServeConfig, files: ModelFiles, client: Dispatcher, bound: tuple[str, int], seconds: float) -> str:
    """What runs, how it was sized, how long it took, and how to use it. It listens at `bound`, address and port."""
    name = config.served_model_names[0]
    first: Ready = next(iter(client.ready.values()))
    room = {worker: ready.pool.num_pages * ready.page_tokens for worker, ready in client.ready.items()}
    least = min(room.values())
    tokens = f"{least:,}" if len(set(room.values())) == 1 else f"{least:,} to {max(room.values()):,}"
    host = "127.0.0.1" if bound[0] in ("0.0.0.0", "::") else config.host
    at, unix = f"{f'[{host}]' if ':' in host else host}:{bound[1]}", ""
    if config.uds:
        at, unix = "localhost", f" --unix-socket {shlex.quote(config.uds)}"
    url = f"http://{at}/v1"
    phases: dict[str, float] = {}
    for ready in client.ready.values():  # workers load side by side: the slowest counts
        for phase, took in ready.phases.items():
            phases[phase] = max(phases.get(phase, 0.0), took)
    ranks = config.engine.tensor_parallel_size
    size, each = (f" of {ranks} ranks each", "a rank") if ranks > 1 else ("", "a worker")
    rows = {
        "model": f"{name} ({files.source})",
        "dtype": f"{first.dtype} on {places(client.ready)}, {first.threads} threads {each}",
        "kernels": first.kernels,
        "topology": f"{client.topology}{size}, policy {config.policy}",
        "transfer": ways(client.transfer),
        "weights": f"{format_bytes(first.weights_bytes)} {each}",
        "KV cache": f"{tokens} tokens a worker: {first.kv_note}",
        "concurrency": f"{least / client.max_model_len:.1f} x {client.max_model_len:,} tokens a worker",
        "started in": f"{seconds:.1f} s ({', '.join(f'{phase} {took:.1f}' for phase, took in phases.items())})",
        "API": f"{url} at {config.uds}" if config.uds else url,
        "dashboard": url.removesuffix("v1"),
        "prompts": "without Claude Code's billing line" if config.normalize_prompts else "as they come",
    }
    key = ' -H "Authorization: Bearer YOUR_KEY"' if config.api_key else ""
    curl = (
        f"curl{unix} {url}/chat/completions -H 'Content-Type: application/json'{key} -d "
        f'\'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}\''
    )
    return "\n".join([*(f"{label + ':':<13}{text}" for label, text in rows.items()), "try:", f"  {curl}", ""])


def places(workers: dict[str, Ready]) -> str:
    """The devices; of GPUs also which workers are on each, and whether they share it."""
    at: dict[str, list[str]] = {}
    for name, ready in workers.items():
        at.setdefault(ready.device, []).append(name)
    return ", ".join(
        f"{device} ({', '.join(names)}{' share its memory' if len(names) > 1 else ''})" if "cuda" in device else device
        for device, names in at.items()
    )


def ways(transfer: dict[tuple[str, str], str]) -> str:
    """How KV travels between workers, in one line: the usual way, and the pairs that have another one."""
    if not transfer:
        return "none needed"
    usual, _ = Counter(transfer.values()).most_common(1)[0]
    others = [f"{source}->{home} {how}" for (source, home), how in sorted(transfer.items()) if how != usual]
    return f"{usual} between all workers" + (f" but {', '.join(others)}" if others else "")
