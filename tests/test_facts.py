"""The worlds, and bAbI itself as their judge."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from rmt_lightning.core.errors import UserError
from rmt_lightning.tasks.babi import Babi
from rmt_lightning.tasks.facts import (
    OBJECTS,
    OPPOSITE,
    PEOPLE,
    Carried,
    Detect,
    Example,
    Memorize,
    Reasoning,
    Split,
    Task,
    Whereabouts,
)

BUILT_IN: list[Task] = [Memorize(), Detect(), Whereabouts(), Reasoning(), Carried()]


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def answer_of_relations(facts: tuple[str, ...], question: str) -> str:
    """Answer a question about directions as a person would: from either fact, or from its inverse."""
    known = {}
    for fact in facts:
        subject, direction, reference = re.fullmatch(r"The (\w+) is (\w+) of the (\w+)\.", fact).groups()
        known[direction, reference] = subject
        known[OPPOSITE[direction], subject] = reference
    if match := re.fullmatch(r"What is (\w+) of the (\w+)\?", question):
        return known[match[1], match[2]]
    reference, direction = re.fullmatch(r"What is the (\w+) (\w+) of\?", question).groups()
    return known[OPPOSITE[direction], reference]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_detect_and_memorize(split: Split) -> None:
    rng = generator()
    for task in (Detect(), Memorize()):
        for _ in range(200):
            example = task.draw(rng, split)
            (fact,) = example.facts
            assert re.fullmatch(r"\w+ (moved|went|went back|journeyed|travelled) to the \w+\.", fact)
            assert example.question == f"Where is {fact.split()[0]}?"
            assert fact.endswith(f" {example.answer}.")


def where_people_are(facts: tuple[str, ...]) -> dict[str, str]:
    """As somebody would tell who has listened."""
    moves = (re.fullmatch(r"(\w+) (?:moved|went|went back|journeyed|travelled) to the (\w+)\.", f) for f in facts)
    return dict(move.groups() for move in moves)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_whereabouts(split: Split) -> None:
    rng = generator()
    numbers, nowhere, again = Counter(), 0, 0
    for _ in range(2000):
        example = Whereabouts().draw(rng, split)
        there = where_people_are(example.facts)
        questions = {example.question: example.answer, **dict(example.also)}
        assert questions == {f"Where is {person}?": there.get(person, "nowhere") for person in PEOPLE}
        numbers[len(example.facts)] += 1
        nowhere += example.answer == "nowhere"
        again += len(there) < len(example.facts)
        # Nobody goes where they are.
        for person in there:
            visited = [fact.split()[-1] for fact in example.facts if fact.startswith(person)]
            assert all(a != b for a, b in pairwise(visited))
        if example.answer != "nowhere":
            (needed,) = example.support
            assert example.facts[needed].startswith(example.question[9:-1])
            assert example.facts[needed].endswith(f" {example.answer}.")
        else:
            assert len(example.support) == len(example.facts)
    assert sorted(numbers) == [1, 2, 3, 4] and min(numbers.values()) > 400
    assert 100 < nowhere < 300 and again > 600


def test_the_easier_whereabouts_have_fewer_moves() -> None:
    rng = generator()
    assert [max(len(t.draw(rng, "train").facts) for _ in range(50)) for t in Whereabouts().easier] == [1, 2]
    assert Whereabouts(moves=1).easier == ()
    assert [Whereabouts(moves).repeated for moves in (1, 2, 3, 4)] == [0, 1, 2, 2]


def test_reasoning() -> None:
    rng = generator()
    for split in ("train", "validation"):
        for _ in range(500):
            example = Reasoning().draw(rng, split)
            assert answer_of_relations(example.facts, example.question) == example.answer
            # The fact that is called needed is, and the other one alone does not tell.
            (needed,) = example.support
            assert example.answer in example.facts[needed]


def test_what_could_be_asked_instead_is_answered_as_a_person_would() -> None:
    rng = generator()
    for _ in range(300):
        example = Reasoning().draw(rng, "train")
        questions = {example.question: example.answer, **dict(example.also)}
        assert len(questions) == 4
        assert all(answer_of_relations(example.facts, q) == answer for q, answer in questions.items())
    for asked, count in (("thing", 2), ("person", 2), ("either", 4)):
        for _ in range(200):
            example = Carried(asked).draw(rng, "train")
            questions = {example.question: example.answer, **dict(example.also)}
            assert len(questions) == count
            for question, answer in questions.items():
                about = re.fullmatch(r"Where is (?:the )?(\w+)\?", question)[1]
                carrier = next(fact.split()[0] for fact in example.facts if about in fact)
                assert any(re.fullmatch(rf"{carrier} .* to the {answer}\.", fact) for fact in example.facts)
    assert Detect().draw(rng, "train").also == ()


def test_the_easier_reasoning_repeats_the_words_of_a_fact() -> None:
    rng = generator()
    for _ in range(300):
        (easier,) = Reasoning().easier
        example = easier.draw(rng, "train")
        assert answer_of_relations(example.facts, example.question) == example.answer
        middle = re.fullmatch(r"What is \w+ of the (\w+)\?", example.question)[1]
        assert all(fact.endswith(f" of the {middle}.") for fact in example.facts)
        (needed,) = example.support
        assert example.facts[needed] == f"The {example.answer} is{example.question[7:-1]}."


def test_reasoning_has_the_forms_of_the_published_rows(shared_data: Path) -> None:
    """The shares of the ways in which two facts share a place, in bAbI task 4 and here."""

    def form(facts: tuple[str, ...]) -> str:
        places = [place for fact in facts for place in re.findall(r"[Tt]he (\w+)", fact)]
        return "".join(str(places.index(place)) for place in places)

    babi = Babi(str(shared_data / "babi/en-10k/qa4_two-arg-relations_train.txt"))
    rng = generator()
    published = Counter(form(babi.draw(rng, "train").facts) for _ in range(4000))
    ours = Counter(form(Reasoning().draw(rng, "train").facts) for _ in range(4000))
    assert published.keys() == ours.keys()
    for key, count in published.items():
        assert abs(count - ours[key]) < 0.04 * 4000, key


def test_carried_needs_both_facts() -> None:
    rng = generator()
    for _ in range(500):
        example = Carried().draw(rng, "train")
        take, go = (example.facts[i] for i in example.support)
        thing = re.fullmatch(r"Where is the (\w+)\?", example.question)[1]
        person = take.split()[0]
        assert take.endswith(f" the {thing}.") and go == f"{person} {go.split(' ', 1)[1]}"
        assert go.endswith(f" {example.answer}.")
        assert example.support[0] < example.support[1]
        # The decoys: another person, another thing, another place, taken before gone.
        others = [fact for i, fact in enumerate(example.facts) if i not in example.support]
        assert {fact.split()[0] for fact in others} != {person} and len(others) == 2
        assert thing not in " ".join(others) and example.answer not in " ".join(others)


def stories_of(task: Task, example: Example) -> list[tuple[str, ...]]:
    """What is told, the story that is asked about first: all of it, or each person's part in carried."""
    if task.name != "carried":
        return [example.facts]
    asked = [example.facts[i] for i in example.support]
    decoys = [fact for fact in example.facts if fact not in asked]
    # How a thing was picked up is drawn apart.
    return [(take.split()[0], take.split()[-1], go) for take, go in (asked, decoys)]


