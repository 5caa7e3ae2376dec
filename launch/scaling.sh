#!/usr/bin/env bash
# The invariant and the scaling over the GPUs of this machine: bash launch/scaling.sh [NUMBER OF GPUS ...]
#
# For each number (default: 2, 4 and 8, as far as there are so many) and every Ulysses x ring mesh of so many ranks: masks and
# outputs against one device, the layer, the Wan transformer against diffusers' dense attention, and the timeline of the layer.
# On rings the invariant and the layer come with every exchange of EXCHANGES, side by side.
# Tables, raw results and pictures go to OUTPUT. Without a GPU the same runs on gloo ranks with small shapes.
#
# PYTHON     interpreter with sp_sparse[diffusers,benchmark] installed (default python3)
# OUTPUT     folder (default outputs/scaling)
# SIZES      of the videos: 480p, 720p (default both)
# DENSITIES  default "1.0 0.5 0.3 0.1"
# MODES      of the transformer: eager, compiled (default compiled)
# EXCHANGES  of keys and values on a ring (default "ring all_gather")
# REPEAT     timed calls (default 5)
# LIMIT_S    seconds after which a benchmark starts nothing more (default 300)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-python3}" OUTPUT="${OUTPUT:-outputs/scaling}" SIZES="${SIZES:-480p 720p}"
DENSITIES="${DENSITIES:-1.0 0.5 0.3 0.1}" MODES="${MODES:-compiled}" EXCHANGES="${EXCHANGES:-ring all_gather}" REPEAT="${REPEAT:-5}" LIMIT_S="${LIMIT_S:-300}"
read -ra sizes <<<"$SIZES"
read -ra densities <<<"$DENSITIES"
read -ra modes <<<"$MODES"
read -ra exchanges <<<"$EXCHANGES"
sparse=()
for density in "${densities[@]}"; do
    [[ "$density" == 1 || "$density" == 1.0 ]] || sparse+=("$density")
done

gpus="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
if ((gpus)); then
    declare -A grid_of=([480p]=21x30x52 [720p]=21x45x80)
    grids=()
    for size in "${sizes[@]}"; do grids+=("${grid_of[$size]}"); done
    videos=("${sizes[@]}")
    layer=() transformer=() invariant=(--repeat 3)
else
    echo "no NVIDIA GPU: gloo ranks with small shapes"
    export OMP_NUM_THREADS=1
    small=(--device cpu --dtype float32 --heads 8 --head-dim 16)
    grids=(4x8x10) videos=(4x8x20)
    layer=("${small[@]}" --block-size 16x16)
    transformer=("${layer[@]}" --layers 1 --ffn-dim 64 --text-tokens 8 --text-dim 32 --compile-backend eager)
    invariant=("${small[@]}" --block-size 16 --repeat 0)
fi
counts=("$@")
if ((${#counts[@]} == 0)); then
    for count in 2 4 8; do ((gpus && count > gpus)) || counts+=("$count"); done
fi
((${#counts[@]})) || { echo "error: one GPU scales nowhere; run this on a machine with 2 or more" >&2; exit 2; }

mkdir -p "$OUTPUT"
failed=()
# run NAME COMMAND...: its table goes to the terminal and a file, its progress to a file; what fails does not stop the rest
run() {
    local name="$1"
    shift
    echo "== $name"
    { printf '%q ' "$@"; printf '\n\n'; } >"$OUTPUT/$name.txt"
    "$@" 2>"$OUTPUT/$name.err" | tee -a "$OUTPUT/$name.txt" || { failed+=("$name"); tail -n 5 "$OUTPUT/$name.err"; }
}

stamp="$(date +%F)"
results=()
for count in "${counts[@]}"; do
    torchrun=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$count")
    benchmark=("${torchrun[@]}" launch/benchmark.py)
    timing=(--repeat "$REPEAT" --time-limit-s "$LIMIT_S")
    prefix="${stamp}_x${count}"
    run "${prefix}_invariant" "${torchrun[@]}" launch/check_invariant.py --grids "${grids[@]}" "${invariant[@]}" \
        --kv-exchange "${exchanges[@]}" --output "$OUTPUT/${prefix}_invariant.jsonl"
    run "${prefix}_attention" "${benchmark[@]}" attention "${layer[@]}" "${timing[@]}" --grids "${grids[@]}" \
        --densities "${densities[@]}" --kv-exchanges "${exchanges[@]}" --output "$OUTPUT/${prefix}_attention.jsonl"
    run "${prefix}_transformer" "${benchmark[@]}" transformer "${transformer[@]}" "${timing[@]}" --videos "${videos[@]}" \
        --densities "${densities[@]}" --modes "${modes[@]}" --output "$OUTPUT/${prefix}_transformer.jsonl"
    for what in attention transformer; do
        [[ -f "$OUTPUT/${prefix}_$what.jsonl" ]] && results+=("$OUTPUT/${prefix}_$what.jsonl")
    done
    if ((gpus)); then
        run "${prefix}_timeline" "${benchmark[@]}" timeline --grids "${grids[@]}" --densities "${sparse[@]}" \
            --meshes "${count}x1" "1x$count" --output "$OUTPUT/${prefix}_timeline.jsonl"
        run "${prefix}_timeline_pictures" "$PYTHON" launch/benchmark.py plot "$OUTPUT/${prefix}_timeline.jsonl" \
            --output-dir "$OUTPUT/plots"
    fi
done
run "${stamp}_scaling" "$PYTHON" launch/benchmark.py scaling "${results[@]}" --output-dir "$OUTPUT/plots"
cat "$OUTPUT/plots/scaling.md"
if ((${#failed[@]})); then
    echo "error: failed: ${failed[*]}; see $OUTPUT/*.err" >&2
    exit 1
fi
