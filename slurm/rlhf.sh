#!/bin/bash
# After SFT: the reward model (STAGE=rm), then PPO against it (STAGE=ppo); or DPO or KTO, which need none (STAGE=dpo);
# or GRPO (STAGE=grpo), whose rewards programs give:
#   STAGE=dpo sbatch --nodes=2 slurm/rlhf.sh run=runs/main
#SBATCH --job-name=megachat-rlhf
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8             # one task per GPU: with fewer, the other GPUs idle without a word
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300             # five minutes' notice: enough to take the last step, save, and requeue
#SBATCH --requeue                       # lets it go back into the queue: by Slurm, or by the supervisor in launch.sh
#SBATCH --open-mode=append              # a requeued job goes on in the same log file instead of erasing it
#SBATCH --output=slurm-%j.log
cd "${SLURM_SUBMIT_DIR:?this script is for sbatch}" ||  # which runs a copy of it: $0 points into Slurm's spool
    { echo "it is not on $SLURMD_NODENAME: sbatch --exclude=$SLURMD_NODENAME" >&2; exit 1; }
exec bash slurm/launch.sh "${STAGE:?rm, ppo, dpo, kto or grpo}" "$@"
