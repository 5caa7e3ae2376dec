#!/usr/bin/env bash
# Measures on mini what a density costs in quality, and what wins it back: bash launch/mini/evidence.sh RESULTS
#
# Goes on where it was stopped; SECONDS_MOST=540 stops it in time for a lease of ten minutes. RESULTS gets, at whatever end, the
# JSON lines of all videos, compressed, and the report of those that were compared last, which has the tables of all before. COUNT
# captions that training never saw, SEEDS seeds each.
set -euo pipefail
cd "$(dirname "$0")/../.."
results=${1:?give the folder for the results}
model=${MODEL:-mini} work=${WORK:-outputs/mini-fidelity} python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
end=$((SECONDS + ${SECONDS_MOST:-86400}))
mkdir -p "$work" "$results"
"$python" -m launch.mini captions --count "${COUNT:-64}" >"$work/captions.txt"

# One folder for all, so that dense videos are made once. MORE: flags that all of them share, such as sizes of another model.
compare() {
    local name=$1 left=$((end - SECONDS))
    shift
    ((left > 20)) || { echo "stopped in time before $name; the same command goes on"; exit 0; }
    echo "comparison: $name"
    # shellcheck disable=SC2086
    timeout --signal=INT "$left" "$python" -m torch.distributed.run --standalone --nproc-per-node 1 -m sp_sparse.fidelity \
        --model "$model" --prompts "$work/captions.txt" --seeds "${SEEDS:-2}" --batch "${BATCH:-32}" \
        --caption-check launch.mini.check:follows_caption --output "$work/videos" ${MORE:-} "$@" || { echo "stopped in $name (status $?); the same command goes on"; exit 1; }
}

keep() {
    for file in fidelity.md fidelity.txt psnr.png ssim.png index.html; do
        if [[ -f $work/videos/$file ]]; then cp "$work/videos/$file" "$results/"; fi
    done
    if [[ -f $work/videos/fidelity.jsonl ]]; then gzip -c "$work/videos/fidelity.jsonl" >"$results/fidelity.jsonl.gz"; fi
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
