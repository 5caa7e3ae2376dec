#!/usr/bin/env bash
# Does the wheel do the main job without the checkout? bash launch/test_wheel.sh
# It is built from a copy, installed with its extras into .venv-wheel, and used from a folder elsewhere: a video on two CPU ranks,
# then a server, its page and a video of its. No module may come from the checkout. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

root="$PWD" venv="$PWD/.venv-wheel" folder="$(mktemp -d)" server=""
python="$venv/bin/python"
trap '[[ -z "$server" ]] || kill -KILL "$server" 2>/dev/null || true; rm -rf "$folder"' EXIT
fail() {
    echo "error: $1" >&2
    [[ ! -f "$folder/elsewhere/log" ]] || cat "$folder/elsewhere/log" >&2
    exit 1
}

echo "building the wheel and installing it into $venv ..."
make_environment "$venv"
mkdir "$folder/source" "$folder/elsewhere" "$folder/probe"
# A copy, for a folder in which wheels were built before adds what it held then.
cp -r pyproject.toml README.md sp_sparse "$folder/source"
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder" "$folder/source"
wheel=("$folder"/sp_sparse-*.whl)
[[ "$("$python" -m zipfile --list "${wheel[0]}")" == *sp_sparse/serve/static/index.html* ]] || fail "the wheel lacks the page"
# pip keeps an installed package of the same version.
"$python" -m pip uninstall --quiet --yes sp-sparse 2>/dev/null
"$python" -m pip install --quiet "${wheel[0]}[diffusers,serve]"

# Python imports it at each start: at the end of the process, the files of what was imported are written down.
cat >"$folder/probe/sitecustomize.py" <<PROBE
import atexit, os, sys

def write_down():
    with open(os.path.join("$folder", f"imported.{os.getpid()}"), "w") as out:
        out.writelines(f"{getattr(module, '__file__', None)}\n" for module in list(sys.modules.values()))

atexit.register(write_down)
PROBE
export PYTHONPATH="$folder/probe" OMP_NUM_THREADS=1
cd "$folder/elsewhere"
sparse=(--device cpu --sparse-attn-backend reference --sparse-attn-topk 0.3)

echo "a video on two ranks ..."
"$python" -m torch.distributed.run --standalone --nproc-per-node 2 -m sp_sparse.generate --model tiny \
    --num-inference-steps 2 --ring-degree 2 "${sparse[@]}" --output video.mp4 >log 2>&1 || fail "generate failed"
[[ "$(head -c 8 video.mp4 | tail -c 4)" == ftyp ]] || fail "generate wrote no mp4"

echo "a server, its page and a video ..."
"$python" -m sp_sparse.serve --model tiny --port 0 --warmup-steps 0 "${sparse[@]}" >log 2>&1 &
server=$!
for _ in $(seq 600); do
    url="$(grep -om1 'http://127.0.0.1:[0-9]*' log || true)"
    [[ -z "$url" ]] || break
    kill -0 "$server" 2>/dev/null || fail "the server has ended"
    sleep 0.2
done
"$python" - "$url" <<'CLIENT' || fail "the server did not answer as it should"
import sys

import httpx

with httpx.Client(base_url=sys.argv[1], timeout=120, trust_env=False) as http:
    page = http.get("/")
    assert page.status_code == 200 and "<html" in page.text, page
    video = http.post("/v1/videos/sync", json={"prompt": "a cat", "num_inference_steps": 2})
    assert video.status_code == 200 and video.content[4:8] == b"ftyp", video
CLIENT
kill -TERM "$server"
wait "$server" || fail "the server did not end well"
server=""
grep -q "drained" log || fail "the server was not drained"

(($(grep -l "^$venv/.*/sp_sparse/generate/__main__.py" "$folder"/imported.* | wc -l) >= 3)) ||
    fail "the processes did not run the installed package"
if foreign="$(grep -h "^$root/" "$folder"/imported.* | grep -v "^$venv/")"; then
    fail "imported from the checkout: $foreign"
fi
echo "the wheel makes and serves videos on its own"
