#!/usr/bin/env bash
# Run the tests of the vllm-omni plug-in, in an environment of their own: bash launch/test_vllm_omni.sh [pytest arguments]
# It holds the real vllm-omni and vllm's Python part. vllm's compiled part (a wheel of 315 MB for CUDA) is left out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-python3}"
VENV=.venv-vllm
VLLM=0.30.0
VLLM_OMNI=0.30.0

prepare() {
    local stamp="$VENV/.installed" wanted
    wanted="$("$PYTHON" --version) $(cat pyproject.toml tests/vllm_omni/requirements.txt launch/test_vllm_omni.sh | cksum)"
    if [[ -x $VENV/bin/python && -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
        return
    fi
    echo "installing vllm-omni $VLLM_OMNI into $VENV ..."
    "$PYTHON" -m venv --clear "$VENV"
    pip() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
    pip torch==2.13.0
    pip -r tests/vllm_omni/requirements.txt pytest pytest-xdist pytest-timeout hypothesis \
        setuptools-rust setuptools-scm wheel "setuptools<81,>=77.0.3" packaging cmake ninja
    pip --no-deps xgrammar apache-tvm-ffi==0.1.11 diffusers==0.40.0 "vllm-omni==$VLLM_OMNI" importlib_metadata zipp
    VLLM_VERSION_OVERRIDE="$VLLM" VLLM_TARGET_DEVICE=empty \
        pip --no-deps --no-build-isolation --no-binary vllm "vllm==$VLLM"
    pip --no-deps --no-build-isolation --editable . yunchang
    echo "$wanted" >"$stamp"
}

prepare
"$VENV/bin/python" -m pytest -n 2 tests/vllm_omni "$@"
