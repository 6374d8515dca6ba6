"""What the documentation takes from elsewhere: the page of all settings, that of the API, and the results."""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import griffe
import yaml
from hydra.utils import get_object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import rmt_lightning
from rmt_lightning.app.schema import CONF, may_be_added, type_hints

ROOT = Path(__file__).parents[1]
# In the order in which people choose.
GROUPS = (
    "task", "noise", "backbone", "model", "model.update", "finetune", "answer", "data", "curriculum", "hold", "metrics",
    "test", "optim", "trainer", "logger", "callbacks", "experiment", "sweep",
)  # fmt: skip
DOORS = ("train", "evaluate", "ask", "attend", "export", "flops", "plot")
# What the run itself gives to what it builds.
BY_THE_RUN = {"metrics", "trust"}
logging.getLogger("griffe").setLevel(logging.ERROR)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the results with their pictures, and the pages that are generated."""
    for path in sorted((ROOT / "experiments").rglob("*")):
        if path.suffix in {".md", ".png", ".csv"}:
            place = str(path.relative_to(ROOT))
            files.append(File(place, str(ROOT), config.site_dir, config.use_directory_urls))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=notebook(path)))
    return files


def notebook(path: Path) -> str:
    """A notebook as a page, with what its cells have printed and drawn."""
    title, *cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = ["".join(title["source"]), f"[{path.name}]({path.name}) is the notebook itself."]
    for cell in cells:
        text = "".join(cell["source"])
        parts += [f"```python\n{text}\n```", *map(output, cell["outputs"])] if cell["cell_type"] == "code" else [text]
    return "\n\n".join(parts)


def output(shown: dict[str, Any]) -> str:
    """What a cell has printed, drawn or ended with."""
    data = shown.get("data", {})
    if "image/png" in data:
        return f'<img alt="the figure that this cell draws" src="data:image/png;base64,{"".join(data["image/png"])}">'
    return f"```text\n{''.join(shown.get('text') or data['text/plain']).rstrip()}\n```"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill the pages that are written from the code; and leave links of results to what is no page as text."""
    if page.file.src_uri in FILLED:
        return f"{markdown}\n\n{FILLED[page.file.src_uri]()}"
    if page.file.src_uri.startswith("experiments/"):
        return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\.(?:py|sh|pdf)\)", r"`\1`", markdown)
    # In the repository results stand beside this folder, in the site within it.
    return re.sub(r"\]\(\.\./((?:\.\./)?experiments/)", r"](\1", markdown)


def settings() -> str:
    """Every setting with its default, what it may be, and what it means."""
    parts = ["## Of the commands"]
    for door in DOORS:
        parts += [f"### `rmt_lightning.{door}`", *table(commented(CONF / f"{door}.yaml"), None)]
    for group in GROUPS:
        parts.append(f"## `{group}=`")
        for path in sorted((CONF / group).glob("*.yaml")):
            parts += [f"### `{group}={path.stem}`", *choice(path)]
    return "\n\n".join(parts)


def choice(path: Path) -> Iterator[str]:
    """What a choice is, and its settings."""
    text = path.read_text(encoding="utf-8")
    target = (yaml.safe_load(text) or {}).get("_target_")
    head = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#") and "@package" not in line)
    if target is None:
        yield head
        if rest := "\n".join(line for line in text.splitlines() if not line.startswith("#")).strip():
            yield f"```yaml\n{rest}\n```"
        return
    kind = get_object(target)
    yield head or " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split())
    yield from table([row for row in commented(path) if row[0] != "_target_"], kind)


Row = tuple[str, str, str]


def commented(path: Path) -> list[Row]:
    """The settings of a yaml at its top, with their values and the comments before or behind them."""
    rows, before = list[Row](), list[str]()
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            before.append(line.lstrip("# "))
            continue
        if match := re.match(r"([\w.]+):\s*(.*?)(?:\s+#\s+(.*))?$", line):
            name, value, behind = match.groups()
            if name not in {"defaults", "hydra"}:
                rows.append((name, value, " ".join([*before, behind or ""]).strip()))
        before = []
    return rows


