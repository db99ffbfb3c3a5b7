#!/bin/bash
# Runs a command of rag-jax on every host of a Cloud TPU pod slice.
#
#   TPU=my-slice ZONE=us-east5-b DIRECTORY=/mnt/shared/rag_jax \
#       scripts/launch_tpu_pod.sh train --config configs/nq_rag_token.py --run /mnt/shared/runs/nq
#
# TPU        name of the slice (it exists: gcloud compute tpus tpu-vm create ...)
# ZONE       its zone
# DIRECTORY  where the repository is on every host; run directory, corpus and questions must be on a file system that all
#            hosts share, such as a mounted disk
# PROJECT    the cloud project (default: that of the gcloud configuration)
# VENV       the virtual environment on the hosts (default: DIRECTORY/.venv)
#
# After a stop or the loss of a host, give the same command again: it resumes from the last checkpoint. A host that is
# preempted gets SIGTERM; all hosts then save a checkpoint at the same step and end.

set -euo pipefail
if [ "$#" -eq 0 ] || [ -z "${TPU:-}" ] || [ -z "${ZONE:-}" ] || [ -z "${DIRECTORY:-}" ]; then
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    exit 2
fi
words=$(printf '%q ' "$@")
directory=$(printf '%q' "$DIRECTORY")
venv=$(printf '%q' "${VENV:-$DIRECTORY/.venv}")
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" ${PROJECT:+--project "$PROJECT"} --worker=all \
    --command "cd $directory && . $venv/bin/activate && python -m rag_jax $words--distributed auto"
