#!/usr/bin/env python3
"""Compare servers that are already running, fairly on a noisy machine: their turns alternate within each scenario.

  scripts/bench_peers.py --client PATH/bench_client.py --tokenizer MODEL_FOLDER --rounds 3 --out FILE.json \
      miniserve=http://127.0.0.1:8201/v1,smollm2-135m,PID vllm=http://127.0.0.1:8202/v1,smollm2,PID

Runs the client of shared/tools once for each server, scenario and round, and prints medians and the ratio of the first
server to each other one. All servers stay loaded throughout; none may spin when idle.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SCENARIOS = [
    ("prefill 512, tok/s", ["prefill", "--prompt-tokens", "512"], "prefill_tok_s", True),
    ("prefill 2048, tok/s", ["prefill", "--prompt-tokens", "2048"], "prefill_tok_s", True),
    ("decode, 1 stream, tok/s", ["decode"], "decode_tok_s", True),
    ("output, 8 streams, tok/s", ["concurrent", "--concurrency", "8"], "output_tok_s", True),
    ("output, 16 streams, tok/s", ["concurrent", "--concurrency", "16"], "output_tok_s", True),
    ("turn-2 TTFT, s", ["turn2"], "turn2_ttft_s", False),
]
"""Name, arguments for the client, the figure that counts, whether more is better."""


def measure(client: str, tokenizer: str, server: str, scenario: list[str]) -> dict:
    """The medians of one run of one scenario."""
    url, model, pid = server.split(",")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, client, "--base-url", url, "--model", model, "--pid", pid, "--tokenizer", tokenizer]
        command += ["--scenario", *scenario, "--repeats", "2", "--warmup", "1", "--out", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=300)
        result = json.loads(out.read_text())
    return next(r["median"] for r in result["results"] if r["scenario"] == scenario[0])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="+", metavar="NAME=URL,MODEL,PID")
    parser.add_argument("--client", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="scenarios whose name contains this")
    parser.add_argument("--out")
    args = parser.parse_args()
    servers = dict(server.split("=", 1) for server in args.servers)
    first = next(iter(servers))
    table = {}
    for name, scenario, figure, more_is_better in SCENARIOS:
        if args.only not in name:
            continue
        runs: dict[str, list[float]] = {server: [] for server in servers}
        for round_number in range(args.rounds):
            # Whoever goes first has the cooler machine: take turns.
            order = list(servers) if round_number % 2 == 0 else list(reversed(servers))
            for server in order:
                runs[server].append(measure(args.client, args.tokenizer, servers[server], scenario)[figure])
        medians = {server: statistics.median(values) for server, values in runs.items()}
        ratios = {s: medians[first] / m if more_is_better else m / medians[first] for s, m in medians.items()}
        table[name] = {"runs": runs, "median": medians, "ratio": ratios}
        figures = "  ".join(f"{s} {m:.4g}" for s, m in medians.items())
        beside = "  ".join(f"{r:.2f}x {s}" for s, r in ratios.items() if s != first)
        print(f"{name:<28}{figures}   {first} is {beside}", flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
