"""Where facts stand, and that samples are pure functions."""

from __future__ import annotations

import re
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from rmt_lightning.core.errors import UserError
from rmt_lightning.tasks.babi import Babi
from rmt_lightning.tasks.corpus import Corpus, tokenize
from rmt_lightning.tasks.datamodule import FactDataset
from rmt_lightning.tasks.facts import (
    OBJECTS,
    PEOPLE,
    PLACES,
    Carried,
    Detect,
    Memorize,
    Reasoning,
    Split,
    Task,
)  # fmt: skip
from rmt_lightning.tasks.noise import Files
from rmt_lightning.tasks.placement import Key, Placement

Corpora = dict[Split, Corpus]
TASKS: list[Task] = [Memorize(), Detect(), Reasoning(), Carried()]


def segments_of(placement: Placement, key: Key, split: Split = "train") -> list[list[int]]:
    return [segment.tolist() for segment in placement.sample(split, key).segments]


def find(needle: list[int], hay: list[int]) -> list[int]:
    return [i for i in range(len(hay) - len(needle) + 1) if hay[i : i + len(needle)] == needle]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize("num_segments", [1, 2, 5])
def test_every_segment_is_full_and_facts_are_whole(
    task: Task, num_segments: int, corpora: Corpora, tokenizer: PreTrainedTokenizerBase
) -> None:
    placement = Placement(task, corpora, tokenizer, text_length=45, seed=3)
    sentences = [tokenizer(s, add_special_tokens=False)["input_ids"] for s in task.sentences() if not s.endswith("?")]
    questions = [tokenizer(s, add_special_tokens=False)["input_ids"] for s in task.sentences() if s.endswith("?")]
    facts_of = {"memorize": 1, "detect": 1, "reasoning": 2, "carried": 4}[task.name]
    for number in range(40):
        segments = segments_of(placement, Key(num_segments, number))
        assert [len(segment) for segment in segments] == [45] * num_segments
        assert any(segments[-1][-len(question) :] == question for question in questions)
        if task.name != "reasoning":  # its list of sentences names the words, not every statement
            found = sum(len(find(sentence, segment)) for segment in segments for sentence in sentences)
            assert found == facts_of


def test_the_tightest_segment_holds_any_example_and_hardly_any_noise(
    corpora: Corpora, tokenizer: PreTrainedTokenizerBase
) -> None:
    for task in (Reasoning(), Carried(), Detect()):
        placement = Placement(task, corpora, tokenizer, text_length=60, seed=3)
        assert len(placement.tightest) == len(placement.easier) + 1
        for easier, room in zip((*range(len(placement.easier)), None), placement.tightest, strict=True):
            noise: list[int] = []
            for number in range(30_000):
                # The longest example is rare.
                if number >= 1000 and min(noise) == 0:
                    break
                sample = placement.sample("train", Key(1, number, easier=easier, text_length=room))
                (pieces,) = sample.pieces
                assert sum(len(piece.ids) for piece in pieces) == room
                noise.append(sum(len(piece.ids) for piece in pieces if piece.source == "noise"))
            assert min(noise) == 0 and max(noise) < room / 2


def test_facts_stand_between_sentences(corpora: Corpora, tokenizer: PreTrainedTokenizerBase) -> None:
    """Taking the facts and the question out leaves running noise, cut at the fact only where a sentence ends."""
    placement = Placement(Detect(), corpora, tokenizer, text_length=60, seed=3)
    ends = {tokenizer.convert_tokens_to_ids(token) for token in (".", "?", '!"', '"', '."', '?"')} - {None}
    for number in range(200):
        (segment,) = segments_of(placement, Key(1, number))
        text = tokenizer.decode(segment)
        facts = [s for s in Detect().sentences() if not s.endswith("?") and s.lower() in text]
        (start,) = find(tokenizer(facts[0], add_special_tokens=False)["input_ids"], segment)
        assert start == 0 or segment[start - 1] in ends, text


def test_memorize_begins_with_its_fact_and_detect_is_anywhere(
    corpora: Corpora, tokenizer: PreTrainedTokenizerBase
) -> None:
    detect = Placement(Detect(), corpora, tokenizer, text_length=30, seed=3)
    memorize = Placement(Memorize(), corpora, tokenizer, text_length=30, seed=3)
    distances = Counter(detect.sample("train", Key(6, number)).distance for number in range(1200))
    assert sorted(distances) == [0, 1, 2, 3, 4, 5]
    assert max(distances.values()) < 1.4 * min(distances.values())
    facts = [tokenizer(s, add_special_tokens=False)["input_ids"] for s in Memorize().sentences()]
    for number in range(50):
        assert memorize.sample("train", Key(6, number)).distance == 5
        first = segments_of(memorize, Key(6, number))[0]
        assert any(first[: len(fact)] == fact for fact in facts)


