#!/usr/bin/env bash
# Clients that run agents, of docs/clients.md, against a scripted model: run_agents.sh CLIENTS_DIR [PORT]
# It starts the service itself (tests/clients/scripted_service.py), with the Python of .venv. Clients that are not installed
# are left out, by name.
set -euo pipefail

clients=$(realpath "$1") port=${2:-18230}
here=$(dirname "$(realpath "$0")")
root=$(realpath "$here/../..")
url=http://127.0.0.1:$port model=scripted
out=$(mktemp -d)
failed=()

cd "$root"
.venv/bin/python -m tests.clients.scripted_service "$port" >"$out/service.log" 2>&1 &
service=$!
trap 'kill $service' EXIT
for _ in $(seq 120); do
  curl -sf "$url/ready" >/dev/null && break
  sleep 0.5
done

check() { # NAME PROGRAM COMMAND...
  local name=$1 program=$2
  shift 2
  if [ ! -e "$clients/$program" ]; then
    echo "$name: not installed ($clients/$program)"
    return
  fi
  if timeout 300 "$@" >"$out/$name.log" 2>&1; then
    echo "$name: ok"
  else
    echo "$name: FAILED, see $out/$name.log"
    failed+=("$name")
  fi
}

check_python() { # NAME SCRIPT
  check "$1" "$1" "$clients/$1/bin/python" "$here/$2" "$url" "$model"
}

check_python anthropic anthropic_check.py
check_python langchain langchain_check.py
check_python pydantic-ai pydantic_ai_check.py
check_python instructor instructor_check.py
check_python llama-index llama_index_check.py
check_python litellm litellm_tools_check.py
check_python openai-agents openai_agents_check.py
[ ! -d "$clients/npm" ] || cp "$here/ai_sdk_check.mjs" "$clients/npm/"
check ai-sdk npm/node_modules/ai env -C "$clients/npm" node ai_sdk_check.mjs "$url" "$model"

[ ${#failed[@]} -eq 0 ]
