#!/usr/bin/env bash
# From a fresh clone to a video, made alike on one rank and on several: bash launch/quickstart.sh
# Uses the NVIDIA GPUs that are there, else the CPU. PYTHON chooses the interpreter (default python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

prepare_environment diffusers

folder=outputs/quickstart
if has_gpu; then
    gpus="$(nvidia-smi -L | grep -c GPU)"
    tolerance=1e-2
else
    gpus=0
    tolerance=1e-4
    export OMP_NUM_THREADS=1
    echo "no NVIDIA GPU: ranks are processes on the CPU"
fi

case "$gpus" in
    0) meshes=("1 1" "2 1" "1 2" "2 2") ;;
    1) meshes=("1 1") ;;
    *) meshes=("1 1" "$gpus 1" "1 $gpus") ;;
esac
if ((gpus >= 4 && gpus % 2 == 0)); then
    meshes+=("2 $((gpus / 2))")
fi

mkdir -p "$folder"
reports=()
for mesh in "${meshes[@]}"; do
    read -r ulysses ring <<<"$mesh"
    name="$folder/tiny_u${ulysses}_r${ring}"
    echo "tiny Wan 2.2, Ulysses $ulysses x ring $ring ..."
    # The log is shown if the job fails.
    .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node "$((ulysses * ring))" -m sp_sparse.generate \
        --model tiny --num-inference-steps 8 --ulysses-degree "$ulysses" --ring-degree "$ring" \
        --sparse-attn-backend auto --sparse-attn-topk 0.3 --sparse-attn-schedule constant --sparse-attn-token-order tile \
        --output "$name.mp4" --output-latents "${name}_latents.pt" --output-frames "${name}_frames.pt" \
        >"$name.log" 2>&1 || { cat "$name.log" >&2; exit 1; }
    reports+=("$name.json")
done

echo
.venv/bin/python launch/compare.py --tolerance "$tolerance" "${reports[@]}"

# mini is small and trained, so its videos show what their caption says. Its dense one is made by one rank.
caption="A red circle moves to the right over dark blue stripes."
mini() { # NAME RANKS ARGUMENTS...
    local name="$folder/mini_$1" ranks="$2"
    shift 2
    echo "mini, ${name##*_}: $caption ..."
    .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node "$ranks" -m sp_sparse.generate \
        --model mini --prompt "$caption" --output "$name.mp4" --output-frames "${name}_frames.pt" "$@" \
        >"$name.log" 2>&1 || { cat "$name.log" >&2; exit 1; }
}
ranks=$((gpus == 1 ? 1 : 2))
OMP_NUM_THREADS=2 mini dense 1 --sparse-attn-backend none
mini sparse "$ranks" --ulysses-degree "$ranks" --sparse-attn-backend auto --sparse-attn-topk 0.3 --sparse-attn-remainder linear
.venv/bin/python launch/compare.py --side-by-side "$folder/mini.mp4" "$folder/mini_dense.json" "$folder/mini_sparse.json"
echo "video: $folder/mini.mp4 (dense on the left, sparse on the right)"
