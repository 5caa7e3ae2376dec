#!/usr/bin/env bash
# Run the tests in .venv, made if need be: bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

prepare_environment diffusers,serve,dev
.venv/bin/python -m pytest -n 2 "$@"
