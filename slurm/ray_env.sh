# shellcheck shell=bash
# Sourced by serve.sbatch and ray_node.sh: the environment that every node of the job shares.
# The file named by TENSORWEAVE_ACTIVATE may use unset variables.
set +u
# shellcheck source=/dev/null
source "$TENSORWEAVE_ACTIVATE"
set -u
export PYTHONPATH=$TENSORWEAVE_HOME${PYTHONPATH:+:$PYTHONPATH}
# The service drains before Ray is stopped; Ray's own draining of each node would only wait, and fail once the head is gone.
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
cd "$TENSORWEAVE_HOME" || exit
