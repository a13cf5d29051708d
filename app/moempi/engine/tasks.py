"""The two tasks: what a step asks of the rows that it wants, and what becomes of the answers."""

from collections.abc import Sequence as ManyOf
from typing import Protocol, cast

import numpy as np

from moempi.backend.protocol import Array, Choice, Picked
from moempi.comm.batch import Asked
from moempi.comm.tensor_group import TensorGroup
from moempi.engine.scheduler import Work
from moempi.engine.tokenizer import Text
from moempi.model.transformer import Transformer

HEAD_ROWS = 64


class Task(Protocol):
    """`pick` happens on the last stage, the rest on the first."""

    def wants(self, work: ManyOf[Work]) -> tuple[list[int], list[Asked]]:
        """The rows of the step whose logits are wanted, ascending, and what is asked of each."""

    def pick(
        self, model: Transformer, tensor: TensorGroup, rows: Array, asked: ManyOf[Asked], *, counts: ManyOf[int]
    ) -> Picked:
        """Answer for rows (N, D) of the last layer. Collective over the group, whose ranks bring `counts`; blocks."""

    def accept(self, work: ManyOf[Work], picked: Picked) -> None:
        """Move the sequences of a step on, given the answers to all that it wanted."""


class Generate:
    """One new token for every sequence whose tokens are all computed; `top` is the most that any request asks for."""

    def __init__(self, text: Text, *, top: int) -> None:
        self._text = text
        self._top = top

    def wants(self, work: ManyOf[Work]) -> tuple[list[int], list[Asked]]:
        """See `Task.wants`: the last row of each sequence that has no token left."""
        rows: list[int] = []
        asked: list[Asked] = []
        end = 0
        for sequence, count in work:
            end += count
            if count == sequence.num_waiting:
                rows.append(end - 1)
                asked.append(sequence.choice())
        return rows, asked

    def pick(
        self, model: Transformer, tensor: TensorGroup, rows: Array, asked: ManyOf[Asked], *, counts: ManyOf[int]
    ) -> Picked:
        """See `Task.pick`: the next tokens."""
        logits = model.logits(rows, tensor, counts)
        return model.backend.pick(logits, cast("ManyOf[Choice]", asked), top=self._top)

    def accept(self, work: ManyOf[Work], picked: Picked) -> None:
        """See `Task.accept`."""
        row = 0
        for sequence, count in work:
            sequence.computed += count
            if not sequence.num_waiting:
                own = picked.take(slice(row, row + 1)).shortened(sequence.sampling.top_logprobs)
                sequence.accept(own, self._text)
                row += 1


class Score:
    """The log-probability of every prompt token but the first, and the `top` likeliest tokens at each."""

    def __init__(self, *, top: int) -> None:
        self._top = top

    def wants(self, work: ManyOf[Work]) -> tuple[list[int], list[Asked]]:
        """See `Task.wants`: every row that has a next token in its prompt."""
        rows: list[int] = []
        asked: list[Asked] = []
        first = 0
        for sequence, count in work:
            targets = sequence.prompt_tokens[sequence.computed + 1 : sequence.computed + 1 + count]
            rows.extend(range(first, first + len(targets)))
            asked.extend(targets)
            first += count
        return rows, asked

    def pick(
        self, model: Transformer, tensor: TensorGroup, rows: Array, asked: ManyOf[Asked], *, counts: ManyOf[int]
    ) -> Picked:
        """See `Task.pick`: in pieces of HEAD_ROWS rows a rank, for a row of logits is as long as the vocabulary."""
        targets = np.array(cast("ManyOf[int]", asked), np.int64)
        picked = []
        for first in range(0, max(*counts, 1), HEAD_ROWS):
            piece = slice(first, first + HEAD_ROWS)
            logits = model.logits(rows[piece], tensor, [min(max(count - first, 0), HEAD_ROWS) for count in counts])
            picked.append(model.backend.score(logits, targets[piece], top=self._top))
        return Picked.join(picked)

    def accept(self, work: ManyOf[Work], picked: Picked) -> None:
        """See `Task.accept`."""
        first = 0
        for sequence, count in work:
            sequence.computed += count
            own = count if sequence.num_waiting else count - 1
            sequence.accept_scores(picked.take(slice(first, first + own)))
            first += own
