"""Running text: what is read and predicted, the loss of every segment, and the real command."""

from __future__ import annotations

import csv
import math
import re
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Run
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rmt_lightning import train as front_door
from rmt_lightning.app.build import load
from rmt_lightning.core.errors import UserError
from rmt_lightning.models import state as tree
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.tiny import TinyGPT
from rmt_lightning.models.transformer_xl import TransformerXL
from rmt_lightning.tasks.corpus import Corpus
from rmt_lightning.tasks.facts import Split
from rmt_lightning.tasks.language import IGNORED, DocumentDataModule, RunningText, TextScore
from rmt_lightning.training.language_modeling import LanguageModeler
from rmt_lightning.training.metrics import TextLoss
from rmt_lightning.training.optimization import WarmupDecay
from rmt_lightning.training.phases.fixed_steps import FixedSteps
from rmt_lightning.training.phases.phase import Phases

LENGTH = 300


@pytest.fixture
def text(corpora: dict[Split, Corpus], tokenizer: PreTrainedTokenizerBase) -> RunningText:
    return RunningText(corpora["train"], tokenizer, LENGTH, seed=3)


def tokens_of(text: RunningText, number: int) -> list[int]:
    return text.corpus.tokens[text.borders[number] : text.borders[number + 1]].tolist()


def test_each_token_of_a_document_is_predicted_once_from_those_before_it(
    text: RunningText, tokenizer: PreTrainedTokenizerBase
) -> None:
    for number in (0, 7):
        tokens = tokens_of(text, number)
        document = text.document(number)
        assert document["input_ids"].shape == document["targets"].shape == (math.ceil(len(tokens) / LENGTH), LENGTH)
        assert document["starts"].tolist() == [True] + [False] * (len(document["starts"]) - 1)
        targets, inputs = document["targets"].flatten().tolist(), document["input_ids"].flatten().tolist()
        assert targets == tokens + [IGNORED] * (len(targets) - len(tokens))
        assert inputs[: len(tokens)] == [tokenizer.cls_token_id, *tokens[:-1]]
        assert text.corpus.document_bytes[number] == len(" ".join(tokenizer.decode(tokens).split()))


def test_a_row_is_an_endless_stream_of_whole_documents(text: RunningText) -> None:
    """In any pieces; all documents before one comes again; every row in an order of its own."""
    total = int(text.num_segments.sum())
    stream = text.row(5, 0, 2 * total)
    pieces = [text.row(5, first, min(7, 2 * total - first)) for first in range(0, 2 * total, 7)]
    for name, whole in stream.items():
        assert torch.equal(torch.cat([piece[name] for piece in pieces]), whole)
    starts = [*stream["starts"].nonzero().flatten().tolist(), 2 * total]
    documents = [text.document(number)["targets"] for number in range(len(text.num_segments))]
    read = [
        next(n for n, document in enumerate(documents) if torch.equal(stream["targets"][first:last], document))
        for first, last in pairwise(starts)
    ]
    half = len(read) // 2
    assert sorted(read[:half]) == sorted(read[half:]) == list(range(len(documents)))
    assert read[:half] != read[half:]
    assert not torch.equal(text.row(6, 0, 4)["input_ids"], text.row(5, 0, 4)["input_ids"])


def module(text: RunningText, rank: int = 0, world_size: int = 1, batch_size: int = 2) -> DocumentDataModule:
    texts: dict[Split, RunningText] = dict.fromkeys(("train", "validation", "test"), text)
    phases = Phases([FixedSteps(steps=10)], WarmupDecay(steps=10, lr=1.0), seed=0)
    data = DocumentDataModule(
        texts, phases, LENGTH, batch_size, num_segments=3, steps_per_epoch=4, validation_documents=9
    )
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
    return data


def test_rows_go_on_from_step_to_step_and_are_shared_by_ranks(text: RunningText) -> None:
    data = module(text)
    data.keys.consumed = 6
    batches = list(data.train_dataloader())
    assert len(batches) == 2  # what is left of the second epoch
    for step, batch in zip((6, 7), batches, strict=True):
        for row in range(2):
            expected = text.row(row, 3 * step, 3)
            assert all(torch.equal(batch[name][row], expected[name]) for name in expected)
    ranks = [module(text, rank, world_size=2, batch_size=1) for rank in range(2)]
    for whole, *parts in zip(module(text).train_dataloader(), *(d.train_dataloader() for d in ranks), strict=True):
        assert torch.equal(whole["targets"], torch.cat([part["targets"] for part in parts]))
    read = [number for data in ranks for batch in data.val_dataloader() for number in batch["number"].tolist()]
    assert sorted(read) == list(range(9))


