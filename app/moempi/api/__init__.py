"""Python: a model that scripts use, and the model of lm-evaluation-harness."""
