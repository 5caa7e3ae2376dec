#!/usr/bin/env bash
# Measures on mini what a density costs in quality, and what wins it back: bash launch/mini/evidence.sh RESULTS
#
# Goes on where it was stopped; SECONDS_MOST=540 stops it in time for a lease of ten minutes. COUNT captions that training never
# saw, SEEDS seeds each. PARTS processes share the captions, dealt out over the GPUs that there are. RESULTS gets, at whatever end,
# the JSON lines of all videos, compressed, and the report of those that were compared last, which has the tables of all before.
set -euo pipefail
cd "$(dirname "$0")/../.."
results=${1:?give the folder for the results}
model=${MODEL:-mini} work=${WORK:-outputs/mini-fidelity} python=${PYTHON:-python3} parts=${PARTS:-1}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
end=$((SECONDS + ${SECONDS_MOST:-86400}))
mkdir -p "$work" "$results"
gpus=$("$python" -c 'import torch; print(max(torch.cuda.device_count(), 1))')
"$python" -m launch.mini captions --count "${COUNT:-64}" >"$work/captions.txt"
split --number "r/$parts" --numeric-suffixes --suffix-length 2 --additional-suffix .txt "$work/captions.txt" "$work/captions-"
last=()

fidelity() { # PROMPTS OUTPUT ARGUMENTS...: one process. MORE: flags that all of them share, such as sizes of another model
    local prompts=$1 output=$2
    shift 2
    # shellcheck disable=SC2086
    "$python" -m torch.distributed.run --standalone --nproc-per-node 1 -m sp_sparse.fidelity --model "$model" \
        --prompts "$prompts" --seeds "${SEEDS:-2}" --batch "${BATCH:-32}" \
        --caption-check launch.mini.check:follows_caption --output "$output" ${MORE:-} "$@"
}

# A folder a part for all comparisons, so that dense videos are made once.
compare() {
    local name=$1 left=$((end - SECONDS)) part failed=0 started=() masks=()
    shift
    ((left > 20)) || { echo "stopped in time before $name; the same command goes on"; exit 0; }
    echo "comparison: $name"
    last=("$@")
    export -f fidelity
    export model python
    for ((part = 0; part < parts; part++)); do
        ((part == 0)) || masks=(--masks false) # looked at for the first caption alone
        CUDA_VISIBLE_DEVICES=$((part % gpus)) timeout --signal=INT "$left" bash -c 'fidelity "$@"' - \
            "$(printf '%s/captions-%02d.txt' "$work" "$part")" "$work/part-$part" "$@" "${masks[@]}" >"$work/part-$part.log" 2>&1 &
        started+=($!)
    done
    for part in "${!started[@]}"; do
        wait "${started[part]}" || { failed=$?; tail -n 3 "$work/part-$part.log"; }
    done
    ((failed == 0)) || { echo "stopped in $name (status $failed); the same command goes on"; exit 1; }
}

keep() {
    mkdir -p "$work/videos"
    for ((part = 0; part < parts; part++)); do cp -r "$work/part-$part"/{run.json,frames,masks} "$work/videos/" || true; done
    cat "$work"/part-*/fidelity.jsonl >"$work/videos/fidelity.jsonl" || true
    gzip -c "$work/videos/fidelity.jsonl" >"$results/fidelity.jsonl.gz"
    ((${#last[@]} == 0)) || fidelity "$work/captions.txt" "$work/videos" --report-only true "${last[@]}" || true
    for file in fidelity.md fidelity.txt psnr.png ssim.png index.html; do
        if [[ -f $work/videos/$file ]]; then cp "$work/videos/$file" "$results/"; fi
    done
}
trap keep EXIT

densities=${DENSITIES:-0.05,0.1,0.2,0.3,0.5}
# Of 12 steps the first 0, 10 and 25 %.
dense_steps=${DENSE_STEPS:-0,1,3}
compare remainders --densities "$densities" --remainders drop,mean,linear --selectors topk,subblock --dense-steps "$dense_steps"
compare bound --densities "$densities" --remainders drop,linear --selectors topk,mass --dense-steps "${dense_steps##*,}" --masks false
compare orders --densities "$densities" --remainders drop,linear --orders raster,tile,hilbert --dense-steps "${dense_steps##*,}"
compare kept --densities "$densities" --remainders drop,linear --keep-diagonal true,false --keep-first-frame false,true \
    --dense-steps "${dense_steps##*,}" --masks false
compare blocks --densities "$densities" --remainders drop,linear --block-sizes "${BLOCKS:-64,128}" \
    --dense-steps "${dense_steps##*,}" --masks false
