"""What transformers makes of the chats of tests/engine/chats.py. As a program, with the peers extra, it records them in
tests/chat_templates/expected.json: python tests/peers/chats.py
"""

import json
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from transformers import AutoTokenizer  # noqa: E402
from transformers.utils import chat_template_utils  # noqa: E402

from engine import chats  # noqa: E402


class FixedDay(datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime.fromisoformat(chats.DATE)


def load(folder: Path, style: str) -> Any:
    """The tokenizer of a style."""
    chat_template_utils.datetime = FixedDay
    chats.write_tokenizer(folder, style)
    return AutoTokenizer.from_pretrained(folder)


def apply(tokenizer: Any, chat: dict[str, Any], *, as_text: bool, **options: Any) -> Any:
    """The text or the tokens of a chat, None if the template refuses it."""
    variables = {"add_generation_prompt": True, **chat.get("chat_template_kwargs", {}), **options}
    if not as_text:
        variables["return_dict"] = False
    try:
        return tokenizer.apply_chat_template(
            chat["messages"], tools=chat.get("tools"), tokenize=not as_text, **variables
        )
    except Exception:
        return None


def record() -> None:
    """Write the texts of all chats in all styles."""
    expected = {}
    for style in chats.STYLES:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = load(Path(folder), style)
            expected[style] = {name: apply(tokenizer, chat, as_text=True) for name, chat in chats.CHATS.items()}
    text = json.dumps(expected, ensure_ascii=False, indent=1)
    (chats.FIXTURES / "expected.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()
