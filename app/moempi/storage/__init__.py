"""Files: weights and results (HDF5), checkpoints (safetensors), prompts, and the journal of a run."""
