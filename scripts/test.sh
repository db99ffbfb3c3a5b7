#!/usr/bin/env bash
# Everything that must pass: virtual environment, install, ruff, types, tests. From any directory:
#   scripts/test.sh [arguments of pytest]
#   scripts/test.sh --fast               ruff, and the tests that take seconds: for the loop of editing, under 90 s
# VENV: where the environment is or will be (default .venv-test).  PYTHON: the interpreter that makes it (default python3).
# WORKERS: processes that run tests side by side (default 2; 0: in this one, as a debugger wants it).
# EXTRAS: what is installed beside the package (default test; test,parity,minilm has the comparisons with torch too).
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

# The stamp is written last, so an install that was interrupted, or is of other requirements, is done again.
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
