#!/bin/bash
# Any training stage on any number of nodes, with the overrides it takes anywhere else:
#   sbatch slurm/pretrain.sh model=gpt_7b parallel=zero1_tp8
#   STAGE=sft sbatch --nodes=2 slurm/pretrain.sh run=runs/main
#SBATCH --job-name=megachat
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8             # one task per GPU: with fewer, the other GPUs idle without a word
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue                       # back into the queue when a node fails or the job is preempted
#SBATCH --open-mode=append              # a requeued job goes on in the same log file instead of erasing it
#SBATCH --output=slurm-%j.log
set -euo pipefail

unset RANK WORLD_SIZE LOCAL_RANK        # sbatch hands on the shell it is typed in, which may itself be a rank of a job
cd "$SLURM_SUBMIT_DIR"                  # sbatch runs a copy of this file: $0 points into Slurm's spool
source slurm/env.sh

# Rank 0 runs on the first node of the list; `hostname` here would name the batch node, which --exclude may change.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
# Not a constant, for two jobs may share a node; below 32768, where Linux begins to hand out ports to whoever asks;
# and one that rank 0 can listen on: a port may be taken on an address where it answers nobody.
MASTER_PORT=$(python - $((20000 + SLURM_JOB_ID % 12000)) <<'EOF'
import itertools, socket, sys
for port in itertools.count(int(sys.argv[1])):
    try:
        socket.create_server(("", port)).close()
    except OSError:
        continue
    print(port)
    break
EOF
)
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}  # else every rank starts as many threads as the node has cores

# srun starts one rank per GPU, and megachat reads SLURM_PROCID and SLURM_NTASKS: torchrun's restarts under srun died
# every time a rank was killed. --cpus-per-task again: since Slurm 22.05 srun does not inherit it from sbatch.
# --kill-on-bad-exit: one dead rank ends the job instead of leaving the others in an all-reduce until the time limit.
exec srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 --wait=60 \
    python -m megachat "${STAGE:-pretrain}" "$@"
