"""Asking a trained model.

Shapes: B batch, N tokens of a text, C answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeAlias

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from rich import progress as bar
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import check_readable, write_atomically
from rmt_lightning.core.tokens import CHARACTERS, encode, plain_ids, token_ids, whole_words
from rmt_lightning.models import state as tree
from rmt_lightning.models.card import card
from rmt_lightning.models.pretrained import CONFIG, HEAD, opened, read_config, write_config
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.segment_model import SegmentModel

# What says that a file holds a memory.
_KIND = "rmt_lightning memory"
# How many questions are asked at once.
_AT_ONCE = 64
_HALF = re.compile("[\ud800-\udfff]")

# A text, the path of a file that holds one, or the pieces of one.
Text: TypeAlias = str | Path | Iterable[str]


class Answer(NamedTuple):
    """One of the answers that a model knows, and how likely the model takes it to be, from 0 to 1."""

    text: str
    probability: float


@dataclass(frozen=True)
class Memory:
    """What is left of a text that has been read: a value, which asking does not change.

    Attributes:
        state: the tensors of the model's state (1, …) before the end of the text.
        end: (n,) the tokens of that end, fewer than two segments, which are read together with a question: so that it
            stands at the end of a full segment, as in training.
        tokens: of the whole text.
        model: tells by which weights it was read.
    """

    state: list[Tensor]
    end: Tensor
    tokens: int
    model: str

    def save(self, path: str | Path) -> None:
        """Write it as a safetensors file, whole or not at all.

        Raises:
            UserError: if a folder or a device stands there.
        """
        _check_plain(path)
        tensors = {f"state.{number}": part.contiguous() for number, part in enumerate(self.state)} | {"end": self.end}
        told = {"tokens": str(self.tokens), "model": self.model, "kind": _KIND}
        write_atomically(Path(path), save(tensors, metadata=told))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Open what `save` has written.

        Raises:
            UserError: if there is no such file, or it holds something else.
        """
        _check_plain(path)
        check_readable(Path(path))
        try:
            with safe_open(path, framework="pt") as file:
                told, names = file.metadata() or {}, file.keys()
                if told.get("kind") != _KIND:
                    raise UserError(f"{path}: holds no memory; give what Memory.save has written")
                state = [file.get_tensor(f"state.{number}") for number in range(len(names) - 1)]
                return cls(state, file.get_tensor("end"), int(told["tokens"]), told["model"])
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise UserError(f"{path}: cannot be read ({reason}); give what Memory.save has written") from None
        except (SafetensorError, KeyError, ValueError):
            raise UserError(f"{path}: holds no memory; give what Memory.save has written") from None


