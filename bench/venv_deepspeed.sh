#!/bin/sh
# Makes bench/.venv-deepspeed: graft with DeepSpeed, whose ZeRO trains on CPUs too (DS_ACCELERATOR=cpu).
set -eu
cd "$(dirname "$0")"
"${PYTHON:-python3}" -m venv .venv-deepspeed
DS_BUILD_OPS=0 .venv-deepspeed/bin/pip install -q -c ../constraints.txt -e '..[deepspeed,test]'
