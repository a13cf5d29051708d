"""Tokenizers in tiktoken's format: a file of byte sequences in the order in which they are merged.

The format does not say how a text is divided before it is merged. Checkpoints say so in the Python file of their
tokenizer, which is read here as a syntax tree and never run.
"""

import ast
import base64
import binascii
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from moempi.config.input_file import read_input
from moempi.errors import DataError

MAX_CODE_BYTES = 1 << 20
MAX_RESERVED = 1 << 16
"""Most tokens between the ranks and the last added token."""
PATTERN_NAME = "pat_str"
_NOT_HAN = "&&[^\\p{Han}]]"
_UPPER, _LOWER = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{_NOT_HAN}", rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{_NOT_HAN}"
_LEAD, _SUFFIX = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        f"{_LEAD}{_UPPER}*{_LOWER}+{_SUFFIX}",
        f"{_LEAD}{_UPPER}+{_LOWER}*{_SUFFIX}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
PATTERNS = {"TikTokenTokenizer": KIMI_PATTERN}
"""Patterns by the name of the tokenizer's class, for checkpoints without its file."""


def tokenizer_of_ranks(content: bytes, pattern: str, added: Mapping[int, AddedToken]) -> Tokenizer:
    """The tokenizer with the ranks that `content` lists and the `added` tokens by id.

    A text is divided at the matches of `pattern`; ids that neither has are reserved tokens. Raises ValueError if
    `content` is not such a list, or if an added token does not fit.
    """
    ranks = _read_ranks(content)
    if not ranks:
        raise ValueError("it has no ranks")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"its {len(ranks)} ranks are not the numbers from 0 to {len(ranks) - 1}")
    last = max(added, default=-1)
    if last >= len(ranks) + MAX_RESERVED:
        raise ValueError(f"tokenizer_config.json has a token {last}, the ranks end at {len(ranks) - 1}")
    vocab = {_spelled(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_merges(ranks), ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    beyond = {number: added.get(number, _reserved(number)) for number in range(len(ranks), last + 1)}
    tokenizer.add_tokens([token for _, token in sorted((beyond | dict(added)).items())])
    for number, token in added.items():
        if tokenizer.token_to_id(token.content) != number:
            raise ValueError(
                f"tokenizer_config.json has {token.content!r} as token {number}, which the ranks do not fit"
            )
    return tokenizer


def find_pattern(folder: Path, class_name: str) -> str:
    """The pattern of a checkpoint folder's tokenizer class: in one of its Python files, else a known one; "" if none.

    Raises NoInputError for a file that cannot be read.
    """
    code = sorted(folder.glob("tokenization_*.py"))
    found = [pattern for path in code for pattern in _patterns_in(path)]
    return found[0] if found else PATTERNS.get(class_name, "")


def _read_ranks(content: bytes) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error) as error:
                raise ValueError(f"line {number} is not a token in base64 and its rank") from error
    return ranks


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """Every pair of tokens that make a token, in the order of its rank."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [(ranks[left], ranks[right], left, right) for left, right in pairs if left in ranks and right in ranks]
        merges += [(_spelled(left), _spelled(right)) for _, _, left, right in sorted(known)]
    return merges


def _spelled(token: bytes) -> str:
    """The bytes as the characters that stand for them in a byte-level vocabulary."""
    return token.decode("latin-1").translate(_CHARACTERS)


def _byte_characters() -> dict[int, str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}


_CHARACTERS = _byte_characters()


def _reserved(number: int) -> AddedToken:
    return AddedToken(f"<|reserved_token_{number}|>", normalized=False, special=True)


def _patterns_in(path: Path) -> list[str]:
    """The texts that a Python file assigns to PATTERN_NAME, if they are literals or a join of literals."""
    try:
        tree = ast.parse(read_input(path, limit=MAX_CODE_BYTES, too_long=DataError))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    texts = []
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name == PATTERN_NAME:
                texts.append(_text(value))
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value) if name == PATTERN_NAME:
                texts.append(_text(value))
    return [text for text in texts if text]


def _text(value: ast.expr) -> str:
    match value:
        case ast.Constant(value=str(text)):
            return text
        case ast.Call(func=ast.Attribute(value=ast.Constant(value=str(separator)), attr="join"), args=[ast.List(elts)]):
            parts = [_text(part) for part in elts]
            return separator.join(parts) if all(parts) else ""
    return ""