def test_distance_counts_borders_from_the_first_needed_fact(
    corpora: Corpora, tokenizer: PreTrainedTokenizerBase
) -> None:
    placement = Placement(Detect(), corpora, tokenizer, text_length=30, seed=3)
    facts = [tokenizer(s, add_special_tokens=False)["input_ids"] for s in Detect().sentences() if not s.endswith("?")]
    for number in range(60):
        segments = segments_of(placement, Key(4, number))
        (home,) = [i for i, segment in enumerate(segments) if any(find(fact, segment) for fact in facts)]
        assert placement.sample("train", Key(4, number)).distance == 3 - home


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_pieces_tell_where_facts_stand(task: Task, corpora: Corpora, tokenizer: PreTrainedTokenizerBase) -> None:
    placement = Placement(task, corpora, tokenizer, text_length=45, seed=3)
    for number in range(20):
        key = Key(3, number)
        sample = placement.sample("train", key)
        woven = list(sample.pieces)
        joined = [[token for piece in pieces for token in piece.ids.tolist()] for pieces in woven]
        assert joined == segments_of(placement, key)
        said = {piece.source: (home, piece.ids) for home, pieces in enumerate(woven) for piece in pieces}
        wanted = {fact: (home, sample.example.facts[fact]) for fact, home in enumerate(sample.homes)}
        wanted |= {"question": (2, sample.example.question)}
        assert said.keys() - {"noise"} == wanted.keys()
        for source, (home, sentence) in wanted.items():
            ids = tokenizer(sentence, add_special_tokens=False)["input_ids"]
            assert (said[source][0], said[source][1].tolist()) == (home, ids)


def test_order_of_facts_is_kept(corpora: Corpora, tokenizer: PreTrainedTokenizerBase) -> None:
    placement = Placement(Carried(), corpora, tokenizer, text_length=45, seed=5)
    for number in range(60):
        text = tokenizer.decode([token for segment in segments_of(placement, Key(3, number)) for token in segment])
        thing = text.rsplit("where is the", 1)[1].strip(" ?")
        taken = re.search(rf"(\w+) (?:picked up|took|got|grabbed) the {thing}\.", text)
        gone = re.search(rf"{taken[1]} (?:moved|went|went back|journeyed|travelled) to the", text)
        assert taken.start() < gone.start()


def test_samples_are_pure(placement: Placement) -> None:
    keys = [Key(n, i) for n in (1, 3) for i in (0, 1, 500)]
    first = {key: segments_of(placement, key) for key in keys}
    np.random.seed(1)  # the global generator must not matter
    assert {key: segments_of(placement, key) for key in reversed(keys)} == {key: first[key] for key in reversed(keys)}
    texts = [str(segments) for segments in first.values()]
    assert len(set(texts)) == len(keys)
    other = Placement(placement.task, placement.corpora, placement.tokenizer, placement.text_length, seed=8)
    assert segments_of(other, keys[0]) != first[keys[0]]
    assert segments_of(placement, keys[0], "test") != first[keys[0]]


def test_a_long_sample_is_read_segment_by_segment(placement: Placement) -> None:
    tracemalloc.start()
    sample = placement.sample("test", Key(10_000_000, 0))
    assert len(next(sample.segments)) == placement.text_length
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_noise_is_not_repeated_before_all_is_read(placement: Placement) -> None:
    corpus = placement.corpora["train"]
    segments = len(corpus.tokens) // placement.text_length // 2
    ids = np.concatenate(list(placement.sample("train", Key(segments, 0)).segments))
    windows = Counter(tuple(ids[i : i + 20]) for i in range(0, len(ids) - 20))
    assert windows.most_common(1)[0][1] == 1


def test_too_small_a_segment_is_refused(corpora: Corpora, tokenizer: PreTrainedTokenizerBase) -> None:
    placement = Placement(Carried(), corpora, tokenizer, text_length=20, seed=3)
    with pytest.raises(UserError, match=r"data\.segment_length.*carried"):
        placement.sample("train", Key(1, 0))
    # Over more segments the same facts fit.
    assert len(segments_of(placement, Key(3, 0))) == 3


