#!/bin/bash
# SPIN on several nodes under SLURM, one torchrun agent a node, continued by itself until it is done:
#
#     sbatch --nodes 4 configs/slurm.sh --config configs/zephyr-7b.toml --iter 0-3
#
# run.dir must be on a file system that all nodes share. The job is queued again when its time is up, when it is preempted
# and when a node fails, and goes on from the last checkpoint; not when training itself ends with an error.
#SBATCH --job-name=spin
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600        # this shell hears it ten minutes before the time is up
set -u
cd "${SLURM_SUBMIT_DIR:-.}"
PATH="$PWD/.venv/bin:$PATH"
GPUS=${GPUS:-8}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=480    # what torchrun gives its ranks after SIGTERM to leave a checkpoint; else 30 s
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1    # or restarted ranks may be given the addresses of those that died
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
again=
trap 'again=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1    # to the agents, not to this shell

srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 \
    torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$GPUS" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" --rdzv-endpoint "$first:${PORT:-29500}" \
    train.py --run.shard_size="$GPUS" "$@" &
step=$!
wait $step; status=$?
while kill -0 $step 2>/dev/null; do wait $step; status=$?; done    # a signal ends a wait early
if [ $status != 0 ] && [ -n "$again" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $status
