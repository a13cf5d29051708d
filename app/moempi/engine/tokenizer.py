"""Text to tokens and back, with the tokenizer of the weight file."""

import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from typing import TYPE_CHECKING

from moempi.errors import DataError

if TYPE_CHECKING:  # imported by ranks that have text
    from tokenizers import AddedToken, Tokenizer

MAX_REASON = 200
"""Characters of a tokenizer's own error text that an error record keeps."""

# Two code points that are no characters and that no text should have: they enclose the number of a special token.
QUOTE, TOKEN = "\ufdd0", "\ufdd1"
HALF_CHARACTER = "\ufffd"
MAX_CHARACTER_BYTES = 4
WORD_CATEGORIES = ("Nd", "Nl", "Pc")
JOINERS = (0x200C, 0x200D)
CIRCLED_LETTERS = ((0x24B6, 0x24E9), (0x1F130, 0x1F149), (0x1F150, 0x1F169), (0x1F170, 0x1F189))
"""The alphabetic characters among symbols."""
SPARE_TOKENS = 16
"""Tokens that are decoded before the longest stop text, for what a decoder takes from the beginning of a text."""


class TextTokenizer:
    """A tokenizer, "" for none, and the tokens that end a text; without one, only prompts of tokens can be run.

    If `reads_special`, the text of a special token in a prompt is that token, otherwise plain text. Decoded texts have
    the texts of special tokens only if `writes_special`. Truncation and padding that its file asks for are for
    training: a prompt is encoded whole, and nothing else.

    Raises DataError that names the file `origin` for a text that is not a tokenizer.
    """

    def __init__(
        self,
        tokenizer: str,
        *,
        eos_tokens: Sequence[int],
        origin: str = "the weight file",
        reads_special: bool = True,
        writes_special: bool = False,
    ) -> None:
        self.eos_tokens = frozenset(eos_tokens)
        self._text = tokenizer
        self._reads_special, self._writes_special = reads_special, writes_special
        with _raising_data_errors(f"{origin}: its tokenizer cannot be read"):
            self._tokenizer = _whole_texts(tokenizer) if tokenizer else None
            self._special = _special_tokens(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, with the begin and end tokens that the tokenizer adds.

        Raises DataError without a tokenizer, or if the tokenizer fails.
        """
        if self._tokenizer is None:
            raise DataError("the weight file holds no tokenizer; give the prompt as tokens")
        with _raising_data_errors("the tokenizer cannot encode the prompt"):
            self._tokenizer.encode_special_tokens = not self._reads_special
            return list(self._tokenizer.encode(text).ids)

    def quote(self, text: str) -> str:
        """The text with each text of a special token replaced, so that `encode_chat` reads it as plain text.

        Raises DataError for a text with one of the code points that replace it.
        """
        if QUOTE in text or TOKEN in text:
            raise DataError(f"the chat holds U+{ord(QUOTE):X} or U+{ord(TOKEN):X}, which are not characters")
        return self._special_texts.sub(lambda found: _enclosed(QUOTE, self._numbers[found[0]]), text)

    def unquote(self, text: str) -> str:
        """The text without quotes: what `quote` replaced is again the text of a special token."""
        contents = {str(number): token.content for number, token in self._special.items()}
        return re.sub(f"{QUOTE}([0-9]+){QUOTE}", lambda found: contents.get(found[1], ""), text)

    def special_token(self, text: str) -> int | None:
        """The special token with this text; None if there is none."""
        return self._numbers.get(text)

    def encode_chat(self, text: str) -> list[int]:
        """Tokens of a text with special tokens, except where they are quoted; no begin or end token is added.

        Raises DataError without a tokenizer, or if the tokenizer fails.
        """
        if self._tokenizer is None:
            raise DataError("the weight file holds no tokenizer; give the prompt as tokens")
        with _raising_data_errors("the tokenizer cannot encode the chat"):
            if QUOTE in text:
                return self._encode_quoted(text)
            self._tokenizer.encode_special_tokens = False
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens; empty without a tokenizer. Raises DataError if it fails."""
        return self._decode(tokens, skip_special=not self._writes_special)

    def decode_whole(self, tokens: Sequence[int]) -> str:
        """Text of tokens, with the texts of special tokens; empty without a tokenizer. Raises DataError if it fails."""
        return self._decode(tokens, skip_special=False)

    def text_before_stop(self, tokens: Sequence[int], stops: Sequence[str]) -> str | None:
        """Text of the tokens before the first of the stop texts, also of special tokens; None if there is none.

        To be called with each new token: a stop text ends in the last one. A character of which the tokens have only a
        part is no text. Raises DataError if the tokenizer fails.
        """
        if not stops or self._tokenizer is None:
            return None
        end = self._decode(tokens[-SPARE_TOKENS - MAX_CHARACTER_BYTES * max(map(len, stops)) :], skip_special=False)
        if not any(stop in end for stop in stops):
            return None
        whole = self._decode(tokens, skip_special=False)
        found = [whole.find(stop) for stop in stops if HALF_CHARACTER not in stop or self._is_written(tokens)]
        ends = [end for end in found if end >= 0]
        if not ends:
            return None
        before = whole[: min(ends)]
        return before if self._writes_special else self._without_special(tokens, before)

    def _decode(self, tokens: Sequence[int], *, skip_special: bool) -> str:
        if self._tokenizer is None:
            return ""
        with _raising_data_errors("the tokenizer cannot decode the tokens"):
            return str(self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special))

    def _without_special(self, tokens: Sequence[int], before: str) -> str:
        """The beginning `before` of the text of the tokens, without special tokens."""
        whole, count = self._decode(tokens, skip_special=False), len(tokens)
        while not before.startswith(whole):
            count -= 1
            whole = self._decode(tokens[:count], skip_special=False)
        cut_special = count < len(tokens) and tokens[count] in self._special
        return self.decode(tokens[:count]) + ("" if cut_special else before[len(whole) :])

    def _is_written(self, tokens: Sequence[int]) -> bool:
        """Whether the tokens have the character that also stands for a part of a character in decoded text."""
        with _raising_data_errors("the tokenizer cannot encode a stop text"):
            one = list(self._tokenizer.encode(HALF_CHARACTER, add_special_tokens=False).ids) if self._tokenizer else []
        starts = range(len(tokens) - len(one) + 1) if one else ()
        return any(list(tokens[start : start + len(one)]) == one for start in starts)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {token.content: number for number, token in self._special.items() if token.content}

    @cached_property
    def _special_texts(self) -> re.Pattern[str]:
        """Every text of a special token, the longest first."""
        return _any_of([re.escape(text) for text in sorted(self._numbers, key=len, reverse=True)])

    @cached_property
    def _read_texts(self) -> re.Pattern[str]:
        """Every text of a special token where it is read as one: some only as a whole word."""
        longest_first = sorted(self._special.values(), key=lambda token: len(token.content), reverse=True)
        texts = [(re.escape(token.content), token.single_word) for token in longest_first if token.content]
        word = _word_characters() if any(single_word for _, single_word in texts) else ""
        return _any_of([f"(?<![{word}]){text}(?![{word}])" if single_word else text for text, single_word in texts])

    def _encode_quoted(self, text: str) -> list[int]:
        """See `_quoting`: first each special token's text becomes the one enclosed by TOKEN, then quotes end."""
        marked = self._read_texts.sub(lambda found: _enclosed(TOKEN, self._numbers[found[0]]), text)
        tokenizer, numbers = self._quoting
        ids = tokenizer.encode(self.unquote(marked), add_special_tokens=False).ids
        return [numbers.get(token, token) for token in ids]

    @cached_property
    def _quoting(self) -> "tuple[Tokenizer, dict[int | None, int]]":
        """A tokenizer that has other texts for special tokens, enclosed by TOKEN, and their ids by its own."""
        tokenizer = _whole_texts(self._text)
        tokenizer.encode_special_tokens = True
        texts = {number: _enclosed(TOKEN, number) for number in self._special}
        tokenizer.add_tokens([_renamed(self._special[number], text) for number, text in texts.items()])
        return tokenizer, {tokenizer.token_to_id(text): number for number, text in texts.items()}


def _renamed(token: "AddedToken", text: str) -> "AddedToken":
    from tokenizers import AddedToken

    """A token that the text stands for wherever it is, also if it is read as plain text."""
    return AddedToken(
        text,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=False,
        special=False,
    )


@cache
def _word_characters() -> str:
    r"""The word characters of the tokenizers library, as ranges of a regular expression; `\w` of `re` has others.

    Unicode Technical Standard 18, annex C: alphabetic characters, marks, decimal digits, connectors, joiners.
    """
    found = [
        code
        for code in range(sys.maxunicode + 1)
        if (category := unicodedata.category(chr(code)))[0] in "LM" or category in WORD_CATEGORIES or code in JOINERS
    ]
    ranges = list(CIRCLED_LETTERS)
    for code in found:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1] = ranges[-1][0], code
        else:
            ranges.append((code, code))
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)


def _any_of(patterns: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(patterns) or r"(?!)")


def _whole_texts(text: str) -> "Tokenizer":
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _special_tokens(tokenizer: "Tokenizer | None") -> "dict[int, AddedToken]":
    if tokenizer is None:
        return {}
    return {number: token for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def _enclosed(sign: str, number: int) -> str:
    return f"{sign}{number}{sign}"


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
