import numpy as np

from rmt_lightning import Example


class Colors:
    """What color a door has."""

    name = "colors"
    answers = ("red", "green", "blue")
    where = "anywhere"  # "start": in the first segment; "apart": each fact in a segment of its own

    def draw(self, rng: np.random.Generator, split: str) -> Example:
        color = self.answers[rng.integers(len(self.answers))]
        return Example((f"The door is {color}.",), "What color is the door?", color, support=(0,))

    def sentences(self):
        """All that it may say, for tokenizers that are trained on it."""
        yield from (f"The door is {color}." for color in self.answers)
        yield "What color is the door?"