def test_a_crowd_of_facts_still_fits(tmp_path, corpora: Corpora, tokenizer: PreTrainedTokenizerBase) -> None:
    """Many facts in few segments: all are placed, in order, whole."""
    names = ["mary", "john", "daniel", "sandra"]
    story = [f"{i + 1} {names[i % 4].capitalize()} went to the kitchen." for i in range(8)]
    lines = [*story, "9 Where is Mary?\tkitchen\t5"]
    path = tmp_path / "qa.txt"
    path.write_text("\n".join(lines * 10) + "\n")
    placement = Placement(Babi(str(path)), corpora, tokenizer, text_length=30, seed=3)
    fact = len(tokenizer("Mary went to the kitchen.", add_special_tokens=False)["input_ids"])
    per_segment = 30 // fact
    num_segments = -(-8 // per_segment) + 1
    for number in range(50):
        segments = segments_of(placement, Key(num_segments, number))
        said = [
            word
            for segment in segments
            for word in tokenizer.decode(segment).replace(".", " ").split()
            if word in names
        ]
        assert said == [names[i % 4] for i in range(8)]  # the question's "mary?" keeps its mark


def test_noise_holds_fragments_of_facts_but_no_whole_one(placement: Placement) -> None:
    def words(fragments: float) -> list[str]:
        samples = (placement.sample("train", Key(4, number, False, fragments)) for number in range(40))
        return [placement.tokenizer.decode(ids) for sample in samples for ids in sample.segments]

    plain, mixed = words(0), words(2)
    facts = [sentence for sentence in Detect().sentences() if not sentence.startswith("Where")]
    assert not any(fact.lower() in text for fact in facts for text in mixed)
    pieces = ("mary went", "to the garden", "daniel moved to", "the kitchen.")
    assert sum(text.count(piece) for piece in pieces for text in mixed) > 20
    assert sum(text.count(piece) for piece in pieces for text in plain) < 10
    assert [len(ids) for ids in placement.sample("train", Key(2, 5, False, 3.0)).segments] == [30, 30]


def test_fragments_stand_beside_facts_too(placement: Placement) -> None:
    """But not in a segment that tells or asks, of which nothing is overwritten."""
    shared = changed = 0
    for number in range(20):
        plain, mixed = (placement.sample("train", Key(5, number, fragments=mean)) for mean in (0.0, 3.0))
        assert (plain.example, plain.homes) == (mixed.example, mixed.homes)
        for segment, (before, after) in enumerate(zip(plain.pieces, mixed.pieces, strict=True)):
            told = [(piece.source, piece.ids.tolist()) for piece in after if piece.source != "noise"]
            assert told == [(piece.source, piece.ids.tolist()) for piece in before if piece.source != "noise"]
            assert sum(len(piece.ids) for piece in after) == placement.text_length
            text = placement.tokenizer.decode(np.concatenate([piece.ids for piece in after if piece.source == "noise"]))
            spotted = any(f" {name.lower()}" in text for name in (*PEOPLE, *PLACES))
            shared += spotted and segment in (*plain.homes, 4)
            changed += spotted and segment not in (*plain.homes, 4)
    assert (shared, changed > 30) == (0, True)


def test_a_fragment_tells_nothing(corpora: Corpora, tokenizer: PreTrainedTokenizerBase) -> None:
    """No piece of a fact names two of the people, things and places that it brings together."""

    class OneFragment(np.random.Generator):
        def poisson(self, *_: object) -> int:
            return 1

    rng = OneFragment(np.random.Philox(0))
    names = {word.lower() for word in (*PEOPLE, *OBJECTS, *PLACES)}
    for task in (Detect(), Reasoning(), Carried()):
        placement = Placement(task, corpora, tokenizer, text_length=45, seed=3)
        named = []
        for _ in range(300):
            ids = placement._scatter_fragments(np.full(45, -1), rng, "train", mean=1.0)
            words = re.findall(r"\w+", tokenizer.decode(ids[ids >= 0]))
            named.append(len(names & set(words)))
        assert set(named) == {0, 1}


@pytest.mark.fault("noise in which no sentence ends", "facts stand between its words, and one line says so")
@pytest.mark.parametrize("kind", ["words", "characters", "one word", "sentences almost of a segment"])
def test_facts_in_text_without_stops(
    kind: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("абвгд"), size=rng.integers(1, 3))) for _ in range(9000)]
    text = {"characters": "".join(map(chr, rng.integers(0x4E00, 0x9000, size=4000))), "one word": "абв" * 4000}.get(
        kind
    )
    if kind.startswith("sentences"):
        words = [word.capitalize() + "," * (n % 11 > 0) + "." * (n % 11 == 10) for n, word in enumerate(words)]
    (tmp_path / "book.txt").write_text(text or " ".join(words))
    corpora = tokenize(Files(str(tmp_path / "book.txt")), tokenizer, tmp_path)
    placement = Placement(Detect(), corpora, tokenizer, text_length=50, seed=7)
    (said,) = placement.remarks()
    assert re.match(r"noise: in [\d,]+ of [\d,]+ training segments no sentence ends", said)
    first = 0
    for number in range(100):
        (pieces,) = placement.sample("train", Key(1, number)).pieces
        before, fact, after, question = pieces
        assert (fact.source, question.source) == (0, "question")
        assert len(before.ids) + len(after.ids) == 50 - len(fact.ids) - len(question.ids)
        if kind == "words":
            # The token of a word in running text holds the space before it.
            assert len(after.ids) == 0 or tokenizer.decode(after.ids).startswith(" ")
        elif kind == "characters":
            assert len(before.ids) < 3 or len(tokenizer.decode(before.ids[-3:])) == 1
        first += len(before.ids) == 0
    assert first <= 15


