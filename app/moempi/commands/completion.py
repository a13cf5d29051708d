"""`moempi completion`: a bash script that completes commands, their options, and the keys of a job."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from importlib import import_module

import msgspec

from moempi.config.job import Job

SCRIPT = """\
_moempi() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} command=${{COMP_WORDS[1]}} words=
    if [ "$command" = launch ] && [ "$COMP_CWORD" -gt 4 ]; then command=${{COMP_WORDS[4]}}; fi
    if [ "$COMP_CWORD" = 1 ]; then
        words="{commands}"
    elif [ "${{COMP_WORDS[COMP_CWORD - 1]}}" = --set ]; then
        words="{keys}"
        compopt -o nospace 2>/dev/null || true
    elif [[ $word == -* ]]; then
        case $command in
{options}
        esac
    fi
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
}}
complete -o default -F _moempi moempi
"""


def add_flags(_parser: ArgumentParser) -> None:
    """No flags."""


def run(chosen: Namespace) -> int:
    """Print the script on stdout, to be sourced: source <(moempi completion)."""
    options = "\n".join(f'            {name}) words="{" ".join(_options(name))}" ;;' for name in chosen.commands)
    keys = " ".join(f"{key}=" for key in _keys())
    print(SCRIPT.format(commands=" ".join(chosen.commands), keys=keys, options=options), end="")
    return 0


def _options(name: str) -> list[str]:
    """The options of a command; the ones of a benchmark depend on its name."""
    parser = ArgumentParser()
    parser.add_argument("--debug")
    if name != "bench":
        import_module(f"moempi.commands.{name}").add_flags(parser)
    return [word for action in parser._actions for word in action.option_strings if word.startswith("--")]


def _keys() -> Iterator[str]:
    for field in msgspec.structs.fields(Job):
        section = field.type
        if isinstance(section, type) and issubclass(section, msgspec.Struct):
            yield from (f"{field.name}.{key.name}" for key in msgspec.structs.fields(section))
        else:
            yield field.name
