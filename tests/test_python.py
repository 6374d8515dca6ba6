"""Training from Python, without Hydra: modules, data and phases with a plain Lightning Trainer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassF1Score
from transformers import PreTrainedTokenizerBase

import rmt_lightning
from rmt_lightning.core.errors import UserError
from rmt_lightning.models.rmt import RMTDecoder, RMTEncoder
from rmt_lightning.models.tiny import TinyBert, TinyGPT
from rmt_lightning.tasks.corpus import Corpus
from rmt_lightning.tasks.datamodule import FactDataModule
from rmt_lightning.tasks.facts import Detect, Split
from rmt_lightning.tasks.labeled_texts import LabeledTexts, TextDataModule
from rmt_lightning.tasks.language import DocumentDataModule, RunningText
from rmt_lightning.tasks.placement import Key, Placement
from rmt_lightning.training.answering import FactClassifier
from rmt_lightning.training.generation import FactGenerator
from rmt_lightning.training.language_modeling import LanguageModeler
from rmt_lightning.training.optimization import WarmupDecay
from rmt_lightning.training.phases.curriculum import SegmentCurriculum
from rmt_lightning.training.phases.fixed_steps import FixedSteps
from rmt_lightning.training.phases.state_passing import StatePassing

PEOPLE = ("Mary", "John")
PLACES = Detect().answers
# Texts of one, two and three segments, as `make_model` cuts them.
TEXTS = [
    (f"{PEOPLE[number % 2]} was here. " * (1 + 6 * (number % 3)) + "Who was here?", PEOPLE[number % 2])
    for number in range(24)
]


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    def make(*callbacks: Any, **settings: Any) -> L.Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        quiet["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        return L.Trainer(callbacks=[*callbacks], default_root_dir=tmp_path, **quiet | settings)

    return make


@pytest.fixture
def facts(corpora: dict[Split, Corpus], tokenizer: PreTrainedTokenizerBase) -> Callable[..., FactDataModule]:
    def make(**settings: Any) -> FactDataModule:
        placement = Placement(Detect(), corpora, tokenizer, text_length=27)
        return FactDataModule(placement, batch_size=4, steps_per_epoch=2, validation_samples=8, **settings)

    return make


def curriculum(**settings: Any) -> SegmentCurriculum:
    return SegmentCurriculum(**{"max_segments": 2, "steps": 4, "when_stuck": "continue", **settings})


ONE = curriculum(max_segments=1)


def pairs(rows: list[Any]) -> tuple[Any, ...]:
    return tuple(zip(*rows, strict=True))


@pytest.fixture
def classifier(make_model: Callable[..., RMTEncoder]) -> FactClassifier:
    model = make_model(segment_length=34)
    assert model.text_length == 27
    return FactClassifier(model, Detect().answers)


def test_a_curriculum_among_the_callbacks(
    classifier: FactClassifier, facts: Callable[..., FactDataModule], make_trainer: Callable[..., L.Trainer]
) -> None:
    """The sanity check is no validation of the curriculum, which ends the run; then test and predict."""
    growing, data = curriculum(), facts(test_segments=[3, 1], test_samples=8)
    trainer = make_trainer(growing, max_epochs=99)
    trainer.fit(classifier, data)
    assert [(result.stage, result.steps) for result in growing.results] == [(1, 4), (2, 4)]
    assert [step for step, *_ in growing.history] == [2, 4, 6, 8] and trainer.global_step == 8
    found = trainer.test(classifier, data, verbose=False)[0]
    assert {"test/accuracy", "test/accuracy_segments_1", "test/accuracy_segments_3"} <= set(found)
    assert found["test/accuracy"] == found["test/accuracy_segments_3"]
    # Another Trainer asks the same questions, in words.
    said = make_trainer().predict(classifier, data)
    assert said is not None and [len(some) for some in said] == [8, 8] and set(chain(*said)) <= set(PLACES)
    right = sum(
        answer == data.placement.example("test", Key(length, number)).answer
        for length, answers in zip((1, 3), said, strict=True)
        for number, answer in enumerate(answers)
    )
    assert right == 8 * (found["test/accuracy_segments_1"] + found["test/accuracy_segments_3"])
    # A validation of its own decides nothing, and what is over is not gone through again.
    make_trainer().validate(classifier, data, verbose=False)
    assert len(growing.history) == 4
    with pytest.raises(UserError, match="SegmentCurriculum: is over; give a new one, or one that goes on for longer"):
        make_trainer(growing).fit(classifier, data)
    again = make_trainer(curriculum(), max_epochs=99)
    again.validate(classifier, data, verbose=False)
    again.fit(classifier, data)
    assert again.global_step == 8


def test_trained_as_a_run_trains(
    make_model: Callable[..., RMTEncoder], facts: Callable[..., FactDataModule], make_trainer: Callable[..., L.Trainer]
) -> None:
    """A curriculum, then a phase after it, with the optimizer that is given; going on from a checkpoint is the same."""

    def trained(*callbacks: Any, checkpoint: Path | None = None, **settings: Any) -> FactClassifier:
        L.seed_everything(3, verbose=False)
        optimization = WarmupDecay(steps=4, lr=3e-3, weight_decay=0.1)
        module = FactClassifier(make_model(segment_length=34), PLACES, optimization=optimization)
        hold = StatePassing(steps=4, lr=1e-3, until_rate=1, rounds=1)
        trainer = make_trainer(curriculum(), hold, *callbacks, **settings)
        trainer.fit(module, facts(), ckpt_path=checkpoint, weights_only=True)
        return module

    saving = ModelCheckpoint(every_n_train_steps=2, save_top_k=-1, filename="{step}", save_on_train_epoch_end=False)
    whole = trained(saving, max_epochs=99)
    folder = Path(saving.dirpath or "")
    assert sorted(path.name for path in folder.iterdir())[:1] == ["step=10.ckpt"]
    again = trained(max_epochs=99, checkpoint=folder / "step=6.ckpt")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


@pytest.mark.parametrize("labels", ["answers", "places"])
def test_texts_and_labels_of_ones_own(
    labels: str, make_model: Callable[..., RMTEncoder], make_trainer: Callable[..., L.Trainer]
) -> None:
    texts = [(text, PEOPLE.index(label) if labels == "places" else label) for text, label in TEXTS]
    module = FactClassifier(make_model(segment_length=34), PEOPLE, metrics=None)
    growing, data = curriculum(max_segments=3), TextDataModule(texts, texts[:12], texts, batch_size=4)
    data.steps_per_epoch = 2
    make_trainer(growing, max_epochs=99).fit(module, data)
    assert [(result.stage, result.questions) for result in growing.results] == [(1, 4), (2, 4), (3, 4)]
    trainer = make_trainer()
    found = trainer.test(module, data, verbose=False)[0]
    said = [*chain(*trainer.predict(module, data) or ())]
    by_length = sorted(texts, key=lambda pair: len(pair[0]) // 60)
    wanted = [PEOPLE[label] if labels == "places" else label for _, label in by_length]
    assert len(said) == 24
    # What is said of texts without labels is the same.
    loader = DataLoader([text for text, _ in by_length], batch_size=5)
    alone = [*chain(*trainer.predict(module, loader) or ())]
    assert said == alone
    assert [*chain(*trainer.predict(module, [loader.dataset]) or ())] == alone
    third = sum(word == label for word, label in zip(said[16:], wanted[16:], strict=True)) / 8
    assert found["test/accuracy"] == found["test/accuracy_segments_3"] == pytest.approx(third)


def test_plain_loaders(make_model: Callable[..., RMTEncoder], make_trainer: Callable[..., L.Trainer]) -> None:
    """Any loader of texts and labels will do where there is no curriculum, with metrics of one's own."""
    metrics = {"f1": MulticlassF1Score(2)}
    for given in (None, metrics):
        module = FactClassifier(make_model(segment_length=34), PEOPLE, metrics=given)
        before = [weight.clone() for weight in module.parameters()]
        trainer = make_trainer(max_epochs=2)
        trainer.fit(module, DataLoader(TEXTS, batch_size=5, shuffle=True), DataLoader(TEXTS, batch_size=5))
        name = "accuracy" if given is None else "f1"
        assert {"train/loss", "val/loss", f"val/{name}"} <= set(trainer.callback_metrics)
        assert not any(map(torch.equal, before, module.parameters()))
        found = trainer.test(module, DataLoader(TEXTS, batch_size=24), verbose=False)[0]
        assert found[f"test/{name}"] == pytest.approx(float(trainer.callback_metrics[f"test/{name}"]))