def questions_of_sizes(tmp_path: Path, *sizes: int) -> Babi:
    """A task whose questions, of 4 tokens, differ in the number of their facts, of 6 tokens each."""
    stories = []
    for number, size in enumerate(sizes):
        facts = [f"{i + 1} Mary went to the {PLACES[(number + i) % 6]}." for i in range(size)]
        stories.append("\n".join([*facts, f"{size + 1} Where is Mary ?\t{PLACES[number % 6]}\t{size}"]))
    path = tmp_path / "qa.txt"
    path.write_text("\n".join(stories))
    return Babi(str(path), test_path=str(path))


@pytest.mark.fault("more samples are wanted than there are questions", "each question is asked once, and counted")
def test_questions_of_a_file_are_asked_once(
    tmp_path: Path, corpora: Corpora, tokenizer: PreTrainedTokenizerBase
) -> None:
    task = questions_of_sizes(tmp_path, *range(1, 13))
    placement = Placement(task, corpora, tokenizer, text_length=30, seed=3)
    fitting = 4
    assert placement.fits("test", Key(1, 0)) == fitting / 12 and placement.fits("test", Key(9, 0)) == 1
    for num_segments, count in ((1, fitting), (9, 12)):
        for samples in (None, 1000, count):
            assert placement.asked("test", samples, Key(num_segments, 0)) == count
        examples = [placement.sample("test", Key(num_segments, number)).example for number in range(count)]
        assert set(examples) <= set(task.questions("test")) and len(set(examples)) == count
        assert placement.different("test", (Key(num_segments, number) for number in range(2 * count))) == count
    assert placement.asked("test", 2, Key(9, 0)) == 2
    # Fewer are not the first ones of the file, and longer inputs ask them in the same order.
    order = [placement.example("test", Key(9, number)) for number in range(12)]
    assert order != list(task.questions("test"))
    short = [placement.example("test", Key(1, number)) for number in range(fitting)]
    assert short == [example for example in order if len(example.facts) <= fitting]
    # What has no end is drawn, and counted too.
    worlds = Placement(Detect(), corpora, tokenizer, text_length=30, seed=3)
    assert worlds.asked("test", None, Key(1, 0)) == 256 and worlds.asked("test", 1000, Key(1, 0)) == 1000
    assert worlds.different("test", (Key(1, number) for number in range(1000))) == 24


@pytest.mark.fault("next to no question fits", "one that fits is found, however seldom it is drawn")
def test_a_question_that_fits_is_found(tmp_path: Path, corpora: Corpora, tokenizer: PreTrainedTokenizerBase) -> None:
    sizes = [1, *[20] * 1500]
    placement = Placement(questions_of_sizes(tmp_path, *sizes), corpora, tokenizer, text_length=30, seed=3)
    samples = [placement.sample("train", Key(1, number)) for number in range(5)]
    assert all(len(sample.example.facts) == 1 for sample in samples)
    assert placement.room_for("train", 0.0) <= 30 < placement.room_for("train", 0.5) == placement.room_for("train", 1.0)


def test_a_question_or_fact_longer_than_a_segment_is_left_out(
    tmp_path: Path, corpora: Corpora, tokenizer: PreTrainedTokenizerBase
) -> None:
    long = " and".join([" Mary went to the garden"] * 9)
    stories = [f"1 Mary went to the {place}.\n2 Where is Mary ?\t{place}\t1\n" for place in PLACES] * 3
    stories += [f"1 {long}.\n2 Where is Mary ?\tgarden\t1\n", f"1 Mary left.\n2 Where is it if {long} ?\tgarden\t1\n"]
    path = tmp_path / "qa.txt"
    path.write_text("".join(stories))
    placement = Placement(Babi(str(path), test_path=str(path)), corpora, tokenizer, text_length=30, seed=3)
    assert placement.fits("test", Key(50, 0)) == 18 / 20
    samples = FactDataset(placement, "train")
    for number in range(60):
        assert samples[Key(2, number)].input_ids.shape == (2, 30)
        assert samples[Key(2, number, facts=False, fragments=3.0)].answers.shape == (1, 1)
