"""What the ask door does: reads a text, answers questions about it, and keeps what is remembered."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from omegaconf import DictConfig
from rich import get_console

from rmt_lightning.app.build import find_device
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import check_readable
from rmt_lightning.core.quoting import one_line
from rmt_lightning.models.answerer import Answerer, Memory


def ask(config: DictConfig) -> None:
    """Read what is to be read, save what is remembered, and answer.

    Raises:
        UserError: if there is nothing to read or to do, or something cannot be read or written.
    """
    if config.text is None and config.memory is None:
        raise UserError("text: is missing; give text=<file>, text=- for what is piped in, or memory=<file>")
    if config.question is not None and config.questions is not None:
        raise UserError("questions: question= is given too; leave one of them out")
    typed = config.question is None and config.questions is None
    if typed and config.save is None and not _at_terminal(config):
        raise UserError("question: is missing; give question=…, questions=<file>, or save=<file>")
    questions = None if typed else _questions(config)
    if config.save is not None:
        _check_place(config.save)
    device, _ = find_device(config.device)
    answerer = Answerer.from_pretrained(config.folder).to(device)
    memory = None if config.memory is None else Memory.load(config.memory)
    if config.text is not None or memory is None:
        before = memory.tokens if memory else 0
        memory = answerer.read(_text(config.text), memory, progress=get_console().is_terminal)
        if memory.tokens == before:
            raise UserError(f"text={config.text}: is empty; give text")
    if config.save is not None:
        _save(memory, config.save)
    if questions is not None:
        _answer(answerer, memory, questions, config.top_k)
    elif config.save is None:
        for question in _from_terminal():
            _answer(answerer, memory, [question], config.top_k)


def _text(given: str) -> TextIO | Path:
    """The text that is named, or what is piped in, in UTF-8 too."""
    if given != "-":
        return Path(given)
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8-sig")
    return sys.stdin


def _at_terminal(config: DictConfig) -> bool:
    """Whether somebody is there who can be asked for questions."""
    return config.text != "-" and sys.stdin is not None and sys.stdin.isatty()


def _questions(config: DictConfig) -> list[str]:
    """The questions that are given, each as it stands."""
    if config.questions is None:
        questions = [config.question] if isinstance(config.question, str) else list(config.question)
        if not questions or not all(question.strip() for question in questions):
            raise UserError("question: asks nothing; give a question, or several as [one,another]")
        return questions
    try:
        # No splitlines, for which a question may end at a letter within it.
        lines = Path(config.questions).read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"questions={config.questions}: cannot be read ({error.strerror}); give a file") from None
    except UnicodeDecodeError:
        raise UserError(f"questions={config.questions}: is no text in UTF-8; convert it first") from None
    questions = [line.strip() for line in lines if line.strip()]
    if not questions:
        raise UserError(f"questions={config.questions}: holds no question; write one in each line")
    return questions


def _from_terminal() -> Iterator[str]:
    """Questions as they are typed, until there are no more."""
    while True:
        try:
            question = input("question (Ctrl-D ends): ").strip()
        except EOFError:
            print()
            return
        if question:
            yield question


def _check_place(place: str) -> None:
    """Raise UserError where nothing can be saved, or something else than a memory would be lost."""
    if not (parent := Path(place).absolute().parent).is_dir():
        raise UserError(f"save={place}: there is no folder {parent}; make it, or choose another place")
    if not os.access(parent, os.W_OK):
        raise UserError(f"save={place}: cannot be written to {parent}; choose another place")
    check_readable(Path(place))
    if os.path.lexists(place):
        try:
            Memory.load(place)
        except UserError:
            raise UserError(f"save={place}: is there already, and holds no memory; choose another place") from None


def _save(memory: Memory, place: str) -> None:
    try:
        memory.save(place)
    except OSError as error:
        raise UserError(f"save={place}: cannot be written ({error.strerror}); choose another place") from None
    print(f"{place} holds what is remembered of {memory.tokens:,} tokens; memory={place} reads on, or asks it")


def _answer(answerer: Answerer, memory: Memory, questions: list[str], top_k: int) -> None:
    for question, best in zip(questions, answerer.ranked(memory, questions, top_k), strict=True):
        told = ", ".join(f"{answer.text} ({answer.probability:.1%})" for answer in best)
        print(one_line(f"{question} → {told}"))