def test_training_tells_every_reasoning_world() -> None:
    """And none twice as often as another, which would be remembered better."""
    rng = generator()

    def world(facts: tuple[str, ...]) -> frozenset[tuple[str, ...]]:
        relations = (re.fullmatch(r"The (\w+) is (\w+) of the (\w+)\.", fact).groups() for fact in facts)
        return frozenset((a, d, b) if d in ("north", "east") else (b, OPPOSITE[d], a) for a, d, b in relations)

    told = Counter(world(Reasoning().draw(rng, "train").facts) for _ in range(60_000))
    assert len(told) == 240
    assert max(told.values()) < 2 * min(told.values())


@pytest.mark.parametrize("task", BUILT_IN, ids=lambda task: task.name)
def test_answers_are_even_and_statements_are_held_out(task: Task) -> None:
    rng = generator()
    train = [task.draw(rng, "train") for _ in range(9000)]
    held_out = [task.draw(rng, "validation") for _ in range(9000)]
    for examples in (train, held_out):
        shares = Counter(example.answer for example in examples)
        assert len(shares) == len(task.answers)
        shares.pop("nowhere", None)
        assert max(shares.values()) < 1.25 * min(shares.values())
    stories = {story for example in train for story in stories_of(task, example)}
    assert not stories & {stories_of(task, example)[0] for example in held_out}


@pytest.mark.parametrize("task", BUILT_IN, ids=lambda task: task.name)
def test_every_word_is_in_the_sentences_for_the_tokenizer(task: Task) -> None:
    known = set(" ".join(task.sentences()).replace(".", " ").replace("?", " ").lower().split())
    rng = generator()
    for split in ("train", "test"):
        for _ in range(300):
            example = task.draw(rng, split)
            text = " ".join((*example.facts, example.question)).replace(".", " ").replace("?", " ").lower()
            assert set(text.split()) <= known


def test_the_easier_forms_of_carried_begin_with_one_question() -> None:
    rng = generator()
    questions, orders = [], []
    for task in Carried().easier:
        examples = [task.draw(rng, "train") for _ in range(600)]
        questions.append({example.question for example in examples})
        for example in examples:
            person = example.facts[example.support[-1]].split()[0]
            if example.question.startswith("Where is the "):
                thing = example.question.removeprefix("Where is the ").rstrip("?")
                assert re.fullmatch(rf"{person} .* the {thing}\.", example.facts[example.support[0]])
                assert len(example.support) == 2
            else:
                assert example.question == f"Where is {person}?"
                assert len(example.support) == 1
            assert re.fullmatch(rf"{person} .* to the {example.answer}\.", example.facts[example.support[-1]])
            # Somebody else went somewhere else.
            other = next(f for f in example.facts if " to the " in f and not f.startswith(person))
            assert not other.endswith(f" {example.answer}.")
        apart = [e.facts[0].split()[0] == e.facts[1].split()[0] for e in examples]
        assert 0 < sum(apart) < 600 if task.interleaved else all(apart)
        orders.append(task.interleaved)
    people, things = {f"Where is {person}?" for person in PEOPLE}, {f"Where is the {thing}?" for thing in OBJECTS}
    apple = {"Where is the apple?"}
    either = [people | apple, people | things]
    assert questions == [{"Where is Mary?"}, people, *either, *either, apple, things, apple]
    assert orders == [True, True, False, False, True, True, False, False, True]
    with pytest.raises(UserError, match=r"task\.always=pear: choose one of Mary, John, .*, milk, or null"):
        Carried(always="pear")
