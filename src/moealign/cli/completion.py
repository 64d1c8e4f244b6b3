"""``moealign completion``: a script that has every command and option in it, so that Tab starts no Python."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

import typer

__all__ = ["completion"]


class Shell(str, Enum):
    """The shells that are known."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(
    context: typer.Context,
    shell: Annotated[Shell, typer.Argument(help="The shell that is to read the script.", show_default=False)],
) -> None:
    """Print a script that completes commands and options in a shell."""
    assert context.parent is not None
    group: Any = context.parent.command
    print(_fish(group) if shell is Shell.FISH else _bash(group))


def _words(command: Any) -> list[str]:
    """What may follow the name of a command, beside files."""
    options = [name for each in command.params for name in each.opts if name.startswith("--")]
    shells = [each.value for each in Shell] if command.name == "completion" else []
    return [*shells, *options, "--help"]


def _bash(group: Any) -> str:
    """For bash, and for zsh through its emulation of bash; files complete where no word does."""
    cases = [f'    {name}) words="{" ".join(_words(command))}" ;;' for name, command in group.commands.items()]
    first = " ".join([*group.commands, *_words(group)])
    lines = [
        'if [ -n "${ZSH_VERSION-}" ]; then autoload -U +X bashcompinit && bashcompinit; fi',
        "_moealign() {",
        '  local words=""',
        '  case "${COMP_WORDS[1]}" in',
        *cases,
        "  esac",
        f'  if [ "$COMP_CWORD" -eq 1 ]; then words="{first}"; fi',
        '  COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))',
        "}",
        "complete -o default -F _moealign moealign",
    ]
    return "\n".join(lines)


def _fish(group: Any) -> str:
    lines = []
    for name, command in group.commands.items():
        lines.append(f'complete -c moealign -n __fish_use_subcommand -a {name} -d "{command.get_short_help_str()}"')
        for word in _words(command):
            what = f"-l {word[2:]}" if word.startswith("--") else f"-f -a {word}"
            lines.append(f'complete -c moealign -n "__fish_seen_subcommand_from {name}" {what}')
    lines += [f"complete -c moealign -n __fish_use_subcommand -l {word[2:]}" for word in _words(group)]
    return "\n".join(lines)
