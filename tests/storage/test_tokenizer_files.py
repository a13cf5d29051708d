"""Tokenizers of checkpoints in other files than tokenizer.json, beside the libraries of their formats."""

import base64
import io
import json
import re
import unicodedata
from collections import Counter
from functools import cache
from itertools import pairwise
from random import Random

import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from engine.requests import byte_tokenizer_text
from moempi.errors import DataError
from moempi.storage import tokenizer_files
from moempi.storage.tiktoken_ranks import KIMI_PATTERN
from moempi.storage.tokenizer_files import read_tokenizer
from mpirun import ROOT

WORDS = (
    "the quick brown fox jumps over lazy dogs 日本語 été naïve 12 345 hello World ÜNÏ мир abc abcabc don't it's aaaa"
)
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
SPACES = ["", " ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "▁"]
PIECES = st.sampled_from(
    [*WORDS.split(), *SPACES, *"aàbAB日語мё12٣½ﬁ😀.,;!?<|>'", "e\u0301", "\u200d", "1234567", "'S", "'ll", "\0"]
) | st.text(max_size=3)
MARKS = {"Mn", "Mc", "Me", "Cf"}
TEXTS = st.lists(PIECES, max_size=14).map("".join)


def corpus():
    random = Random(1)
    words = random.choices(WORDS.split(), k=6000)
    return [" ".join(shuffled(random, word) for word in words[start : start + 10]) for start in range(0, 6000, 10)]


def shuffled(random, word):
    return word if random.random() < 0.5 else "".join(random.sample(word, len(word))) + random.choice("abc ")


def added(content, special=True):
    plain = dict.fromkeys(["lstrip", "normalized", "rstrip", "single_word"], False)
    return {"content": content, "special": special} | plain


def sentencepiece_model(**settings):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, hard_vocab_limit=False, minloglevel=3, **settings
    )
    return model.getvalue()


LIKE_LLAMA = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
MODELS = {
    "as of Llama": {"model_type": "bpe", "vocab_size": 440, "split_digits": True} | LIKE_LLAMA,
    "without a space before": {"model_type": "bpe", "vocab_size": 440, "add_dummy_prefix": False} | LIKE_LLAMA,
    "normalized": {"model_type": "bpe", "vocab_size": 220},
    "user's symbols": {"model_type": "bpe", "vocab_size": 440, "user_defined_symbols": ["<sep>", "fox"]} | LIKE_LLAMA,
    "unigram": {"model_type": "unigram", "vocab_size": 220},
    "unigram of bytes": {"model_type": "unigram", "vocab_size": 440} | LIKE_LLAMA,
}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS.keys())
def converted(request, tmp_path_factory):
    """A SentencePiece model, the tokenizer that it becomes, and whether they replace characters by others."""
    folder, model = tmp_path_factory.mktemp("hub"), sentencepiece_model(**request.param)
    (folder / "tokenizer.model").write_bytes(model)
    tokenizer = Tokenizer.from_str(read_tokenizer(folder, NAMED))
    normalizes = "normalization_rule_name" not in request.param
    return sentencepiece.SentencePieceProcessor(model_proto=model), tokenizer, normalizes


@settings(deadline=None, max_examples=400)
@given(text=TEXTS)
def test_a_text_has_the_tokens_of_sentencepiece_and_these_its_text(converted, text):
    """Two divisions of a text into pieces may be equally likely in a unigram model: then the scores are equal.

    `tokenizers` drops a combining mark of a character that the model replaces by another.
    """
    original, tokenizer, normalizes = converted
    if re.search(r"<0x..>|</?s>|<unk>", text) or (normalizes and MARKS & set(map(unicodedata.category, text))):
        return
    expected, found = original.encode(text), tokenizer.encode(text).ids
    if found != expected:
        assert sum(map(original.get_score, found)) == pytest.approx(sum(map(original.get_score, expected)))
        assert original.decode(found) == original.decode(expected)
    elif original.unk_id() not in expected:
        assert tokenizer.decode(expected) == original.decode(expected)


@pytest.mark.parametrize("adds", [{}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}])
def test_begin_and_end_tokens_and_added_tokens_are_those_of_the_configuration(tmp_path, adds):
    (tmp_path / "tokenizer.model").write_bytes(model := sentencepiece_model(**MODELS["as of Llama"]))
    size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    decoder = {str(size): added("<|im_end|>"), str(size + 1): added("<tool>", special=False)}
    config = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": decoder} | NAMED | adds
    tokenizer = Tokenizer.from_str(read_tokenizer(tmp_path, config))
    begin, end = [1] * ("add_bos_token" in adds), [2] * ("add_eos_token" in adds)
    plain = tokenizer.encode("fox", add_special_tokens=False).ids
    assert tokenizer.encode("fox").ids == begin + plain + end
    assert tokenizer.encode("fox<|im_end|><tool></s>", add_special_tokens=False).ids == [*plain, size, size + 1, 2]


NUM_MERGES = 250


