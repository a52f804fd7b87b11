#!/bin/bash
# The job scripts on a real Slurm of three hosts, all on this machine: network namespaces with their own hostnames, PIDs and /tmp.
#
#   sudo tests/hosts/slurm_on_hosts.sh MODEL_DIRECTORY [PART...]     (Debian: apt install slurm-wlm munge iproute2 curl)
#
# It submits a service with a gang of two ranks, one a host, asks it a question, drains it while a request runs, submits another and
# cancels that one plainly, and checks each time that nothing is left. A service of two gangs then loses a host and goes on, is queued
# anew, loses its first host and is requeued by Slurm; a service on three nodes drains at its time limit; a heterogeneous job serves over
# its components. A batch of 500 lines is queued anew twice, a load is put on a service. Everything that it started is gone when it ends.
# PART: one of the functions under "what is tried".
set -euo pipefail

model=$(realpath "$1")
repository=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../..")
hosts=(1 2 3)
export TENSORWEAVE_ACTIVATE=${TENSORWEAVE_ACTIVATE:-$repository/.venv/bin/activate}
net=10.78.0 bridge=twbr0 port=18080
patience=${TENSORWEAVE_TEST_PATIENCE:-400} # seconds for a start, on a machine that is busy with other things
root=$(mktemp -d /var/tmp/twslurm.XXXXXX) # not under /tmp, which every host has of its own
export SLURM_CONF=$root/slurm.conf
daemons=()
declare -A host_pid=()

say() { echo "slurm_on_hosts: $*"; }
die() {
  say "FAILED: $*"
  tail -n 40 "$root"/log/job-*.log 2>/dev/null || true
  sinfo -N -o '%N %T %E' || true
  squeue || true
  tail -n 20 "$root/log/slurmctld.log" 2>/dev/null || true
  exit 1
}

tear_down() {
  for pid in "${daemons[@]}"; do
    disown "$pid" 2>/dev/null || true
    kill -9 "$pid" 2>/dev/null || true
  done
  for host in "${hosts[@]}"; do
    ip netns del "twh$host" 2>/dev/null || true
    ip link del "twv$host" 2>/dev/null || true # the namespace stays as long as a process of it does
  done
  ip link del "$bridge" 2>/dev/null || true
  wait 2>/dev/null || true
  rm -rf "$root"
}
trap tear_down EXIT

# on_host N COMMAND...: with host N's network, its name, PIDs, /tmp and /dev/shm. Its end kills all that runs in it.
on_host() {
  local host=$1
  shift
  # shellcheck disable=SC2016
  exec setsid nsenter --net="/run/netns/twh$host" unshare --uts --mount --pid --fork --kill-child --mount-proc bash -c '
    hostname "twh$0"; mount --bind "$1/h$0/tmp" /tmp; mount -t tmpfs -o size=1g tmpfs /dev/shm
    mount --bind "$1/hosts" /etc/hosts; mount --bind "$1/resolv.conf" /etc/resolv.conf
    shift; exec "$@"' "$host" "$root" "$@"
}

# until_true SECONDS WHAT COMMAND...
until_true() {
  local deadline=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    if [ "$SECONDS" -ge "$deadline" ]; then die "not in time: $what"; fi
    sleep 0.5
  done
}

raise_hosts() {
  printf '127.0.0.1 localhost\n%s.1 %s\n' "$net" "$(hostname -s)" > "$root/hosts"
  for host in "${hosts[@]}"; do printf '%s.1%s twh%s\n' "$net" "$host" "$host" >> "$root/hosts"; done
  echo 'options timeout:1 attempts:1' > "$root/resolv.conf"
  ip link add "$bridge" type bridge
  ip addr add "$net.1/24" dev "$bridge"
  ip link set "$bridge" up
  for host in "${hosts[@]}"; do
    mkdir -p "$root/h$host/tmp"
    chmod 1777 "$root/h$host/tmp"
    ip netns add "twh$host"
    ip link add "twv$host" type veth peer name eth0 netns "twh$host"
    ip link set "twv$host" master "$bridge" up
    ip -n "twh$host" addr add "$net.1$host/24" dev eth0
    ip -n "twh$host" link set eth0 up
    ip -n "twh$host" link set lo up
  done
}

