#!/bin/sh
# Makes bench/.venv-mergekit: mergekit, as a peer of the merges.
set -eu
cd "$(dirname "$0")"
"${PYTHON:-python3}" -m venv .venv-mergekit
.venv-mergekit/bin/pip install -q torch==2.13.0
.venv-mergekit/bin/pip install -q mergekit==0.1.5
