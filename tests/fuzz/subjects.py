"""All classes of inputs by name."""

from fuzz import checkpoints, hdf5_files, journals, prompts, texts, tokenizer
from fuzz.subject import Subject

MODULES = (texts, prompts, checkpoints, tokenizer, hdf5_files, journals)
SUBJECTS: dict[str, type[Subject]] = {subject.name: subject for module in MODULES for subject in module.SUBJECTS}
