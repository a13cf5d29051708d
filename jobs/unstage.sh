#!/usr/bin/env bash
# Slurm runs this on every node when the step of stage_weights (batch.sh) has ended there, also if it was killed.
rm -f -- "$MOEMPI_STAGED"
