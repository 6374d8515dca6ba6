"""Fact tasks whose answer a language model writes."""

from __future__ import annotations

import copy
import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Run
from reference import read_causal_segment
from transformers import PreTrainedTokenizerBase

from rmt_lightning.core.errors import UserError
from rmt_lightning.models.generation import generate
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.rmt import RMTDecoder, RMTEncoder
from rmt_lightning.models.segment_model import Reading
from rmt_lightning.models.tiny import TinyBert, TinyGPT
from rmt_lightning.training.generation import FactGenerator

SIZE = {"width": 16, "layers": 2, "heads": 2, "max_positions": 64}
ANSWERS = ("garden", "the old garden", "kitchen and hallway and office")


@pytest.fixture
def learner(tokenizer: PreTrainedTokenizerBase) -> FactGenerator:
    torch.manual_seed(0)
    own = TinyGPT().tokenizer(["Mary went to the old garden.", "the kitchen and the hallway and the office"])
    model = RMTDecoder(TinyGPT(**SIZE).decoder(own), 26, memory_size=3)
    for name, weight in model.decoder.model.named_parameters():
        weight.data.mul_(20 if ".h." in name and weight.dim() > 1 else 1)
    return FactGenerator(model, ANSWERS).double().eval()


def test_the_words_of_an_answer(learner: FactGenerator) -> None:
    tokenizer = learner.model.tokenizer
    for words, is_word, answer in zip(*learner._ended(learner.answer_ids), ANSWERS, strict=True):
        assert tokenizer.decode(words[is_word]) == f" {answer}[EOS]"
        assert (words[~is_word] == learner.end).all()


def test_the_loss_is_that_of_the_words(learner: FactGenerator) -> None:
    """Segment by segment, word by word."""
    model = learner.model
    gpt = model.decoder.model
    ids = torch.randint(5, 250, (3, 2, model.text_length))
    labels = torch.tensor([2, 0, 1])
    losses = []
    for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
        memory = model.memory
        for segment in row:
            hidden, memory = read_causal_segment(gpt, segment, memory, free=True)
        words = [*learner.answer_ids[label][learner.answer_ids[label] >= 0].tolist(), learner.end]
        told, _ = read_causal_segment(gpt, words[:-1], memory, free=True)
        for before, word in zip([hidden[-1], *told], words, strict=True):
            losses.append(-gpt.lm_head(before).log_softmax(-1)[word])
    (*_, end) = model.read(ids)
    loss, _, _ = learner.judge(end, learner.answer_ids[labels])
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    # Where nothing is asked, nothing is learnt.
    extended = Reading(Segment(end.segment.input_ids[[0, 1, 2, 0]]), end.hidden[[0, 1, 2, 0]], end.state[[0, 1, 2, 0]])
    nothing = torch.full_like(learner.answer_ids[:1], -1)
    again, _, right = learner.judge(extended, torch.cat([learner.answer_ids[labels], nothing]))
    torch.testing.assert_close(again, loss)
    assert not right[3]


def test_right_is_what_is_written_word_for_word(learner: FactGenerator) -> None:
    """The answers are made to be what the model happens to write."""
    model = learner.model
    ids = torch.randint(5, 250, (4, 3, model.text_length))
    longest = learner.words.shape[1]
    learner.end = int(generate(model, ids[:1].flatten(1), longest).input_ids[0, 2])
    said, before_end, _ = generate(model, ids.flatten(1), longest, stop_tokens=[learner.end])
    said = said.masked_fill(before_end == 0, learner.end)
    assert before_end[0].sum() == 3 and (said[:, None] == said[:2]).all(dim=2).tolist() == [
        [True, False], [False, True], [False, False], [False, False]
    ]  # fmt: skip
    learner.words[:2, : said.shape[1]] = said[:2]
    learner.words[:2, said.shape[1] :] = learner.end
    learner.words[2] = learner.words[0]
    learner.words[2, 1] += 1  # one word differs from what is written
    scores = learner(ids)
    assert scores.shape == (4, 4) and scores.sum(dim=1).tolist() == [1] * 4
    assert scores.argmax(dim=1).tolist() == [0, 1, 3, 3]
    # The same from a stream, and from plain ids padded anywhere.
    assert torch.equal(learner(iter(ids.unbind(dim=1))), scores)
    padded = torch.nn.functional.pad(ids.flatten(1), (2, 5))
    assert torch.equal(learner(padded, torch.nn.functional.pad(torch.ones_like(ids.flatten(1)), (2, 5))), scores)


def test_who_cannot_write(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = RMTEncoder(TinyBert(**SIZE).encoder(tokenizer), 24, memory_size=3)
    with pytest.raises(UserError, match=r"answer=generate: RMTEncoder cannot write; choose model=rmt_decoder"):
        FactGenerator(encoder, ANSWERS)
    # [SEP] ends an answer where there is no other token to.
    decoder = TinyGPT(**SIZE).decoder(tokenizer)
    assert FactGenerator(RMTDecoder(decoder, 24, memory_size=3), ANSWERS).end == tokenizer.sep_token_id
    decoder.tokenizer = copy.deepcopy(tokenizer)
    decoder.tokenizer.sep_token = None
    endless = RMTDecoder(decoder, 24, memory_size=3)
    with pytest.raises(UserError, match=r"tokenizer has no end token; choose answer=classify"):
        FactGenerator(endless, ANSWERS)


@pytest.mark.soak
def test_a_decoder_learns_to_write_what_it_has_read(train: Run, environment: dict[str, str], tmp_path: Path) -> None:
    """The fact is in the first segment, the question in the last; the answer is written after it."""
    result = train(
        "task=memorize", "model=rmt_decoder", "backbone=tiny_gpt", "answer=generate", "backbone.width=64",
        "backbone.layers=2", "backbone.heads=2", "noise.documents=50", "data.segment_length=36", "model.memory_size=4",
        "data.steps_per_epoch=20", "data.validation_samples=64", "curriculum.max_segments=2",
        "curriculum.threshold=0.95", "test.segments=[2]", "test.samples=64", "hydra.run.dir=run", small=False,
    )  # fmt: skip
    assert result.returncode == 0 and result.stderr == "", result.stdout + result.stderr
    command = ["-m", "rmt_lightning.evaluate", "checkpoint=run", "segments=[2]", "samples=64", "device=cpu"]
    subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, check=True, capture_output=True)
    (folder,) = (tmp_path / "run" / "evaluations").iterdir()
    for path in (tmp_path / "run" / "evaluation.csv", folder / "evaluation.csv"):
        with path.open() as file:
            (row,) = csv.DictReader(file)
        assert float(row["accuracy"]) > 0.8
