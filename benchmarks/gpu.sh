#!/usr/bin/env bash
# benchmarks/gpu.sh INPUTS [RESULTS]: everything that needs a GPU, in at most 9 minutes, on a machine without a network.
# INPUTS is a folder with docs_gpt2.tar.xz (GPT-2 token shards docs_gpt2/docs_train_*.bin and docs_gpt2/docs_val_*.bin)
# and the wheels, dependencies too, of what the machine's Python lacks of numpy, tyro, pytest and hypothesis. RESULTS
# (default benchmarks/results) gets <GPU name>.json. Each step has a time limit of its own; one that fails is written
# down as failed and stops no other. PYTHON names the interpreter (default python3).
# STEPS="limits bank-slice" runs these steps alone, those that prepare them aside.
# SMALL_SHAPES=1 takes every step at shapes of seconds, without a GPU too, on shards of tokens below 512 that start
# documents with 0: to test this script, not to measure.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ $# -lt 1 ] || [ ! -f "$1/docs_gpt2.tar.xz" ]; then
  echo "error: usage: benchmarks/gpu.sh INPUTS [RESULTS], where INPUTS holds docs_gpt2.tar.xz and wheels" >&2
  exit 2
fi
inputs=$(realpath "$1")
results=$(realpath -m "${2:-benchmarks/results}")
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/runs" "$work/site" "$work/shards"
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
last_second=$((SECONDS + 520)) # 9 minutes, less what the last lines take

# step NAME LIMIT COMMAND...: runs it for at most LIMIT seconds and what is left of the 9 minutes.
step() {
  local name=$1 limit=$2 began=$SECONDS left=$((last_second - SECONDS)) code=-1
  [[ " install shards ${STEPS:-$name} " == *" $name "* ]] || return 0
  shift 2
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$limit" -gt 0 ]; then
    timeout --kill-after=5 "$limit" "$@" >"$work/$name.out" 2>"$work/$name.err"
    code=$?
  fi
  printf '%s\t%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - began))" "$*" >>"$work/steps.tsv"
  echo "$name: exit code $code after $((SECONDS - began)) s" >&2
}

limits=() bank=(--presets record --seconds 2) eight_slices=(--tokens 98304) model=(record)
triton=(--backend triton) short=() run=(--run.seconds 75) notes=()
if [ -n "${SMALL_SHAPES:-}" ]; then
  limits=(--matrix-size 128 --megabytes 8)
  bank=(--presets nano --tokens 128 --width 32 --expert-width 32 --experts 4 --dtypes float32 --seconds 0)
  eight_slices=(--top-k 2)
  triton=(--backend grouped)
  short=(
    --model.layers 1 --model.width 64 --model.heads 1 --model.window 128 --model.experts 2 --model.expert-width 64
    --model.value-embeddings 0 --model.vocab-size 512 --model.eod-token 0 --data.slice-tokens 128
    --data.slices-per-step 2 --data.val-slice-tokens 128 --data.val-tokens 256 --run.tokens-per-forward 256
    --run.no-compile
  )
  model=(small "${short[@]}" --seconds 0)
  run=(--run.seconds 2 --run.val-at-seconds 1)
  notes=(--small-shapes)
fi
data=(--data.train "$work/shards/docs_gpt2/docs_train_*.bin" --data.val "$work/shards/docs_gpt2/docs_val_*.bin")
missing=()
for package in numpy tyro pytest hypothesis; do
  "$python" -c "import $package" 2>/dev/null || missing+=("$package")
done
mapfile -t gpu_tests < <(grep -rl --include='test_*.py' 'mark\.gpu' tests | grep -v triton)
triton_tests=(tests/ops/test_*_triton.py)
# Where there is no Triton either, these have nothing to collect, which pytest calls a failure.
[ -z "${SMALL_SHAPES:-}" ] || triton_tests+=("${gpu_tests[0]}")

if [ ${#missing[@]} -gt 0 ]; then
  step install 60 "$python" -m pip install --no-index --find-links "$inputs" --target "$work/site" "${missing[@]}"
fi
step shards 30 tar -xJf "$inputs/docs_gpt2.tar.xz" -C "$work/shards" --no-same-owner
step limits 25 "$python" -m benchmarks.limits "${limits[@]}" --json
step bank-slice 50 "$python" -m benchmarks.bank "${bank[@]}" --json
step bank-eight-slices 50 "$python" -m benchmarks.bank "${bank[@]}" "${eight_slices[@]}" --json
step step 150 "$python" -m benchmarks.step "${model[@]}" --json
step optimizer 40 "$python" -m benchmarks.optimizer "${model[@]}" --json
step tests 90 "$python" -m pytest -m gpu "${gpu_tests[@]}"
step torchrun 90 "$python" -m torch.distributed.run --nproc_per_node=1 --master-addr=127.0.0.1 --master-port=29517 \
  train_switch_bank.py small "${data[@]}" --data.val-tokens 65536 "${short[@]}" --run.steps 20 \
  --run.out "$work/runs/torchrun"
step small 170 "$python" train_switch_bank.py small "${data[@]}" "${short[@]}" "${run[@]}" --run.profile \
  --run.out "$work/runs/small"
# Last: no GPU had run these kernels when they were written, and a kernel that hangs or writes where it must not takes
# its process and its time with it.
step tests-triton 100 "$python" -m pytest -m gpu "${triton_tests[@]}"
step bank-slice-triton 50 "$python" -m benchmarks.bank "${bank[@]}" "${triton[@]}" --json
step bank-eight-slices-triton 50 "$python" -m benchmarks.bank "${bank[@]}" "${eight_slices[@]}" "${triton[@]}" --json

"$python" -m benchmarks.results "$work" --out "$results" "${notes[@]}"
