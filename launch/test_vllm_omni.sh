#!/usr/bin/env bash
# Run the tests of the vllm-omni plug-in, in an environment of their own:
#   bash launch/test_vllm_omni.sh [VERSION] [pytest arguments]        VERSION: 0.30.0 (the default) or 0.32.0rc1
# It holds the real vllm-omni and vllm's Python part. vllm's compiled part (a wheel of 315 MB for CUDA) is left out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-python3}"
VLLM_OMNI=0.30.0
if [[ ${1:-} =~ ^[0-9]+\.[0-9] ]]; then
    VLLM_OMNI="$1"
    shift
fi
case "$VLLM_OMNI" in
    0.30.0) VLLM=0.30.0 VENV=.venv-vllm OWN=(openai-harmony) ;;
    0.32.0rc1) VLLM=0.32.0 VENV=.venv-vllm-0.32 OWN=(oss-harmony openai-harmony) ;;
    *)
        echo "vllm-omni $VLLM_OMNI is not tested here; give 0.30.0 or 0.32.0rc1" >&2
        exit 2
        ;;
esac
CONSTRAINTS="tests/vllm_omni/constraints-$VLLM_OMNI.txt"

prepare() {
    local stamp="$VENV/.installed" wanted
    wanted="$("$PYTHON" --version) $(cat pyproject.toml tests/vllm_omni/requirements.txt "$CONSTRAINTS" launch/test_vllm_omni.sh | cksum)"
    if [[ -x $VENV/bin/python && -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
        return
    fi
    echo "installing vllm-omni $VLLM_OMNI into $VENV ..."
    "$PYTHON" -m venv --clear "$VENV"
    pip() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$CONSTRAINTS" "$@"; }
    pip torch
    pip -r tests/vllm_omni/requirements.txt pytest pytest-xdist pytest-timeout hypothesis \
        setuptools-rust setuptools-scm wheel "setuptools<81,>=78.1.1" packaging cmake ninja "${OWN[@]}"
    pip --no-deps xgrammar apache-tvm-ffi diffusers "vllm-omni==$VLLM_OMNI" importlib_metadata zipp
    VLLM_VERSION_OVERRIDE="$VLLM" VLLM_TARGET_DEVICE=empty \
        pip --no-deps --no-build-isolation --no-binary vllm "vllm==$VLLM"
    pip --no-deps --no-build-isolation --editable . yunchang
    echo "$wanted" >"$stamp"
}

prepare
"$VENV/bin/python" -m pytest -n 2 tests/vllm_omni "$@"
