"""How values are written so that a screen, a shell, Hydra and OmegaConf leave them as they are."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any
from unicodedata import category

# What none of them reads as anything but a text.
_PLAIN = re.compile(r"[A-Za-z_./][\w./+-]*", flags=re.ASCII)
_NOT_A_TEXT = re.compile(r"null|true|false|nan|inf|[\d._]+(e[+-]?\d+)?", flags=re.IGNORECASE)


def literal(text: str) -> str:
    """A text as a config holds it, so that no part of it is taken for an interpolation."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def literals(value: Any) -> Any:
    """Resolved values as a config holds them, so that nothing in them is interpolated once more."""
    if isinstance(value, dict):
        return {key: literals(part) for key, part in value.items()}
    if isinstance(value, list):
        return [literals(part) for part in value]
    return literal(value) if isinstance(value, str) else value


def quoted(value: Any) -> str:
    """A value as Hydra reads it on a command line, where nothing of it is to be interpolated."""
    if isinstance(value, str):
        # Of backslashes Hydra reads two as one before a quote alone.
        inner = re.sub(r'(\\*)("|\Z)', lambda match: 2 * match[1] + match[2].replace('"', '\\"'), literal(value))
        return f'"{inner}"'
    if isinstance(value, list):
        return f"[{','.join(map(quoted, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{quoted(part)}" for key, part in value.items()) + "}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def setting(key: str, text: str | Path) -> str:
    """The word of a command line that sets `key` to this very text."""
    text = str(text)
    plain = _PLAIN.fullmatch(text) and not _NOT_A_TEXT.fullmatch(text)
    return f"{key}={text if plain else quoted(text)}"


def to_type(key: str, text: str | Path) -> str:
    """What to type in a shell to set `key` to this very text; a name that begins with ~ is that of no home folder."""
    text = str(text)
    return for_shell(setting(key, f"./{text}" if text.startswith("~") else text))


def for_shell(word: str) -> str:
    """A word as it is typed in a shell; in bash and zsh where it cannot be printed as it is."""
    if word.isprintable():
        return shlex.quote(word)
    letters = (
        letter
        if letter.isprintable() and letter not in "\\'"
        else "".join(f"\\x{byte:02x}" for byte in os.fsencode(letter))
        for letter in word
    )
    return f"$'{''.join(letters)}'"


def shown(path: str | Path) -> str:
    """A path on one line, as it is seen from here."""
    return one_line(os.path.relpath(path))


def one_line(text: str) -> str:
    """A text without what would break a line or change a screen."""
    # Python takes no space but the plain one for printable.
    return "".join(
        letter if letter.isprintable() or category(letter) == "Zs" else letter.encode("unicode_escape").decode()
        for letter in text
    )
