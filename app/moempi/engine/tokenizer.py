"""Text to tokens and back, with the tokenizer of the weight file."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tokenizers import Tokenizer

from moempi.errors import DataError

MAX_REASON = 200
"""Characters of a tokenizer's own error text that an error record keeps."""


class TextTokenizer:
    """A tokenizer, "" for none, and the tokens that end a text; without one, only prompts of tokens can be run.

    Truncation and padding that its file asks for are for training: a prompt is encoded whole, and nothing else.

    Raises DataError that names the file `origin` for a text that is not a tokenizer.
    """

    def __init__(self, tokenizer: str, *, eos_tokens: Sequence[int], origin: str = "the weight file") -> None:
        self.eos_tokens = frozenset(eos_tokens)
        with _raising_data_errors(f"{origin}: its tokenizer cannot be read"):
            self._tokenizer = Tokenizer.from_str(tokenizer) if tokenizer else None
        if self._tokenizer is not None:
            self._tokenizer.encode_special_tokens = True
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; names of special tokens in it are plain text.

        Raises DataError without a tokenizer, or if the tokenizer fails.
        """
        if self._tokenizer is None:
            raise DataError("the weight file holds no tokenizer; give the prompt as tokens")
        with _raising_data_errors("the tokenizer cannot encode the prompt"):
            return list(self._tokenizer.encode(text).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens without the special ones; empty without a tokenizer. Raises DataError if it fails."""
        if self._tokenizer is None:
            return ""
        with _raising_data_errors("the tokenizer cannot decode the tokens"):
            return self._tokenizer.decode(list(tokens), skip_special_tokens=True)


@contextmanager
def _raising_data_errors(problem: str) -> Iterator[None]:
    """Raise what the tokenizer raises as DataError; a panic of its library is no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise DataError(f"{problem}: {reason[:MAX_REASON]}") from error
