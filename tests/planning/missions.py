"""Layouts of the mission's network beside the shipped ones."""

PIPELINE = (
    "task=generate",
    "parallel.stages=61",
    "parallel.tensor=1",
    "run.micro_batches=130",
    "run.max_sequences=130",
    "run.kv_memory=40GB",
)
"""Overrides of mission-score.toml for prompts: a layer a stage, each rank computing attention alone."""
