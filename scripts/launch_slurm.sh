#!/bin/bash
# Runs a command of rag-jax on several nodes of a Slurm cluster, one process a node. When it is preempted, or its time
# ends, it saves a checkpoint, and the job is put back into the queue and resumes from there.
#
#   sbatch --nodes 4 --gpus-per-node 8 scripts/launch_slurm.sh train --config configs/nq_rag_token.py --run /shared/runs/nq
#
# The run directory, the corpus and the questions must be on a file system that all nodes share.
#
# VENV     a virtual environment to activate first (default: none)
# All other settings, such as partition and account, are options of sbatch.

#SBATCH --job-name=rag-jax
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300

set -euo pipefail
if [ "$#" -eq 0 ]; then
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    exit 2
fi
if [ -n "${VENV:-}" ]; then
    source "$VENV/bin/activate"
fi

asked_to_stop=
# When one process ends, srun waits a minute before it kills the others, so that they can say why they end.
srun --kill-on-bad-exit=0 --wait=60 --label python -m rag_jax "$@" --distributed auto &
steps=$!
trap 'asked_to_stop=1; scancel --signal=TERM "$SLURM_JOB_ID.0" || kill -TERM "$steps"' TERM

status=0
wait "$steps" || status=$?
while kill -0 "$steps" 2>/dev/null; do # the trap ended the first wait
    status=0
    wait "$steps" || status=$?
done
if [ -n "$asked_to_stop" ] && [ "$status" -eq 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
