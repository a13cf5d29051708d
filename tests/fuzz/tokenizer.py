"""Tokenizers, and texts for them."""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import Tokenizer

from config.test_hub_configs import OLMOE
from fuzz.checkpoints import Model
from fuzz.mutation import damaged_text, mutated, to_json
from fuzz.seeds import TOKENIZER
from fuzz.subject import Subject, Use
from moempi.engine.tokenizer import TextTokenizer
from moempi.errors import DataError
from moempi.storage import tokenizer_files
from moempi.storage.checkpoint import open_checkpoint
from moempi.storage.tokenizer_check import check_tokenizer

TRIED_EVERY = 20


class TokenizerFile(Subject):
    """tokenizer.json: read with its checkpoint; texts become tokens, and tokens texts."""

    name = "tokenizer"
    file = "hub/tokenizer.json"
    named = ("hub/tokenizer.json", "tokenizer cannot")
    commands = ("convert hub out.h5",)

    def __init__(self, _: Path) -> None:
        model = Model(OLMOE)
        self.config, self.weights = to_json(model.config), model.file
        self.count = 0

    def write(self, random: Random) -> Any:
        folder = Path("hub")
        folder.mkdir()
        (folder / "config.json").write_bytes(self.config)
        (folder / "model.safetensors").write_bytes(self.weights)
        tree = random.choice(TOKENIZERS)
        if random.random() < 0.2:
            tree = tree | {"truncation": random.choice(TRUNCATIONS), "padding": random.choice(PADDINGS)}
        tree = mutated(random, tree)
        if random.random() < 0.4:
            _set_patterns(random, tree)
        text = to_json(tree)
        (folder / "tokenizer.json").write_bytes(damaged_text(random, text) if random.random() < 0.1 else text)
        return random.sample(INPUT_TEXTS, 4), [random.choice(TOKEN_LISTS), [random.randrange(200) for _ in range(5)]]

    def uses(self, known: tuple[list[str], list[list[int]]]) -> Sequence[Use]:
        return (lambda: self.encode(*known),)

    def encode(self, texts: list[str], tokens: list[list[int]]) -> None:
        self.count += 1
        tokenizer_files.check_tokenizer = _check_here if self.count % TRIED_EVERY else check_tokenizer
        tokenizer = TextTokenizer(open_checkpoint("hub").tokenizer, eos_tokens=(1,))
        for text in texts:
            tokenizer.decode(tokenizer.encode(text))
        for each in tokens:
            tokenizer.decode(each)


def _check_here(text: str, *, origin: str) -> None:
    """As `check_tokenizer`, without a process, which takes a tenth of a second."""
    try:
        Tokenizer.from_str(text)
    except BaseException as error:
        raise DataError(f"{origin}: not a tokenizer: {error}") from error


def _set_patterns(random: Random, tree: Any) -> None:
    """Replace regular expressions of a tokenizer."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == "Regex":
                tree[key] = random.choice(PATTERNS)
            else:
                _set_patterns(random, value)
    elif isinstance(tree, list):
        for entry in tree[:20]:
            _set_patterns(random, entry)


TRUNCATIONS = tuple(
    {"direction": "Right", "max_length": most, "strategy": "LongestFirst", "stride": stride}
    for most, stride in ((3, 0), (3, 5), (0, 0), (2**62, 0))
)
PADDINGS = tuple(
    {"direction": "Left", "strategy": strategy, "pad_to_multiple_of": multiple, "pad_id": 0, "pad_type_id": 0}
    | {"pad_token": "<pad>"}
    for strategy, multiple in (("BatchLongest", None), ("BatchLongest", 10**10), ({"Fixed": 10**10}, None))
)
PATTERNS = (
    "(a+)+$", "(a|a)*b", "(?:a?){30}a{30}", "", "(", r"\p{", r"[\x00-\x{10ffff}]*", "(?<=a{1,1000})b", "a{100000}",
    "((((a{100}){100}){100}){100})", "$", "^", "(?=)", r"\1(a)", r"(?:\s|\s)*x", r"(\w+\s?)+!", "(a|b|ab)*c", ".*.*.*=",
)  # fmt: skip
INPUT_TEXTS = (
    "",
    "é",
    "a" * 400,
    "ab ab_ <s> 12+34=",
    "\0\x1b",
    "▁ab",
    "a" * 30 + "!",
    "😀" * 20,
    " " * 300 + "y",
    "a b" * 100,
)
TOKEN_LISTS = ([0, 1, 2**31 - 1, 5, 99], [0, 0, 0], [], [2**31 - 1])
S_TOKEN = {
    "id": 0,
    "content": "<s>",
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}
TOKENIZERS: tuple[dict[str, Any], ...] = (
    TOKENIZER,
    {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [S_TOKEN],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFKC"}, {"type": "Replace", "pattern": {"Regex": " +"}, "content": "_"},
            {"type": "Prepend", "prepend": "_"}]},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\p{L}+|\d"}, "behavior": "Isolated", "invert": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "_"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "Unigram", "unk_id": 1, "byte_fallback": False, "vocab": [
            ["<s>", 0.0], ["<unk>", -1.0], ["a", -2.0], ["b", -3.0], ["ab", -2.5], ["_", -1.0], ["<0x41>", -9.0]]},
    },
    {
        "version": "1.0", "added_tokens": [S_TOKEN | {"id": 4}], "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": r"'s|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"},
             "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": "a", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {"a": 0, "b": 1, "ab": 2, "c": 3, "abab": 5}, "merges": [["a", "b"], "ab ab"]},
    },
    {
        "version": "1.0", "added_tokens": [],
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                       "strip_accents": None, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": {"[UNK]": 0, "a": 1, "[CLS]": 2, "[SEP]": 3, "##b": 4}},
    },
)  # fmt: skip

SUBJECTS = (TokenizerFile,)