# A modeler in double precision, whose dropout is off, for short segments of short documents.


@pytest.fixture
def short(tokenizer: PreTrainedTokenizerBase) -> RunningText:
    documents = [tokenizer(f"{'The dog was gone. ' * n}")["input_ids"] for n in (1, 3, 2)]
    lengths = torch.tensor([0, *map(len, documents)]).cumsum(0).numpy()
    tokens = torch.tensor([token for document in documents for token in document]).numpy()
    return RunningText(Corpus(tokens, tokens * 0, lengths, torch.arange(4).numpy(), lengths[1:]), tokenizer, 4, seed=0)


@pytest.mark.parametrize("kind", ["bos", "cls", "eos", "sep"])
def test_what_a_document_begins_with(kind: str, corpora: dict[Split, Corpus]) -> None:
    """A tokenizer such as Qwen's has an end token alone."""
    tokenizer = TinyGPT().tokenizer(["Mary went to the garden."])
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"tokenizer has no token that begins or ends a text \(bos, cls, eos, sep\)"):
        RunningText(corpora["train"], tokenizer, LENGTH, seed=3)
    tokenizer.add_special_tokens({f"{kind}_token": "[EOS]"})
    text = RunningText(corpora["train"], tokenizer, LENGTH, seed=3)
    assert text.document(0)["input_ids"][0, 0] == tokenizer.convert_tokens_to_ids("[EOS]")


@pytest.fixture
def make(tokenizer: PreTrainedTokenizerBase) -> Callable[..., LanguageModeler]:
    def make(**options: int) -> LanguageModeler:
        torch.manual_seed(0)
        model = TransformerXL(tokenizer, 8, width=8, layers=1, heads=2, cache_length=3, memory_size=2, **options)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)  # so that what is far away matters
        return LanguageModeler(model).double()

    return make


def losses_by_hand(modeler: LanguageModeler, row: dict[str, Tensor], size: int) -> list[Tensor]:
    """One row: a new state at each document, the state cut off before every `size`-th segment."""
    model, found, state = modeler.model, [], None
    for number, (ids, targets, starts) in enumerate(zip(row["input_ids"], row["targets"], row["starts"], strict=True)):
        if starts:
            state = model.initial_state(1)
        elif number % size == 0:
            state = tree.detach(state)
        length = int((targets != IGNORED).sum())
        hidden, state = model.step(Segment(ids[None, :length]), state)
        scores = model.logits(hidden[0]).log_softmax(dim=1)
        found.append(-sum(scores[i, targets[i]] for i in range(length)))
    return found


