#!/bin/bash
# Starts Ray on one node of a Slurm job. run.sbatch starts it once on each node; it ends with the step.
set -u
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-0}   # by then the driver has ended
options=(--block --disable-usage-stats --object-store-memory=2000000000)
options+=("--num-cpus=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" "--num-gpus=${SLURM_GPUS_ON_NODE:-0}")
if [ "$SLURM_NODEID" = 0 ]; then
  exec ray start --head --node-ip-address="$RAY_HEAD" --port="$RAY_PORT" --temp-dir="$RAY_TMP" --include-dashboard=false "${options[@]}"
fi
for _ in $(seq 150); do
  (exec 3<> "/dev/tcp/$RAY_HEAD/$RAY_PORT") 2> /dev/null && exec ray start --address="$RAY_HEAD:$RAY_PORT" "${options[@]}"
  sleep 2
done
echo "node.sh: $(hostname): Ray's head on $RAY_HEAD did not answer on port $RAY_PORT within 5 minutes" >&2
exit 1
