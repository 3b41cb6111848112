"""Coding agents, started by `miniserve agent` with no other configuration, against a real server, with nothing fetched:
`make test-clients`.

Each does a task of several turns with its own tools in a repository, and is then resumed. What its model says is bent
(script_model.py); prompts, tools, loops and requests are the agents' own. docs/agents.md has what was measured.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from tests.support import dialects, script_model
from tests.support.recorder import Request, recorder
from tests.support.server_process import server

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-agents"
NOWHERE = "http://127.0.0.1:9"
"""A proxy that refuses: whoever asks anybody but the server fails."""
GIT = {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}

pytestmark = pytest.mark.skipif(
    not (ENVIRONMENT / "stamp").exists(), reason="needs .venv-agents: run `make test-clients`, which needs npm"
)


class Agent(NamedTuple):
    """`script` has its model's answers: 0 to its task, 6 to what it is asked when it is resumed, 8 to that of a second
    session. @3 in an answer, or in what it leads to, gets answer 3. `task` and `resume` are arguments before a prompt.

    `kinds` are the conversations of the three, and `misses` what the prefix doctor says of their prompts,
    `client` how they are called, if not by the name of the command.
    `kept` and `resumed` are the least shares of a turn's tokens that are cached for the next one, in a run and across
    two of them; `shared` is the least cached share of the second session's first prompt.
    """

    script: dict[int, str]
    task: str
    resume: str
    spawns: bool = True
    turns: int = 4
    kept: float = 0.95
    resumed: float = 0.95
    shared: float = 0.95
    kinds: tuple[str, ...] = ("main", "main", "sub-agent")
    misses: tuple[str, ...] = ()
    client: str = ""


def call(tool: str, **arguments: Any) -> str:
    """As the model's template renders a call of the history."""
    return f"\n<tool_call>\n{json.dumps({'name': tool, 'arguments': arguments})}\n</tool_call>"


def with_tools(shell: str, between: str, **more: Any) -> dict[int, str]:
    """Commands in a shell, and something in between."""
    return {
        0: call(shell, command="echo one > @.txt; echo @1", **more),
        1: between,
        2: "@3 is next.",
        3: call(shell, command="echo two >> @.txt; echo @4", **more),
        4: "Done.",
        6: call(shell, command="echo three >> @.txt; echo @7", **more),
        7: "Done.",
        8: "Done.",
    }


LOOK = {"description": "Look around", "prompt": "Look around for @. @2"}
CODEX = {
    0: call("exec_command", cmd="echo $CODEX_THREAD_ID > .git/first; echo one > @.txt; echo @1"),
    1: call("multi_agent_v1__spawn_agent", message="Look around for @. @2"),
    # The parent has read the mark of its sub-agent, too: what both of them run tells which one it is.
    2: call("exec_command", cmd="n=3; [ $CODEX_THREAD_ID = $(cat .git/first) ] && sleep 1 && n=4; echo @${n}"),
    3: "It is fine.",
    4: call("exec_command", cmd="echo two >> @.txt; echo @5"),
    5: "Done.",
    6: call("exec_command", cmd="echo three >> @.txt; echo @7"),
    7: "Done.",
    8: "Done.",
}
# Aider has no tools, but runs tests and sends what fails.
AIDER = {
    0: "@.txt\n```\none\n```\n",
    1: "@.txt\n```\none\ntwo\n```\n",
    6: "@.txt\n```\none\ntwo\nthree\n```\n",
    8: "Done.",
}
TESTED = (
    """--yes-always --no-auto-commits --no-stream --auto-test --test-cmd 'grep two @.txt || { echo @""1; false; }'"""
)
AGENTS = {
    "claude": Agent(
        with_tools("Bash", call("Agent", **LOOK, run_in_background=False), description="Take notes"),
        "-p --allowedTools=Bash,Agent",
        "-p --allowedTools=Bash,Agent --continue",
        shared=0.7,  # the status of git stands before the prompt
        misses=("git-status",),
        client="claude-code",
    ),
    "codex": Agent(
        CODEX,
        "exec --dangerously-bypass-approvals-and-sandbox",
        "exec --dangerously-bypass-approvals-and-sandbox resume --last",
    ),
    "opencode": Agent(
        with_tools("bash", call("task", **LOOK, subagent_type="general"), description="Take notes"),
        "run",
        "run --continue",
        kinds=("main", "main", "side", "side", "sub-agent"),  # it asks for titles
    ),
    "qwen": Agent(
        with_tools("run_shell_command", call("agent", **LOOK, run_in_background=False), is_background=False),
        "--approval-mode yolo",
        "--approval-mode yolo --continue",
        resumed=0.7,  # the status of git stands in its system prompt
        kinds=("main",) * 4,  # it says nothing of itself, nor of its sub-agent and a request for its memory
        misses=("git-status",),
        client="qwen-code",
    ),
    "pi": Agent(
        with_tools("bash", call("write", path="more.txt", content="@2"))
        | {2: call("bash", command="cat more.txt; echo @3")},
        "-p",
        "-p --continue",
        spawns=False,
        turns=5,
        kinds=("main", "main"),
    ),
    # What it says of files moves with each turn.
    "aider": Agent(
        AIDER,
        f"{TESTED} --message",
        f"{TESTED} --restore-chat-history --message",
        spawns=False,
        turns=2,
        kept=0.5,
        resumed=0.5,
        shared=0.5,
        kinds=("main",) * 5,
        client="openai/python",
    ),
}


