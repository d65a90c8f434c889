#!/usr/bin/env bash
# benchmarks/gpu.sh INPUTS [RESULTS]: everything that needs a GPU, in at most 9 minutes, on a machine without a network.
# INPUTS is a folder with docs_gpt2.tar.xz (GPT-2 token shards docs_gpt2/docs_train_*.bin and docs_gpt2/docs_val_*.bin)
# and the wheels, dependencies too, of what the machine's Python lacks of numpy, tyro, pytest and hypothesis. RESULTS
# (default benchmarks/results) gets <GPU name>.json, and logs.tgz if a step did not pass. Each step has a time limit of
# its own; one that fails is written down as failed and stops no other. PYTHON names the interpreter (default python3).
# STEPS="limits bank-slice" runs these steps alone, those that prepare them aside. Where nothing is compiled yet, 9
# minutes are too few for all. Then it takes two calls, each with RESULTS of its own:
#  STEPS="limits tests-symmetric step small"
#  STEPS="bank-slice bank-eight-slices optimizer tests-triton tests torchrun bank-slice-grouped bank-eight-slices-grouped"
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
last_second=$((SECONDS + 525)) # 9 minutes, less what the last lines take
# Told to end, it stops the step that runs, takes no other, and writes down what it has.
trap 'last_second=0; kill "$running"' TERM
running=

# step NAME LIMIT COMMAND...: runs it for at most LIMIT seconds and what is left of the 9 minutes. Told to end, it is
# given `grace` seconds.
step() {
  local name=$1 limit=$2 began=$SECONDS grace=${grace:-5} code=-1
  local left=$((last_second - grace - SECONDS))
  [[ " install shards ${STEPS:-$name} " == *" $name "* ]] || return 0
  shift 2
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$limit" -gt 0 ]; then
    timeout --kill-after="$grace" "$limit" "$@" >"$work/$name.out" 2>"$work/$name.err" &
    running=$!
    wait "$running"
    code=$?
    wait "$running" # a signal ends the first wait, not the step
  fi
  printf '%s\t%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - began))" "$*" >>"$work/steps.tsv"
  echo "$name: exit code $code after $((SECONDS - began)) s" >&2
}

limits=() bank=(--presets record --seconds 2) eight_slices=(--tokens 98304) model=(record --seconds 8)
grouped=(--backend grouped) short=() run=(--run.seconds 50 --run.val-at-seconds 25) notes=()
if [ -n "${SMALL_SHAPES:-}" ]; then
  limits=(--matrix-size 128 --megabytes 8)
  bank=(--presets nano --tokens 128 --width 32 --expert-width 32 --experts 4 --dtypes float32 --seconds 0)
  eight_slices=(--top-k 2)
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
symmetric_tests=(tests/ops/test_orthogonalize_triton.py) triton_tests=(tests/ops/test_bank_triton.py tests/ops/test_attention_triton.py)
if [ -n "${SMALL_SHAPES:-}" ]; then
  # Where there is no Triton either, these have nothing to collect, which pytest calls a failure.
  symmetric_tests+=("${gpu_tests[0]}") triton_tests+=("${gpu_tests[0]}")
fi

if [ ${#missing[@]} -gt 0 ]; then
  step install 30 "$python" -m pip install --no-index --find-links "$inputs" --target "$work/site" "${missing[@]}"
fi
step shards 15 "$python" -m tarfile -e "$inputs/docs_gpt2.tar.xz" "$work/shards"
# The first call. `limits` has time for a first import of torch; `small` is sure of 190 s, and takes what else is left.
step limits 55 "$python" -m benchmarks.limits "${limits[@]}" --json
# From here on these kernels work in every optimizer, so that is known first whether they are right.
step tests-symmetric 60 "$python" -m pytest -m gpu "${symmetric_tests[@]}"
step step 170 "$python" -m benchmarks.step "${model[@]}" --json
step small 300 "$python" train_switch_bank.py small "${data[@]}" "${short[@]}" "${run[@]}" --run.profile \
  --run.out "$work/runs/small"
# The second call.
step bank-slice 75 "$python" -m benchmarks.bank "${bank[@]}" --json
step bank-eight-slices 60 "$python" -m benchmarks.bank "${bank[@]}" "${eight_slices[@]}" --json
step optimizer 60 "$python" -m benchmarks.optimizer "${model[@]}" --json
step tests-triton 100 "$python" -m pytest -m gpu "${triton_tests[@]}"
step tests 150 "$python" -m pytest -m gpu "${gpu_tests[@]}"
# torchrun starts its workers in a session of their own and kills those that do not end within 30 s: killed sooner
# itself, it leaves them on the GPU.
grace=35 step torchrun 150 "$python" -m torch.distributed.run --nproc_per_node=1 --master-addr=127.0.0.1 \
  --master-port=29517 train_switch_bank.py small "${data[@]}" --data.val-tokens 65536 "${short[@]}" --run.steps 20 \
  --run.out "$work/runs/torchrun"
# What the Triton experts are measured against.
step bank-slice-grouped 60 "$python" -m benchmarks.bank "${bank[@]}" "${grouped[@]}" --json
step bank-eight-slices-grouped 60 "$python" -m benchmarks.bank "${bank[@]}" "${eight_slices[@]}" "${grouped[@]}" --json

"$python" -m benchmarks.results "$work" --out "$results" "${notes[@]}"
code=$?
if [ "$code" -ne 0 ] || cut -f 2 "$work/steps.tsv" | grep -qvx 0; then
  mkdir -p "$results"
  cd "$work" && find . \( -path ./site -o -path ./shards \) -prune -o -type f -size -8M ! -name '*.pt*' -print0 |
    tar -czf "$results/logs.tgz" --null -T -
fi
exit "$code"
