"""Text to tokens and back with a real tokenizer, and without one."""

import copy
import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models

from engine.requests import EOS, abacus_tokenizer, byte_tokenizer, byte_tokenizer_text
from moempi.engine.tokenizer import TextTokenizer
from moempi.errors import DataError
from mpirun import ROOT

TOKENIZER = json.loads((ROOT / "weights/abacus/tokenizer.json").read_text(encoding="utf-8"))
SPECIAL, PRIVATE = ("<s>", "<|end|>"), "\ufdd0\ufdd1"
LIBRARY = Tokenizer.from_str(byte_tokenizer_text(*SPECIAL))
CHARACTERS = [token for token in TOKENIZER["model"]["vocab"] if len(token) == 1]


@given(st.text(st.sampled_from(CHARACTERS), max_size=30))
def test_text_of_the_vocabulary_survives_encoding_and_decoding(text):
    tokenizer = abacus_tokenizer()
    tokens = tokenizer.encode(text)
    assert len(tokens) == len(text)
    assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize("special", TOKENIZER["added_tokens"], ids=lambda token: token["content"])
def test_a_special_token_spelled_out_in_a_prompt_is_that_token_or_as_asked_plain_text(special):
    text, one, two = f"1{special['content']}2", *(abacus_tokenizer().encode(digit) for digit in "12")
    assert abacus_tokenizer().encode(text) == [*one, special["id"], *two]
    plain = abacus_tokenizer(reads_special=False).encode(text)
    assert not {token["id"] for token in TOKENIZER["added_tokens"]} & set(plain)
    assert abacus_tokenizer().decode(plain) == text


PIECES = st.sampled_from([*SPECIAL, *"<|>ab \n", "日", "é", "<s", "end|>", *PRIVATE]) | st.text(max_size=4)


@given(st.lists(PIECES, max_size=12).map("".join))
def test_a_prompt_has_the_tokens_that_the_library_gives_with_special_tokens_on(text):
    assert byte_tokenizer(*SPECIAL).encode(text) == LIBRARY.encode(text).ids


@given(st.lists(st.integers(0, 255 + len(SPECIAL)), max_size=20))
def test_tokens_have_the_text_that_the_library_gives_with_special_tokens_or_without(tokens):
    for writes_special in (False, True):
        found = byte_tokenizer(*SPECIAL, writes_special=writes_special).decode(tokens)
        assert found == LIBRARY.decode(tokens, skip_special_tokens=not writes_special)


@given(st.text(), st.booleans())
def test_any_text_survives_encoding_and_decoding(text, reads_special):
    tokenizer = byte_tokenizer(*SPECIAL, reads_special=reads_special, writes_special=True)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_words_end_where_the_library_ends_them():
    """For every character that is assigned; a later Unicode may assign others."""
    library = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    library.add_special_tokens([AddedToken("§", single_word=True)])
    codes = (*range(0x3000), *range(0x1F100, 0x1F200), 0x4E00, 0xA9E6, 0x1D7CE, 0x20000, 0xE0100)
    characters = [chr(code) for code in codes if unicodedata.category(chr(code)) not in ("Cn", "Cs")]
    tokenizer = TextTokenizer(library.to_str(), eos_tokens=())
    found = [tokenizer.encode_chat(f"§{character}").count(1) for character in characters]
    assert found == [library.encode(f"§{character}").ids.count(1) for character in characters]


@pytest.mark.parametrize("kinds", [{}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}], ids=str)
@given(pieces=st.lists(st.tuples(st.booleans(), PIECES), max_size=10))
def test_of_a_chat_only_the_parts_that_are_not_quoted_have_special_tokens(kinds, pieces):
    """As the library gives the whole text, if each special token in a quoted part is of signs that no other has."""
    tokenizer = TextTokenizer(byte_tokenizer_text(*SPECIAL, **kinds), eos_tokens=())
    library = Tokenizer.from_str(byte_tokenizer_text(*SPECIAL, **kinds))
    if any(private in piece for _, piece in pieces for private in PRIVATE):
        return
    chat = "".join(tokenizer.quote(piece) if quoted else piece for quoted, piece in pieces)
    swapped = chat
    for number in range(len(SPECIAL)):
        swapped = swapped.replace(f"\ufdd0{256 + number}\ufdd0", "→" if number else "§")
    tokens = library.encode(swapped, add_special_tokens=False).ids
    found = tokenizer.encode_chat(chat)
    assert [token for token in found if token > 255] == [token for token in tokens if token > 255]
    if not any("→" in piece or "§" in piece for _, piece in pieces):
        spelled = tokenizer.decode(tokens).replace("→", SPECIAL[1]).replace("§", SPECIAL[0])
        assert tokenizer.decode(found) == spelled


@pytest.mark.parametrize("private", PRIVATE)
def test_a_chat_with_the_code_points_of_quotes_is_a_data_error(private):
    with pytest.raises(DataError, match=r"U\+FDD"):
        byte_tokenizer(*SPECIAL).quote(f"a{private}5")


