"""What a page that is passed on must not tell: whose machine it was made on, and with which keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

HIDDEN = "(hidden)"

_HOME = re.compile(r"(?<![\w.:/~-])(?:(?:/[\w.-]+)*?/(?:home|Users)/[^/\s]+|/root(?=/|$))")
_KEY_NAME = re.compile(r"(^|_)(key|apikey|token|secret|password|credentials?)$", re.IGNORECASE)
# Tokens of Hugging Face, OpenAI and GitHub; user and password in an address.
_KEY = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_)\w{16,}|(?<=://)[^/\s@]+(?=@)")


def public(value: Any, name: str = "") -> Any:
    """A value of a config or a json file, of any depth, without home folders and keys.

    Args:
        value: what to clean.
        name: of the setting; those called token, api_key … are hidden whatever they hold.
    """
    if isinstance(value, dict):
        return {str(key): public(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [public(inner, name) for inner in value]
    if isinstance(value, str):
        return HIDDEN if value and _KEY_NAME.search(name) else public_text(value)
    return value


def public_text(text: str) -> str:
    """A text in which home folders are called ~ and keys are hidden."""
    home = str(Path.home())
    if home != "/":
        text = re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", text)
    return _KEY.sub(HIDDEN, _HOME.sub("~", text))
