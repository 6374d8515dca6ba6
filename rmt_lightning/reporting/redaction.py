"""What a page that is passed on must not tell: whose machine it was made on, and with which keys.

A secret is known by the name of its setting, by how its service writes keys, or by looking random.
"""

from __future__ import annotations

import getpass
import os
import re
from collections import Counter
from functools import lru_cache
from math import log2
from typing import Any

HIDDEN = "(hidden)"

# Home folders, as Linux, macOS and Windows write them, in addresses, and of other users (~jane).
_NAME = r"[^\\/\s:,;%&\"']+"
_HOME = re.compile(
    r"(?:[A-Za-z]:|\\\\[\w.$-]+)?(?:\\+[\w.$-]+)*?\\+(?:home\$?|users\$?|documents and settings)"
    r"\\+(?:[^\\/:*?\"<>|\n]+(?=\\)|" + _NAME + ")"
    r"|(?<![\w./~:-])//+(?:[\w.-]+/+)?(?:home|users)/+" + _NAME
    + r"|\b(?:s?ftp|ssh|scp|nfs|smb|rsync|(?:web)?hdfs|s3[an]?|gs|abfss?|wasbs?)://[^/\s]+"
    r"(?:/[\w.-]+)*?/(?:home\d*|users?)/+" + _NAME
    + r"|(?<![\w./~-])[A-Za-z]:/+(?:users|documents and settings)/+" + _NAME
    + r"|(?:%2f[\w.-]+)*?%2f(?:home|users)%2f" + _NAME
    + r"|(?:(?<![\w./~-])|(?<=file://))(?:(?:/[\w.-]+)*?/(?:home\d*|users?)/+(?:(?:\w|\d+)/){0,2}" + _NAME
    + r"(?:\\+" + _NAME + ")?"
    + r"|/afs/[\w.-]+/(?:usr|u)/(?:\w/){0,2}" + _NAME
    + r"|/(?:homes|people|u)/" + _NAME
    # /homes/j/jane
    + r"|(?:/[\w.-]+)+?/(?P<initial>[a-z])/(?P=initial)[\w.-]+"
    + r"|/root(?![\w.-]))"
    r"|(?<![\w./~-])~[A-Za-z_][\w.-]*(?=/|$)",
    flags=re.IGNORECASE,
)  # fmt: skip

# Words of the names of settings that are hidden; glued together, they stand at the end or are unmistakable.
_SECRET_WORDS = {
    "key", "keys", "token", "secret", "secrets", "pass", "pwd", "pw", "passphrase", "passcode", "auth", "oauth",
    "authorization", "authentication", "cookie", "bearer", "pat", "login", "signature", "sig", "sas", "jwt", "otp",
    "pin", "creds", "webhook", "dsn", "keytab", "netrc", "mnemonic", "phrase", "salt", "tok", "csrf", "hmac", "pem",
}  # fmt: skip
_SECRET_PART = re.compile(
    r"passw|secret|credential|(?:key|token|pass)$|apikey|authtoken|accesskey|privatekey|session_?id|conn(?:ection)?_?str"
)
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# Of these even a number is a secret.
_PASSWORD = re.compile(r"passw|passphrase|passcode|pwd|secret|\b(?:pin|otp)\b", flags=re.IGNORECASE)

_KEY = re.compile(
    # user and password in an address, with a scheme and without
    r"(?<=://)[^/\s]+(?=@)|\b[\w.+-]+:[^\s/@:]+(?=@[\w-]+\.)|\b(?!git@)[\w.+-]+(?=@[\w.-]+:[~/])"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.*?-----END [A-Z ]*PRIVATE KEY-----|.*)"
    # what follows the name of a secret
    r"|(?i:(?<=bearer )|(?<=basic ))[\w.~+/=-]{8,}"
    r"|(?i:\b[\w-]*(?:passw(?:or)?d|pwd|secret|token(?!s|iz)|api[_-]?key|(?:access|private|account)[_-]?key|signature|\bpass\b|[_-]pass\b|(?-i:[A-Z]PASS\b))[\w-]*"
    r"|(?<=[?&])(?:key|sig|auth|code))[\"']?\s*[=:]\s*(?:\"[^\"]*\"?|'[^']*'?|[^\s\"',&]+)"
    r"|(?<=--api-key )\S+|(?<=--password )\S+|(?<=--token )\S+|(?<=--secret )\S+|(?<=sshpass -p )\S+"
    r"|(?<=\s-u )[^\s:]+:\S+|(?<=\s--user )[^\s:]+:\S+"
    r"|\bAGE-SECRET-KEY-\w+|(?<=hooks\.slack\.com/services/)\S+"
    # how services write their keys
    r"|\b(?:sk|pk|rk)[-_](?=[\w-]*\d)[\w-]{16,}"
    r"|\b(?:hf_|gh[opsur]_|github_pat_|gl[a-z]{2,5}-|xox[a-z]-|xapp-|AIza|ya29\.|GOCSPX-|A[KS]IA|npm_|pypi-|r8_|dop_v1_"
    r"|SG\.|hv[sbr]\.|sq0[a-z]{3}-|wandb_v1_|nvapi-|gsk_|xai-|pplx-|shpat_|lin_api_|ntn_|sntry[su]_|eyJ)[\w.=+/-]{16,}",
    flags=re.DOTALL,
)  # fmt: skip
_LONG = re.compile(r"[A-Za-z0-9+/_=-]{20,}")
_SHORT = re.compile(r"(?<![A-Za-z0-9])[A-Za-z0-9]{8,19}(?![A-Za-z0-9])")
# Names are made of them, keys are not, however their letters are mixed: TinyRoFormer, Wav2Vec2Bert.
_WRITTEN = re.compile(r"[A-Z][a-z]{2,}|[a-z]{3,}|[A-Z]{3,}")
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?")
# The commit of this project looks like a key of W&B.
_COMMIT = re.compile(r"[0-9a-f]{40}(-dirty)?")


