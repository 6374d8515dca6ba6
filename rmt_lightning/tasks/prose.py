"""A seeded generator of English narrative, so that a first run needs no file and no network.

The text is meant as noise for the fact tasks: its own people walk to other rooms and pick up other things in the very
words of the facts. People and rooms of the tasks are named on demand, in sentences that do not tell where anybody is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np

from rmt_lightning.tasks.facts import DIRECTIONS, PEOPLE, PICK_UPS, PLACES, VERBS

# The share of sentences that look like a fact: other people go to other rooms, and other things are picked up.
LOOK_ALIKES = 0.1

WORDS: dict[str, tuple[str, ...]] = {
    name: tuple(words.split(","))
    for name, words in {
        "name": "Harriet,Oswald,Beatrice,Edmund,Clara,Rufus,Agnes,Tobias,Miriam,Felix,Prudence,Gideon,Lavinia,"
        "Ambrose,Cecily,Jasper,Winifred,Silas,Rosalind,Hector,Margery,Leopold,Dorothea,Barnaby,Isolde,"
        "Percival,Flora,Cyril",
        "role": "the captain,the baker,the old doctor,the stranger,the ferryman,the schoolmistress,the blacksmith,"
        "the young pilot,the widow,the gardener's boy,the magistrate,the tailor,the night watchman,"
        "the engineer",
        "building": "library,cellar,stables,attic,chapel,mill,market,harbour,lighthouse,courtyard,station,tavern,"
        "workshop,greenhouse,barn,tower,theatre,bakery,armoury,pantry,ballroom,orchard,observatory,dockyard",
        "land": "valley,moor,river,forest,marsh,hills,coast,meadow,canal,quarry,bridge,island,road,village,glacier",
        "thing": "lantern,letter,map,ledger,violin,umbrella,compass,kettle,clock,telescope,suitcase,basket,mirror,"
        "coin,diary,hammer,rope,candle,blanket,photograph,parcel,whistle,manuscript,saddle,key,notebook,"
        "barrel,chess set",
        "adjective": "old,narrow,quiet,bright,broken,heavy,strange,familiar,empty,crooked,pale,warm,distant,dusty,"
        "splendid,plain,forgotten,curious,gentle,bitter,faded,enormous,shallow,stubborn,delicate,wet",
        "feeling": "relief,doubt,anger,wonder,shame,hope,boredom,sorrow,delight,fear,pride,envy,impatience,regret",
        "weather": "rain,fog,snow,wind,frost,sunlight,thunder,hail,mist,heat",
        "time": "that evening,in the morning,before dawn,a week later,at noon,after supper,by midnight,"
        "during the storm,the next day,towards autumn,at the end of the month,when the bells rang,"
        "on the third day,long afterwards",
        "manner": "slowly,without a word,with great care,in a hurry,as if in a dream,quite cheerfully,in silence,"
        "against all advice,for the second time,with a shrug,rather late,under protest",
        "said": "said,replied,whispered,muttered,cried,answered,remarked,insisted",
        "work": "mended the roof,counted the coins,fed the horses,wrote to a cousin,polished the silver,read aloud,"
        "argued about the weather,drew up a list,waited for news,played a slow tune,swept the floor,"
        "boiled water,studied the stars,sharpened the tools,packed for the journey,cut the bread,"
        "listened at the door",
        "opinion": "nobody would come,the bridge had been washed away,the price was too high,the war was over,"
        "it had all been a mistake,the ship was already lost,there was still time,someone had lied,"
        "the house was watched,the harvest would fail,the machine could be repaired,"
        "the letter was a forgery,winter would be mild",
        "speech": "We cannot stay here,It is only a matter of time,I have seen worse,You never told me that,"
        "There must be another way,Nothing is settled yet,I would not open it,Ask me again tomorrow,"
        "That is what they all say,Leave it where it is,I remember it well,Somebody has been here before us,"
        "The engine will not start,Give me your hand,It was never about the money,Let us begin",
        "number": "two,three,four,five,six,seven,nine,ten,a dozen,twenty,forty,a hundred",
    }.items()
}

NARRATIVE = (
    "{Time}, {person} {work}.",
    "{person} {work} {manner}, and {person} {work}.",
    "{person} {said} that {opinion}.",
    '"{speech}," {said} {person}.',
    '"{speech}," {person} {said} {manner}.',
    '"{speech}!"',
    "The {weather} came down over the {land}, and the {building} stood {adjective} and {adjective}.",
    "There was a {adjective} {thing} beside the {adjective} {thing}.",
    "It was a {adjective} {building}, built {number} years ago at the edge of the {land}.",
    "{person} felt {feeling}, then {feeling}, and in the end nothing but {feeling}.",
    "Behind the {building} lay the {land}; beyond it there was only {weather}.",
    "For {number} days {person} had thought of the {thing} and of the {adjective} {land}.",
    "Perhaps {opinion}, but {person} did not believe it.",
    "If {opinion}, {person} {said}, then the {thing} was of no use.",
    "No one knew why {person} had left the {thing} in the {building}.",
    "The {thing} was {adjective}, the {thing} was {adjective}, and the {weather} did not stop.",
    "{number} people had crossed the {land} since the {weather} began.",
    "With {feeling} {person} looked at the {adjective} {thing}.",
    "{Time} the {land} seemed {adjective}, almost {adjective}.",
    "What {person} wanted was a {thing}, a {adjective} fire and {number} hours of sleep.",
    "{person} remembered a {adjective} childhood: the {building}, the {thing}, the smell of the {land}.",
    "Everybody in the {building} agreed that {opinion}.",
    "They sold the {thing} for {number} coins and bought a {thing}.",
    "Was it {feeling}, or only the {weather}?",
    "Nothing happened {time}.",
    "{person} opened the {adjective} door {manner} and saw the {thing}.",
    "The road to the {land} was {adjective}, and {person} took it {manner}.",
    "Between the {building} and the {land} they met {person}, who {work}.",
)

# Other people, things and places in the words of the facts. The six answers are left out: a model that starts from
# random weights does not learn to tell a mention from a fact within the few minutes of a first run.
LOOK_ALIKE = (
    "{person} {verb} to the {building}.",
    "{person} {verb} to the {building}.",
    "{person} {pick_up} the {thing}.",
    "The {building} is {direction} of the {building}.",
    "Where is {name}?",
)

# The people and the rooms of the facts, in sentences that do not tell where any of these people is. So a model cannot
# just keep the last room that was named, or all that is said of a person.
MENTIONS = (
    "The {room} was {adjective}, and the {land} looked {adjective}.",
    "There was a {adjective} {thing} in the {room}.",
    "The {room} is {direction} of the {building}.",
    "{person} {verb} to the {room}.",
    "{person} {verb} to the {room}.",
    "{person} waited for {somebody} in the {room}.",
    "{somebody} did not go to the {room}.",
    "{somebody} never went back to the {room}.",
    "{somebody} wanted to go to the {room}.",
    "{somebody} dreamed of the {adjective} {room}.",
    "{somebody} and {person} {work}.",
    "{somebody} {said} that {opinion}.",
    "Nobody had seen {somebody} {time}.",
    "Where is {somebody}?",
    "Is {somebody} in the {room}?",
)

_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"(?<=\b[Aa])(?= [aeiou])")


def documents(
    seed: int,
    count: int,
    sentences: int = 60,
    mentions: float = 0.0,
    allowed: Callable[[str], bool] = lambda sentence: True,
) -> Iterator[list[str]]:
    """Yield `count` documents, each a list of sentences; document i depends on (seed, i) and what follows alone.

    Args:
        seed: of the random numbers.
        count: how many.
        sentences: of each.
        mentions: which share of them names people or rooms of the tasks.
        allowed: which sentences may be said.
    """
    for number in range(count):
        said = _document(np.random.Generator(np.random.Philox(key=[seed, number])), mentions)
        yield list(islice(filter(allowed, said), sentences))


def _document(rng: np.random.Generator, mentions: float) -> Iterator[str]:
    """Yield sentences without end."""
    # A small cast makes a document hang together: the same few people turn up again and again.
    cast = [str(name) for name in rng.choice(WORDS["name"], size=3, replace=False)]
    cast += [str(rng.choice(WORDS["role"]))]

    def choose(words: tuple[str, ...] | list[str]) -> str:
        return words[int(rng.integers(len(words)))]

    def fill(slot: str) -> str:
        match slot:
            case "person":
                return choose(cast)
            case "name":
                return choose(cast[:3])
            case "Time":
                return choose(WORDS["time"])
            case "verb":
                return choose(VERBS)
            case "pick_up":
                return choose(PICK_UPS)
            case "direction":
                return choose(DIRECTIONS)
            case "somebody":
                return choose(PEOPLE)
            case "room":
                return choose(PLACES)
            case word:
                return choose(WORDS[word])

    while True:
        template = choose(NARRATIVE)
        if rng.random() < LOOK_ALIKES:
            template = choose(LOOK_ALIKE)
        if mentions and rng.random() < mentions:
            template = choose(MENTIONS)
        yield written(template, fill)


def written(template: str, fill: Callable[[str], str]) -> str:
    """The sentence that comes of a template, each slot of which is filled by its name."""
    sentence = _ARTICLE.sub("n", _SLOT.sub(lambda slot: fill(slot[1]), template))
    start = 1 if sentence.startswith('"') else 0
    return sentence[:start] + sentence[start].upper() + sentence[start + 1 :]