raise_slurm() {
  mkdir -p "$root"/{state,spool,log,munge}
  chmod 700 "$root/munge"
  head -c 128 /dev/urandom > "$root/munge/key"
  chmod 600 "$root/munge/key"
  munged --foreground --force --socket="$root/munge/socket" --key-file="$root/munge/key" --pid-file="$root/munge/pid" \
    --seed-file="$root/munge/seed" --log-file="$root/munge/log" 2>/dev/null &
  daemons+=($!)
  cat > "$SLURM_CONF" <<CONF
ClusterName=tw
SlurmctldHost=$(hostname -s)($net.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$root/munge/socket,cred_expire=5
CredType=cred/munge
SlurmctldPort=16917
SlurmdPort=16918
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool/%n
SlurmctldPidFile=$root/slurmctld.pid
SlurmdPidFile=$root/slurmd.%n.pid
SlurmctldLogFile=$root/log/slurmctld.log
SlurmdLogFile=$root/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SchedulerParameters=bf_interval=1
SlurmdTimeout=15
KillWait=5
SlurmdParameters=config_overrides
NodeName=twh1 NodeHostname=twh1 NodeAddr=$net.11 CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=twh2 NodeHostname=twh2 NodeAddr=$net.12 CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=twh3 NodeHostname=twh3 NodeAddr=$net.13 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=twh[1-3] Default=YES MaxTime=INFINITE State=UP
CONF
  until_true 10 "munged" test -S "$root/munge/socket"
  slurmctld -D -i 2>/dev/null &
  daemons+=($!)
  for host in "${hosts[@]}"; do raise_host "$host"; done
  until_true 60 "three idle nodes" bash -c 'sinfo -h -t idle -o %D | grep -qx 3'
}

# The host's slurmd, and with it all that will run there: `lose_host` ends both like a power cut.
raise_host() {
  (on_host "$1" slurmd -D -N "twh$1") 2>/dev/null &
  host_pid[$1]=$!
  daemons+=($!)
}

lose_host() {
  disown "${host_pid[$1]}"
  kill -9 "${host_pid[$1]}"
  rm -rf "$root/h$1/tmp" # it would lie there still after a power cut; what is looked at below is what others leave
  mkdir -p "$root/h$1/tmp"
  chmod 1777 "$root/h$1/tmp"
}

write_config() {
  cp -r "$model" "$root/model"
  cat > "$root/service.yaml" <<YAML
model: $root/model
served_model_name: tiny
engine: {device: cpu, dtype: float32, num_threads: 1, kv_cache_config: {max_tokens: 4096}}
pools: {main: {tensor_parallel_size: 2}}
router: {port: $port, proxy_port: $((port + 1))}
admin: {port: $((port + 2))}
limits: {drain_timeout_s: 20, start_timeout_s: $patience}
YAML
}

nodes=(--nodes=2 --cpus-per-task=1) changes=()
two_gangs=(--set pools.main.tensor_parallel_size=1 --set pools.main.replicas=2)

endpoint=$root/endpoint

# submit SCRIPT ARGUMENTS...
submit() {
  (cd "$repository" && sbatch --parsable --output="$root/log/job-%j.log" \
    --export="ALL,TENSORWEAVE_STATE=$root,TENSORWEAVE_ENDPOINT=$endpoint" "${nodes[@]}" "slurm/$1.sbatch" "${@:2}")
}

# From the first host itself, on which the admin port listens.
health() { nsenter --net=/run/netns/twh1 curl -sf --max-time 10 "http://127.0.0.1:$((port + 2))/health"; }
num_hosts() { health | grep -oE '"node_ip":"[0-9.]+"' | sort -u | wc -l; }
serves_on() { [ "$(num_hosts)" = "$1" ]; }
has_said() { [ "$(grep -c "$2" "$root/log/job-$1.log")" -ge "$3" ]; }
has_state() { squeue -h -o %T -j "$1" | grep -qx "$2"; }
is_down() { sinfo -h -n "$1" -o %T | grep -q '^down'; }
answers() { [[ $(complete 4) == *'"completion_tokens":4'* ]]; }

# complete TOKENS: one completion over HTTP from outside the hosts, to its full length.
complete() {
  curl -s --max-time 60 "http://$net.11:$port/v1/completions" -H 'content-type: application/json' \
    -d "{\"model\": \"tiny\", \"prompt\": \"The capital\", \"max_tokens\": $1, \"temperature\": 0, \"ignore_eos\": true}"
}

has_ended() { [ -z "$(squeue -h -j "$1" 2>/dev/null)" ]; }

# Pids and names of the processes in a host besides its own slurmd: there must be none.
strangers() {
  local inode process
  inode=$(stat -Lc %i "/run/netns/twh$1")
  for process in /proc/[0-9]*; do
    [ "$(stat -Lc %i "$process/ns/net" 2>/dev/null)" = "$inode" ] || continue
    grep -HvxE 'slurmd|unshare' "$process/comm" 2>/dev/null || true
  done
}

leftovers() {
  for host in "${hosts[@]}"; do strangers "$host"; done
  find "$root" -maxdepth 3 \( -name 'tw-*' -o -name '.tensorweave-job-*' \)
}

nothing_left() { [ -z "$(leftovers)" ]; }

check_left() {
  local waited=0
  until nothing_left; do
    if [ "$((waited += 1))" -gt 30 ]; then die "left behind: $(leftovers)"; fi
    sleep 1
  done
  say "nothing left on either host"
}

# run_until_ready NUMBER: a service with ranks on so many hosts.
run_until_ready() {
  job=$(submit serve --config "$root/service.yaml" "${changes[@]}")
  until_true "$patience" "job $job is ready" grep -qE 'ready: |cannot start|did not come up' "$root/log/job-$job.log"
  grep 'ready: ' "$root/log/job-$job.log" || die "job $job did not start"
  until_true 10 "the endpoint file" test -e "$endpoint"
  [ "$(cat "$endpoint")" = "http://$net.11:$port" ] || die "the endpoint file says $(cat "$endpoint")"
  local token=$root/.tensorweave-job-$job/token
  [ "$(stat -c %a "$token")" = 600 ] || die "the token file has mode $(stat -c %a "$token")"
  answers || die "no answer"
  until_true "$patience" "ranks on $1 hosts" serves_on "$1"
  say "job $job answers, with ranks on $1 hosts"
}

# ---- what is tried

drains_and_ends() {
  run_until_ready 2
  complete 300 > "$root/long.json" &
  local long=$!
  sleep 1
  scancel --batch --signal=TERM "$job"
  wait "$long" || die "the running request did not survive the drain"
  grep -q '"completion_tokens":300' "$root/long.json" || die "the running request was cut short: $(cat "$root/long.json")"
  say "the running request ended whole while the service drained"
  until_true 60 "job $job ends after its drain" has_ended "$job"
  grep -q 'tensorweave: stopped' "$root/log/job-$job.log" || die "the service did not stop by itself"
  [ ! -e "$endpoint" ] || die "the endpoint file is still there"
  check_left

  run_until_ready 2
  scancel "$job"
  until_true 60 "job $job ends after scancel" has_ended "$job"
  check_left
}

survives_a_lost_host() {
  changes=("${two_gangs[@]}")
  run_until_ready 2
  lose_host 2
  until_true 90 "an answer after the loss of a host" answers
  until_true 90 "Slurm has noticed" is_down twh2
  has_state "$job" RUNNING || die "job $job is $(squeue -h -o %T -j "$job") after the loss of a host"
  until_true 60 "the job names the host" has_said "$job" "node twh2 has left" 1
  answers || die "no answer with one host: $(health)"
  say "job $job serves on without its second host"

  raise_host 2
  until_true 60 "two nodes up" bash -c '! sinfo -h -o %T | grep -q down'
  scontrol requeue "$job"
  until_true "$patience" "job $job, requeued, is ready" has_said "$job" 'ready: ' 2
  until_true "$patience" "ranks on both hosts" serves_on 2
  say "job $job was requeued and serves on two hosts"
  scancel --batch --signal=TERM "$job"
  until_true 60 "job $job ends after its drain" has_ended "$job"
  check_left
}

is_queued_anew_without_its_first_host() {
  changes=("${two_gangs[@]}")
  run_until_ready 2
  lose_host 1
  until_true 120 "Slurm has noticed" is_down twh1
  until_true 150 "job $job is requeued" has_said "$job" 'requeueing it' 1
  raise_host 1
  until_true "$patience" "job $job, whose first host was lost, is ready" has_said "$job" 'ready: ' 2
  answers || die "no answer"
  say "job $job lost its first host, was requeued, and serves"
  scancel --batch --signal=TERM "$job"
  until_true 60 "job $job ends after its drain" has_ended "$job"
  check_left
}

serves_heterogeneous() {
  changes=()
  nodes=(--nodes=1 --cpus-per-task=1 : --nodes=1 --cpus-per-task=1)
  run_until_ready 2
  say "job $job is heterogeneous and serves over both components"
  scancel --batch --signal=TERM "$job"
  until_true 60 "job $job ends after its drain" has_ended "$job"
  check_left
}

# The two minutes before the limit, which Slurm looks at twice a minute, are for what runs then.
drains_at_its_time_limit() {
  nodes=(--nodes=3 --cpus-per-task=1) changes=(--set pools.main.tensor_parallel_size=1 --set pools.main.replicas=3)
  local started=$SECONDS
  run_until_ready 3
  scontrol update "JobId=$job" "TimeLimit=$(((SECONDS - started) / 60 + 3))"
  complete 300 > "$root/long.json"
  until_true 240 "the drain before the time limit" has_said "$job" 'SIGTERM: finishing running requests' 1
  until_true 90 "job $job ends by itself" has_ended "$job"
  grep -q 'tensorweave: stopped' "$root/log/job-$job.log" || die "the service did not stop by itself"
  say "job $job on three nodes drained before its time limit"
  check_left
}

num_answered() { wc -l < "$root/out.jsonl"; }
has_answered() { [ "$(num_answered)" -ge "$1" ]; }
has_answered_or_ended() { has_answered "$1" || has_ended "$job"; }
has_restarted() { scontrol show job "$job" | grep -q "Restarts=$1"; }

# Once by the signal before the time limit, once like a lost node.
finishes_a_batch_across_requeues() {
  local line id
  nodes=(--nodes=2 --cpus-per-task=1)
  for ((line = 0; line < 500; line++)); do
    printf '{"custom_id": "line-%d", "method": "POST", "url": "/v1/completions", "body": {"model": "tiny", "prompt": "Number %d", ' "$line" "$line"
    printf '"max_tokens": 24, "temperature": 0, "ignore_eos": true}}\n'
  done > "$root/in.jsonl"
  touch "$root/out.jsonl"
  job=$(submit batch --config "$root/service.yaml" --input "$root/in.jsonl" --output "$root/out.jsonl" --concurrency 4)
  until_true "$((2 * patience))" "100 answers, or an end" has_answered_or_ended 100
  has_answered 100 || die "job $job ended early"
  scancel --batch --signal=TERM "$job"
  until_true 180 "the job is queued anew" has_restarted 1
  say "$(num_answered) of 500 lines were answered when job $job was queued anew by itself"
  until_true "$((2 * patience))" "250 answers" has_answered 250
  scontrol requeue "$job"
  until_true 60 "the job is queued anew" has_restarted 2
  say "$(num_answered) of 500 lines were answered when job $job was requeued"
  until_true "$((2 * patience))" "job $job ends" has_ended "$job"
  grep -q '500 answered, 0 errors' "$root/log/job-$job.log" || die "job $job: $(tail -n 3 "$root/log/job-$job.log")"
  for id in $(grep -oE '"custom_id": ?"line-[0-9]+"' "$root/out.jsonl" | grep -oE 'line-[0-9]+' | sort | uniq -d); do die "twice: $id"; done
  [ "$(grep -oE '"custom_id": ?"line-[0-9]+"' "$root/out.jsonl" | sort -u | wc -l)" = 500 ] || die "not every line is answered"
  say "job $job answered each of 500 lines once, over two requeues"
  check_left
}

puts_a_load_on_a_service() {
  nodes=(--nodes=2 --cpus-per-task=1)
  job=$(submit bench "$root/service.yaml" --num-prompts 40 --concurrency 4 --input-len 32 --output-len 16 --vocab-size 100 --json "$root/bench.json")
  until_true "$((2 * patience))" "job $job ends" has_ended "$job"
  grep -q '"num_answered": 40' "$root/bench.json" || die "no figures: $(tail -n 20 "$root/log/job-$job.log")"
  say "job $job answered 40 requests of a load and ended"
  check_left
}

parts=("${@:2}")
[ "${#parts[@]}" -gt 0 ] || parts=(drains_and_ends survives_a_lost_host is_queued_anew_without_its_first_host drains_at_its_time_limit
  serves_heterogeneous finishes_a_batch_across_requeues puts_a_load_on_a_service)
raise_hosts
raise_slurm
write_config
for part in "${parts[@]}"; do "$part"; done
say "PASSED"
