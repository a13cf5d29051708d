"""The two tasks: what becomes of the rows that a step returns."""

from collections.abc import Sequence as ManyOf
from typing import Protocol

import numpy as np

from moempi.backend.protocol import Array, Picked
from moempi.engine.scheduler import Work
from moempi.engine.text import Text
from moempi.model.transformer import Transformer

HEAD_ROWS = 64


class Task(Protocol):
    """Takes the rows of one step and moves its sequences on."""

    def accept(self, rows: Array, work: ManyOf[Work]) -> None:
        """`rows` (N, D) are the wanted rows of the batch that `work` made, in its order."""


class Generate:
    """One new token for every sequence whose tokens are all computed."""

    def __init__(self, model: Transformer, text: Text) -> None:
        self._model = model
        self._text = text

    def accept(self, rows: Array, work: ManyOf[Work]) -> None:
        """See `Task.accept`."""
        for sequence, count in work:
            sequence.computed += count
        ready = [sequence for sequence, _ in work if not sequence.num_waiting]
        if not ready:
            return
        top = max(sequence.sampling.top_logprobs for sequence in ready)
        choices = [sequence.choice() for sequence in ready]
        picked = self._model.backend.pick(self._model.logits(rows), choices, top=top)
        for row, sequence in enumerate(ready):
            own = _rows(picked, row, row + 1, top=sequence.sampling.top_logprobs)
            sequence.accept(own, self._text)


class Score:
    """The log-probability of every prompt token but the first."""

    def __init__(self, model: Transformer, *, top: int) -> None:
        self._model = model
        self._top = top

    def accept(self, rows: Array, work: ManyOf[Work]) -> None:
        """See `Task.accept`."""
        scored = self._score(rows, _targets(work))
        first = 0
        for sequence, count in work:
            sequence.computed += count
            own = count if sequence.num_waiting else count - 1
            sequence.accept_scores(_rows(scored, first, first + own, top=self._top))
            first += own

    def _score(self, rows: Array, targets: list[int]) -> Picked:
        """In pieces of HEAD_ROWS rows: a row of logits is as long as the vocabulary."""
        pieces = [
            self._model.backend.score(
                self._model.logits(rows[first : first + HEAD_ROWS]),
                np.array(targets[first : first + HEAD_ROWS], np.int64),
                top=self._top,
            )
            for first in range(0, max(len(targets), 1), HEAD_ROWS)
        ]
        return Picked(
            tokens=np.concatenate([piece.tokens for piece in pieces]),
            logprobs=np.concatenate([piece.logprobs for piece in pieces]),
            top_tokens=np.concatenate([piece.top_tokens for piece in pieces]),
            top_logprobs=np.concatenate([piece.top_logprobs for piece in pieces]),
        )


def _targets(work: ManyOf[Work]) -> list[int]:
    """The token after each scored row."""
    targets = []
    for sequence, count in work:
        targets.extend(sequence.prompt_tokens[sequence.computed + 1 : sequence.computed + 1 + count])
    return targets


def _rows(picked: Picked, first: int, last: int, *, top: int) -> Picked:
    rows = slice(first, last)
    return Picked(
        tokens=picked.tokens[rows],
        logprobs=picked.logprobs[rows],
        top_tokens=picked.top_tokens[rows, :top],
        top_logprobs=picked.top_logprobs[rows, :top],
    )
