#!/usr/bin/env bash
# Every client of docs/clients.md against a running service: run_all.sh URL MODEL MODEL_DIR CLIENTS_DIR
# CLIENTS_DIR holds the virtual environments and the npm folder that docs/clients.md says how to make; those that are
# missing are left out, by name.
set -euo pipefail

url=$1 model=$2 dir=$3 clients=$(realpath "$4")
here=$(dirname "$(realpath "$0")")
out=$(mktemp -d)
failed=()
export VLLM_NO_USAGE_STATS=1 OMP_NUM_THREADS=1

check() { # NAME PROGRAM COMMAND...
  local name=$1 program=$2
  shift 2
  if [ ! -e "$clients/$program" ]; then
    echo "$name: not installed ($clients/$program)"
    return
  fi
  if "$@" >"$out/$name.log" 2>&1; then
    echo "$name: ok"
  else
    echo "$name: FAILED, see $out/$name.log"
    failed+=("$name")
  fi
}

bench_serve() { # BACKEND ENDPOINT
  HF_HUB_OFFLINE=1 "$clients/vllm/bin/vllm" bench serve --backend "$1" --base-url "$url" --endpoint "$2" \
    --model "$model" --tokenizer "$dir" --dataset-name random --random-input-len 128 --random-output-len 32 \
    --num-prompts 8 --max-concurrency 4 --ignore-eos --seed 1 | tee /dev/stderr | grep 'Failed requests: *0'
}

node_check() {
  cp "$here/openai_check.mjs" "$clients/npm/" && (cd "$clients/npm" && node openai_check.mjs "$url" "$model")
}

check openai-2 openai2 "$clients/openai2/bin/python" "$here/openai_check.py" "$url" "$model"
check openai-3 openai3 "$clients/openai3/bin/python" "$here/openai_check.py" "$url" "$model"
check openai-npm npm/node_modules/openai node_check
check litellm litellm "$clients/litellm/bin/python" "$here/litellm_check.py" "$url" "$model"
check lm-eval lmeval "$clients/lmeval/bin/python" "$here/lm_eval_check.py" "$url" "$model" "$dir"
check eval eval "$clients/eval/bin/python" "$here/eval_check.py" "$url" "$model" "$dir"
check vllm-completions vllm bench_serve openai /v1/completions
check vllm-chat vllm bench_serve openai-chat /v1/chat/completions
check aiperf aiperf "$clients/aiperf/bin/aiperf" profile --model "$model" --url "$url" --endpoint-type chat --streaming \
  --tokenizer "$dir" --synthetic-input-tokens-mean 64 --synthetic-input-tokens-stddev 0 --output-tokens-mean 16 \
  --extra-inputs ignore_eos:true --request-count 6 --concurrency 2 --workers-max 1 --ui none --no-gpu-telemetry \
  --artifact-dir "$out/aiperf" ${OPENAI_API_KEY:+--api-key "$OPENAI_API_KEY"}
check guidellm guidellm env HF_HUB_OFFLINE=1 "$clients/guidellm/bin/guidellm" run \
  --backend "kind=openai_http,target=$url,model=$model${OPENAI_API_KEY:+,api_key=$OPENAI_API_KEY}" \
  --tokenizer "kind=hf_auto,model=$dir" --data kind=synthetic_text,prompt_tokens=64,output_tokens=16 \
  --profile kind=concurrent,streams=2 --constraint kind=max_requests,count=6 \
  --output "kind=json,path=$out/guidellm.json" --disable-console-interactive
check schemathesis schemathesis "$clients/schemathesis/bin/st" run "$url/openapi.json" --max-examples 20 \
  --request-timeout 600 --checks not_a_server_error,response_schema_conformance,content_type_conformance,status_code_conformance \
  ${OPENAI_API_KEY:+--header "Authorization: Bearer $OPENAI_API_KEY"}

[ ${#failed[@]} -eq 0 ]
