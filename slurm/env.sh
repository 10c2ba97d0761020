# What differs from cluster to cluster: the one file to edit for yours. Sourced by every script in this folder.

# The environment that `bash tools/setup.sh` made, on a file system that all nodes see; the one that was active at
# sbatch, if there was one: sbatch hands it on.
[[ ${VIRTUAL_ENV:-} ]] || source .venv/bin/activate
unset PYTHONDONTWRITEBYTECODE           # many containers set it: then every rank compiles torch's sources anew
# module load cuda/13.0                 # where CUDA does not come with the driver and torch

# Caches into node-local space: a thousand ranks compiling kernels into one home directory bring it down.
export TRITON_CACHE_DIR=${TMPDIR:-/tmp}/$UID/triton
export TORCH_EXTENSIONS_DIR=${TMPDIR:-/tmp}/$UID/torch_extensions

# export NCCL_SOCKET_IFNAME=ib0         # which network finds the other nodes; wrong: hangs in the first all-reduce
# export NCCL_IB_HCA=mlx5               # which cards carry the data; wrong: training at a tenth of the speed
# export NCCL_DEBUG=INFO                # says which of them NCCL took; read it once on every new cluster

# When a job is taken to hang, and how often it starts again. Ranks that stand still end by themselves (`watch` in the
# settings), a minute later the job ends them; MEGACHAT_HANG_SECONDS puts a time of its own in the place of that.
export MEGACHAT_START_SECONDS=${MEGACHAT_START_SECONDS:-3600}  # until the ranks give their first sign of life
export MEGACHAT_STOP_SECONDS=${MEGACHAT_STOP_SECONDS:-240}     # to take the last step and save; less than --signal says
export MEGACHAT_END_SECONDS=${MEGACHAT_END_SECONDS:-120}       # for all to end when one rank has; longer than KillWait
export MEGACHAT_RESTARTS=${MEGACHAT_RESTARTS:-3}               # in a row that fail and leave no newer checkpoint

# export MEGACHAT_MIN_NODES=2           # after the death of a node a job starts again on as few as these

# Compute nodes seldom reach the internet: record offline, then `wandb sync` from the login node.
export WANDB_MODE=${WANDB_MODE:-offline}
