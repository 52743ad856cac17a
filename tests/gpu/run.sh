#!/bin/sh
# Everything that is measured on a GPU, in about fifteen minutes:   sh tests/gpu/run.sh
# The same on a CPU with tiny sizes, to see that it runs:           sh tests/gpu/run.sh --tiny
# Installs what it needs into the Python that is active, unless --no-install is given.
set -eu
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD:$PWD/adapters" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
tiny= install=yes
for flag in "$@"; do
    case "$flag" in
        --tiny) tiny=--tiny ;;
        --no-install) install= ;;
        *) echo "unknown: $flag; expected --tiny or --no-install" >&2; exit 2 ;;
    esac
done
if [ -n "$install" ]; then
    python -m pip install --quiet --editable ".[trl,deepspeed]" liger-kernel cut-cross-entropy
fi
python tests/gpu/heads_gpu.py $tiny
python tests/gpu/kl_gpu.py $tiny
python tests/gpu/plan_gpu.py $tiny
python tests/gpu/trainers_gpu.py $tiny
python tests/gpu/shared_prefix_gpu.py $tiny
if [ -n "$tiny" ]; then
    python tests/benchmarks/bench_head.py --only small --rounds 1 --no-memory
else
    timeout 240 python tests/benchmarks/bench_head.py --device cuda --dtype bfloat16 --only huge --rounds 3 --no-memory
fi
