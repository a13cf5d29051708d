"""Strings are printed as they are, in lines and in every part of a table."""

import io

import pytest
from rich.table import Column, Table

from hostile import HOSTILE, MARKUP, STYLE, assert_printable
from moempi.observe.console import MAX_TEXT_LENGTH, PlainConsole


def printed(*renderables, terminal=False, **options):
    screen = io.StringIO()
    colours = "truecolor" if terminal else None
    console = PlainConsole(file=screen, width=2000, force_terminal=terminal, color_system=colours)
    console.print(*renderables, **options)
    return screen.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_no_part_of_a_table_is_interpreted(terminal):
    table = Table(f"head {HOSTILE}", title=f"title {HOSTILE}", caption=f"caption {HOSTILE}")
    table.add_column("footed", footer=f"foot {HOSTILE}")
    table.show_footer = True
    table.add_row(f"cell {HOSTILE}", MARKUP)
    text = printed(table, f"line {HOSTILE}", terminal=terminal)
    assert ("\x1b[" in text) == terminal
    plain = STYLE.sub("", text)
    assert_printable(plain)
    for part in ("head", "title", "caption", "foot", "cell", "line"):
        assert f"{part} a\\x01" in plain
    assert plain.count(MARKUP) == 7
    assert len({len(line) for line in plain.splitlines() if line.startswith("│")}) == 1


def test_a_call_cannot_turn_markup_on():
    assert printed("[red]:smile: 1[/red]", markup=True, emoji=True, highlight=True) == "[red]:smile: 1[/red]\n"


def test_a_giant_string_is_cut_in_its_middle():
    text = printed("begin" + "\x1b" * 10_000_000 + "end", soft_wrap=True)
    assert text.startswith("begin\\x1b")
    assert text.endswith("\\x1bend\n")
    assert len(text) < 5 * MAX_TEXT_LENGTH


def test_a_table_that_must_not_be_wrapped_becomes_lines_where_it_does_not_fit():
    table = Table(
        Column("rank", no_wrap=True), Column("bytes sent", no_wrap=True), title="a title", caption="a caption"
    )
    table.add_row("0", "1.00 MiB" * 8)
    table.add_row("1", "[red]2")
    screen = io.StringIO()
    PlainConsole(file=screen, width=80).print(table)
    assert "│" in screen.getvalue()
    narrow = io.StringIO()
    PlainConsole(file=narrow, width=40).print(table, soft_wrap=True)
    assert narrow.getvalue().splitlines() == [
        "a title",
        "rank 0, bytes sent " + "1.00 MiB" * 8,
        "rank 1, bytes sent [red]2",
        "a caption",
    ]
