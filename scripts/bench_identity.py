"""What it costs to know whose turn a request is, and why its prompt is not like the one before.

    .venv/bin/python scripts/bench_identity.py [--conversations N] [--tokens N] [--json FILE]

One process, no workers. Beside what a turn cost anyway (the hash of its prompt), medians and 95th percentiles in
milliseconds: `speaker` reads a request's headers, `find` finds the conversation of a prompt among all that are known
(by kind: it goes on with a key, or without; a new session that begins like all others; one that lost a reminder near
its beginning), and `examine` is the doctor, on a thread beside the turn, for prompts that changed near their beginning.
"""

from __future__ import annotations

import random
import sys
import time
from array import array
from collections.abc import Callable
from statistics import median
from typing import Any

from starlette.datastructures import Headers

from miniserve.api.identity import speaker
from miniserve.api.openai.schemas import ChatRequest
from miniserve.hub.resolve import resolve
from miniserve.kv.hashing import token_bytes
from miniserve.monitor.doctor import Doctor, Segment
from miniserve.scheduler.conversation import Change, Said
from miniserve.scheduler.conversations import Conversations
from miniserve.scheduler.prompts import page_chain
from miniserve.text.tokenizer import Tokenizer
from scripts.harness import flags, write

PAGE, HEAD = 16, 0.75
"""Tokens of a page; the share of a prompt that all sessions have."""
SAID = Said(client="bench", tools=True)


def main(argv: list[str]) -> int:
    parser = flags(__doc__)
    parser.add_argument("--conversations", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=20_000)
    args = parser.parse_args(argv)
    pick, length = random.Random(1), args.tokens
    head = [pick.randrange(40_000) for _ in range(int(length * HEAD))]
    known = Conversations(PAGE)
    prompts: dict[Any, list[int]] = {}
    times: dict[str, list[float]] = {}

    def find(kind: str, key: str, tokens: list[int], now: float) -> Any:
        prompt = token_bytes(tokens)
        chain = page_chain(tokens, "", PAGE)
        started = time.perf_counter()
        found = known.find(key, prompt, chain, now, SAID)
        if kind:
            times.setdefault(kind, []).append(time.perf_counter() - started)
        found.conversation.turns += 1
        found.conversation.last_end = now
        found.conversation.tokens = len(tokens)
        return found

    def own(count: int) -> list[int]:
        return [pick.randrange(40_000) for _ in range(count)]

    for n in range(args.conversations):
        tokens = [*head, *own(length - len(head))]
        of = find("", f"k{n}" if n % 2 else "", tokens, n * 0.01).conversation
        if n >= args.conversations - 400:
            prompts[of.key] = tokens
    for key, tokens in prompts.items():
        kind = "key" if isinstance(key, str) else "prompt"
        assert (
            find(f"goes on, by {kind}", key if kind == "key" else "", [*tokens, *own(100)], 1e4).conversation.key == key
        )
    for _ in range(200):
        fresh = [*head, *own(length - len(head))]
        assert find("new session", "", fresh, 2e4).change is not None
    for _ in range(200):
        reminded = [*head, *own(80), *own(length - len(head) - 80)]
        of = find("", "", reminded, 3e4).conversation
        resumed = find("resumed without its reminder", "", [*head, *reminded[len(head) + 80 :], *own(100)], 3e4)
        assert (resumed.conversation is of, of.edits) == (True, 1)
    request = ChatRequest.model_validate({"messages": [{"role": "user", "content": "Hi"}]})
    headers = Headers({"user-agent": "codex_exec/0.171.0", "thread-id": "t", "x-codex-window-id": "t:0"})
    timed(times, "speaker", 1000, lambda: speaker(headers, request))
    tokenizer = Tokenizer.load(resolve("smollm2-135m").folder)
    doctor = Doctor(lambda ids: tokenizer.decode(ids, False))
    text = tokenizer.decode(head, False)
    segments = [Segment("messages[0]", "system", text), Segment("messages[1]", "user", "Hi")]
    line = length // 8
    before = array("i", [*head[:line], *own(5), *head[line:]]).tobytes()
    after = array("i", [*head[:line], *own(5), *head[line:]]).tobytes()
    change = Change(line, before, after, first=True)
    timed(times, "examine (on a thread)", 50, lambda: doctor.examine(1, change, 0, segments, ["run"]))
    result = {
        kind: {"median_ms": 1e3 * median(seen), "p95_ms": 1e3 * sorted(seen)[int(0.95 * len(seen))], "n": len(seen)}
        for kind, seen in times.items()
    }
    for kind, row in result.items():
        print(f"{kind:32} {row['median_ms']:.3f} ms, 95% below {row['p95_ms']:.3f} ms")
    write(args.json, {"conversations": len(known), "tokens": length, "kept_bytes": known._last.size, **result})
    return 0


def timed(times: dict[str, list[float]], kind: str, count: int, call: Callable[[], object]) -> None:
    for _ in range(count):
        started = time.perf_counter()
        call()
        times.setdefault(kind, []).append(time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
