"""Lines are one line of printable characters, whatever text they quote."""

import mpirun as launching
from hostile import CONTROLS, HOSTILE, INVISIBLE, MARKUP, assert_printable
from moempi.printing import MAX_LINE_LENGTH, MAX_WORD_LENGTH, one_line, print_traceback, printable


def test_every_unprintable_character_is_escaped():
    assert printable("a\0\r\n\t\x1b[2J\x7f\x9b\u202e\u2028\udcff\U000e0001") == (
        r"a\x00\r\n\t\x1b[2J\x7f\x9b\u202e\u2028\udcff\U000e0001"
    )
    for text in (CONTROLS, INVISIBLE):
        assert printable(text).isprintable()


def test_printable_text_is_unchanged():
    for text in ("", MARKUP, "C:\\new", "é 漢字 \U0001f9ee"):
        assert printable(text) == text


def test_a_line_has_no_line_ends():
    assert one_line(" line 3\r\n\tis\u2028torn\x1b ") == r"line 3 is torn\x1b"


def test_long_words_and_lines_are_cut_in_the_middle():
    path = f"/begin/{'n' * 300}/end.h5:"
    line = one_line(f"{path} cannot be read")
    assert line.startswith("/begin/nnn")
    assert line.endswith("nnn/end.h5: cannot be read")
    assert len(line) <= MAX_WORD_LENGTH + len(" cannot be read")
    for text in ("word " * 1000, "\x1b" * 1000 + " " + "\x1b" * 1000):
        assert len(one_line(text)) <= MAX_LINE_LENGTH


def test_a_traceback_keeps_its_lines_alone(capsys):
    try:
        raise ValueError(HOSTILE)
    except ValueError as error:
        print_traceback(error)
    err = capsys.readouterr().err
    assert_printable(err)
    assert err.startswith("Traceback (most recent call last):\n")
    assert err.endswith(f"{MARKUP}z\n")


def test_a_terminal_that_is_not_utf8_gets_escapes():
    program = """
from moempi import printing
printing.escape_unencodable()
printing.print_line("é \\u202e")
printing.write_error("é \\u202e")
"""
    outcome = launching.execute(*launching.python("-c", program), PYTHONIOENCODING="ascii")
    assert (outcome.code, outcome.out, outcome.err) == (0, "\\xe9 \\u202e\n", "moempi: \\xe9 \\u202e\n")