@cache
def ranks():
    """Byte sequences in the order in which they are merged, of the corpus divided by the pattern."""
    found = {bytes([byte]): byte for byte in range(256)}
    division = tiktoken.Encoding("words", pat_str=KIMI_PATTERN, mergeable_ranks=found, special_tokens={})
    words = Counter()
    for line in corpus():
        for word in re.findall(r" ?[^ ]+", line):
            words[tuple(bytes([token]) for token in division.encode(word))] += 1
    for _ in range(NUM_MERGES):
        pairs = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        found[b"".join(best)] = len(found)
        words = Counter({merged(word, best): count for word, count in words.items()})
    return found


def merged(word, pair):
    parts, out = list(word), []
    while parts:
        cut = 2 if tuple(parts[:2]) == pair else 1
        out.append(b"".join(parts[:cut]))
        del parts[:cut]
    return tuple(out)


def write_ranks(folder, found):
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in found.items()]
    (folder / "tiktoken.model").write_bytes(b"".join(lines))


NUM_RANKS = 256 + NUM_MERGES
SPECIAL = {"[BOS]": NUM_RANKS, "[EOS]": NUM_RANKS + 1, "<|im_end|>": NUM_RANKS + 2, "[PAD]": NUM_RANKS + 7}
RESERVED = {f"<|reserved_token_{number}|>": number for number in range(NUM_RANKS + 3, NUM_RANKS + 7)}
KIMI = {
    "tokenizer_class": "TikTokenTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
    "added_tokens_decoder": {str(number): added(text) for text, number in SPECIAL.items()},
}


@pytest.fixture(scope="module")
def kimi(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kimi")
    write_ranks(folder, ranks())
    (folder / "tokenization_kimi.py").write_text("raise SystemExit('this file ran')\n")
    encoding = tiktoken.Encoding(
        "kimi", pat_str=KIMI_PATTERN, mergeable_ranks=ranks(), special_tokens=SPECIAL | RESERVED
    )
    return encoding, Tokenizer.from_str(read_tokenizer(folder, KIMI))


@settings(deadline=None, max_examples=1000)
@given(text=st.lists(PIECES | st.sampled_from([*SPECIAL, *RESERVED, "<|im", "[PAD"]), max_size=14).map("".join))
def test_a_text_has_the_tokens_of_tiktoken_and_these_its_text(kimi, text):
    encoding, tokenizer = kimi
    tokens = encoding.encode(text, allowed_special="all")
    assert tokenizer.encode(text).ids == tokens
    assert tokenizer.decode(tokens, skip_special_tokens=False) == encoding.decode(tokens) == text
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode(text).ids == encoding.encode(text, disallowed_special=())
    tokenizer.encode_special_tokens = False


@given(tokens=st.lists(st.integers(0, NUM_RANKS + 7), max_size=20))
def test_any_tokens_have_the_text_of_tiktoken(kimi, tokens):
    encoding, tokenizer = kimi
    assert tokenizer.decode(tokens, skip_special_tokens=False) == encoding.decode(tokens)


CODE = {
    "a literal": 'class Own:\n    pat_str = r"a|[^a]+"\n',
    "a join": 'class Own:\n    pat_str: str = "|".join(["a", r"[^a]+"])\nraise SystemExit\n',
}


@pytest.mark.parametrize("code", CODE.values(), ids=CODE.keys())
def test_the_pattern_in_the_python_file_of_the_checkpoint_is_read_and_the_file_is_not_run(tmp_path, code):
    write_ranks(tmp_path, ranks())
    (tmp_path / "tokenization_own.py").write_text(code)
    tokenizer = Tokenizer.from_str(read_tokenizer(tmp_path, KIMI | {"tokenizer_class": "Own"}))
    encoding = tiktoken.Encoding("own", pat_str="a|[^a]+", mergeable_ranks=ranks(), special_tokens={})
    for text in ("abcabc the fox", "aaaa 日本語 12345"):
        assert tokenizer.encode(text).ids == encoding.encode(text)


@pytest.mark.parametrize("code", [None, "pat_str = make()", "def broken(", "x = 1", "(" * 5000, "\0"])
def test_ranks_without_a_pattern_are_refused_with_what_to_do(tmp_path, code):
    write_ranks(tmp_path, ranks())
    if code is not None:
        (tmp_path / "tokenization_own.py").write_text(code)
    with pytest.raises(DataError, match=r"tiktoken\.model: no file says how it divides a text .* let transformers"):
        read_tokenizer(tmp_path, {"tokenizer_class": "Own"})


BAD_RANKS = {
    b"": "it has no ranks",
    b"YQ== x\n": "line 1 is not a token",
    b"YQ==\n": "line 1 is not a token",
    b"!! 0\n": "line 1 is not a token",
    b"YQ== 0\n\nYg== 0\n": "its 2 ranks are not the numbers from 0 to 1",
    b"YQ== 5\n": "its 1 ranks",
    b"\xff\xfe 0\n": "line 1 is not a token",
}


@pytest.mark.parametrize(("content", "reason"), BAD_RANKS.items())
def test_a_file_that_is_no_list_of_ranks_is_refused(tmp_path, content, reason):
    (tmp_path / "tiktoken.model").write_bytes(content)
    with pytest.raises(DataError, match=rf"tiktoken\.model: not a list of tiktoken's ranks: {re.escape(reason)}"):
        read_tokenizer(tmp_path, {"tokenizer_class": "TikTokenTokenizer"})


@pytest.mark.parametrize("number", [-1, 3, 2**40])
def test_an_added_token_that_the_ranks_do_not_fit_is_refused(tmp_path, number):
    write_ranks(tmp_path, ranks())
    with pytest.raises(DataError, match=f"tokenizer_config.json has .*{number}"):
        read_tokenizer(tmp_path, KIMI | {"added_tokens_decoder": {str(number): added("<|x|>")}})


@pytest.mark.parametrize("decoder", [[], {"x": added("a")}, {"1": {"content": 5}}, {"1": "a"}])
def test_added_tokens_of_another_form_are_refused(tmp_path, decoder):
    write_ranks(tmp_path, ranks())
    with pytest.raises(DataError, match=r"tokenizer_config\.json: "):
        read_tokenizer(tmp_path, KIMI | {"added_tokens_decoder": decoder})


@pytest.mark.parametrize("content", [b"", b"\0", b"not a model", b"\n\x05" + b"\xff" * 100])
def test_a_file_that_is_no_sentencepiece_model_is_refused(tmp_path, content, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "utf-16")
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(DataError, match=rf"{tmp_path}/tokenizer\.model: cannot be converted: \S") as refused:
        read_tokenizer(tmp_path, NAMED)
    assert "\n" not in str(refused.value)
    assert "/moempi-" not in str(refused.value)


def test_without_the_libraries_a_sentencepiece_model_is_refused_with_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"\0")
    monkeypatch.setattr(tokenizer_files, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"tokenizer\.model: needs .*: bash jobs/setup\.sh sentencepiece"):
        read_tokenizer(tmp_path, NAMED)