def public(value: Any, name: str = "") -> Any:
    """A value of a config or a json file, of any depth, without home folders and keys.

    Args:
        value: what to clean.
        name: of the setting; those called token, api_key … are hidden whatever they hold.
    """
    if isinstance(value, dict):
        # What is inside of a secret is one.
        inherited = name if _is_secret(name) else ""
        return {public_text(str(key)): public(inner, inherited or str(key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [public(inner, name) for inner in value]
    if isinstance(value, str):
        if name == "commit" and _COMMIT.fullmatch(value):
            return value
        return HIDDEN if value and _is_secret(name) else public_text(value)
    return HIDDEN if type(value) in (int, float) and _PASSWORD.search(name) else value


def public_text(text: str) -> str:
    """A text in which home folders are called ~ and keys are hidden."""
    if not text or _NUMBER.fullmatch(text):
        # Most cells of a table, and the environment takes its time.
        return text
    return _cleaned(text, *_home_and_user(*map(os.environ.get, ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME"))))


@lru_cache
def _home_and_user(*_environment: str | None) -> tuple[str, str]:
    """The user's home folder and name, which the environment tells, or else the system, which takes its time."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = ""
    return os.path.expanduser("~"), user


# Runs have most of their settings in common.
@lru_cache(maxsize=2**14)
def _cleaned(text: str, home: str, user: str) -> str:
    for folder in {home, os.path.realpath(home)} - {"/"}:
        text = re.sub(rf"(?<![\w.-]){re.escape(folder)}(?![\w.-])", "~", text)
    text = _KEY.sub(HIDDEN, _HOME.sub("~", text))
    # Elsewhere than at home, a folder may be called by the user too: /scratch/jane.
    if len(user) > 2 and user != "root":
        text = re.sub(rf"(?<![\w./~-])(?:/[\w.-]+)*?/{re.escape(user)}(?![\w.-])", "~", text)
    text = _LONG.sub(lambda found: HIDDEN if _is_random(found[0]) else found[0], text)
    return _SHORT.sub(lambda found: HIDDEN if _is_mixed(found[0]) else found[0], text)


@lru_cache
def _is_secret(name: str) -> bool:
    words = {word.lower() for word in _WORDS.findall(name)}
    return bool(words & _SECRET_WORDS) or _SECRET_PART.search(name.lower()) is not None


def _is_mixed(text: str) -> bool:
    """Whether small and capital letters follow each other, perhaps with digits, and next to nothing is a word."""
    both = text != text.lower() and text != text.upper()
    return both and sum(map(len, _WRITTEN.findall(text))) <= 0.4 * len(text)


def _is_random(text: str) -> bool:
    """Whether letters and digits follow each other as nobody would write them."""
    if "/" in text and any(_is_random(part) for part in text.split("/")):
        return True
    bare = re.sub(r"[^A-Za-z0-9]", "", text)
    if len(bare) < 20 or bare.isdigit() or bare.isalpha():
        return False
    if re.fullmatch(r"[0-9a-f]{32,}", text, flags=re.IGNORECASE):
        return True
    changes = len(re.findall(r"(?=[a-z][A-Z]|[A-Za-z]\d|\d[A-Za-z])", bare)) / len(bare)
    entropy = -sum(n / len(bare) * log2(n / len(bare)) for n in Counter(bare).values())
    mixed = bare != bare.lower() and bare != bare.upper()
    # A name on the Hub has an owner, and both are words for the most part.
    words = sum(map(len, re.findall(r"[A-Z]?[a-z]{2,}", bare))) / len(bare) if "/" in text else 0
    return ("/" not in text and changes >= 1 / 3) or (mixed and words <= 1 / 2 and changes >= 1 / 5 and entropy >= 4.3)
