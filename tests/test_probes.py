"""Probes: that they say what they should, and tell who spots keywords."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rmt_lightning.analysis.extrapolation import replies
from rmt_lightning.analysis.probing import score_probe, spot
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.rmt import RMTEncoder
from rmt_lightning.tasks.babi import Babi
from rmt_lightning.tasks.corpus import Corpus, tokenize
from rmt_lightning.tasks.facts import (
    PEOPLE,
    PLACES,
    Carried,
    Detect,
    Memorize,
    Reasoning,
    Split,
    Task,
    Whereabouts,
)
from rmt_lightning.tasks.noise import SPLITS, Prose
from rmt_lightning.tasks.placement import Key, Placement
from rmt_lightning.tasks.probes import probes
from rmt_lightning.training.answering import FactClassifier

# How many facts, of whose answers which share is nowhere, and whether they name another place than the answer.
SHAPES = {
    "two people": (2, 0, True),
    "another moves after": (2, 0, True),
    "moves twice": (2, 0, True),
    "mention before": (2, 0, True),
    "mention after": (2, 0, True),
    "negation after": (2, 0, True),
    "reworded": (1, 0, False),
    "other asked (nowhere)": (1, 1, True),
    "no fact (nowhere)": (1, 1, True),
}
MOVE = re.compile(
    r"(\w+) (?:moved|went|went back|journeyed|travelled|walked|hurried|ran|headed|strolled) to the (\w+)\."
)


@pytest.fixture(scope="module")
def mentioning(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> dict[Split, Corpus]:
    return tokenize(Prose(20, mentions=0.2), tokenizer, tmp_path_factory.mktemp("cache"))


def where_people_are(facts: tuple[str, ...]) -> dict[str, str]:
    """As somebody would tell who has listened: what is no move tells nothing."""
    return dict(move.groups() for move in map(MOVE.fullmatch, facts) if move)


def of_whereabouts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Task]:
    _, *others = probes(Whereabouts(), tokenizer)
    return {probe.name: probe for probe in others}


def test_answers_are_those_of_a_listener(tokenizer: PreTrainedTokenizerBase) -> None:
    there = of_whereabouts(tokenizer)
    assert there.keys() == SHAPES.keys()
    rng = np.random.default_rng(0)
    for name, (count, nowhere, distracts) in SHAPES.items():
        answers = Counter()
        for _ in range(150):
            example = there[name].draw(rng, "test")
            answer, person = example.answer, example.question[9:-1]
            assert example.question == f"Where is {person}?" and person in PEOPLE
            assert answer == where_people_are(example.facts).get(person, "nowhere")
            answers[answer] += 1
            assert len(example.facts) == count and not example.also
            named = {place for place in PLACES if any(place in fact for fact in example.facts)}
            assert bool(named - {answer}) == distracts and len(named - {answer}) <= 1
            (needed,) = example.support
            if not nowhere:
                assert MOVE.fullmatch(example.facts[needed]).groups() == (person, answer)
        assert answers.keys() == ({"nowhere"} if nowhere else set(PLACES)), name


def test_each_probe_is_what_it_is_called(tokenizer: PreTrainedTokenizerBase) -> None:
    there, rng = of_whereabouts(tokenizer), np.random.default_rng(1)

    def drawn(name: str) -> Iterator[tuple[list[str], str, bool]]:
        """For each example of whom its facts tell a move, or nothing; who is asked; whether training has its verb."""
        for _ in range(60):
            example = there[name].draw(rng, "test")
            moves = [MOVE.fullmatch(fact) for fact in example.facts]
            verbs = [fact in set(Detect().sentences()) for fact, move in zip(example.facts, moves, strict=True) if move]
            yield [move[1] if move else "" for move in moves], example.question[9:-1], all(verbs)

    assert all(len({*who}) == 2 and asked in who and known for who, asked, known in drawn("two people"))
    assert {who.index(asked) for who, asked, _ in drawn("two people")} == {0, 1}
    assert all(who[0] == asked != who[1] for who, asked, _ in drawn("another moves after"))
    assert all(who == [asked, asked] and known for who, asked, known in drawn("moves twice"))
    assert all(who == ["", asked] for who, asked, _ in drawn("mention before"))
    assert all(who == [asked, ""] for who, asked, _ in drawn("mention after"))
    assert all(who == [asked, ""] for who, asked, _ in drawn("negation after"))
    assert all(who == [asked] and not known for who, asked, known in drawn("reworded"))
    assert all(who[0] not in ("", asked) for who, asked, _ in drawn("other asked (nowhere)"))
    assert all(who == [""] for who, asked, _ in drawn("no fact (nowhere)"))
    negations = [there["negation after"].draw(rng, "test") for _ in range(30)]
    assert all(e.facts[1].startswith(f"{e.question[9:-1]} did not go to the ") for e in negations)


def test_nothing_that_is_told_stands_in_what_is_trained_on(tokenizer: PreTrainedTokenizerBase) -> None:
    prose = {sentence for document in Prose(50, mentions=0.5).documents("train") for sentence in document}
    rng = np.random.default_rng(2)
    told = {
        task: {fact for _ in range(500) for fact in task.draw(rng, "train").facts} for task in (Detect(), Whereabouts())
    }
    trained = prose.union(*told.values())
    for probe in of_whereabouts(tokenizer).values():
        facts = {split: {fact for _ in range(40) for fact in probe.draw(rng, split).facts} for split in SPLITS}
        assert not facts["test"] & trained and not facts["test"] & facts["train"], probe.name


def test_which_probes_suit(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    for task in (Detect(), Memorize(), Whereabouts(moves=1)):
        first, *others = probes(task, tokenizer)
        assert first is task and [probe.name for probe in others] == [*SHAPES]
        assert {probe.where for probe in others} == {task.where}
    stories = [f"1 Mary moved to the {place}.\n2 Where is Mary? \t{place}\t1\n" for place in PLACES[:2]]
    (tmp_path / "places.txt").write_text("".join(stories * 10))
    (tmp_path / "others.txt").write_text("".join(stories * 10).replace(PLACES[0], "cellar"))
    for task in (Reasoning(), Carried(), Babi(str(tmp_path / "places.txt"))):
        assert probes(task, tokenizer) == (task,)
    assert probes(Babi(str(tmp_path / "others.txt")), tokenizer) == ()

    class Elsewhere(Detect):
        """It says the same in words of its own."""

        def draw(self, rng: np.random.Generator, split: Split) -> Any:
            return super().draw(rng, split).__class__(("Mary est là.",), "Where is Mary?", PLACES[0], (0,))

    assert len(probes(Elsewhere(), tokenizer)) == 1


def test_verbs_are_those_that_the_tokenizer_can_spell() -> None:
    def of(*verbs: str) -> list[Task]:
        words = [*" ".join(Detect().sentences()).replace(".", " .").replace("?", " ?").split(), *verbs, "nowhere"]
        tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["?!", *dict.fromkeys(words)])}, "?!"))
        tokenizer.pre_tokenizer = Whitespace()
        return [*probes(Detect(), PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?!"))]

    assert "reworded" not in [probe.name for probe in of()]
    (reworded,) = (probe for probe in of("ran") if probe.name == "reworded")
    rng = np.random.default_rng(0)
    assert {reworded.draw(rng, "test").facts[0].split()[1] for _ in range(20)} == {"ran"}


class Spotter:
    """A reader that takes the places it has read, and chooses one of them.

    It answers what a model would that cannot say "nowhere".
    """

    def __init__(self, placement: Placement, choose: Callable[[list[str]], str]) -> None:
        self.tokenizer, self.choose = placement.tokenizer, choose

    def say(self, segments: Iterable[Segment]) -> list[str | None]:
        texts = [self.tokenizer.decode(row) for row in torch.cat([one.input_ids for one in segments], dim=1)]
        return [self.choose(re.findall("|".join(PLACES), text)) for text in texts]


def commonest(named: list[str]) -> str:
    return max(PLACES, key=Counter(named).__getitem__)


@pytest.mark.parametrize("text", ["corpora", "mentioning"])
def test_spotters_score_what_the_baselines_say(
    text: str, tokenizer: PreTrainedTokenizerBase, request: pytest.FixtureRequest
) -> None:
    """In prose without places, and in prose that is full of them."""
    corpora = request.getfixturevalue(text)
    for task in probes(Detect(), tokenizer):
        placement = Placement(task, corpora, tokenizer, text_length=45, seed=3)
        for choose, column in ((lambda named: named[-1], "last_place"), (commonest, "commonest_place")):
            said = replies(Spotter(placement, choose), placement, Key(2, 0), 5, 3, torch.device("cpu"))
            found = score_probe(said, placement)
            assert found.right == found.row()[column], task.name
            assert found.samples == 5 and 1 < found.questions <= 5 and found.right + found.decoy <= 5
            if text == "corpora":
                # There is no place but those of the facts.
                decoys = {"detect": 0, "reworded": 0}.get(task.name, 5 - found.right)
                assert found.decoy == decoys
    if text == "corpora":
        assert (found.right, found.decoy) == (0, 5)


def test_a_place_that_the_question_names_is_no_answer(
    mentioning: dict[Split, Corpus], tokenizer: PreTrainedTokenizerBase
) -> None:
    placement = Placement(Reasoning(), mentioning, tokenizer, text_length=45, seed=3)
    for number in range(20):
        key = Key(2, number)
        question = placement.example("test", key).question
        assert not any(place and place in question for place in spot(placement, key))


def test_an_answer_that_is_longer_than_all_that_are_known_is_none_of_them(
    make_model: Callable[..., RMTEncoder], tokenizer: PreTrainedTokenizerBase
) -> None:
    """It may begin with one of them."""
    classifier = FactClassifier(make_model(), ["office", "garden"])
    (office, garden), longer = classifier.answer_ids.tolist(), classifier.answer_ids.shape[1] + 1
    rows = [[*office, -1], [*garden, -1], [*office, 7]]
    assert all(len(row) == longer for row in rows)
    assert classifier.classes(torch.tensor(rows)).tolist() == [0, 1, -1]
