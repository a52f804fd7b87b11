# shellcheck shell=bash
# Sourced by the job scripts and, on each node, by ray_node.sh: the environment that every process of a job shares. What differs on
# your cluster goes into the file that TENSORWEAVE_ACTIVATE names (modules, a virtual environment, HF_HOME, NCCL_SOCKET_IFNAME, …).
#
#   TENSORWEAVE_HOME      the clone, under a path that all nodes see; default: where sbatch was called
#   TENSORWEAVE_ACTIVATE  a file to source on every node; default: .venv/bin/activate of the clone
#   TENSORWEAVE_STATE     a directory that all nodes see, for the job's token; default: the clone
#   TENSORWEAVE_ADDRESS   the first node's address, where the network has several; default: what its name resolves to
export TENSORWEAVE_HOME=${TENSORWEAVE_HOME:-$SLURM_SUBMIT_DIR}
export TENSORWEAVE_ACTIVATE=${TENSORWEAVE_ACTIVATE:-$TENSORWEAVE_HOME/.venv/bin/activate}
export TENSORWEAVE_STATE=${TENSORWEAVE_STATE:-$TENSORWEAVE_HOME}
set +u # the file may use unset variables
# shellcheck source=/dev/null
source "$TENSORWEAVE_ACTIVATE"
set -u
export PYTHONPATH=$TENSORWEAVE_HOME${PYTHONPATH:+:$PYTHONPATH}
# The service drains before Ray is stopped; Ray's own draining of each node would only wait, and fail once the head is gone.
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
cd "$TENSORWEAVE_HOME" || exit
