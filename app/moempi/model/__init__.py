"""The mathematics of the model, written in the verbs of a backend."""
