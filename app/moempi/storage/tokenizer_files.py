"""The tokenizer of a checkpoint folder, as the text of a tokenizer.json. All files are untrusted, and none is run."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from tokenizers import AddedToken, Tokenizer

from moempi.config.input_file import read_input
from moempi.errors import DataError
from moempi.storage.downloads import refuse_placeholder
from moempi.storage.tiktoken_ranks import find_pattern, tokenizer_of_ranks
from moempi.storage.tokenizer_check import ask, check_tokenizer

TOKENIZER_FILE, SENTENCEPIECE_FILE, RANKS_FILE = "tokenizer.json", "tokenizer.model", "tiktoken.model"
OTHER_FILES = ("tekken.json", "spiece.model", "vocab.json", "vocab.txt")
SENTENCEPIECE_CONVERSION = "moempi.storage.sentencepiece_conversion"
HOW_TO_MAKE_TOKENIZER = (
    "let transformers write it: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER), "
    "or move the file away to convert without a tokenizer, for prompts of tokens"
)
MAX_BYTES = 1 << 28


class _AddedToken(Struct, frozen=True):
    content: str
    lstrip: bool = False
    normalized: bool = False
    rstrip: bool = False
    single_word: bool = False
    special: bool = False


class _Config(Struct, frozen=True):
    """What tokenizer_config.json says about the tokenizer."""

    added_tokens_decoder: dict[int, _AddedToken] = {}
    bos_token: Any = None
    eos_token: Any = None
    unk_token: Any = None
    sep_token: Any = None
    pad_token: Any = None
    cls_token: Any = None
    mask_token: Any = None
    additional_special_tokens: Any = None
    tokenizer_class: str | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    legacy: bool | None = None

    def named_tokens(self) -> list[_AddedToken]:
        """The special tokens that the configuration names, in the order in which transformers adds missing ones."""
        named = (self.bos_token, self.eos_token, self.unk_token, self.sep_token, self.pad_token)
        others = self.additional_special_tokens if isinstance(self.additional_special_tokens, list) else ()
        tokens = map(_named, (*named, self.cls_token, self.mask_token, *others))
        return [token for token in tokens if token is not None]


def _named(token: Any) -> _AddedToken | None:
    """A token that is a text or an object; None for anything else, which chat templates read as no token."""
    try:
        found = _AddedToken(token) if isinstance(token, str) else msgspec.convert(token, _AddedToken)
    except (msgspec.ValidationError, RecursionError):
        return None
    return msgspec.structs.replace(found, special=True) if found.content else None


def read_tokenizer(folder: Path, config: Mapping[str, Any]) -> str:
    """The tokenizer of a checkpoint folder, "" if it has none; `config` is its tokenizer_config.json.

    A SentencePiece model or a list of tiktoken's ranks is converted. Raises DataError for a file that is not a
    tokenizer, or that cannot be converted, with what to do. Blocks.
    """
    found = next((name for name in (TOKENIZER_FILE, RANKS_FILE, SENTENCEPIECE_FILE) if _is_named(folder / name)), None)
    if found is None:
        other = next((name for name in OTHER_FILES if _is_named(folder / name)), None)
        if other:
            raise DataError(
                f"{folder / other}: only {TOKENIZER_FILE}, {SENTENCEPIECE_FILE} and {RANKS_FILE} are read; "
                f"{HOW_TO_MAKE_TOKENIZER}"
            )
        return ""
    path = folder / found
    content = read_input(path, limit=MAX_BYTES, too_long=DataError)
    refuse_placeholder(path, content)
    known = _known(config, folder / "tokenizer_config.json")
    if found == TOKENIZER_FILE:
        text = _decoded(path, content)
    elif found == RANKS_FILE:
        text = _from_ranks(path, content, known)
    else:
        text = _from_sentencepiece(path, known)
    check_tokenizer(text, origin=str(path))
    return _with_missing_tokens(text, path, known)


def _is_named(path: Path) -> bool:
    """Whether the folder names this file; what a link to nowhere names is missing, not left out."""
    return os.path.lexists(path)


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from error


def _known(config: Mapping[str, Any], origin: Path) -> _Config:
    try:
        return msgspec.convert(config, _Config, strict=False)
    except (msgspec.ValidationError, RecursionError) as error:
        raise DataError(f"{origin}: {error}") from error


def _from_ranks(path: Path, content: bytes, known: _Config) -> str:
    pattern = find_pattern(path.parent, known.tokenizer_class or "")
    if not pattern:
        raise DataError(
            f"{path}: no file says how it divides a text (pat_str in tokenization_*.py); {HOW_TO_MAKE_TOKENIZER}"
        )
    added = {number: _added(token) for number, token in known.added_tokens_decoder.items()}
    try:
        return str(tokenizer_of_ranks(content, pattern, added).to_str())
    except Exception as error:
        raise DataError(f"{path}: not a list of tiktoken's ranks: {error}") from error


def _with_missing_tokens(text: str, path: Path, known: _Config) -> str:
    """The tokenizer with the tokens that only tokenizer_config.json has, as transformers adds them."""
    tokenizer = Tokenizer.from_str(text)
    present = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    declared = {token.content: number for number, token in sorted(known.added_tokens_decoder.items())}
    tokens = {token.content: token for _, token in sorted(known.added_tokens_decoder.items())}
    tokens = {token.content: token for token in known.named_tokens()} | tokens
    missing = [content for content in (*declared, *tokens) if content and content not in present]
    if not missing:
        return text
    tokenizer.add_tokens([_added(tokens[content]) for content in dict.fromkeys(missing)])
    for content, number in declared.items():
        if content in missing and tokenizer.token_to_id(content) != number:
            raise DataError(f"{path}: has no place for token {number} of tokenizer_config.json, {content!r}")
    return str(tokenizer.to_str())


def _added(token: _AddedToken) -> AddedToken:
    return AddedToken(
        token.content,
        lstrip=token.lstrip,
        normalized=token.normalized,
        rstrip=token.rstrip,
        single_word=token.single_word,
        special=token.special,
    )


def _from_sentencepiece(path: Path, known: _Config) -> str:
    """Converted by transformers, in a process and from a folder of its own with nothing else of the checkpoint."""
    if not all(map(find_spec, ("transformers", "sentencepiece"))):
        raise DataError(f"{path}: needs transformers and sentencepiece: bash jobs/setup.sh sentencepiece")
    said = {name: getattr(known, name) for name in ("add_bos_token", "add_eos_token", "legacy")}
    named = {name: _named(getattr(known, name)) for name in ("bos_token", "eos_token", "unk_token")}
    said |= {name: token.content for name, token in named.items() if token is not None}
    said["added_tokens_decoder"] = msgspec.to_builtins(known.added_tokens_decoder, str_keys=True)
    given = {name: value for name, value in said.items() if value is not None}
    with tempfile.TemporaryDirectory(prefix="moempi-") as made:
        folder = Path(made)
        shutil.copyfile(path, folder / SENTENCEPIECE_FILE)
        (folder / "tokenizer_config.json").write_bytes(msgspec.json.encode(given))
        offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": made}
        reply = ask(SENTENCEPIECE_CONVERSION, made, origin=str(path), environment=offline)
    if reply.error:
        raise DataError(
            f"{path}: cannot be converted: {reply.error.replace(made, str(path.parent))}; {HOW_TO_MAKE_TOKENIZER}"
        )
    return reply.text
