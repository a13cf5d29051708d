"""What the steps of a job compute: prompts, outputs, or both. Pure."""

from math import ceil
from typing import NamedTuple

from moempi.arrays import larger, smaller
from moempi.planning.step_cost import StepLoad


class Workload(NamedTuple):
    """What a job computes: sequences of a prompt of `prompt` tokens, then `output` tokens; `cached` are in its cache.

    If they are `scored`, every prompt token needs logits, else the last.

    A step of it is full of prompt tokens if there is no output, of generated tokens if there is no prompt, and of both
    in their proportion otherwise.
    """

    name: str
    prompt: float
    output: float
    cached: int
    scored: bool = False

    def load(self, slots: float, batch_tokens: int) -> StepLoad:
        """A step of a micro-batch that has `slots` sequences in a group; arrays (n,) of both give n loads."""
        rows_of_slot = 1 + self.prompt / self.output if self.output else self.prompt
        rows = smaller(batch_tokens, slots * rows_of_slot)
        if not self.output:
            sequences = larger(1.0, rows / self.prompt)
            return StepLoad(rows, sequences, self.prompt / 2, scored=self.scored)
        generated = self.output / (self.output + self.prompt)
        context = self.prompt + self.output / 2 if self.prompt else self.cached
        sequences = rows * (generated + ((1 - generated) / self.prompt if self.prompt else 0.0))
        mean = generated * context + (1 - generated) * self.prompt / 2
        return StepLoad(rows, sequences, mean, cached=context)

    def most_slots(self, batch_tokens: int) -> int:
        """The sequences of a micro-batch in a group beyond which its step has no more rows."""
        return batch_tokens if self.output else max(1, ceil(batch_tokens / self.prompt))


def prefill(prompt: int) -> Workload:
    """Prompts of `prompt` tokens, and no outputs."""
    return Workload("prefill", prompt, 0, prompt)


def score(prompt: int) -> Workload:
    """Texts of `prompt` tokens, each of which is scored."""
    return Workload("score", prompt, 0, prompt, scored=True)


def decode(context: int) -> Workload:
    """Outputs only, with `context` tokens in the cache of each sequence."""
    return Workload("decode", 0, 1, context)


def mixed(prompt: int, output: int) -> Workload:
    """Prompts of `prompt` tokens and their outputs of `output` tokens."""
    return Workload("mixed", prompt, output, prompt + output)
