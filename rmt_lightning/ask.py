"""Front door: `python -m rmt_lightning.ask model=<folder> text=book.txt question="Where is Mary?"`.

It reads a text of any length in constant memory, and answers questions about it with a model that
`python -m rmt_lightning.export` has left. Without a question it asks for them at the terminal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge
from omegaconf import DictConfig

from rmt_lightning.app.hydra_errors import front_door
from rmt_lightning.app.schema import check


@dataclass(frozen=True)
class Root:
    """The settings of conf/ask.yaml."""

    folder: str
    text: str | None
    question: str | list[str] | None
    questions: str | None
    top_k: Annotated[int, Ge(1)]
    memory: str | None
    save: str | None
    device: Literal["auto", "cpu", "cuda"]


def _renamed(words: list[str]) -> list[str]:
    """A command line with folder= for model=, which Hydra takes for the choice of conf/model/."""
    return [f"folder={word.removeprefix('model=')}" if word.startswith("model=") else word for word in words]


def main(config: DictConfig) -> None:
    check(config, Root)
    # Takes seconds to import; --help and spelling mistakes should not have to wait for it.
    from rmt_lightning.app.asking import ask

    ask(config)


run = front_door(main, "ask", _renamed)

if __name__ == "__main__":
    run()
