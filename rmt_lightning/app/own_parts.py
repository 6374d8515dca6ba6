"""Parts of one's own: where in their code an error arose, and whether a model does what every model does."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, NamedTuple

from rmt_lightning.core.errors import UserError

if TYPE_CHECKING:
    from rmt_lightning.models.segment_model import SegmentModel

# Where code stands that is ours, Python's, or a library's.
_OTHERS = re.compile(
    rf"<|{re.escape(str(Path(__file__).parents[1]))}/|{re.escape(sysconfig.get_path('stdlib'))}/|.*/(site|dist)-packages/"
)
# A line of a traceback, as a loader's worker sends it, and what is said of a function that takes other arguments.
TOLD = re.compile(r'^ *File "(.+)", line (\d+), in (\S+)$', flags=re.MULTILINE)
CALLED = re.compile(r"([\w.]+)\(\) (?:takes|missing|got) ")


class _Place(NamedTuple):
    file: str
    line: int
    name: str


def mistake(error: BaseException) -> str | None:
    """Where an error arose in somebody's own code, in a line; None if it has nothing to do with any."""
    own = [place for place in _places(error) if not _OTHERS.match(place.file)]
    if not own:
        return None
    file, line, name = own[-1]
    here = os.path.relpath(file) if Path(file).is_relative_to(Path.cwd()) else file
    # The last line of what a worker sends names the kind already.
    reason = str(error).splitlines()[-1] if TOLD.search(str(error)) else f"{type(error).__name__}: {error}"
    return f"{here}:{line}: {name}: {' '.join(reason.split()).rstrip(': '):.300}; mend it there"


def _places(error: BaseException) -> Iterator[_Place]:
    """What was called on the way to an error, from without to within."""
    for frame, line in walk_tb(error.__traceback__):
        yield _Place(frame.f_code.co_filename, line, frame.f_code.co_qualname)
    for file, line, name in TOLD.findall(str(error)):
        yield _Place(file, int(line), name)
    if isinstance(error, TypeError) and (called := CALLED.match(str(error))):
        for module in [name for name in sys.modules if not _is_others(name)]:
            # Some modules make of any name what they like.
            with suppress(AttributeError, RuntimeError):
                code = attrgetter(called[1])(sys.modules[module]).__code__
                yield _Place(code.co_filename, code.co_firstlineno, called[1])


def _is_others(module: str) -> bool:
    return bool(_OTHERS.match(getattr(sys.modules[module], "__file__", None) or "<"))


def check_model(model: SegmentModel[Any]) -> None:
    """Try a model of one's own on two segments.

    Raises:
        UserError: unless it does what every model does.
    """
    kind = type(model)
    if not _is_others(kind.__module__) and (fault := _fault(model)):
        raise UserError(f"model: a {kind.__name__} {fault}")


def _fault(model: SegmentModel[Any]) -> str | None:
    # It takes seconds to import, which the other commands need not wait for.
    import torch

    from rmt_lightning.models import state as tree
    from rmt_lightning.models.recurrence import Segment

    if not hasattr(model, "text_length"):
        return "has no text_length; let its constructor call super().__init__(text_length, width)"
    if model.tokenizer is None:
        return "has no tokenizer; let it keep the one that its constructor is given"
    segment = Segment(torch.zeros(2, model.text_length, dtype=torch.long))
    training = model.training
    with torch.no_grad(), torch.random.fork_rng([]):
        state = model.eval().initial_state(2)
        for _ in range(min(2, model.max_segments or 2)):
            made = model.read_segment(segment, state)
            if not isinstance(made, tuple) or len(made) != 2:
                return f"returns a {type(made).__name__} of a segment; let it return hidden states and the next state"
            hidden, state = made
            if strange := [tuple(leaf.shape) for leaf in tree.leaves(state) if leaf.shape[:1] != (2,)]:
                return f"has a state of shape {strange[0]} for 2 texts; let the texts be its first dimension"
        read = tuple(model.readout(hidden, segment).shape)
    model.train(training)
    return None if read == (2, model.width) else f"makes {read} of 2 texts, and its width is {model.width}"
