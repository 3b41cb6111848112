#!/usr/bin/env bash
# Creates .venv-clients, which holds the clients that `make test-clients` runs: an environment of their own, because what
# they ask for (an older huggingface-hub, their own pins) must not decide what miniserve is tested with.
#
# Quick when nothing changed: a stamp holds a hash of what was installed from. Needs .venv first (scripts/setup.sh test).
set -euo pipefail
cd "$(dirname "$0")/.."

log=.venv-clients/setup.log
stamp=$(cat constraints-clients.txt scripts/setup-clients.sh | cksum)
[ "$(cat .venv-clients/stamp 2>/dev/null)" = "$stamp" ] && exit 0

echo "set-up: installing clients into .venv-clients (the first time takes a few minutes)"
rm -rf .venv-clients
.venv/bin/python -m venv .venv-clients
if ! .venv-clients/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
    -r constraints-clients.txt >"$log" 2>&1 </dev/null; then
    grep -v ^WARNING "$log" | tail -n 15 >&2
    echo "set-up: pip could not install the clients: see above and $log." >&2
    exit 1
fi
echo "$stamp" >.venv-clients/stamp
