#!/usr/bin/env bash
# Builds the documentation, docs/*.md by mkdocs.yml, into build/site; any warning fails. From any directory:
#   scripts/docs.sh [arguments of mkdocs build]
#   scripts/docs.sh serve            a local site that follows changes
# VENV: an environment with the extra `docs`, made if it is not there (default .venv-docs).  PYTHON: the interpreter that
# makes it (default python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv-docs}
stamp=$(cat pyproject.toml constraints.txt | cksum)
if [[ ! -x $venv/bin/mkdocs || $(cat "$venv/docs-complete" 2>/dev/null) != "$stamp" ]]; then
    [[ -x $venv/bin/python ]] || "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet -e '.[docs]' -c constraints.txt
    printf '%s\n' "$stamp" > "$venv/docs-complete"
fi

export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} NO_MKDOCS_2_WARNING=1
"$venv/bin/python" docs/generate.py --check
if [[ ${1:-} == serve ]]; then
    shift
    exec "$venv/bin/mkdocs" serve "$@"
fi
exec "$venv/bin/mkdocs" build --strict --clean "$@"
