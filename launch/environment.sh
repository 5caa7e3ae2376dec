# Sourced by the scripts beside it: prepare_environment EXTRAS makes .venv with sp_sparse and these extras, or reuses it;
# make_environment FOLDER makes one with torch alone, or keeps it.

PYTHON="${PYTHON:-python3}"

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }

make_environment() {
    local folder="$1" version site=""
    version="$("$PYTHON" --version)"
    "$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || {
        echo "error: $version cannot be used; set PYTHON to a Python 3.10 to 3.13" >&2
        return 1
    }
    # A torch with CUDA that is there already fits the driver, and is large.
    if has_gpu && "$PYTHON" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2>/dev/null; then
        site=yes
    fi
    # An environment of another Python, or one whose making was interrupted, is made anew.
    if [[ "$("$folder/bin/python" --version 2>&1)" != "$version" ]] || ! "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
        "$PYTHON" -m venv --clear ${site:+--system-site-packages} "$folder"
    fi
    if ! has_gpu; then
        "$folder/bin/python" -m pip install --quiet torch==2.13.0
    fi
}

prepare_environment() {
    local extras="$1" stamp wanted
    stamp=".venv/.installed-${extras//,/-}"
    wanted="$("$PYTHON" --version) $(cksum <pyproject.toml)"
    if [[ -x .venv/bin/python && -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
        return
    fi
    echo "installing sp_sparse[$extras] into .venv ..."
    make_environment .venv
    .venv/bin/python -m pip install --quiet --editable ".[$extras]"
    echo "$wanted" >"$stamp"
}
