#!/bin/sh
# Makes bench/.venv-lm-eval: lm-eval's `hf` model, as a peer of scoring choices.
set -eu
cd "$(dirname "$0")"
"${PYTHON:-python3}" -m venv .venv-lm-eval
.venv-lm-eval/bin/pip install -q torch==2.13.0 transformers==5.23.0 lm-eval==0.4.13 accelerate
