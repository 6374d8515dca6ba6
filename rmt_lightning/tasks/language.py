"""Running text for language modeling: documents in order, segment by segment.

Shapes: B rows, T segments, S text tokens of a segment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from rmt_lightning.core.tokens import start_token
from rmt_lightning.tasks.corpus import Corpus
from rmt_lightning.tasks.datamodule import Batches, Keys, ShortEpochs, TrainingKeys, ValidationKeys
from rmt_lightning.tasks.facts import Split

# A target that stands for no token.
IGNORED = -100


class LanguageModeling:
    """Predict each token of a document from those before it (RMT-2022, section 4).

    ```
    reads      [CLS] The dog was | gone . He had      two segments of four tokens
    predicts    The  dog was gone | .   He had never
    ```
    """

    name = "language_modeling"


@dataclass(frozen=True)
class TextScore:
    """How well some text has been predicted.

    Attributes:
        nats: negative log-likelihood of all its tokens.
        tokens: how many tokens it has, each predicted once.
        bytes: how long it is in UTF-8.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Independent of the vocabulary, unlike perplexity."""
        return self.nats / math.log(2) / self.bytes

    def row(self) -> dict[str, float]:
        """The columns of a csv file."""
        derived = {"loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        return asdict(self) | derived


class RunningText:
    """The documents of one split, cut into segments, and endless rows of them.

    Each document begins with a start token, so that each of its own tokens is predicted once, and with a new segment;
    its last segment is padded. A row is a stream of documents in an order of its own; it reads all of them before it
    reads one again. What stands where in a row depends on the seed and the row alone.

    Args:
        corpus: the documents.
        tokenizer: names the start token.
        text_length: S.
        seed: of the order of documents.

    Raises:
        UserError: if the tokenizer has no token to begin with.
    """

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, text_length: int, seed: int) -> None:
        self.corpus = corpus
        self.start_token = start_token(tokenizer)
        self.text_length = text_length
        self.seed = seed
        self.borders = corpus.sentence_starts[corpus.document_starts]  # (documents + 1,) positions in the tokens
        self.num_segments = -(-np.diff(self.borders) // text_length)  # (documents,)
        # What is being read of each row, so as not to draw it again for each segment: (reading, documents, ends).
        self._orders: dict[int, tuple[int, np.ndarray, np.ndarray]] = {}

    def document(self, number: int) -> dict[str, Tensor]:
        """All T segments of a document; see `_segments`."""
        return self._segments([(number, place) for place in range(self.num_segments[number])])

    def row(self, row: int, first: int, count: int) -> dict[str, Tensor]:
        """Segments `first` … `first + count - 1` of a row; see `_segments`."""
        return self._segments([self._find(row, position) for position in range(first, first + count)])

    def _find(self, row: int, position: int) -> tuple[int, int]:
        """Which document, and which of its segments, stands at a position of a row."""
        reading, position = divmod(position, int(self.num_segments.sum()))
        if row not in self._orders or self._orders[row][0] != reading:
            rng = np.random.Generator(np.random.Philox(key=[self.seed, 2**33], counter=[0, 0, reading, row]))
            order = rng.permutation(len(self.num_segments))
            self._orders[row] = reading, order, np.cumsum(self.num_segments[order])
        _, order, ends = self._orders[row]
        index = int(np.searchsorted(ends, position, side="right"))
        return int(order[index]), position - int(ends[index] - self.num_segments[order[index]])

    def _segments(self, places: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """Segments of documents: `input_ids` and `targets` (T, S), and whether a document `starts` there (T,)."""
        input_ids = np.zeros((len(places), self.text_length), np.int64)
        targets = np.full_like(input_ids, IGNORED)
        for segment, (document, place) in enumerate(places):
            first = self.borders[document] + place * self.text_length
            text = self.corpus.tokens[first : min(first + self.text_length, self.borders[document + 1])]
            targets[segment, : len(text)] = text
            input_ids[segment, 1 : len(text)] = text[:-1]
            input_ids[segment, :1] = self.corpus.tokens[first - 1 : first] if place else self.start_token
        starts = torch.tensor([place == 0 for _, place in places])
        return {"input_ids": torch.from_numpy(input_ids), "targets": torch.from_numpy(targets), "starts": starts}


class Rows(Dataset[dict[str, Tensor]]):
    """Pieces of rows, by (row, first segment)."""

    def __init__(self, text: RunningText, num_segments: int) -> None:
        self.text = text
        self.num_segments = num_segments

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        return self.text.row(*key, self.num_segments)


class Documents(Dataset[dict[str, Tensor]]):
    """Whole documents, by `number`, with their length in `bytes`."""

    def __init__(self, text: RunningText) -> None:
        self.text = text

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        length = int(self.text.corpus.document_bytes[number])
        return self.text.document(number) | {"number": torch.tensor(number), "bytes": torch.tensor(length)}


def side_by_side(documents: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Batch documents; the shorter ones end with segments without text."""
    padding = {"input_ids": 0, "targets": IGNORED, "starts": False}
    batch = {name: torch.stack([document[name] for document in documents]) for name in ("number", "bytes")}
    for name, value in padding.items():
        batch[name] = pad_sequence([document[name] for document in documents], batch_first=True, padding_value=value)
    return batch


