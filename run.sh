#!/usr/bin/env bash
# ./run.sh [PRESET] [--group.option VALUE ...]   trains: record on FineWeb where there are GPUs, nano on local text elsewhere
# ./run.sh test [--slow]                         runs the tests
# Either sets up all it needs first: .venv, the pinned dependencies, the training data.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: Python 3.10 or later is needed; set PYTHON" >&2; exit 2; }
command -v g++ >/dev/null || command -v clang++ >/dev/null || { echo "error: a C++ compiler is needed: torch.compile calls it" >&2; exit 2; }
installed=.venv/installed-from
if ! cmp -s pyproject.toml "$installed"; then
  echo "setting up .venv with the dependencies that pyproject.toml pins" >&2
  "$python" -m venv .venv
  .venv/bin/pip install --quiet --disable-pip-version-check --editable '.[test]'
  cp pyproject.toml "$installed"
fi

if [ "${1:-}" = test ]; then
  shift
  marks=(-m "not slow")
  if [ "${1:-}" = --slow ]; then marks=(); shift; fi
  # A process of one thread on each core. Most tests wait for other programs: they gain more than products lose.
  OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal "${marks[@]}" "$@"
fi

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
if [ "$gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .); fi
preset=nano
[ "$gpus" -eq 0 ] || preset=record
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then preset=$1; shift; fi
case " $* " in
  *" --data.train"*) ;;  # the user's own shards
  *)
    if [ "$preset" = nano ] || [ "$preset" = lora_moe ]; then
      [ -e data/local/tokenizer.json ] || .venv/bin/python data/local_text.py
    elif ! compgen -G 'data/fineweb10B/fineweb_train_*.bin' >/dev/null; then
      echo "fetching the FineWeb shards that $preset reads" >&2
      .venv/bin/python data/cached_fineweb10B.py 2
    fi ;;
esac
if [ "$gpus" -eq 0 ]; then
  exec .venv/bin/python train_switch_bank.py "$preset" "$@"
fi
exec .venv/bin/torchrun --standalone --nproc_per_node="$gpus" train_switch_bank.py "$preset" "$@"