def replaced(pattern, content, count):
    rule = {"type": "Replace", "pattern": pattern, "content": content}
    return {"type": "Sequence", "normalizers": [rule] * count, "decoders": [rule] * count}


HOSTILE = {
    "a text grows": {"normalizer": replaced({"String": "1"}, "1" * 1000, 5)},
    "a rare text grows": {"normalizer": replaced({"String": "xyz"}, "xyz" * 1000, 5)},
    "a rare character grows": {"normalizer": replaced({"Regex": "[\u4e11]"}, "\u4e11" * 1000, 5)},
    "an empty text grows": {"normalizer": replaced({"Regex": ""}, "1" * 1000, 5)},
    "decoded text grows": {"decoder": replaced({"String": "1"}, "1" * 1000, 4)},
}


@pytest.mark.parametrize("rules", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_tokenizer_that_would_end_the_process_is_refused(tmp_path, rules):
    tree = json.loads((ROOT / "weights/abacus/tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree | rules))
    with pytest.raises(DataError, match=r"tokenizer\.json: not a usable tokenizer: it (needs too much|takes too long)"):
        read_tokenizer(tmp_path, {})


NAMED_TOKEN = {"__type": "AddedToken"}
ONLY_CONFIGURED = {
    "added tokens": {"added_tokens_decoder": {"258": added("<end>"), "259": added("<tool>", special=False)}},
    "named tokens": {
        "pad_token": "<pad>",
        "eos_token": NAMED_TOKEN | added("<s>"),
        "mask_token": NAMED_TOKEN | added("<mask>"),
    },
    "special tokens": {"additional_special_tokens": ["<x>", NAMED_TOKEN | added("<y>"), "<s>"]},
    "all": {
        "added_tokens_decoder": {"258": added("<y>"), "259": added("<pad>") | {"lstrip": True}},
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "additional_special_tokens": ["<x>", "<y>"],
    },
    "none": {"bos_token": None, "additional_special_tokens": [], "added_tokens_decoder": {"256": added("<s>")}},
}


@pytest.mark.parametrize("config", ONLY_CONFIGURED.values(), ids=ONLY_CONFIGURED.keys())
def test_tokens_that_only_the_configuration_has_are_those_of_transformers(tmp_path, config):
    from transformers import TokenizersBackend  # takes seconds

    (tmp_path / "tokenizer.json").write_text(byte_tokenizer_text("<s>", "<|end|>"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    expected = TokenizersBackend.from_pretrained(tmp_path, local_files_only=True)
    tokenizer = Tokenizer.from_str(read_tokenizer(tmp_path, config))
    random = Random(2)
    texts = ["<s>", "<|end|>", "<end>", "<tool>", "<pad>", "<mask>", "<x>", "<y>", "a", " ", "日", "<"]
    for _ in range(300):
        text = "".join(random.choices(texts, k=6))
        tokens = tokenizer.encode(text).ids
        assert tokens == expected(text)["input_ids"]
        assert tokenizer.decode(tokens) == expected.decode(tokens, skip_special_tokens=True)


def test_an_added_token_for_whose_number_there_is_no_place_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer_text("<s>"))
    with pytest.raises(DataError, match=r"tokenizer\.json: has no place for token 300 of .* '<x>'"):
        read_tokenizer(tmp_path, {"added_tokens_decoder": {"300": added("<x>")}})