class DocumentDataModule(ShortEpochs):
    """Running text for training, whole documents for validation and test.

    Args:
        texts: the documents of each split.
        keys: which pieces of rows come next, and which documents are validated; None: the phases of the module that is
            trained on them know.
        segment_length: what the model sees of a segment, memory included, by which speed is counted; None: the text
            alone.
        batch_size: B, rows side by side, on each device.
        num_segments: T, segments of a training step; the next step reads on after them.
        num_workers: processes that read; 0 reads in the main process.
        steps_per_epoch: training steps between two validations.
        validation_documents: how many documents a validation reads, at most.
    """

    def __init__(
        self,
        texts: dict[Split, RunningText],
        keys: Keys[DocumentDataModule] | None = None,
        segment_length: Annotated[int, Ge(1)] | None = None,
        batch_size: Annotated[int, Ge(1)] = 16,
        num_segments: Annotated[int, Ge(1)] = 4,
        num_workers: Annotated[int, Ge(0)] = 0,
        steps_per_epoch: Annotated[int, Ge(1)] = 100,
        validation_documents: Annotated[int, Ge(1)] = 16,
    ) -> None:
        length = segment_length or texts["train"].text_length
        super().__init__(keys, length, batch_size, num_workers, steps_per_epoch)
        self.texts = texts
        self.num_segments = num_segments
        self.validation_documents = validation_documents

    @property
    def validated(self) -> int:
        return min(self.validation_documents, len(self.texts["validation"].num_segments))

    @property
    def rows(self) -> range:
        """The rows of this device."""
        return range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self.loader(Rows(self.texts["train"], self.num_segments), batch_sampler=TrainingKeys(self))

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        documents = Documents(self.texts["validation"])
        return self.loader(documents, batch_sampler=ValidationKeys(self), collate_fn=side_by_side)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        batches = Batches(self._batches("test", None, self.rank, self.world_size))
        return self.loader(Documents(self.texts["test"]), batch_sampler=batches, collate_fn=side_by_side)

    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Those of the test."""
        return self.test_dataloader()

    def validation_batches(self) -> list[list[int]]:
        """The numbers of this device's share of the documents that a validation reads, batch by batch."""
        return self._batches("validation", self.validation_documents, self.rank, self.world_size)

    def documents(self, split: Split, limit: int | None) -> DataLoader[dict[str, Tensor]]:
        """The first documents of a split, those of like length together."""
        batches = self._batches(split, limit)
        return self.loader(Documents(self.texts[split]), batch_sampler=batches, collate_fn=side_by_side)

    def _batches(self, split: Split, limit: int | None, rank: int = 0, world_size: int = 1) -> list[list[int]]:
        lengths = self.texts[split].num_segments
        by_length = sorted(range(len(lengths))[:limit], key=lambda number: -lengths[number])[rank::world_size]
        return [by_length[i : i + self.batch_size] for i in range(0, len(by_length), self.batch_size)]
