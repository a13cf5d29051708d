"""The process that converts a SentencePiece model with transformers: python sentencepiece_conversion.py FOLDER.

FOLDER has tokenizer.model and tokenizer_config.json. stdout gets {"text": ...}, a tokenizer.json, or {"error": ...}.
The tokens of the converted tokenizer are compared with SentencePiece's for texts of all pieces.
"""

import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moempi.storage.tokenizer_trial import reply

MEMORY_BYTES = 8 << 30
LIMIT_S = 600
PIECES = 40
"""Pieces in each text that is compared."""
MAX_SHOWN = 60
TEXTS = (
    "",
    " ",
    "  a  b ",
    "a\nb\t c",
    "12345 1,234.5",
    "日本語 é😀 ñ",
    "\u00a0x\u3000y",
    "▁a ▁",
    "ﬁ Ⅳ ½",
    "\u0301e\u200d",
)


def main(folder: str) -> None:
    """Convert the model in a folder."""
    for kind, value in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CPU, LIMIT_S), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
    try:
        reply({"text": convert(Path(folder))})
    except BaseException as error:  # also a panic of a library
        reply({"error": str(error).strip().partition("\n")[0] or type(error).__name__})


def convert(folder: Path) -> str:
    """The text of a tokenizer.json; raises ValueError if it gives other tokens than SentencePiece."""
    from sentencepiece import SentencePieceProcessor
    from transformers import TokenizersBackend

    original = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    converted = TokenizersBackend.from_pretrained(folder, local_files_only=True).backend_tokenizer
    special = {token.content for token in converted.get_added_tokens_decoder().values()}
    for text in _probes(original, special):
        text = f"x{text}"  # `legacy` is about the space before a text
        if converted.encode(text, add_special_tokens=False).ids != original.encode(text):
            raise ValueError(f"transformers gives other tokens than SentencePiece for {text[:MAX_SHOWN]!r}")
    return str(converted.to_str())


def _probes(original: Any, special: set[str]) -> Iterator[str]:
    yield from TEXTS
    texts = (token for token in range(original.get_piece_size()) if not original.is_byte(token))
    pieces = [original.id_to_piece(token).replace("▁", " ") for token in texts]
    for start in range(0, len(pieces), PIECES):
        text = "".join(piece for piece in pieces[start : start + PIECES] if piece not in special)
        if not any(token in text for token in special):
            yield text


if __name__ == "__main__":
    main(*sys.argv[1:])
