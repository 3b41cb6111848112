#!/usr/bin/env bash
# Creates .venv-clients, which holds the clients that `make test-clients` runs: an environment of their own, because what
# they ask for (an older huggingface-hub, their own pins) must not decide what miniserve is tested with.
#
# Every package and version is listed, so that nothing is resolved, and uv installs them in parallel: in seconds, where pip
# takes minutes. Quick when nothing changed: a stamp holds a hash of what was installed from. Needs .venv first
# (scripts/setup.sh test).
set -euo pipefail
cd "$(dirname "$0")/.."

log=.venv-clients/setup.log
stamp=$(cat constraints-clients.txt scripts/setup-clients.sh .venv/stamp-test | cksum)
[ "$(cat .venv-clients/stamp 2>/dev/null)" = "$stamp" ] && exit 0

echo "set-up: installing clients into .venv-clients"
rm -rf .venv-clients
.venv/bin/python -m venv --without-pip .venv-clients
# uv does not read pip's settings: where a mirror or a certificate of its own is needed, pip does the same in minutes.
list=(--no-deps -r constraints-clients.txt)
if ! .venv/bin/uv pip install --system-certs --python .venv-clients/bin/python "${list[@]}" >"$log" 2>&1 </dev/null &&
    ! .venv/bin/python -m pip --python .venv-clients/bin/python install --quiet --no-input "${list[@]}" >>"$log" 2>&1 </dev/null; then
    tail -n 15 "$log" >&2
    echo "set-up: neither uv nor pip could install the clients: see above and $log." >&2
    exit 1
fi
# guidellm imports torch. scripts/setup.sh knows where a build for this machine comes from, and one is enough.
ln -s "$PWD"/.venv/lib/python3.*/site-packages/torch* .venv-clients/lib/python3.*/site-packages/
echo "$stamp" >.venv-clients/stamp
