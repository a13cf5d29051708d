"""Changes of trees (what JSON and TOML hold), of their texts, and of bytes; and the writers of those texts."""

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any


class Raw(str):
    """Text that the writers copy as it is, for values that no Python object has."""

    __slots__ = ()


HUGE = (2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30)
NUMBERS = (0, 1, 2, 3, 7, 64, 1000, -1, -(2**31), -(2**63), *HUGE, *(-number for number in HUGE))
FLOATS = (0.0, -0.0, 0.5, 1.5, 1e-9, 5e-324, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf"))
TEXTS = (
    "", "a", "x" * 300, "é" * 5, "\0", "a\0b", "\x1b[31m", "[/red]", "\ufeffa", "\ud7ff", "١", "9" * 400, "../x", "."
)  # fmt: skip
RAW = tuple(
    map(Raw, ("9" * 5000, "-" + "9" * 5000, "1e999", '"\\ud800"', '"\\udfff\\ud800"', "[" * 3000, '{"a":' * 3000))
)
OTHERS = (True, False, None, [], {}, [[]], [0], [-1], [2**63], [[0, 1], [2]], {"a": 1}, ["a"], [1] * 2000)
KEYS = ("x", "", "__proto__", "a.b", "\x1b[2J", "[/b]", "k" * 5000, "é", "a\0b", "version")
BOUNDARIES = tuple(number.to_bytes(8, "little") for number in (0, 1, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1))
NOT_UTF8 = (b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\xf5\x80\x80\x80", b"\xe2\x82")

REPEATED = (b"[", b'{"a":', b"{a=", b'"', b"a.", b"\n", b" ")
ENDS = (b"\n" * 5000, b" " * 5000, b"\0" * 50, b"{}", b"]", b"#" + b"c" * 300_000, b"\n\n\r\n\t")

Path = tuple[Any, ...]


def any_value(random: Random) -> Any:
    """A value of any kind that is likely to be wrong somewhere."""
    return copy.deepcopy(random.choice(random.choice((NUMBERS, FLOATS, TEXTS, RAW, OTHERS))))


def changed_number(random: Random, value: float) -> Any:
    """A number near a number, or far from it."""
    near = (value + 1, value - 1, value * 2, -value, value // 2 if isinstance(value, int) else value / 3, 0, 1)
    return random.choice(near if random.random() < 0.7 else (*NUMBERS, *FLOATS, value * 1000))


def mutated(random: Random, tree: Any, *, changes: int | None = None) -> Any:
    """A copy of a tree with none, one or several changes at random places."""
    tree = copy.deepcopy(tree)
    for _ in range(random.choice((0, 0, 1, 1, 1, 2, 3)) if changes is None else changes):
        places = [place for place in paths(tree) if place]
        if not places:
            return tree
        *parents, last = random.choice(places)
        owner = tree
        for key in parents:
            owner = owner[key]
        random.choice(CHANGES)(random, tree, owner, last)
    return tree


def paths(tree: Any, path: Path = ()) -> list[Path]:
    """The places of a tree; of a long list only some."""
    found = [path]
    if isinstance(tree, dict):
        for key in tree:
            found += paths(tree[key], (*path, key))
    elif isinstance(tree, list):
        for index in range(min(len(tree), 20)):
            found += paths(tree[index], (*path, index))
    return found


def replace_near(random: Random, _: Any, owner: Any, key: Any) -> None:
    value = owner[key]
    if isinstance(value, bool):
        owner[key] = not value
    elif isinstance(value, int | float):
        owner[key] = changed_number(random, value)
    elif isinstance(value, str):
        owner[key] = (
            Raw(value) if isinstance(value, Raw) else random.choice((value + "x", value[:-1], value.upper(), *TEXTS))
        )
    elif isinstance(value, list) and value:
        change_list(random, value)
    else:
        owner[key] = any_value(random)


def change_list(random: Random, values: list[Any]) -> None:
    match random.randrange(6):
        case 0:
            values.append(copy.deepcopy(random.choice(values)))
        case 1:
            values.pop(random.randrange(len(values)))
        case 2:
            values.reverse()
        case 3:
            values.extend(values[:500])
        case 4:
            values[random.randrange(len(values))] = any_value(random)
        case _:
            values.insert(0, values.pop())


def replace(random: Random, _: Any, owner: Any, key: Any) -> None:
    owner[key] = any_value(random)


def delete(_: Random, __: Any, owner: Any, key: Any) -> None:
    del owner[key]


def rename(random: Random, _: Any, owner: Any, key: Any) -> None:
    if isinstance(owner, dict):
        owner[random.choice((*KEYS, f"{key}s", str(key).upper(), str(key)[:-1]))] = owner.pop(key)


def add(random: Random, _: Any, owner: Any, __: Any) -> None:
    if isinstance(owner, dict):
        owner[random.choice(KEYS)] = any_value(random)
    else:
        owner.append(any_value(random))


def graft(random: Random, tree: Any, owner: Any, key: Any) -> None:
    """Put a copy of what is elsewhere in the tree here."""
    source = tree
    for step in random.choice(paths(tree)):
        source = source[step]
    owner[key] = copy.deepcopy(source)


def wrap(random: Random, _: Any, owner: Any, key: Any) -> None:
    value = owner[key]
    owner[key] = random.choice(
        ([value], {"a": value}, [value, value], str(value) if not isinstance(value, Raw) else value)
    )


def swap(random: Random, _: Any, owner: Any, key: Any) -> None:
    other = random.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
    owner[key], owner[other] = owner[other], owner[key]


CHANGES: tuple[Callable[[Random, Any, Any, Any], None], ...] = (
    replace_near, replace_near, replace_near, replace_near, replace, replace, delete, rename, add, graft, wrap, swap
)  # fmt: skip


def to_json(tree: Any) -> bytes:
    """JSON, with bare NaN and Infinity where a tree holds them."""
    return _json(tree).encode(errors="surrogatepass")


def _json(tree: Any) -> str:
    if isinstance(tree, Raw):
        return str(tree)
    if isinstance(tree, dict):
        return "{" + ",".join(f"{json.dumps(str(key))}:{_json(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, list | tuple):
        return "[" + ",".join(map(_json, tree)) + "]"
    return json.dumps(tree, ensure_ascii=False)


def to_toml(random: Random, tree: dict[str, Any]) -> bytes:
    """TOML; a section is a table, dotted keys or an inline table."""
    plain, tables = [], []
    for key, value in tree.items():
        if not isinstance(value, dict):
            plain.append(f"{_key(key)} = {_toml(value)}")
            continue
        match random.randrange(3):
            case 0:
                plain.append(f"{_key(key)} = {_toml(value)}")
            case 1:
                plain += [f"{_key(key)}.{_key(name)} = {_toml(entry)}" for name, entry in value.items()]
            case _:
                tables.append(f"[{_key(key)}]")
                tables += [f"{_key(name)} = {_toml(entry)}" for name, entry in value.items()]
    return ("\n".join(plain + tables) + "\n").encode(errors="surrogatepass")


def _key(key: Any) -> str:
    text = str(key)
    return text if text.isidentifier() and text.isascii() else json.dumps(text)


def _toml(value: Any) -> str:
    match value:
        case Raw():
            return str(value)
        case bool():
            return str(value).lower()
        case dict():
            return "{" + ", ".join(f"{_key(key)} = {_toml(entry)}" for key, entry in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(_toml, value)) + "]"
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case None:
            return '"null"'
        case _:
            return str(value)


def damaged_text(random: Random, text: bytes) -> bytes:
    """A text with one change that no tree can express."""
    at = random.randrange(len(text) + 1)
    lines = text.splitlines(keepends=True) or [b""]
    line = random.randrange(len(lines))
    match random.randrange(13):
        case 0:
            return b"\xef\xbb\xbf" + text
        case 1:
            return text.replace(b"\n", b"\r\n")
        case 2:
            return text[:at] + random.choice(NOT_UTF8) + text[at:]
        case 3:
            return text[:at] + b"\0" + text[at:]
        case 4:
            return text[:at]
        case 5:
            return b"".join([*lines[: line + 1], *lines[line:]])
        case 6:
            return b"".join(lines[:line] + lines[line + 1 :])
        case 7:
            return text[:at] + random.choice(REPEATED) * 20_000 + text[at:]
        case 8:
            return text + random.choice(
                (b"\n" * 5000, b" " * 5000, b"\0" * 50, b"{}", b"]", b"#" + b"c" * 300_000, b"\n\n\r\n\t")
            )
        case 9:
            begin = text.find(b"{") + 1
            return text[:begin] + b'"a":1,"a":2,' + text[begin:]
        case 10:
            return random.choice((b"", b"null", b"[]", b"{}", b"\xff\xfe", b"0", b'"a"', b"NaN"))
        case _:
            return damaged(random, text)


def damaged(random: Random, content: bytes, *, first: int = 0, last: int | None = None) -> bytes:
    """Bytes with some changed, removed, added, repeated or replaced by boundaries, from `first` to `last`."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 5))):
        end = min(len(changed), len(content) if last is None else last)
        if end <= first:
            break
        at = random.randrange(first, end)
        match random.randrange(7):
            case 0 | 1:
                changed[at] ^= 1 << random.randrange(8)
            case 2:
                changed[at] = random.randrange(256)
            case 3:
                del changed[at : at + random.randrange(1, 9)]
            case 4:
                changed[at:at] = random.randbytes(random.randrange(1, 9))
            case 5:
                changed[at : at + 8] = random.choice(BOUNDARIES)[: max(1, len(changed) - at)]
            case _:
                changed[at:at] = changed[at : at + random.randrange(1, 64)]
    return bytes(changed)