def test_a_model_that_writes(tokenizer: PreTrainedTokenizerBase, make_trainer: Callable[..., L.Trainer]) -> None:
    """A text shorter than a segment is answered as it is alone."""
    torch.manual_seed(0)
    gpt = TinyGPT(width=16, layers=1, heads=2, vocabulary_size=600)
    tokens = gpt.tokenizer([text for text, _ in TEXTS])
    model = RMTDecoder(gpt.decoder(tokens), segment_length=34, memory_size=3)
    module = FactGenerator(model, PEOPLE)
    data = TextDataModule(TEXTS, TEXTS, TEXTS, batch_size=4, steps_per_epoch=2)
    make_trainer(curriculum(), max_epochs=99).fit(module, data)
    module.eval()
    short = ("Mary was here. Who was here?", "Mary")
    together = module._asked([[short[0], TEXTS[1][0]], [short[1], TEXTS[1][1]]])
    readings = [*module.model.read(together.inputs)]
    alone = module._asked([[short[0]], [short[1]]])
    (last,) = module.model.read(alone.inputs)
    torch.testing.assert_close(
        module.judge(readings[-1], together.answer).scores[:1], module.judge(last, alone.answer).scores
    )
    assert readings[-1].segment.attention_mask is not None


def test_running_text(corpora: dict[Split, Corpus], make_trainer: Callable[..., L.Trainer]) -> None:
    gpt = TinyGPT(width=16, layers=1, heads=2)
    tokens = gpt.tokenizer(text for text, _ in TEXTS)
    corpora = rmt_lightning.tokenize(rmt_lightning.Prose(documents=20), tokens)
    model = RMTDecoder(gpt.decoder(tokens), segment_length=34, memory_size=3)
    texts: dict[Split, RunningText] = {
        split: RunningText(corpus, tokens, model.text_length, seed=0) for split, corpus in corpora.items()
    }
    module, data = LanguageModeler(model), DocumentDataModule(texts, batch_size=2, steps_per_epoch=2)
    trainer = make_trainer(FixedSteps(steps=4), max_epochs=99)
    trainer.fit(module, data)
    assert trainer.global_step == 4
    found = trainer.test(module, data, verbose=False)[0]
    nats = torch.cat([*(trainer.predict(module, data) or [])])
    assert found["test/loss"] == pytest.approx(float(nats.sum() / len(corpora["test"].tokens)), rel=1e-4)


