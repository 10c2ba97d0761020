# What the scripts that train do: `exec bash slurm/launch.sh STAGE [key=value ...]` in a job, in the checkout.
set -euo pipefail
if [[ ${SLURM_ARRAY_JOB_ID:-} ]]; then  # its tasks would all write to one run
    echo "launch.sh: a stage that trains is no job array (--array): submit one job for each run=..., or for parts of" \
        "one run, one after another, the same line again with --dependency=afterany:JOB" >&2
    exit 2
fi
trap '' USR1                            # until there is somebody to answer it: it would end the job
unset RANK WORLD_SIZE LOCAL_RANK        # sbatch hands on the shell it is typed in, which may itself be a rank of a job
source slurm/env.sh
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}  # else every rank starts as many threads as the node has cores

# srun starts one rank per GPU, and megachat reads SLURM_PROCID and SLURM_NTASKS: torchrun's restarts under srun died
# every time a rank was killed. exec: Slurm signals the process of the batch script, which must be the one to answer.
exec python -m megachat.slurm.supervise "$@"
