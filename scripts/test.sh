#!/usr/bin/env bash
# Runs every check: virtual environment, install, ruff, types, tests. From any directory:
#   scripts/test.sh [arguments of pytest]
#   scripts/test.sh --fast               ruff, and the tests that take seconds: while editing, under 90 s
# VENV: the environment, created if need be (default .venv-test).  PYTHON: the interpreter for it (default python3).
# WORKERS: processes that run tests in parallel (default 2; 0: in the process of pytest, for a debugger).
# EXTRAS: extras of the package to install (default test; test,parity,minilm adds the comparisons with torch).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv-test}
python=${PYTHON:-python3}
extras=${EXTRAS:-test}

"$python" - <<'CHECK' || exit 1
import sys
if sys.version_info < (3, 11):
    sys.exit(f"rag-jax needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}. Set PYTHON.")
CHECK

# The stamp is written last, so an install that was interrupted, or was for other requirements, is repeated.
stamp="$(cat pyproject.toml constraints.txt | cksum) $extras"
if [[ ! -x $venv/bin/python || $(cat "$venv/complete" 2>/dev/null) != "$stamp" ]]; then
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet -e ".[$extras]" -c constraints.txt
    printf '%s\n' "$stamp" > "$venv/complete"
fi

export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export PATH="$(cd "$venv" && pwd)/bin:$PATH"

ruff check .
if [[ ${1:-} == --fast ]]; then
    shift
    fast=(imports config losses matching metrics ranking bootstrap curves abstention texts json_stream formats malformed gold
        tasks logs lock plain_text refresh_schedule stacked_arrays block_checksums search report_markdown report_html hlo wheel docs trace)
    exec pytest -q -n "${WORKERS:-2}" --dist loadfile $(printf "tests/test_%s.py " "${fast[@]}") "$@"
fi
ruff format --check .
mypy
pytest -n "${WORKERS:-2}" --dist loadfile "$@"