def test_decoding_leaves_special_tokens_out():
    tokenizer = abacus_tokenizer()
    assert tokenizer.decode([EOS, *tokenizer.encode("7+"), 0, *tokenizer.encode("5"), EOS]) == "7+5"


def test_a_character_beyond_the_vocabulary_becomes_the_unknown_token():
    assert abacus_tokenizer().encode("1é") == [*abacus_tokenizer().encode("1"), TOKENIZER["model"]["vocab"]["<unk>"]]


def test_a_tokenizer_whose_template_has_a_begin_token_puts_it_before_each_prompt():
    begin = {"SpecialToken": {"id": "<pad>", "type_id": 0}}
    template = TOKENIZER["post_processor"] | {
        "single": [begin, *TOKENIZER["post_processor"]["single"]],
        "special_tokens": {"<pad>": {"id": "<pad>", "ids": [0], "tokens": ["<pad>"]}},
    }
    tokenizer = TextTokenizer(json.dumps(TOKENIZER | {"post_processor": template}), eos_tokens=())
    assert tokenizer.encode("12") == [0, *abacus_tokenizer().encode("12")]


def test_an_empty_text_has_no_tokens():
    assert abacus_tokenizer().encode("") == []
    assert abacus_tokenizer().decode([]) == ""


def test_without_a_tokenizer_text_is_refused_and_tokens_have_no_text():
    tokenizer = TextTokenizer("", eos_tokens=(5, 7, 5))
    with pytest.raises(DataError, match="holds no tokenizer; give the prompt as tokens"):
        tokenizer.encode("12")
    assert tokenizer.decode([1, 2, 3]) == ""
    assert tokenizer.eos_tokens == {5, 7}


def failing_tokenizer(kind):
    """The shipped tokenizer with a part that raises an Exception, or panics, when it is used."""
    tree = copy.deepcopy(TOKENIZER)
    if kind == "panic":  # a template that inserts a special token which it does not define
        template = {"SpecialToken": {"id": "<s>", "type_id": 0}}
        sequence = {"Sequence": {"id": "A", "type_id": 0}}
        tree["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [template, sequence],
            "pair": [],
            "special_tokens": {"other": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        }
    else:
        tree["model"] = {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "vocab": {"a": 0},
        }
        tree["model"]["max_input_chars_per_word"] = 100
    return json.dumps(tree)


PADDING = {"direction": "Right", "pad_to_multiple_of": 1 << 30, "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}


@pytest.mark.parametrize("side", ["Left", "Right"])
@pytest.mark.parametrize("length", [3, 40, 10**9])
def test_a_prompt_is_neither_truncated_nor_padded(side, length):
    truncation = {"direction": side, "max_length": length, "strategy": "LongestFirst", "stride": 0}
    padding = PADDING | {"direction": side, "strategy": {"Fixed": length}}
    tokenizer = TextTokenizer(json.dumps(TOKENIZER | {"truncation": truncation, "padding": padding}), eos_tokens=())
    assert tokenizer.encode("12+34=") == abacus_tokenizer().encode("12+34=")


@pytest.mark.parametrize("text", ["{}", "[", "\0", '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'])
def test_a_text_that_is_no_tokenizer_is_a_data_error_that_names_the_weight_file(text):
    with pytest.raises(DataError, match=r"^model\.h5: its tokenizer cannot be read: \S"):
        TextTokenizer(text, eos_tokens=(), origin="model.h5")


@pytest.mark.parametrize("kind", ["panic", "exception"])
def test_a_text_that_the_tokenizer_cannot_take_is_a_data_error_with_its_reason(kind, capfd):
    tokenizer = TextTokenizer(failing_tokenizer(kind), eos_tokens=())
    with pytest.raises(DataError, match=r"the tokenizer cannot encode the prompt: \S") as refused:
        tokenizer.encode("zz")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


def test_tokens_that_the_tokenizer_cannot_decode_are_a_data_error(monkeypatch):
    class Panic(BaseException):
        """Like the panics of the tokenizer's library, no Exception."""

    class Broken:
        encode_special_tokens = True

        def decode(self, tokens, *, skip_special_tokens):
            raise Panic("no such token\nat line 3")

    tokenizer = abacus_tokenizer()
    monkeypatch.setattr(tokenizer, "_tokenizer", Broken())
    with pytest.raises(DataError, match=r"^the tokenizer cannot decode the tokens: no such token$"):
        tokenizer.decode([1])


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_while_a_text_is_tokenized_stays_an_interrupt(interrupt, monkeypatch):
    class Interrupted:
        def encode(self, text):
            raise interrupt

    tokenizer = abacus_tokenizer()
    monkeypatch.setattr(tokenizer, "_tokenizer", Interrupted())
    with pytest.raises(interrupt):
        tokenizer.encode("1")
