#!/usr/bin/env bash
# `pdtasks bench serving` with this folder's plan, from a checkout that is not installed.
# Usage: bench/gpu/serving.sh --model FOLDER --out FOLDER [--topology NAME …] [--workload NAME …] …
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
cd "$here/../.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" -m pdtasks.cli bench serving "$here/plan.yaml" "$@"
