#!/bin/sh
# One run on two processes of this machine. Settings are those of `lumina train`; a batch needs an even number of
# sequences (train.batch_tokens / model.seq_len).
#   sh examples/two_processes.sh tiny train.steps=20
set -eu
exec torchrun --standalone --nproc-per-node 2 -m lumina train "$@"
