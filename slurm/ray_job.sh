# shellcheck shell=bash
# Sourced by the job scripts: Ray on every node of every component of the job, with token authentication of its own, and one program that
# uses it (RAY_ADDRESS) on the first node.
#
#   start_ray                  exit 1 unless it comes up everywhere
#   run_beside_ray COMMAND...  run the program; SIGTERM is passed on to it. Sets `code`
#   stop_ray
#   requeue                    queue the job anew, unless that has happened ${TENSORWEAVE_MAX_REQUEUES:-20} times
set -euo pipefail
umask 077
# shellcheck source=slurm/env.sh
source "${TENSORWEAVE_HOME:-$SLURM_SUBMIT_DIR}/slurm/env.sh"

state=$TENSORWEAVE_STATE/.tensorweave-job-$SLURM_JOB_ID
rm -rf "$state" # left by this job before it was requeued
mkdir "$state"
trap 'rm -rf "$state"' EXIT
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$state/token"
export RAY_AUTH_TOKEN_PATH=$state/token TENSORWEAVE_RAY_IS_UP=$state/ray-is-up # a file, once Ray is up on every node

address=${TENSORWEAVE_ADDRESS:-$(python -c 'import socket; print(socket.gethostbyname(socket.gethostname()))')}
export TENSORWEAVE_HEAD=$address TENSORWEAVE_GCS_PORT=$((20000 + SLURM_JOB_ID % 10000))
export RAY_ADDRESS=$address:$TENSORWEAVE_GCS_PORT TENSORWEAVE_JOB=$SLURM_JOB_ID TENSORWEAVE_FIRST_NODE=''

declare -A node_of=() # the nodes whose Ray runs, by the process of their srun
jobs=() head_step='' num_nodes=0 program='' code=0

# start_component SUFFIX [--het-group=I]: start Ray on each of its nodes, in a step per node, so that a lost node does not end the others.
# SUFFIX is that of the component's variables.
start_component() {
  local job=SLURM_JOB_ID$1 nodes=SLURM_JOB_NODELIST$1 per_task=SLURM_CPUS_PER_TASK$1 per_node=SLURM_JOB_CPUS_PER_NODE$1
  local component=${1##*_} cpus=${!per_task:-${!per_node:-1}} node hostnames
  shift
  hostnames=$(scontrol show hostnames "${!nodes}")
  jobs+=("${!job}")
  for node in $hostnames; do
    TENSORWEAVE_FIRST_NODE=${TENSORWEAVE_FIRST_NODE:-$node}
    TENSORWEAVE_NODE=$num_nodes TENSORWEAVE_COMPONENT=${component:-0} TENSORWEAVE_CPUS=${cpus%%[!0-9]*} srun --overlap --no-kill "$@" \
      --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="$node" bash "$TENSORWEAVE_HOME/slurm/ray_node.sh" &
    node_of[$!]=$node
    head_step=${head_step:-$!}
    num_nodes=$((num_nodes + 1))
  done
}

# Remove the nodes whose Ray has ended, and report them.
drop_ended() {
  local step
  for step in "${!node_of[@]}"; do
    kill -0 "$step" 2>/dev/null && continue
    [ -n "${is_stopping:-}" ] || echo "node ${node_of[$step]} has left; the service continues without it as long as the first node is up" >&2
    unset "node_of[$step]"
  done
}

is_head_up() { kill -0 "$head_step" 2>/dev/null; }

# Use scancel, so that the nodes' own scripts clean up: srun would kill them at once. A node that does not answer is not awaited.
stop_ray() {
  local job timer
  is_stopping=1
  for job in "${jobs[@]}"; do scancel --signal=TERM "$job" || true; done
  sleep 30 &
  timer=$!
  drop_ended
  while [ "${#node_of[@]}" -gt 0 ] && kill -0 "$timer" 2>/dev/null; do
    wait -n "$timer" "${!node_of[@]}" || true
    drop_ended
  done
  kill "$timer" 2>/dev/null || true
  [ "${#node_of[@]}" -eq 0 ] || kill -KILL "${!node_of[@]}" 2>/dev/null || true
}

start_ray() {
  local group nodes
  trap 'is_stopping=1; stop_ray; exit 143' TERM INT
  if [ "${SLURM_HET_SIZE:-1}" -gt 1 ]; then
    for ((group = 0; group < SLURM_HET_SIZE; group++)); do start_component "_HET_GROUP_$group" "--het-group=$group"; done
  else
    start_component ''
  fi
  python "$TENSORWEAVE_HOME/slurm/await_nodes.py" "$num_nodes" &
  nodes=$!
  if ! wait -n "$nodes" "${!node_of[@]}" || kill -0 "$nodes" 2>/dev/null; then
    echo "Ray did not come up on $num_nodes node(s)" >&2
    kill -TERM "$nodes" 2>/dev/null || true
    stop_ray
    exit 1
  fi
  touch "$TENSORWEAVE_RAY_IS_UP"
}

# Until the program ends. A trapped signal only interrupts `wait`; without the first node's Ray a service cannot end by itself.
run_beside_ray() {
  local is_due=''
  trap 'is_stopping=1; if [ -n "$program" ]; then kill -TERM "$program" || true; else is_due=1; fi' TERM INT
  "$@" &
  program=$!
  [ -z "$is_due" ] || kill -TERM "$program" 2>/dev/null || true # the signal came while it was started
  while kill -0 "$program" 2>/dev/null; do
    wait -n "$program" "${!node_of[@]}" || true
    drop_ended
    is_head_up || kill -KILL "$program" 2>/dev/null || true
  done
  code=0
  # shellcheck disable=SC2034 # read by the job scripts
  wait "$program" || code=$?
}

requeue() {
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "${TENSORWEAVE_MAX_REQUEUES:-20}" ]; then
    echo "not queued anew: that has happened ${SLURM_RESTART_COUNT:-0} times (TENSORWEAVE_MAX_REQUEUES)" >&2
    return 1
  fi
  scontrol requeue "$SLURM_JOB_ID"
}