def table(rows: list[Row], kind: Any) -> Iterator[str]:
    """Settings as a table; of those of a class, types and meanings stand in its signature and its docstring."""
    meanings, hints, more = arguments(kind), {}, list[Row]()
    if kind is not None:
        parameters = inspect.signature(kind).parameters
        hints = type_hints(kind.__init__ if inspect.isclass(kind) else kind)
        known = {name for name, *_ in rows} | BY_THE_RUN
        for name, parameter in parameters.items():
            plain = isinstance(parameter.default, bool | int | float | str | None)
            if name not in known and plain and may_be_added(f"{kind.__module__}.{kind.__qualname__}", name):
                more.append((f"+{name}", yaml.safe_dump(parameter.default).split("\n")[0], ""))
    if not rows and not more:
        return
    yield "\n".join(
        ["| setting | default | may be | meaning |", "| --- | --- | --- | --- |"]
        + [
            f"| `{name}` | {code(value)} | {cell(told(hints.get(name.lstrip('+'))))} | "
            f"{cell(comment or meanings.get(name.lstrip('+'), ''))} |"
            for name, value, comment in rows + more
        ]
    )


def arguments(kind: Any) -> dict[str, str]:
    """What docstrings say of the arguments of a class and of those that it is made from."""
    found = dict[str, str]()
    for base in reversed(getattr(kind, "__mro__", ())):
        for section in griffe.Docstring(inspect.getdoc(base) or "").parse("google") if base is not object else ():
            if section.kind is griffe.DocstringSectionKind.parameters:
                found |= {part.name: " ".join(part.description.split()) for part in section.value}
    return found


def told(hint: Any) -> str:
    """A type in words."""
    if hint is None or hint is Any:
        return ""
    if hint is type(None):
        return "null"
    if get_origin(hint) is Literal:
        return ", ".join(dict.fromkeys(f"`{str(value).lower()}`" for value in get_args(hint)))
    if limits := getattr(hint, "__metadata__", None):
        words = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
        said = [
            f"{sign} {getattr(limit, name)}" for limit in limits for name, sign in words.items() if hasattr(limit, name)
        ]
        return f"{told(hint.__origin__)} {' and '.join(said)}".strip()
    if get_origin(hint) in (list, tuple) or getattr(get_origin(hint), "__name__", "") == "Sequence":
        return f"list of {told(get_args(hint)[0])}"
    if get_origin(hint) is Union or type(hint).__name__ == "UnionType":
        return " or ".join(told(part) for part in get_args(hint))
    return {"int": "whole number", "float": "number", "str": "text", "bool": "`true`, `false`"}.get(
        getattr(hint, "__name__", ""), getattr(hint, "__name__", str(hint))
    )


def code(value: str) -> str:
    return f"`{value}`" if value else ""


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def api() -> str:
    """The public names, by the room they come from."""
    rooms: dict[str, list[str]] = {}
    stub = (ROOT / "rmt_lightning" / "__init__.pyi").read_text(encoding="utf-8")
    for room, _, name in re.findall(r"from \.(\w+)(\.\S+) import \w+ as (\w+)", stub):
        rooms.setdefault(room, []).append(name)
    titles = {
        "models": "Models", "training": "Training", "tasks": "Tasks and data", "analysis": "Tests", "core": "Errors",
    }  # fmt: skip
    parts = []
    for room, title in titles.items():
        parts.append(f"## {title}")
        # The models of the papers come first.
        for name in sorted(rooms[room], key=lambda name: not name.startswith("RMT")):
            found = getattr(rmt_lightning, name)
            parts.append(f"::: {found.__module__}.{name}")
    return "\n\n".join(parts)


FILLED = {"settings.md": settings, "api.md": api}