def marked(name: str, text: str) -> str:
    """`text` with the marks of an agent in the place of @0, @1, ..., and of what a shell makes into such."""
    return re.sub(r'@(\d|""\d|\$\{n\})', rf"{name}\1mark", text).replace("@", name)


@pytest.fixture(scope="module")
def recorded(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[Request]]]:
    """A recorder in front of a server of a model that follows all scripts, with room for long prompts."""
    script = {
        marked(name, f"@{number}"): marked(name, answer)
        for name, agent in AGENTS.items()
        for number, answer in sorted(agent.script.items())
    }
    folder = tmp_path_factory.mktemp("agents") / "model"
    script_model.make_model(folder, script, smollm2_folder, dialects.TEMPLATES["hermes"])
    flags = ["--kv-cache-memory", "512M", "--reasoning-parser", "none"]
    with server(folder, *flags, runtime=tmp_path_factory.mktemp("run")) as up, recorder(up.url) as found:
        yield found
        assert up.metric("miniserve:kv_pages", state="held") == 0


def start(name: str, url: str, folder: Path, args: str, prompt: str) -> None:
    """Run an agent in `folder`; it must end well, and finds no way out of this machine."""
    words = [*shlex.split(marked(name, args)), marked(name, prompt)]
    paths = [str(ENVIRONMENT / part) for part in ("node_modules/.bin", "aider/bin")]
    done = subprocess.run(
        [sys.executable, "-m", "miniserve", "agent", name, "--url", url, "--", *words],
        env={
            "HOME": str(folder.parent),
            "PATH": os.pathsep.join([*paths, os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
            "HTTP_PROXY": NOWHERE,
            "HTTPS_PROXY": NOWHERE,
        }
        | GIT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def conversations(url: str, known: list[str]) -> list[dict[str, Any]]:
    """Those that are not `known`."""
    return [card for card in httpx.get(f"{url}/conversations").json()["data"] if card["id"] not in known]


def found_again(earlier: Request, later: Request) -> float:
    """The share of an earlier turn's tokens, prompt and answer, that were cached for a later one."""
    return later.cached / (earlier.prompt + earlier.output)


@pytest.mark.parametrize("name", AGENTS)
def test_agent(recorded: tuple[str, list[Request]], tmp_path: Path, name: str) -> None:
    agent, (url, requests) = AGENTS[name], recorded
    known = [card["id"] for card in conversations(url, [])]
    folder = tmp_path / "repository"
    folder.mkdir()
    for words in ("init --quiet", "commit --quiet --allow-empty -m first"):
        subprocess.run(["git", *words.split()], check=True, cwd=folder, env=os.environ | GIT)
    runs = []
    for args, prompt in ((agent.task, "Do it. @0"), (agent.resume, "More. @6"), (agent.task, "Hello. @8")):
        before = len(requests)
        start(name, url, folder, args, prompt)
        runs.append(requests[before:])
        assert {request.status for request in runs[-1]} == {200}
        assert (folder / f"{name}.txt").read_text() == "one\ntwo\n" + "three\n" * (len(runs) > 1)
    cards = [httpx.get(f"{url}/conversations/{card['id']}").json() for card in conversations(url, known)]
    assert tuple(sorted(card["kind"] for card in cards)) == agent.kinds
    mains = [card["id"] for card in cards if card["kind"] == "main"]
    assert all(card["group"] in mains for card in cards)
    assert {card["client"] for card in cards} == {agent.client or name}
    assert {miss["kind"] for card in cards for miss in card["misses"]} >= set(agent.misses)
    if agent.spawns:
        bodies = [json.dumps(request.body) for request in runs[0]]
        assert any(f"Look around for {name}." in body and marked(name, "@0") not in body for body in bodies)
    # Sub-agents, and requests for titles and memories, have other tools than the agent.
    tools = len(runs[0][-1].body.get("tools", ()))
    task, resumed, second = ([r for r in run if len(r.body.get("tools", ())) == tools] for run in runs)
    kept = [found_again(*turns) for run in (task, resumed) for turns in pairwise(run)]
    over = found_again(task[-1], resumed[0])
    shared = second[0].cached / second[0].prompt
    asked = " + ".join(str(len(run)) for run in runs)
    print(f"{name}: {task[0].prompt} tokens, {asked} requests, kept {min(kept):.1%}, {over:.1%}, shared {shared:.1%}")
    assert len(task) >= agent.turns
    assert min(kept) >= agent.kept
    assert over >= agent.resumed
    assert shared >= agent.shared
