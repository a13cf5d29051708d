"""The doors to disk: weight files (HDF5), checkpoints (safetensors), prompts and results."""
