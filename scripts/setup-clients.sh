#!/usr/bin/env bash
# Creates what `make test-clients` runs: .venv-clients, which holds clients, and .venv-agents, which holds coding agents.
# They are environments of their own, because what they ask for (an older huggingface-hub, their own pins) must not decide
# what miniserve is tested with.
#
# Every package and version is listed, so that nothing is resolved, and uv installs them in parallel: in seconds, where pip
# takes minutes. Quick when nothing changed: a stamp holds a hash of what was installed from. Needs .venv first
# (scripts/setup.sh test).
set -euo pipefail
cd "$(dirname "$0")/.."

# fresh FOLDER FILE...: whether FOLDER was made from these files; else it is empty then.
fresh() {
    stamp=$(cat "${@:2}" scripts/setup-clients.sh .venv/stamp-test | cksum)
    [ "$(cat "$1/stamp" 2>/dev/null)" = "$stamp" ] && return
    echo "set-up: installing into $1"
    rm -rf "$1"
    mkdir "$1"
    log=$1/setup.log
    return 1
}

# python ENVIRONMENT WHAT...: an environment with packages.
python() {
    .venv/bin/python -m venv --without-pip "$1"
    # uv does not read pip's settings: where a mirror or a certificate of its own is needed, pip does the same in minutes.
    if ! .venv/bin/uv pip install --system-certs --python "$1/bin/python" "${@:2}" >>"$log" 2>&1 </dev/null &&
        ! .venv/bin/python -m pip --python "$1/bin/python" install --quiet --no-input "${@:2}" >>"$log" 2>&1 </dev/null; then
        failed "neither uv nor pip could install into $1"
    fi
}

failed() {
    tail -n 15 "$log" >&2
    echo "set-up: $1: see above and $log." >&2
    exit 1
}

if ! fresh .venv-clients constraints-clients.txt; then
    python .venv-clients --no-deps -r constraints-clients.txt
    # guidellm imports torch. scripts/setup.sh knows where a build for this machine comes from, and one is enough.
    ln -s "$PWD"/.venv/lib/python3.*/site-packages/torch* .venv-clients/lib/python3.*/site-packages/
    echo "$stamp" >.venv-clients/stamp
fi

if ! command -v npm >/dev/null; then
    echo "set-up: there is no npm here: coding agents are not installed, and their tests are skipped." >&2
elif ! fresh .venv-agents tests/clients/agents/*; then
    python .venv-agents/aider -r tests/clients/agents/aider.txt # which itself pins all that it needs
    cp tests/clients/agents/package*.json .venv-agents
    # Not `npm ci`, which wants the binaries of all platforms to be on the index. Two install scripts are needed: they put
    # a binary that npm has brought into its place.
    (cd .venv-agents && npm install --ignore-scripts && npm rebuild @anthropic-ai/claude-code opencode-ai) >>"$log" 2>&1 </dev/null ||
        failed "npm could not install the agents"
    echo "$stamp" >.venv-agents/stamp
fi
