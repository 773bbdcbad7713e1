#!/bin/sh
# Makes bench/.venv-trl: transformers' Trainer and TRL's SFTTrainer (with peft), as peers of the training loop.
set -eu
cd "$(dirname "$0")"
"${PYTHON:-python3}" -m venv .venv-trl
.venv-trl/bin/pip install -q -c ../constraints.txt torch transformers trl==1.16.0 accelerate datasets peft
