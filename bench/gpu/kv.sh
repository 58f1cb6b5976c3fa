#!/usr/bin/env bash
# The KV plane on a GPU host: blocks between GPU memory and Valkey, then hand-overs between two real engines
# with random weights. Writes JSON and logs to the folder $1. Usage: bench/gpu/kv.sh OUT [transfer|handover] …
set -uo pipefail
cd "$(dirname "$(readlink -f "$0")")/../.."
out=$1; shift
python=${PYTHON:-python3}
for part in "${@:-transfer handover}"; do
  for shape in llama-2-7b llama-3-8b; do
    if [[ $part == *transfer* ]]; then
      for block in 16 64; do
      timeout 120 "$python" -m pdtasks.cli bench transfer --device cuda --shape $shape --tokens 2048 --block-tokens $block \
        --connections 1 --connections 4 --connections 8 --connections 12 --connections 16 --json "$out/transfer-$shape-$block.json" 2>"$out/transfer-$shape.log"
      done
    fi
    if [[ $part == *handover* ]]; then
      # One chunk of 2048 tokens, then four of 512, whose blocks leave while the next is computed.
      for chunk in 2048 512; do
        echo "$shape, chunks of $chunk tokens"
        timeout 200 "$python" -m pdtasks.cli bench handover --device cuda --shape $shape --tokens 2048 --prompts 7 \
          --engine-args "{\"enforce_eager\": true, \"gpu_memory_utilization\": 0.42, \"max_num_batched_tokens\": $chunk}" \
          --json "$out/handover-$shape-$chunk.json" 2>"$out/handover-$shape-$chunk.log" | grep -v -E "INFO|WARN"
      done
    fi
  done
done