class Answerer(nn.Module, ModelHubMixin, library_name="rmt_lightning"):
    """A recurrent model and the linear head that was trained to read answers off it: texts in, answers out.

    ```
    answerer = Answerer.from_pretrained("mary")
    answerer("Mary went to the garden. … Where is Mary?")         a text that ends with the question
    memory = answerer.read(Path("book.txt"))                      a text of any length, in constant memory
    answerer.ask(memory, ["Where is Mary?", "Where is John?"])    as often as wanted
    ```

    It is saved beside its model, in the same folder: head.safetensors holds the head and the answers.

    Args:
        model: the recurrent model.
        head: from what the model reads off its last segment to scores.
        answers: the C answers that scores stand for.

    Raises:
        UserError: if the head does not read what the model makes, or there are not as many answers as scores.
    """

    def __init__(self, model: SegmentModel[Any], head: nn.Linear, answers: Sequence[str]) -> None:
        super().__init__()
        if head.in_features != model.width:
            raise UserError(f"head: reads {head.in_features} numbers, and the model makes {model.width}; give another")
        if not _are_texts(answers) or len(answers) != head.out_features:
            raise UserError(f"answers: the head gives {head.out_features} scores; give a list of so many texts")
        if len(set(answers)) < len(answers):
            raise UserError(f"answers={', '.join(answers)}: hold one twice; give a different one for each score")
        self.model = model
        self.head = head
        self.answers = tuple(answers)

    def forward(
        self,
        texts: str | Sequence[str] | None = None,
        *,
        question: str | Sequence[str] | None = None,
        context: Text | None = None,
    ) -> str | list[str]:
        """The answer to a question, or the answers to several.

        Args:
            texts: a text of any length that ends with its question, or a list of such.
            question: a question, or several about the same context, which is read once.
            context: what is read, given as to `read`.

        Raises:
            UserError: if that is not what is given.
        """
        if question is not None and context is not None and texts is None:
            return self.ask(self.read(context), question)
        if question is not None or context is not None:
            raise UserError("give texts that end with their questions, or question= and context=")
        answers = [self.answers[best] for best in self.scores(texts).argmax(dim=1).tolist()]
        return answers[0] if isinstance(texts, str) else answers

    @torch.no_grad()
    def scores(self, texts: str | Sequence[str] | None) -> Tensor:
        """(B, C), larger for likelier answers; a single text is a batch of one."""
        ids = self._whole(_texts("texts", texts))
        return self._score(ids, self.model.initial_state(len(ids))) if ids else self._no_scores()

    @torch.no_grad()
    def read(self, text: Text, memory: Memory | None = None, progress: bool = False) -> Memory:
        """Read a text, however long, in constant memory.

        Args:
            text: a text, the path of a file in UTF-8, or pieces of a text, such as an open file. Pieces are joined as
                they are, and may end within a word.
            memory: what an earlier call has left; reading goes on there.
            progress: whether to show a bar.

        Raises:
            UserError: if that is no text, cannot be read, the memory is another model's, or the model keeps the whole
                text and has no memory.
        """
        if self.model.max_segments is not None:
            raise UserError(
                f"{type(self.model).__name__}: keeps the whole text instead of a memory; call it with texts of at most "
                f"{self.model.max_segments} segments that end with their questions"
            )
        length, device = self.model.text_length, self.head.weight.device
        state, end, tokens = self.model.initial_state(1), torch.zeros(0, dtype=torch.long), 0
        if memory is not None:
            state, end, tokens = self._state(memory), memory.end, memory.tokens
        for ids in self._tokens(text, progress):
            end, tokens = torch.cat([end, ids]), tokens + len(ids)
            # One full segment is left for the end.
            full = max(0, len(end) // length - 1) * length
            for segment in end[:full].split(length) if full else ():
                _, state = self.model.step(Segment(segment[None].to(device)), state)
            end = end[full:]
        return Memory([part.cpu() for part in tree.leaves(state)], end, tokens, self._fingerprint())

    def ask(self, memory: Memory, question: str | Sequence[str]) -> str | list[str]:
        """The answer to a question about what has been read, or the answers to several; the memory stays as it is.

        Raises:
            UserError: if that is no question, or the memory is another model's.
        """
        answers = [best.text for (best,) in self.ranked(memory, question, 1)]
        return answers[0] if isinstance(question, str) else answers

    @torch.no_grad()
    def ranked(self, memory: Memory, question: str | Sequence[str], top_k: int = 5) -> list[list[Answer]]:
        """For each question the likeliest answers, at most so many, likeliest first.

        Raises:
            UserError: if that is no question, or the memory is another model's.
        """
        if not isinstance(top_k, int) or top_k < 1:
            raise UserError(f"top_k={top_k}: asks for no answer; give a number of answers, 1 or more")
        questions = _texts("question", question)
        state, end = self._state(memory), memory.end
        rows = [torch.cat([end, torch.tensor(ids, dtype=torch.long)]) for ids in token_ids(self._tokenizer, questions)]
        scores = [self._no_scores()]
        for start in range(0, len(rows), _AT_ONCE):
            some = rows[start : start + _AT_ONCE]
            scores.append(self._score(some, tree.repeat(state, len(some))))
        found = torch.cat(scores).float().softmax(dim=1).topk(min(top_k, len(self.answers)), dim=1)
        return [
            [Answer(self.answers[best], share) for best, share in zip(*row, strict=True)]
            for row in zip(found.indices.tolist(), found.values.tolist(), strict=True)
        ]

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        assert self.model.tokenizer is not None
        return self.model.tokenizer

    def _score(self, rows: list[Tensor], state: Any) -> Tensor:
        """(B, C) after rows of token ids of any length, read from a state on."""
        rows = [ids.to(self.head.weight.device) for ids in rows]
        mask = pad_sequence([torch.ones_like(ids) for ids in rows], batch_first=True)
        summary = self.model.encode(pad_sequence(rows, batch_first=True), mask, state)
        scores: Tensor = self.head(summary.to(self.head.weight.dtype))
        return scores

    def _no_scores(self) -> Tensor:
        return self.head.weight.new_zeros(0, len(self.answers))

    def _tokens(self, text: Text, progress: bool) -> Iterator[Tensor]:
        """The tokens of a text, piece by piece, as if it were tokenized at once."""
        for number, piece in enumerate(whole_words(_pieces(text, progress))):
            # The first one stands where a text begins, the others behind what was before.
            yield from (
                (torch.tensor(ids, dtype=torch.long) for ids, _ in encode(self._tokenizer, [piece]))
                if number
                else self._whole([piece])
            )

    def _whole(self, texts: list[str]) -> list[Tensor]:
        """The tokens of whole texts."""
        return [torch.tensor(row, dtype=torch.long) for row in plain_ids(self._tokenizer, texts)]

    def _state(self, memory: Memory) -> Any:
        """The state that a memory holds, on this device and in this precision."""
        if not isinstance(memory, Memory):
            raise UserError(f"memory: is a {type(memory).__name__}; give what read or Memory.load returns")
        if memory.model != self._fingerprint():
            raise UserError(
                "memory: was read by another model, or one of the two is in float16; read the text again with this one"
            )
        first = self.model.initial_state(1)
        likes = tree.leaves(first)
        if not (_fit(memory.state, likes) and _are_ids(memory.end, len(self._tokenizer))):
            raise UserError("memory: is damaged; read the text again")
        parts = zip(memory.state, likes, strict=True)
        return tree.rebuild(first, [part.to(like.device, like.dtype) for part, like in parts])

    def _fingerprint(self) -> str:
        """Tells weights apart, by a few numbers of each, whatever precision they are in but float16, which rounds
        otherwise.
        """
        content = hashlib.sha256()
        for name, weight in self.named_parameters():
            some = weight.detach().flatten()[:8].to("cpu", torch.bfloat16).float()
            content.update(f"{name} {tuple(weight.shape)} {some.tolist()}".encode())
        return content.hexdigest()[:16]

    def generate_model_card(self, **told: Any) -> ModelCard:
        """The page of the model, README.md; `told` is what `card` takes: title, sections, license, language …

        `save_pretrained` and `push_to_hub` are given it as `model_card_kwargs`.
        """
        return card(self.model, self.answers, **told)

    def _save_pretrained(self, save_directory: Path) -> None:
        self.model._save_pretrained(save_directory)
        weights = {name: value.contiguous() for name, value in self.head.state_dict().items()}
        save_file(weights, save_directory / HEAD)
        # The names that transformers knows them by.
        labels = {"id2label": dict(enumerate(self.answers)), "label2id": {a: n for n, a in enumerate(self.answers)}}
        write_config(save_directory, read_config(save_directory) | labels)
        shutil.copymode(save_directory / CONFIG, save_directory / HEAD)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Open a model that was saved with its answers.

        Args:
            pretrained_model_name_or_path: a folder, or an id on the Hugging Face Hub.
            options: of `huggingface_hub.snapshot_download`: revision, token, cache_dir …

        Raises:
            UserError: if there is no such folder or id, or it holds no answers.
        """
        with opened(pretrained_model_name_or_path, **options) as folder:
            model: SegmentModel[Any] = SegmentModel.from_pretrained(folder)
            if not (folder / HEAD).exists():
                raise UserError(
                    f"{folder}: holds a {type(model).__name__} that was not trained to choose answers; give "
                    "one that was, with answer=classify"
                )
            labels = read_config(folder).get("id2label")
            with safe_open(folder / HEAD, framework="pt") as file:
                # Earlier versions wrote them beside the weights.
                answers = (
                    [labels[str(number)] for number in range(len(labels))]
                    if labels
                    else json.loads(file.metadata()["answers"])
                )
                head = nn.Linear(model.width, len(answers), bias="bias" in file.keys())  # noqa: SIM118
                head.load_state_dict({name: file.get_tensor(name) for name in head.state_dict()})
            return cls(model, head, answers).eval()


def _check_plain(path: str | Path) -> None:
    """Raise UserError if something stands there that is no file: reading it may have no end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: is no plain file; give what Memory.save has written, or another place")


def _fit(state: Sequence[Tensor], likes: Sequence[Tensor]) -> bool:
    """Whether tensors are of the shapes of a state; what is empty in that one grows."""
    if [_kind(part) for part in state] != [_kind(like) for like in likes]:
        return False
    sizes = (
        (n, of) for part, like in zip(state, likes, strict=True) for n, of in zip(part.shape, like.shape, strict=True)
    )
    return all(of in (n, 0) for n, of in sizes) and all(bool(part.double().isfinite().all()) for part in state)


def _kind(part: Tensor) -> tuple[int, bool, bool]:
    return part.ndim, part.is_floating_point(), part.is_complex()


def _are_ids(end: Tensor, known: int) -> bool:
    return end.ndim == 1 and end.dtype == torch.long and bool(((end >= 0) & (end < known)).all())


def _texts(name: str, given: Any) -> list[str]:
    """Texts as a list, of a single one too."""
    if isinstance(given, str):
        given = [given]
    elif _in_order(given):
        given = list(given)
    if not _are_texts(given):
        raise UserError(f"{name}: give a text, or a list of texts")
    for text in given:
        _check_letters(name, text)
        if not text.strip():
            raise UserError(f"{name}: one is blank, which asks nothing; leave it out")
    return list(given)


def _in_order(given: Any) -> bool:
    """Whether it can be gone through, and has an order."""
    # An array of no dimension says that it could be.
    return isinstance(given, Iterable) and not isinstance(given, Mapping | Set) and getattr(given, "ndim", 1) > 0


def _are_texts(given: Any) -> bool:
    return isinstance(given, list | tuple) and all(isinstance(text, str) for text in given)


def _check_letters(name: str, text: str) -> None:
    if _HALF.search(text):
        raise UserError(f"{name}: half of a surrogate pair stands for no letter; leave it out")


def _pieces(text: Text, progress: bool) -> Iterator[str]:
    """A text in pieces, with a bar if that is wanted."""
    if isinstance(text, Path):
        try:
            with bar.open(
                text, "r", encoding="utf-8-sig", description="reading", disable=not progress, transient=True
            ) as file:
                yield from iter(lambda: file.read(CHARACTERS), "")
        except OSError as error:
            raise UserError(f"{text}: cannot be read ({error.strerror}); give the path of a text") from None
        except UnicodeDecodeError:
            raise UserError(f"{text}: is no text in UTF-8; convert it first") from None
        return
    if isinstance(text, bytes) or not _in_order(text):
        raise UserError(f"text: is a {type(text).__name__}; give a text, a Path, or pieces of a text")
    pieces = [text[at : at + CHARACTERS] for at in range(0, len(text), CHARACTERS)] if isinstance(text, str) else text
    try:
        for piece in bar.track(pieces, "reading", disable=not progress, transient=True):
            if not isinstance(piece, str):
                raise UserError(f"text: holds a {type(piece).__name__} among its pieces; give texts")
            _check_letters("text", piece)
            yield piece
    except UnicodeDecodeError:
        raise UserError("text: is no text in UTF-8; convert it first") from None
