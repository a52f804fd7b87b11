#!/bin/bash
# One node's Ray, run by srun from ray_job.sh: the head on the job's first node, a worker on each other. TENSORWEAVE_NODE numbers
# the nodes of all components, TENSORWEAVE_CPUS is what this one has for ranks.
# Not `ray symmetric-run`: it ends with `ray stop`, which kills the Ray of other jobs on a shared node, and it ignores SIGTERM.
set -euo pipefail
umask 077
# shellcheck source=slurm/env.sh
source "$TENSORWEAVE_HOME/slurm/env.sh"

# shellcheck disable=SC2153 # from ray_job.sh
# Short, because Ray keeps sockets in it; local to the node, and removed with the job.
directory=/tmp/tw-$UID-$SLURM_JOB_ID-$TENSORWEAVE_NODE
rm -rf "$directory" # left by this job before it was requeued
options=(--block --object-store-memory=$((128 << 20)) --num-cpus="$TENSORWEAVE_CPUS" --disable-usage-stats
  --labels="component=$TENSORWEAVE_COMPONENT")
if [ "$TENSORWEAVE_NODE" -eq 0 ]; then
  options+=(--head --node-ip-address="$TENSORWEAVE_HEAD" --port="$TENSORWEAVE_GCS_PORT" --temp-dir="$directory"
    --include-dashboard=false --ray-client-server-port=$((TENSORWEAVE_GCS_PORT + 10000)))
else
  options+=(--address="$TENSORWEAVE_HEAD:$TENSORWEAVE_GCS_PORT" --temp-dir="$directory")
  # Wait until the head listens.
  python - "$TENSORWEAVE_HEAD" "$TENSORWEAVE_GCS_PORT" <<'PYTHON'
import socket, sys, time

deadline_s = time.monotonic() + 240
while True:
    try:
        socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5).close()
        break
    except OSError:
        if time.monotonic() > deadline_s:
            sys.exit(f"no Ray head at {sys.argv[1]}:{sys.argv[2]}")
        time.sleep(0.5)
PYTHON
fi

stopping='' ray=''
trap 'stopping=1; kill -TERM "$ray" 2>/dev/null || true' TERM INT
trap 'rm -rf "$directory"' EXIT
# Not `ray start`, which ends the node with its agents, and if it takes longer than 30 s to start. A start that fails all the same, on a
# busy machine or file system, is tried again, until Ray is up on every node: what ends later has failed, or has lost the head.
for try in 1 2 3; do
  python -m tensorweave.cli.main ray start "${options[@]}" &
  ray=$!
  [ -z "$stopping" ] || kill -TERM "$ray" 2>/dev/null || true # asked to while it was started
  while kill -0 "$ray" 2>/dev/null; do wait "$ray" || true; done
  [ -z "$stopping" ] || exit 0
  [ ! -e "$TENSORWEAVE_RAY_IS_UP" ] || break
  echo "Ray has not started here (try $try of 3)" >&2
  rm -rf "$directory"
done
# If Ray ends without a request to stop, that is a failure, which ends the job if it was the head.
[ "$TENSORWEAVE_NODE" -eq 0 ] || python "$TENSORWEAVE_HOME/slurm/requeue_orphan.py" || true
exit 1
