#!/bin/bash
# The data stage on any number of machines, with the overrides it takes anywhere else. With Ray (pip install
# 'megachat[ray]'), which gives the tasks of each step to whoever is free:
#   sbatch --nodes=8 slurm/data.sh run=runs/web corpus=[fineweb_edu]
#   STAGE=encode sbatch --nodes=8 slurm/data.sh run=runs/web
# Or as plain arrays, one for each step, each after the one before:
#   for step in collect select sign exact alive join verify components settle filter; do
#       after=$(sbatch --parsable --array=0-63 ${after:+--dependency=afterok:$after} slurm/data.sh stage=$step run=runs/web ...)
#   done; sbatch --dependency=afterok:$after slurm/data.sh run=runs/web ...
# Some jobs of such an array again, by their numbers in it:  SHARES=64 sbatch --array=3,7 slurm/data.sh stage=...
#SBATCH --job-name=megachat-data
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem-per-cpu=4G                # `memory` of the stage, and as much again for what a task reads and writes
#SBATCH --time=24:00:00
#SBATCH --requeue                       # tasks that are done stay done: it goes on with the others
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

unset RANK WORLD_SIZE LOCAL_RANK        # sbatch hands on the shell it is typed in, which may itself be a rank of a job
cd "$SLURM_SUBMIT_DIR"                  # sbatch runs a copy of this file: $0 points into Slurm's spool
source slurm/env.sh
export OMP_NUM_THREADS=1                # tasks are many; each is one thread
[[ ${STAGE:-} != evaluate ]] || export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

if [[ ${SLURM_ARRAY_TASK_ID:-} ]]; then
    share=$SLURM_ARRAY_TASK_ID shares=${SHARES:-}
    if [[ ! $shares ]]; then            # 3,7 may be 3 and 7 of any number, and as two halves would do the wrong tasks
        if (( SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN + 1 != SLURM_ARRAY_TASK_COUNT )); then
            echo "data.sh: this array has gaps; say of how many jobs these are some: SHARES=64 sbatch --array=..." >&2
            exit 2
        fi
        share=$((share - SLURM_ARRAY_TASK_MIN)) shares=$SLURM_ARRAY_TASK_COUNT
    fi
    exec python -m megachat clean "$@" shard="$share/$shares"
fi
if (( SLURM_JOB_NUM_NODES == 1 )); then
    exec python -m megachat "${STAGE:-clean}" "$@"
fi
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export RAY_USAGE_STATS_ENABLED=0
# One Ray for each job: its port follows from the job's number, below 32768, where Linux hands out ports to whoever asks.
# srun counts one task for each node, which megachat would take for that many of itself: Ray starts it once.
exec srun --export=ALL --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 ray symmetric-run \
    --address "$head:$((20000 + SLURM_JOB_ID % 12000))" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus "$SLURM_CPUS_PER_TASK" -- \
    env -u SLURM_STEP_NUM_TASKS python -m megachat "${STAGE:-clean}" executor=ray "$@"
