"""What is printed to be typed: pasted into a shell, it sets the very text, whatever that is."""

from __future__ import annotations

import os
import subprocess

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from rmt_lightning.core.quoting import literal, one_line, quoted, setting, to_type

# Names without spaces, and names with.
NAMES = r"""
    run outputs/2026-01-31/12-00-00-detect a_b-c+d.txt книга.txt 日本/ü 🙂 a,b a=b a:b [a] [1].txt file[2].txt {a} {a:b}
    $HOME ${x} a${b} ${oc.env:HOME} \${x} \\${x}\ ${ $( `id` $(id) a\b a\\b a\ a\\ a\,b \ ' '' " "" o'brien a"b a\'b
    a\\"b 'a' "a" ~ ~/x ~root -x --x .. ./x a&b a;b a|b a<b>c a*? !x a#b #a a^b a@b a%b 007 1e3 1_000 -1 1.5 .5 inf NaN
    null NULL true choice(1) x(1)
"""
SPACED = [
    "a b",
    " a",
    "a ",
    "  ",
    "book (1).txt",
    "a, b",
    "a\nb",
    "a\n${b}\n'\"\\",
    "\t",
    "a\rb",
    "\x1b[31m",
    "a\u2028b",
]
NAMES = [*NAMES.split(), *SPACED, "a\udcffb", ""]


@pytest.fixture(scope="module")
def pasted() -> dict[str, str]:
    """What a shell makes of the hint about each name."""
    shell = "printf '%s\\0' " + " ".join(to_type("resume", name) for name in NAMES)
    words = subprocess.run(["bash", "-c", shell], check=True, capture_output=True).stdout.split(b"\0")
    return dict(zip(NAMES, map(os.fsdecode, words), strict=False))


def read(word: str) -> object:
    """What Hydra and OmegaConf make of a word of a command line."""
    (override,) = OverridesParser.create().parse_overrides([word])
    assert not override.is_sweep_override()
    return OmegaConf.create({"value": override.value()})["value"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_hint_can_be_pasted(name: str, pasted: dict[str, str]) -> None:
    assert to_type("resume", name) == one_line(to_type("resume", name)), "it is one line"
    assert read(pasted[name]) == (f"./{name}" if name.startswith("~") else name)
    # And within a config, without a command line.
    assert read(setting("noise.path", name)) == OmegaConf.create({"value": literal(name)})["value"] == name


def test_a_line_stays_a_line() -> None:
    assert one_line("Où est\u00a0Marie\u3000?") == "Où est\u00a0Marie\u3000?"
    assert one_line("a\nb\u2028\x1b[2J\u202e") == r"a\nb\u2028\x1b[2J\u202e"


def test_plain_names_stay_plain() -> None:
    assert to_type("resume", "outputs/2026-01-31/12-00-00-detect") == "resume=outputs/2026-01-31/12-00-00-detect"


@pytest.mark.parametrize("value", [["a", "b'c", "${x}"], [1, None, True, 0.5], {"a": "x y", "b": [1, "z\\"]}], ids=str)
def test_other_values(value: object) -> None:
    read_back = read(f"key={quoted(value)}")
    assert OmegaConf.to_container(OmegaConf.create({"value": read_back}), resolve=True) == {"value": value}
