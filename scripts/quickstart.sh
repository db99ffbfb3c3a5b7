#!/usr/bin/env bash
# The whole pipeline on a fictional world, in about ten minutes on two CPU cores and with no download but the packages:
# a retriever and a generator learn from scratch to find and to read, answer questions about entities that no training
# question mentioned, and answer from an edited corpus without retraining. All results are written to runs/quickstart.
# When it was killed, start it again: it resumes. VENV, RUN and PYTHON may be set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
begun=$(date +%s)
venv=${VENV:-.venv}
run=${RUN:-runs/quickstart}
data=$run/data

say() { printf '\n\033[1m[%3ds] %s\033[0m\n' $(($(date +%s) - begun)) "$*" >&2; }
show() { printf '$ %s\n' "$*" >&2; "$@"; }

say "virtual environment and install"
[[ -x $venv/bin/python ]] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e . -c constraints.txt
export PATH="$(cd "$venv" && pwd)/bin:$PATH"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# a step on CPU allocates tens of megabytes; with huge pages (glibc 2.35 and later) it spends a quarter less time
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

say "a fictional world of 5,000 entities, and the same world with half of its facts changed"
[[ -d $data/world ]] || show rag-jax world --out "$data/world" --entities 5000 --relations 6 --wordings 3
[[ -d $data/edited ]] || show rag-jax world --out "$data/edited" --entities 5000 --relations 6 --wordings 3 --edit

say "corpus: passages tokenised once, with tokenizers trained on them"
[[ -d $data/world-corpus ]] || show rag-jax corpus "$data/world/passages.jsonl" --out "$data/world-corpus" \
    --train-tokenizer --encoder-vocab 2048 --generator-vocab 2048 --encoder-length 144 --generator-length 144
[[ -d $data/edited-corpus ]] || show rag-jax corpus "$data/edited/passages.jsonl" --out "$data/edited-corpus" \
    --tokenizers-from "$data/world-corpus" --encoder-length 144 --generator-length 144

say "training: retriever warm-up, reading, then both together through the marginal likelihood"
show rag-jax train --config configs/world.py --run "$run" --set corpus="$data/world-corpus" \
    --set train="$data/world/train.jsonl" --set dev="$data/world/dev.jsonl"

say "questions about entities that no training question mentions"
show rag-jax evaluate "$run" --questions "$data/world/test.jsonl" --limit 600 \
    --out "$run/unseen" --batch 64

say "the same questions without passages: nothing can be guessed"
show rag-jax evaluate "$run" --questions "$data/world/test.jsonl" --limit 600 \
    --out "$run/closed_book" --batch 64 --closed-book

say "hot swap: the edited corpus, no retraining; only questions whose answer changed"
[[ -d $run/edited-index ]] || show rag-jax index "$run" --corpus "$data/edited-corpus" --out "$run/edited-index"
show rag-jax evaluate "$run" --index "$run/edited-index" --questions "$data/edited/test.jsonl" --where changed=true \
    --limit 600 --out "$run/hot_swap" --batch 64

say "a few questions"
python scripts/quickstart_report.py questions "$run" | while IFS= read -r question; do printf '%s\0' "$question"; done |
    xargs -0 rag-jax ask --run "$run" --batch 64

python scripts/quickstart_report.py write "$run" --seconds $(($(date +%s) - begun))
say "done: see $run/report.md, $run/report.json and $run/curves.png; every question: $run/unseen/report.html"
