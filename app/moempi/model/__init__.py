"""The mathematics of the model, readable top to bottom, in the verbs of a backend."""
