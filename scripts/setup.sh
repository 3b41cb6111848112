#!/usr/bin/env bash
# Creates .venv and installs miniserve into it: `scripts/setup.sh serve` or `scripts/setup.sh test` (adds test tools).
#
# A machine with an NVIDIA driver gets the CUDA set-up, others the CPU set-up with the versions in constraints-cpu.txt.
# MINISERVE_SETUP=cpu|cuda overrides that, PYTHON names the Python to use. Quick when nothing changed: a stamp in .venv
# holds a hash of what was installed from. On failure: one line that says what failed and what to do.
set -euo pipefail
cd "$(dirname "$0")/.."

want=${1:-serve}
log=.venv/setup.log

die() {
    echo "set-up: $*" >&2
    exit 1
}

# --- CPU or CUDA ---
setup=${MINISERVE_SETUP:-}
if [ -z "$setup" ]; then
    if [ -e /dev/nvidia0 ] || { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }; then
        setup=cuda
    else
        setup=cpu
    fi
fi

# --- anything to do? ---
sha() { if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi; }
stamp=$(cat pyproject.toml constraints-cpu.txt scripts/setup.sh | sha | cut -c1-16)-$setup
# The tests' set-up holds all that serving needs. The console script shows that this .venv belongs to this folder.
done_for() { [ "$(cat ".venv/stamp-$1" 2>/dev/null)" = "$stamp" ]; }
here() { [ -x .venv/bin/miniserve ] && grep -qF "$PWD/.venv/bin/python" .venv/bin/miniserve; }
if [ -x .venv/bin/python ] && here && { done_for test || { [ "$want" = serve ] && done_for serve; }; }; then
    exit 0
fi

# --- a Python that runs (a pyenv shim may exist and still fail) ---
find_python() {
    local name venvless=""
    for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 /usr/bin/python3 python}; do
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue
        if "$name" -c 'import venv, ensurepip' >/dev/null 2>&1; then
            echo "$name"
            return
        fi
        venvless=$name
    done
    [ -z "$venvless" ] || die "$venvless has no venv module: install it (Debian and Ubuntu: sudo apt install python3-venv)."
    die "no Python 3.11 or newer runs here: install one (python.org, apt, brew, pyenv) or set PYTHON=/path/to/python3."
}

need_gb=3
[ "$setup" = cpu ] || need_gb=14
if [ ! -x .venv/bin/python ] || ! .venv/bin/python -c 'import pip' >/dev/null 2>&1; then
    python=$(find_python)
    free_gb=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
    [ "$free_gb" -ge "$need_gb" ] || die "only $free_gb GB of disk is free here, the $setup set-up needs $need_gb: make room and try again."
    echo "set-up: creating .venv with $("$python" --version) ($setup; the first time takes a few minutes)"
    rm -rf .venv
    "$python" -m venv .venv >/dev/null || die "$python -m venv .venv failed: see above (no space, or no right to write here?)."
fi

# --- install ---
explain() { # what went wrong, from pip's words
    tail -n 15 "$log" >&2
    if grep -qiE 'no space left|disk quota' "$log"; then
        die "the disk is full: make room ($need_gb GB for the $setup set-up) and try again."
    elif grep -qiE 'connection|name resolution|timed out|timeout|proxy|SSLError|retries|No matching distribution' "$log"; then
        die "pip could not get a package: check the network, proxy or pip's index settings (pip config list), then try again."
    fi
    die "pip failed: see above and $log."
}
# Tests import a part of what is installed, which Python compiles by itself: less than all of it.
lazy=()
[ "$want" = test ] && lazy=(--no-compile)
pip() { .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input ${lazy[@]+"${lazy[@]}"} "$@" >>"$log" 2>&1 </dev/null; }

: >"$log"
extras=""
constraints=()
[ "$setup" = cpu ] && constraints=(-c constraints-cpu.txt)
[ "$setup" = cuda ] && extras=cuda
[ "$want" = test ] && extras=${extras:+$extras,}test
if [ "$setup" = cpu ] && ! .venv/bin/python -c 'import torch' >/dev/null 2>&1; then
    # PyPI's own torch for Linux brings CUDA along; PyTorch's index has one without. Where that index is out of reach
    # the ordinary one decides.
    index=https://download.pytorch.org/whl/cpu
    if [ "$(uname -s)" = Linux ] && .venv/bin/python -c "import urllib.request as r; r.urlopen('$index/torch/', timeout=3)" 2>/dev/null; then
        pip --index-url "$index" "$(grep '^torch==' constraints-cpu.txt)" || true
    fi
fi
echo "set-up: installing miniserve ($setup${extras:+; $extras})"
rm -f .venv/stamp-*
pip ${constraints[@]+"${constraints[@]}"} -e ".${extras:+[$extras]}" || explain
if [ "$setup" = cpu ] && [ "$want" = test ]; then
    # Tests hold our calls against FlashInfer's own signatures. Its Python part imports without a GPU, and needs but these
    # of all that it asks for. Where it cannot be had those tests are skipped.
    pip -c constraints-cpu.txt --no-deps flashinfer-python apache-tvm-ffi &&
        pip -c constraints-cpu.txt nvidia-ml-py requests tqdm packaging || true
fi
echo "$stamp" >".venv/stamp-$want"
