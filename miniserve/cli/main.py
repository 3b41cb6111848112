"""The command line: `miniserve serve`, `chat`, `top`; those of the evaluation are in `evaluate.py`. Flags are vLLM's
wherever vLLM has one."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from miniserve import __version__
from miniserve.bench.commands import add_commands
from miniserve.cli.flags import Parser, checked, fraction, interval, port, positive, seconds, share, stretch, tokens
from miniserve.config import ConfigError, EngineConfig, ServeConfig, Topology, parse_bytes, parse_devices
from miniserve.scheduler.baselines import POLICIES
from miniserve.text.formats import FORMATS, REASONING_MARKS

EXAMPLES = """examples:
  miniserve serve                                     the default model, one worker
  miniserve serve llama-3.1-8b --max-model-len 16k    an alias, a folder or a hub id
  miniserve serve --topology 1P1D                     a prefiller and a decoder
  miniserve chat                                      talk to the server that runs here
  miniserve top                                       watch it: workers, KV, conversations
  miniserve replay swe-agent --scale-tokens 0.05      send it agents, and measure
  miniserve simulate swe-agent --topology 1P3D        the same on GPUs that are not here
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit code. 1: it could not do its work and has said why, 2: it was called wrongly."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except ConfigError as error:
        print(f"miniserve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        _flush()


def _flush() -> None:
    """Nobody may read any more what is still to be written; that must not become the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _parser() -> Parser:
    parser = Parser(
        prog="miniserve",
        description="A compact LLM serving engine for agents.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"miniserve {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_chat(commands)
    _add_top(commands)
    add_commands(commands)
    return parser


# --- serve ----------------------------------------------------------------------------------------------------------


def _add_serve(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="serve a model over the OpenAI API",
        description="Serve a model over the OpenAI API. Ready when GET /health answers 200.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_serve)
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help="the same as --model")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        help="folder, alias (llama-3-8b, llama-3.1-8b, qwen3-0.6b, qwen3-8b, qwen2.5-7b, mistral-7b, smollm2-135m) or "
        "hub id like Qwen/Qwen3-0.6B; default: smollm2-135m",
    )
    model.add_argument("--revision", help="branch, tag or commit on the hub")
    model.add_argument(
        "--load-format",
        choices=("auto", "dummy"),
        default="auto",
        help="dummy: random weights of the model's shape, for measuring; default: %(default)s",
    )
    model.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32", "half", "float"),
        default="auto",
        help="default: auto (the model's; on a CPU bf16 only where it is native)",
    )
    model.add_argument(
        "--max-model-len",
        type=tokens,
        help="most tokens of prompt and output, like 8192 or 32k (32,000; 32K is 32,768)",
    )
    model.add_argument("--served-model-name", nargs="+", default=[], metavar="NAME", help="what clients call the model")
    model.add_argument("--chat-template", help="a jinja file or text, instead of the model's own")
    model.add_argument(
        "--tool-call-parser",
        choices=("auto", *FORMATS),
        default="auto",
        help="the model's format of tool calls; default: auto (from its chat template, else its architecture)",
    )
    model.add_argument(
        "--reasoning-parser",
        choices=("auto", "none", *REASONING_MARKS),
        default="auto",
        help="the marks around the model's reasoning; none: it is left in the content; default: auto (from its chat "
        "template and vocabulary)",
    )
    model.add_argument(
        "--generation-config",
        choices=("auto", "vllm"),
        default="auto",
        help="auto: sampling defaults from the model's generation_config.json; vllm: neutral ones",
    )

    cluster = parser.add_argument_group("workers")
    cluster.add_argument(
        "--topology",
        type=checked(Topology.parse),
        help="prefillers and decoders, like 1D, 1P1D, 1P2D; default: 1D on one device, 1P(N-1)D on N GPUs",
    )
    cluster.add_argument(
        "--policy",
        choices=tuple(POLICIES),
        default="observe",
        help="observe: every turn where it costs least, by what was measured; conserve: first turns are prefilled by a "
        "prefiller, all else at home; colocated: all at home; disaggregated: every turn is prefilled by a prefiller; "
        "ampd: turn by turn, by the expected first token; default: %(default)s",
    )
    cluster.add_argument(
        "--decision-log", metavar="FILE", help="write each placement decision and what came of it as JSON lines"
    )
    cluster.add_argument(
        "--mispredict",
        type=share,
        default=0.0,
        metavar="FRACTION",
        help="with --policy ampd: share of decisions turned around, to study wrong predictions; default: %(default)s",
    )
    cluster.add_argument("--device", default="auto", help="auto, cpu or cuda")
    cluster.add_argument(
        "--devices",
        type=checked(parse_devices),
        default=[],
        metavar="GPUS",
        help="like 0,1 or cuda:0,cuda:1: one worker on each, in turns; workers on one GPU share its memory; "
        "default: all GPUs",
    )
    cluster.add_argument(
        "--threads", type=positive, default=0, help="CPU threads of each worker; default: cores shared"
    )
    cluster.add_argument(
        "--cpu-kernels",
        choices=("auto", "torch"),
        default="auto",
        help="auto: compiled with this machine's C++ compiler at first use, where it has one; torch: without; "
        "default: %(default)s",
    )
    cluster.add_argument(
        "--prompt-lookup",
        action=argparse.BooleanOptionalAction,
        help="draft tokens from what a conversation has said before, and keep those that hold: the same text in fewer "
        "steps; default: on a CPU",
    )
    cluster.add_argument(
        "--enforce-eager", action="store_true", help="on a GPU: no CUDA graphs (slower steps, less memory)"
    )
    cluster.add_argument(
        "--async-scheduling",
        action=argparse.BooleanOptionalAction,
        help="prepare a step while the device runs the one before; default: on a GPU",
    )
    cluster.add_argument(
        "--kv-transfer",
        choices=("auto", "mapped", "collective"),  # BACKENDS of kv/transfer.py, which needs torch
        default="auto",
        help="how KV travels between workers: mapped (shared memory or CUDA IPC), collective (NCCL between GPUs, Gloo "
        "over TCP loopback on a CPU); auto: mapped where possible; default: %(default)s",
    )

    memory = parser.add_argument_group("memory and batching, of each worker")
    memory.add_argument(
        "--kv-cache-memory",
        "--kv-cache-memory-bytes",
        type=checked(parse_bytes),
        metavar="SIZE",
        help="size of the KV pool, like 2GiB; default: from the model and what is free",
    )
    memory.add_argument(
        "--gpu-memory-utilization",
        type=fraction,
        default=0.9,
        metavar="FRACTION",
        help="of the device's memory (on a CPU: of what is free) that may be used; default: %(default)s",
    )
    memory.add_argument(
        "--block-size",
        type=positive,
        default=16,
        help="tokens in a KV page, on a CPU a multiple of 16 for its own kernels; default: %(default)s",
    )
    memory.add_argument(
        "--max-num-batched-tokens",
        type=tokens,
        help="tokens computed in one step; default: 512 on a CPU, 8192 on CUDA",
    )
    memory.add_argument(
        "--max-num-seqs", type=positive, default=256, help="sequences that run at once; default: %(default)s"
    )
    memory.add_argument(
        "--step-stretch",
        type=stretch,
        metavar="FACTOR",
        help="how many times longer than a lone stream's step one may take that computes prompts beside streams; 0: as "
        "long as --max-num-batched-tokens makes it; default: 6 with --policy observe, else 0",
    )
    memory.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="find KV of known prefixes; default: on",
    )
    memory.add_argument(
        "--swap-space",
        type=checked(parse_bytes),
        default=0,
        metavar="SIZE",
        help="host memory for KV that had to leave the pool, like 4GiB; default: none",
    )
    memory.add_argument(
        "--kv-eviction",
        choices=("expected", "lru"),
        default="expected",
        help="expected: the KV that is needed least leaves first, as its conversation was observed; lru: the least "
        "recently used; default: %(default)s",
    )
    memory.add_argument(
        "--handoff-deadline",
        type=seconds,
        default=30.0,
        metavar="SECONDS",
        help="how long a worker keeps finished pages for another, and waits for another's; default: %(default)s",
    )

    http = parser.add_argument_group("server")
    http.add_argument("--host", default="127.0.0.1", help="default: %(default)s (only this machine)")
    http.add_argument("--port", type=port, default=8000, help="default: %(default)s; 0: any free one")
    http.add_argument("--api-key", help="ask clients for this key; or set MINISERVE_API_KEY (or VLLM_API_KEY)")
    http.add_argument(
        "--max-num-queued-reqs",
        type=positive,
        default=1024,
        help="requests that may wait; more get 503 with Retry-After; default: %(default)s",
    )
    http.add_argument(
        "--shutdown-timeout",
        type=seconds,
        default=30.0,
        metavar="SECONDS",
        help="how long running requests may go on after SIGTERM or Ctrl-C; default: %(default)s",
    )
    cluster.add_argument(
        "--worker-timeout",
        type=seconds,
        default=120.0,
        metavar="SECONDS",
        help="a worker that is silent for so long is ended and started again: longer than any step; "
        "default: %(default)s",
    )
    http.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="warning")


def _serve(args: argparse.Namespace) -> int:
    from miniserve.hub.check import ModelError
    from miniserve.hub.fetch import DEFAULT_MODEL
    from miniserve.hub.resolve import resolve

    if args.model and args.positional_model and args.model != args.positional_model:
        raise ConfigError(f"Two models are given, {args.positional_model} and {args.model}: one is served at a time.")
    config = serve_config(args, args.model or args.positional_model or DEFAULT_MODEL)
    try:
        files = resolve(config.engine.model, revision=args.revision, load_format=args.load_format, progress=_tell)
    except ModelError as error:
        raise ConfigError(str(error)) from error
    from miniserve.cli.serve import serve

    return serve(config, files)


def serve_config(args: argparse.Namespace, model: str) -> ServeConfig:
    """The settings that flags describe; a flag fills the field of its name."""
    values = vars(args)
    engine = {name: values[name] for name in EngineConfig.__struct_fields__ if name in values}
    server = {name: values[name] for name in ServeConfig.__struct_fields__ if name in values}
    return ServeConfig(
        **{
            **server,
            "engine": EngineConfig(**{**engine, "model": model}),
            "served_model_names": args.served_model_name or [model],
            "api_key": api_key(args),
        }
    )


def api_key(args: argparse.Namespace) -> str | None:
    """The key of the flag, else of the environment; None where none is given. Raises `ConfigError`."""
    given = {"--api-key": args.api_key} | {name: os.environ.get(name) for name in ("MINISERVE_API_KEY", "VLLM_API_KEY")}
    for source, text in given.items():
        if text is None:
            continue
        key = text.strip()  # a secret from a file ends in a newline
        if not key:
            raise ConfigError(
                f"The API key in {source} is empty. Give one (is the variable it comes from set?), or leave {source} "
                "out: then there is none."
            )
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"The API key in {source} must be printable ASCII, as it travels in an HTTP header.")
        return key
    return None


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- chat -----------------------------------------------------------------------------------------------------------


def _add_chat(commands: Any) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk to a running server in the terminal",
        description="Talk to a running server; shows the time to the first token and tokens per second.",
    )
    parser.set_defaults(run=_chat)
    _add_url(parser)
    parser.add_argument("--model", help="default: the server's first")
    parser.add_argument("--system", help="a system message")
    parser.add_argument("--temperature", type=float, help="default: the model's")
    parser.add_argument("--max-tokens", type=positive, help="most tokens of an answer")


def _add_url(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="default: %(default)s")
    parser.add_argument("--api-key", help="what the server asks for; or set MINISERVE_API_KEY (or VLLM_API_KEY)")


def _chat(args: argparse.Namespace) -> int:
    from miniserve.cli.chat import chat

    options = {"model": args.model, "temperature": args.temperature, "max_tokens": args.max_tokens}
    given = {name: value for name, value in options.items() if value is not None}
    return chat(args.url, api_key(args), args.system or "", given)


# --- top ------------------------------------------------------------------------------------------------------------


def _add_top(commands: Any) -> None:
    parser = commands.add_parser(
        "top",
        help="watch a running server in the terminal",
        description="Watch a running server: its workers, their KV, the latest conversations. Ctrl-C or q leaves.",
        epilog="Of workers: `run` and `wait` are requests in the batch and before it, `backlog` prompt tokens to be "
        "computed, `prefills` the share of time spent on prompts, `512 tok.` and `step` what a prompt of 512 tokens "
        "and a decode step take. Of KV: pages `reserved` for turns that run, `resident` for what rests between turns.",
    )
    parser.set_defaults(run=_top)
    _add_url(parser)
    parser.add_argument(
        "--interval",
        type=interval,
        default=1.0,
        metavar="SECONDS",
        help="how often the server is asked; default: %(default)s",
    )
    parser.add_argument("--once", action="store_true", help="print what there is now, and end")


def _top(args: argparse.Namespace) -> int:
    from miniserve.cli.top import top

    return top(args.url, api_key(args), args.interval, args.once)


if __name__ == "__main__":
    sys.exit(main())
