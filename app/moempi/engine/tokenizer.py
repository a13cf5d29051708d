"""Text to tokens and back, with the tokenizer of the weight file."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from moempi.errors import DataError


class TextTokenizer:
    """A tokenizer, "" for none, and the tokens that end a text; without one, only prompts of tokens can be run."""

    def __init__(self, tokenizer: str, *, eos_tokens: Sequence[int]) -> None:
        self.eos_tokens = frozenset(eos_tokens)
        self._tokenizer = Tokenizer.from_str(tokenizer) if tokenizer else None
        if self._tokenizer is not None:
            self._tokenizer.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; names of special tokens in it are plain text. Raises DataError without a tokenizer."""
        if self._tokenizer is None:
            raise DataError("the weight file holds no tokenizer; give the prompt as tokens")
        return list(self._tokenizer.encode(text).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens without the special ones; empty without a tokenizer."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True) if self._tokenizer else ""
