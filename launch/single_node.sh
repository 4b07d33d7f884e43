#!/usr/bin/env bash
# Starts a command with one rank for each GPU of this machine or, without GPUs, with ranks on its CPU cores:
#
#   launch/single_node.sh generate --ckpt_dir D --prompt "Once upon a time"
#
# The first word names the command: generate, batch, bench, serve, or a script. All others are passed on as they are.
#   --dry-run   before the command: print what would be started, and start nothing
#   NPROC=4     environment: that many ranks
set -euo pipefail

dry_run=
if [[ ${1:-} == --dry-run ]]; then
    dry_run=yes
    shift
fi
if [[ ${1:-} != [a-z]* ]]; then
    echo "usage: [NPROC=n] launch/single_node.sh [--dry-run] COMMAND [flags], such as: generate --ckpt_dir D" >&2
    exit 2
fi

# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

n_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c '^[^-]' || true  # empty and -1 hide all GPUs
    elif command -v nvidia-smi > /dev/null; then
        nvidia-smi -L 2> /dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

ranks=${NPROC:-$(n_gpus)}
if [[ ! $ranks =~ ^[0-9]+$ ]]; then
    echo "error: NPROC is not a number - found '$ranks' - write NPROC=8" >&2
    exit 2
fi
if (( ranks == 0 )); then
    # On CPUs a power of two, because head counts are, and at most 8, the KV heads of the Llama 3 models.
    ranks=8
    while (( ranks > $(n_cores) )); do
        (( ranks /= 2 ))
    done
fi
share_cores "$ranks"

# Not torchrun --standalone: it opens two stores to the network, and runs what is written there. This is torchrun without them.
start=(python3 -m llama_tp.launch --nproc_per_node "$ranks" "$@")
if [[ -n $dry_run ]]; then
    printf 'LLAMA_TP_THREADS=%s OMP_NUM_THREADS=%s' "$LLAMA_TP_THREADS" "$OMP_NUM_THREADS"
    printf ' %q' "${start[@]}"
    echo
    exit
fi
if ! python3 -c 'import llama_tp' 2> /dev/null; then
    echo "error: python3 on PATH has no llama_tp - run 'make setup', then: source .venv/bin/activate" >&2
    exit 1
fi
exec "${start[@]}"
