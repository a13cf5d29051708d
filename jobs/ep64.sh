#!/usr/bin/env bash
# Expert parallelism of 64 on this machine: a 64-expert model on 64 ranks, one expert each, compared with one rank.
exec "$(dirname "${BASH_SOURCE[0]}")/rehearse.sh" ep64 64 --set parallel.experts_per_rank=1
