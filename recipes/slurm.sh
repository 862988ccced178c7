#!/usr/bin/env bash
# Training on several machines of a SLURM cluster that goes on by itself after the time limit or a pre-emption:
#
#   sbatch recipes/slurm.sh --model resnet50 --data-dir path/to/data --experiment mine
#
# --output must be a folder that all machines see. Two minutes before the time is up this script is told, and passes it
# on: the trainer writes a checkpoint and ends, and the job is queued again. A run that fails is not.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

main_ip=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
processes=$((SLURM_NNODES * SLURM_GPUS_ON_NODE))
export main_ip processes

stopped=
trap 'stopped=1; kill -TERM "$step"' USR1
srun bash -c 'exec accelerate launch --multi_gpu --mixed_precision bf16 \
    --num_machines "$SLURM_NNODES" --num_processes "$processes" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$main_ip" --main_process_port 29500 \
    recipes/train.py --resume auto "$@"' recipes/train.py "$@" &
step=$!
wait "$step"
status=$?
if [ -n "$stopped" ]; then
    wait "$step"  # the trap has ended the first wait
    status=$?
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
