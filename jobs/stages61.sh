#!/usr/bin/env bash
# The mission's pipeline on this machine: its 61 layers at width 64 on 61 ranks, a layer each, compared with one rank.
exec "$(dirname "${BASH_SOURCE[0]}")/rehearse.sh" mission-mini 61 --set parallel.stages=61 --set run.micro_batches=4