@pytest.mark.parametrize(("depth", "size"), [(0, 1), (1, 2), (2, 3), (-1, 9)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_equal_a_graph_cut_by_hand(
    make: Callable[..., LanguageModeler], short: RunningText, depth: int, size: int, checkpointing: bool
) -> None:
    modeler = make(bptt_depth=depth, gradient_checkpointing=checkpointing)
    modeler.log = lambda *_: None
    rows = [short.row(row, 0, 9) for row in range(2)]
    assert not torch.equal(rows[0]["starts"], rows[1]["starts"])
    modeler._state = modeler.model.initial_state(2)
    loss = modeler.training_step({name: torch.stack([row[name] for row in rows]) for name in rows[0]}, 0)
    own = torch.autograd.grad(loss, list(modeler.parameters()))
    by_hand = sum(sum(losses_by_hand(modeler, row, size)) for row in rows) / (2 * 9 * 4)
    expected = torch.autograd.grad(by_hand, list(modeler.parameters()))
    torch.testing.assert_close(loss, by_hand)
    for (name, _), one, other in zip(modeler.named_parameters(), own, expected, strict=True):
        torch.testing.assert_close(one, other, msg=lambda told, name=name: f"{name}: {told}")


def test_depths_differ(make: Callable[..., LanguageModeler], short: RunningText) -> None:
    batch = {name: value[None] for name, value in short.row(0, 0, 9).items()}
    found = []
    for depth in (0, 1, 2, -1):
        modeler = make(bptt_depth=depth)
        modeler.log, modeler._state = lambda *_: None, modeler.model.initial_state(1)
        modeler.training_step(batch, 0).backward()
        found.append(modeler.model.embedding.weight.grad)
    assert all(not torch.allclose(one, other, rtol=1e-4) for one, other in pairwise(found))


def test_steps_carry_the_state_on(make: Callable[..., LanguageModeler], short: RunningText) -> None:
    """Documents read in training steps of three segments are predicted as well as those read at once."""
    modeler, total = make(), 0.0
    modeler.log, modeler._state = lambda *_: None, modeler.model.initial_state(1)
    segments = int(short.num_segments.sum())
    assert segments % 3 == 0
    for first in range(0, segments, 3):
        batch = {name: value[None] for name, value in short.row(0, first, 3).items()}
        total += modeler.training_step(batch, 0).item() * batch["targets"].numel()
    data = module(short)
    documents = [modeler.nats(batch) for batch in data.documents("test", None)]
    assert total == pytest.approx(torch.cat(documents).sum().item())


def test_scores() -> None:
    metric = TextLoss()
    metric.update(torch.tensor([8 * math.log(4), 0.0]), torch.tensor([8, 8]), torch.tensor([10, 6]))
    score = TextScore(8 * math.log(4), 16, 16)
    assert score.perplexity == pytest.approx(2) and score.bits_per_byte == pytest.approx(1)
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found == pytest.approx({name: score.row()[name] for name in ("loss", "perplexity", "bits_per_byte")})


# The real command

SMALL = (
    "task=language_modeling", "model=rmt_transformer_xl", "model.width=16", "model.layers=1", "model.heads=2",
    "model.cache_length=8", "model.memory_size=2", "model.bptt_depth=1", "backbone.vocabulary_size=600",
    "noise.documents=20", "data.segment_length=20", "data.batch_size=4", "data.steps_per_epoch=5",
    "data.validation_documents=2", "curriculum.steps=10", "optim.lr=1e-2",
)  # fmt: skip


@pytest.fixture
def train_here(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """The command without the seconds that a new process takes to start; returns what it says on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RMT_LIGHTNING_CACHE", str(cache))

    def run(*settings: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train", *settings])
        try:
            front_door.run()
        except SystemExit as exit_:
            assert exit_.code == 2
        GlobalHydra.instance().clear()
        return capsys.readouterr().err

    yield run
    GlobalHydra.instance().clear()


def weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


KILLED_IN_STEP_7 = """
import os, signal
from rmt_lightning.train import run
from rmt_lightning.training.language_modeling import LanguageModeler

original = LanguageModeler.training_step

def step(self, *args):
    if self.global_step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args)

LanguageModeler.training_step = step
run()
"""


def test_a_run_its_files_and_that_it_goes_on_exactly(
    train_here: Callable[..., str], train: Run, tmp_path: Path, cache: Path
) -> None:
    assert train_here(*SMALL, "hydra.run.dir=whole") == ""
    whole = weights(tmp_path / "whole")
    (evaluation,) = rows(tmp_path / "whole" / "evaluation.csv")
    documents = rows(tmp_path / "whole" / "documents.csv")
    assert evaluation["documents"] == "2" == str(len(documents))
    for name in ("nats", "tokens", "bytes"):
        assert sum(float(row[name]) for row in documents) == pytest.approx(float(evaluation[name]))
    assert 1 < float(evaluation["perplexity"]) < 600
    bits = float(evaluation["nats"]) / math.log(2) / float(evaluation["bytes"])
    assert float(evaluation["bits_per_byte"]) == pytest.approx(bits)
    logged = [row for row in rows(tmp_path / "whole/metrics/version_0/metrics.csv") if row["val/perplexity"]]
    assert len(logged) == 2 and float(logged[1]["val/perplexity"]) < float(logged[0]["val/perplexity"])
    assert (tmp_path / "whole" / "perplexity.png").read_bytes().startswith(b"\x89PNG")

    # Killed between two validations: the states of all rows are those of the last checkpoint.
    killed = train(*SMALL, "hydra.run.dir=killed", small=False, driver=KILLED_IN_STEP_7)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert train_here("resume=killed") == ""
    assert all(torch.equal(value, weights(tmp_path / "killed")[name]) for name, value in whole.items())

    # A language model answers no questions, and a finished one can be trained on.
    config = OmegaConf.load(tmp_path / "whole" / "config.yaml")
    with pytest.raises(UserError, match=r"last\.ckpt: holds a language model"):
        load(config, tmp_path / "whole", tmp_path / "whole" / "checkpoints" / "last.ckpt")
    assert train_here("resume=whole", "curriculum.steps=15", "data.batch_size=5") == ""
    assert len(rows(tmp_path / "whole" / "metrics" / "version_1" / "metrics.csv")) > 0


@pytest.mark.soak
def test_two_processes_are_one_with_all_rows(train_here: Callable[..., str], train: Run, tmp_path: Path) -> None:
    """And they hand their states on to one."""
    assert train_here(*SMALL, "hydra.run.dir=whole") == ""
    whole = weights(tmp_path / "whole")
    both = ("data.batch_size=2", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_steps=7")
    result = train(*SMALL, *both, "hydra.run.dir=both", small=False)
    assert result.returncode == 0, result.stderr
    assert len(rows(tmp_path / "both" / "documents.csv")) == 2
    assert train_here("resume=both", "data.batch_size=4", "trainer.devices=1", "trainer.max_steps=-1") == ""
    for name, value in weights(tmp_path / "both").items():
        torch.testing.assert_close(value, whole[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("task=language_modeling model=rmt_encoder", r"task=language_modeling: a RMTEncoder does not predict the next"),
        ("task=language_modeling curriculum=segments", r"curriculum: a SegmentCurriculum does not go with task=langua"),
        ("task=language_modeling test=lengths", r"test: a LengthTest does not go with task=language_modeling, which"),
        ("data=documents", r"data: a DocumentDataModule does not go with task=detect, which needs a FactDataModule; "),
        (
            "task=language_modeling hold=state_passing",
            r"hold: a StatePassing does not go with task=language_modeling; leave out hold=…",
        ),
        ("task=language_modeling data.num_segments=0", r"data\.num_segments=0: must be greater than or equal to 1"),
        ("task=language_modeling curriculum.max_segments=3", r"curriculum\.max_segments: no such setting"),
        ("task=language_modeling noise=files noise.path=absent.txt", r"noise\.path=absent\.txt: no \.txt"),
    ],
)
def test_one_line(typed: str, message: str, train_here: Callable[..., str], tmp_path: Path) -> None:
    small = [] if "noise=" in typed else ["noise.documents=20"]
    told = train_here(*small, *typed.split(" "))
    assert re.match(f"error: {message}", told) and told.count("\n") == 1, told
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".log"]


def test_real_articles(shared_data: Path, train_here: Callable[..., str], tmp_path: Path) -> None:
    text = (shared_data / "wikitext-2" / "train.txt").read_text()[:150_000]
    (tmp_path / "articles.txt").write_text(text)
    settings = [setting for setting in SMALL if not setting.startswith("noise.")]
    files = ("noise=files", "noise.path=articles.txt", "data.segment_length=60", "test.documents=1")
    assert train_here(*settings, *files, "curriculum.steps=20", "hydra.run.dir=run") == ""
    (evaluation,) = rows(tmp_path / "run" / "evaluation.csv")
    assert 2 < float(evaluation["perplexity"]) < 500


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("answer=generate", "answer: running text asks nothing; leave out answer=…"),
        ("answer.all_questions=true", "answer: running text asks nothing; leave out answer=…"),
        ("optim.lr=[1e-3,1e-4]", "optim.lr=[0.001, 0.0001]: running text has one stage, not 2; give one number"),
        (
            "model.schedule=diagonal",
            "model.schedule=diagonal: running text is read segment by segment, for documents begin anywhere in it; "
            "leave it at vertical",
        ),
    ],
)
def test_what_running_text_would_not_obey(typed: str, message: str, refused: Callable[..., str]) -> None:
    assert refused("task=language_modeling", typed) == f"error: {message}\n"
