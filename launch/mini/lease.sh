#!/usr/bin/env bash
# Trains mini in three commands of at most nine minutes each on one GPU: bash launch/mini/lease.sh 1|2|3 RESULTS
#
#   1  VAE and its decoder, latents, text, the first part of joint     2  the rest of joint     3  both experts, check of 100 captions
#
# Checkpoints stay in $WORK (outputs/mini), and every part goes on from them; run 2 again for a longer joint stage. Each part
# ends with an export and leaves in RESULTS at most 8 files below 16 MiB: the model as model.tar.aa, .ab (put together with
# `cat model.tar.* | tar x`), the log and pictures. Where the checkpoints were lost, START=FOLDER of such a model goes on from it.
# GPUS (default 1) train together, each with its own clips; with several the two experts are trained at the same time.
set -euo pipefail
cd "$(dirname "$0")/../.."
part=${1:?give the part: 1, 2 or 3} results=${2:?give the folder for the results}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
work=${WORK:-outputs/mini} size=${SIZE:-mini} gpus=${GPUS:-1} python=${PYTHON:-python3}
mkdir -p "$work" "$results"

mini() { local command=$1; shift; "$python" -m launch.mini "$command" --size "$size" "$@"; }
train() {
    local stage=$1 seconds=$2
    shift 2
    "$python" -m torch.distributed.run --standalone --nproc-per-node "$gpus" -m launch.mini train --size "$size" \
        --folder "$work" --stage "$stage" --seconds "$seconds" "$@"
}
experts() {
    if ((gpus == 1)); then
        train high "${HIGH_S:-90}"
        train low "${LOW_S:-110}"
        return
    fi
    CUDA_VISIBLE_DEVICES=0 gpus=1 train high "${HIGH_S:-90}" &
    local high=$!
    CUDA_VISIBLE_DEVICES=1 gpus=1 train low "${LOW_S:-110}"
    wait "$high"
}
latents() { train latents "${LATENTS_S:-80}" --clips "${CLIPS:-16384}"; }
pictures() { mini sample --folder "$work" --out "$work/$1" "${@:2}" || echo "no $1"; }

restore() {
    [[ -f $work/joint.pt ]] && return
    [[ -n ${START:-} ]] || { echo "error: no $work/joint.pt; run part 1 first, or set START to an exported model" >&2; exit 2; }
    train vae 0 --exported "$START"
    latents
    train text "${TEXT_S:-0}" --exported "$START"
    train joint 0 --exported "$START"
}

pack() {
    mini export --folder "$work" --model "$work/model"
    [[ -f $work/check.json ]] && cp "$work/check.json" "$work/check.png" "$work/model/"
    tar -C "$work" -cf - model | split -b 15M - "$results/model.tar."
    cp "$work/log.jsonl" "$results/"
    for file in vae.png joint.png check.png check.json; do
        if [[ -f $work/$file ]]; then cp "$work/$file" "$results/"; fi
    done
    ls -l "$results"
}

case $part in
1)
    rm -f "$work"/check.*
    if [[ ! -f $work/joint.pt ]]; then
        train vae "${VAE_S:-180}" ${START:+--exported "$START"}
        train decoder "${DECODER_S:-60}"
        pictures vae.png
        latents
        train text "${TEXT_S:-40}" ${START:+--exported "$START"}
    fi
    train joint "${JOINT_S:-90}" ${START:+--exported "$START"}
    ;;
2)
    rm -f "$work"/check.* "$work/high.pt" "$work/low.pt"
    restore
    train joint "${JOINT_S:-450}"
    pictures joint.png
    ;;
3)
    restore
    experts
    mini export --folder "$work" --model "$work/model"
    mini check --model "$work/model" --out "$work" --count "${COUNT:-100}"
    ;;
*) echo "error: part $part; give 1, 2 or 3" >&2; exit 2 ;;
esac
pack
