#!/bin/sh
# Makes bench/.venv-trl: transformers' Trainer and TRL's SFTTrainer (with peft), as peers of the training loop.
set -eu
cd "$(dirname "$0")"
"${PYTHON:-python3}" -m venv .venv-trl
.venv-trl/bin/pip install -q torch==2.13.0 transformers trl accelerate datasets peft
