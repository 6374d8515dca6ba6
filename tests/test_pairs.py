"""Keys and values: what is told and asked, in which split, where it stands, and that it can be read."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, Run
from transformers import PreTrainedTokenizerBase

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.tokens import token_ids
from rmt_lightning.models.tiny import TinyBert
from rmt_lightning.tasks.corpus import Corpus, tokenize
from rmt_lightning.tasks.facts import Example, Split
from rmt_lightning.tasks.noise import SPLITS, Blank, Prose
from rmt_lightning.tasks.pairs import MQAR, KeyValue, Remember, Rewrite, spelled
from rmt_lightning.tasks.placement import Key, Placement

TASKS = [KeyValue, Remember, Rewrite, MQAR]


def listened(example: Example) -> dict[str, str]:
    """Key to value, as somebody would tell who has listened."""
    return dict(fact.removesuffix(".").split(": ") for fact in example.facts)


@pytest.mark.parametrize("kind", TASKS)
def test_each_key_is_asked_for_its_latest_value(kind: type[KeyValue]) -> None:
    rng, task = np.random.default_rng(0), kind(pairs=7, symbols=30, values=40)
    again = 0
    for split in SPLITS:
        for _ in range(100):
            example = task.draw(rng, split)
            known = listened(example)
            questions = {example.question: example.answer, **dict(example.also)}
            assert questions == {f"{key}?": value for key, value in known.items()}
            assert len(example.facts) == 7 and len(questions) == task.different
            assert example.facts[example.support[0]] == f"{example.question[:-1]}: {example.answer}."
            assert {*known.values()} <= {*task.answers}
            told = [fact.partition(":")[0] for fact in example.facts]
            again += example.support[0] > told.index(example.question[:-1])
    assert task.different == (4 if kind is Rewrite else 7)
    assert (again > 50) == (kind is Rewrite)


@pytest.mark.parametrize("kind", TASKS)
def test_splits_share_no_set_of_pairs(kind: type[KeyValue]) -> None:
    # So few that each is drawn several times.
    rng, task = np.random.default_rng(0), kind(pairs=2, symbols=4 if kind is MQAR else 2, key_size=2, values=7)
    counts = {"train": 1000, "validation": 150, "test": 150}
    train, validation, test = (
        Counter(frozenset(task.draw(rng, split).facts) for _ in range(counts[split])) for split in SPLITS
    )
    assert not (train.keys() & validation.keys() or train.keys() & test.keys() or validation.keys() & test.keys())
    # All there are, or almost: two of four keys, or one of them twice.
    there = 4 * (7 + 7 * 6 // 2) if kind is Rewrite else 6 * 7 * 7
    assert 0.95 * there < len(train) + len(validation) + len(test) <= there


def test_keys_and_values_share_no_symbol_in_mqar() -> None:
    rng, task = np.random.default_rng(0), MQAR(pairs=5, symbols=21, values=300)
    known = [listened(task.draw(rng, "train")) for _ in range(200)]
    keys, values = (
        {s for pairs in known for text in part(pairs) for s in text.split()} for part in (dict.keys, dict.values)
    )
    assert keys == {*spelled(21)[:10]} and values <= {*spelled(21)[10:]}


@pytest.mark.parametrize(
    ("pairs", "values", "accuracy", "held"), [(8, 16, 1, 8), (8, 16, 1 / 16, 0), (50, 2, 0.75, 25)]
)
def test_of_what_is_not_held_some_is_guessed(pairs: int, values: int, accuracy: float, held: float) -> None:
    assert KeyValue(pairs=pairs, values=values).capacity(accuracy) == pytest.approx(held)


def test_the_easier_forms_have_fewer_pairs() -> None:
    assert [[form.pairs for form in Rewrite(pairs).easier] for pairs in (1, 4, 5)] == [[], [1, 2], [1, 2, 4]]
    (form, *_) = Remember(symbols=20, key_size=1, values=9).easier
    assert (type(form), form.symbols, form.key_size, form.values) == (Remember, 20, 1, 9)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"pairs": 5, "symbols": 4, "key_size": 1}, "needs 5 keys, and 4 symbols make 4 keys of 1"),
        ({"pairs": 1, "symbols": 2, "key_size": 1, "values": 2}, "too few for three splits"),
    ],
)
def test_too_few_are_refused(settings: dict[str, int], told: str) -> None:
    with pytest.raises(UserError, match=told):
        KeyValue(**settings)


@pytest.mark.parametrize("noise", [Blank(), Prose(20)])
def test_a_symbol_is_a_token_and_no_word_of_the_noise(noise: Blank | Prose) -> None:
    symbols = spelled(100)
    said = [sentence for document in noise.documents("train") for sentence in document]
    tokenizer = TinyBert(vocabulary_size=1200).tokenizer(chain(KeyValue(symbols=100).sentences(), said[:2000]))
    assert {len(ids) for ids in token_ids(tokenizer, [*symbols])} == {1} and len({*symbols}) == 100
    assert not {*symbols} & {word.strip('.,!?"').lower() for sentence in said for word in sentence.split()}


def test_pairs_stand_apart_or_all_at_the_start(tmp_path: Path) -> None:
    tokenizer = TinyBert(vocabulary_size=300).tokenizer(chain(KeyValue().sentences(), ["-"]))
    corpora = tokenize(Blank(), tokenizer, tmp_path)
    # Room for two pairs; or for one and the question.
    for task in (KeyValue(), Remember(), Rewrite()):
        placement = Placement(task, corpora, tokenizer, text_length=10, seed=1)
        for number in range(50):
            homes = {n: placement.sample("train", Key(n, number)).homes for n in (3, 4, 5, 9)}
            if isinstance(task, Remember):
                assert sorted(Counter(homes[3]).values()) == [1, 1, 2] and homes[4] == (0, 1, 2, 3)
                assert all(len({*homes[n]}) == 4 for n in (5, 9))
            else:
                assert all(of == (0, 0, 1, 1) for of in homes.values())
    # A pair fills a segment, and the last one is for the question alone.
    placement = Placement(Remember(), corpora, tokenizer, text_length=5, seed=1)
    for number in range(20):
        sample = placement.sample("validation", Key(5, number))
        texts = [tokenizer.decode(segment).strip() for segment in sample.segments]
        assert texts[:4] == [*sample.example.facts] and texts[4] == f"- - {sample.example.question}"


def test_pairs_grow(train: Run, tmp_path: Path) -> None:
    small = [word for word in SMALL if not word.startswith(("noise.", "curriculum.max", "test.", "data.segment"))]
    small += [
        "noise=none",
        "curriculum.grow=pairs",
        "curriculum.max_segments=2",
        "test.segments=[2,3]",
        "test.samples=8",
    ]
    # One segment has no room for three pairs.
    small += ["curriculum.steps=3", "task=remember", "task.pairs=3", "data.segment_length=33", "hydra.run.dir=run"]
    result = train(*small, small=False)
    assert result.returncode == 0, result.stderr
    (*_, tested) = csv.DictReader((tmp_path / "run/evaluation.csv").open())
    assert float(tested["capacity"]) == pytest.approx(3 * (16 * float(tested["accuracy"]) - 1) / 15)
    assert tested["pairs"] == "3" and "pairs held" in result.stdout
    measured = csv.DictReader((tmp_path / "run/metrics/version_0/metrics.csv").open())
    logged = [row for row in measured if row["val/capacity"]]
    for row, pairs in zip(logged, (1, 2, 3), strict=True):
        assert float(row["val/capacity"]) == pytest.approx(pairs * (16 * float(row["val/accuracy"]) - 1) / 15)
    rows = list(csv.DictReader((tmp_path / "run/stages.csv").open()))
    assert [(row["stage"], row["steps"], row["fits"]) for row in rows] == [(str(n), "3", "1.0") for n in (1, 2, 3)]
    told = result.stdout + result.stderr
    assert [pairs for pairs in ("on 1 pairs", "on 2 pairs", "on 3 pairs") if pairs not in told] == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("task=detect", "curriculum.grow=pairs"), "curriculum.grow=pairs: task=detect has no pairs"),
        (("task=mqar", "curriculum.grow=pairs", "curriculum.lessons=true"), "leave one of them out"),
        (
            ("task=remember", "curriculum.grow=pairs", "data.segment_length=20", "curriculum.max_segments=3"),
            "fit into 3 segments; raise it, or curriculum.max_segments",
        ),
    ],
)
def test_what_cannot_grow_is_refused(refused: Callable[..., str], words: tuple[str, ...], told: str) -> None:
    assert told in refused("noise=none", "trainer.max_steps=1", "backbone.width=16", "backbone.heads=2", *words)


def test_a_decoder_writes_values_of_several_symbols(train: Run) -> None:
    small = [word for word in SMALL if not word.startswith(("noise.", "curriculum.max", "data.segment"))]
    small += ["noise=none", "curriculum.max_segments=2", "data.segment_length=64", "trainer.max_steps=4"]
    written = ("task=rewrite", "task.values=300", "model=rmt_decoder", "backbone=tiny_gpt", "answer=generate")
    result = train(*written, "answer.all_questions=true", "curriculum.lessons=true", *small, small=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.fault("a task tells thousands of facts in each sample", "what it needs is known within seconds")
def test_what_many_pairs_need_is_known_at_once(
    corpora: dict[Split, Corpus], tokenizer: PreTrainedTokenizerBase
) -> None:
    placement = Placement(KeyValue(pairs=1024, symbols=400), corpora, tokenizer, text_length=30, seed=7)
    assert tuple(placement.fits("train", Key(n, 0)) for n in (1, 4096)) == (0, 1)
    assert len(placement._all("train", None, 30).examples) == 16
    assert len(Placement(KeyValue(), corpora, tokenizer, 30, 7)._all("train", None, 30).examples) == 1000