def test_texts_of_training_are_gone_through(tokenizer: PreTrainedTokenizerBase) -> None:
    """Each once before any comes again, in another order; and where no text is so long, the next shorter ones."""
    texts = LabeledTexts({"train": TEXTS, "validation": TEXTS[:3]}, tokenizer, text_length=27, seed=1)
    assert {length: len(numbers) for length, numbers in texts.by_length["train"].items()} == {1: 8, 2: 8, 3: 8}
    first, second = ([texts.number("train", Key(2, start + number)) for number in range(8)] for start in (0, 8))
    assert sorted(first) == sorted(second) == texts.by_length["train"][2] and first != second
    assert texts.number("validation", Key(7, 0)) == 2
    assert texts.fits("train", Key(2, 0)) == pytest.approx(2 / 3)


@pytest.mark.fault("a Trainer of one's own is given what does not go together", "refused in one line")
@pytest.mark.parametrize(
    ("callbacks", "texts", "settings", "message"),
    [
        ([], TEXTS, {}, r"TextDataModule: nothing says which samples come next; give the Trainer callbacks=\[Segm"),
        ([curriculum(max_segments=4)], TEXTS, {}, r"max_segments=4: no text takes so many; give fewer"),
        ([curriculum(lessons=True)], TEXTS, {}, r"lessons, grow: are for tasks, and these are labeled texts"),
        ([curriculum(), StatePassing(4, 1e-3)], TEXTS, {}, r"hold=state_passing: asks .*, which neither .* texts have"),
        ([ONE], [("a", "Bill")] * 4, {}, r"train\[0\]: has the label 'Bill'; give one of Mary, John, or its"),
        ([ONE], [("a", 2)] * 4, {}, r"train\[0\]: has the label 2; give one of Mary, John, or its place fr"),
        ([ONE], [("a", True)] * 4, {}, r"train\[0\]: has the label True"),
        ([ONE], [("a", 1.5)] * 4, {}, r"train\[0\]: has the label 1\.5; give one of the answers, or its pl"),
        ([ONE], [("", "Mary")] * 4, {}, r"train\[0\]: its text is empty for the tokenizer; leave it out"),
        ([ONE], ["a Mary"] * 4, {}, r"train\[0\]: is 'a Mary'; give pairs of a text and its label"),
        ([ONE], [("a", "Mary", 3)] * 4, {}, r"train\[0\]: is \('a', 'Mary', 3\); give pairs"),
        ([ONE], [], {}, r"train: holds no text; give some"),
        ([curriculum()], DataLoader(TEXTS, batch_size=2), {}, r"SegmentCurriculum: chooses samples, which loaders can"),
        ([], DataLoader(TEXTS, batch_size=2), {"max_epochs": -1}, r"max_epochs: says no end of training, over which"),
        ([], DataLoader(["a"], batch_size=1), {}, r"batch: is \['a'\]; give texts and labels, such as a loader of"),
        ([], DataLoader([(1, "Mary")], batch_size=1), {}, r"batch: holds tensor\(\[1\]\); give a list of texts"),
        ([], DataLoader([("a", ["Mary"])], collate_fn=pairs), {}, r"batch, row 0: has the label \['Mary'\]; give"),
        ([], DataLoader([("a", "Bill")], batch_size=1), {}, r"batch, row 0: has the label 'Bill'; give one of Mary"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(
    callbacks: list[Any],
    texts: Any,
    settings: dict[str, Any],
    message: str,
    make_model: Callable[..., RMTEncoder],
    make_trainer: Callable[..., L.Trainer],
) -> None:
    module = FactClassifier(make_model(segment_length=34), PEOPLE)
    data = (
        texts
        if isinstance(texts, DataLoader) or (texts and isinstance(texts[0], list))
        else TextDataModule(texts, TEXTS, batch_size=4)
    )
    with pytest.raises(UserError, match=message):
        make_trainer(*callbacks, **{"max_epochs": 1} | settings).fit(module, data)


def test_phases_and_data_of_two_kinds(
    classifier: FactClassifier, facts: Callable[..., FactDataModule], make_trainer: Callable[..., L.Trainer]
) -> None:
    with pytest.raises(UserError, match="FixedSteps: is for running text, of a DocumentDataModule; give a Segm"):
        make_trainer(FixedSteps(4), max_epochs=1).fit(classifier, facts())


def test_a_test_needs_its_lengths(
    classifier: FactClassifier, facts: Callable[..., FactDataModule], make_trainer: Callable[..., L.Trainer]
) -> None:
    with pytest.raises(UserError, match=r"test_segments: are missing; give FactDataModule\(…, test_segments=\[1, 64"):
        make_trainer().test(classifier, facts())
    with pytest.raises(UserError, match=r"test_segments: has 0; give numbers of segments from 1 to 4096"):
        facts(test_segments=[1, 0])
    with pytest.raises(UserError, match=r"test: is missing; give TextDataModule\(…, test=…\)"):
        make_trainer().test(classifier, TextDataModule([("a", PLACES[0])], [("a", PLACES[0])]))


def test_public_names_are_shown() -> None:
    assert {"FactClassifier", "TextDataModule", "SegmentCurriculum", "tokenize"} <= set(dir(rmt_lightning))
    assert (Path(rmt_lightning.__file__).parent / "py.typed").exists()
    for name in dir(rmt_lightning):
        getattr(rmt_lightning, name)
    assert TinyBert is rmt_lightning.TinyBert
