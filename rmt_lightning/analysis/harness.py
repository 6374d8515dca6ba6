"""Exported models, as the lm-evaluation-harness of EleutherAI asks them (the extra [lm-eval]).

Texts of any length are read whole, segment by segment, in constant memory; nothing is cut off.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.tokens import start_token
from rmt_lightning.models.generation import generate
from rmt_lightning.models.likelihood import likelihood
from rmt_lightning.models.segment_model import SegmentModel

# Tokens that are written before it is seen whether the answer has come to its end.
_GLANCE = 16
# What of gen_kwargs `generate` takes.
_DRAWN = ("temperature", "top_k", "top_p")


@register_model("rmt_lightning")
class RecurrentLM(TemplateLM):
    """An exported model that predicts words, as the harness asks it.

    A text begins with the token that documents begin with in training on running text.

    Args:
        pretrained: a folder that `export` or `save_pretrained` has left, or an id on the Hugging Face Hub.
        batch_size: texts that are read side by side, the longest first.
        device: such as cpu or cuda:0; None for a GPU if there is one.
        dtype: of weights and states.
        max_batch_size: of no meaning here; the harness gives it.
        unknown: whatever else --model_args holds, which is refused.

    Raises:
        UserError: if there is no such model or device, or it predicts no words.
    """

    def __init__(
        self,
        pretrained: str = "",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown or not pretrained:
            told = f"{', '.join(unknown)}: not known here" if unknown else "pretrained: is missing"
            raise UserError(f"model_args: {told}; give pretrained=<folder>, and perhaps dtype=bfloat16")
        if not isinstance(pretrained, str | Path):
            # The harness makes a number of what looks like one.
            raise UserError(f"model_args: pretrained={pretrained}: is no text; give ./{pretrained}")
        self.model: SegmentModel[Any] = SegmentModel.from_pretrained(os.path.expanduser(pretrained))
        if not self.model.predicts:
            raise UserError(
                f"pretrained={pretrained}: a {type(self.model).__name__} predicts no words; give a causal language "
                "model, such as one that task=language_modeling or answer=generate has trained"
            )
        try:
            self.batch_size = int(str(batch_size))
        except ValueError:
            raise UserError(f"batch_size={batch_size}: give a number") from None
        if self.batch_size < 1:
            raise UserError(f"batch_size={batch_size}: give 1 or more")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"dtype={dtype}: give float32, bfloat16 or float16")
        try:
            choice = "cuda" if torch.cuda.is_available() else "cpu"
            self._device = torch.device(choice if device is None else device)
            torch.zeros(1, device=self._device).item()
        except (RuntimeError, AssertionError, NotImplementedError, TypeError):
            raise UserError(f"device={device}: torch cannot use it here; give cpu, or leave it out") from None
        self.model.to(self._device, getattr(torch, dtype)).eval()
        self.tokenizer: Any = self.model.tokenizer

        self._start = start_token(cast(PreTrainedTokenizerBase, self.tokenizer))

    @property
    def eot_token_id(self) -> int:
        end = self.tokenizer.eos_token_id
        return self._start if end is None else int(end)

    @property
    def prefix_token_id(self) -> int:
        return self._start

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: Any) -> list[int]:
        ids: list[int] = self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not self.tokenizer.chat_template:
            raise UserError("apply_chat_template: the model's tokenizer has no template; leave it out")
        try:
            return self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )  # fmt: skip
        except Exception as error:  # templates fail in ways of their own
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"apply_chat_template: the model's template fails ({reason:.200}); leave it out, or mend the template"
            ) from None

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_options: Any
    ) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        texts = [(self._begun(context), rest) for _, context, rest in requests]
        for numbers in self._batches([len(context) + len(rest) for context, rest in texts], disable_tqdm):
            ids, mask = self._padded([[*context, *rest] for context, rest in map(texts.__getitem__, numbers)])
            start = torch.tensor([len(texts[number][0]) for number in numbers], device=self._device)
            scored = likelihood(self.model, ids, start, mask)
            found |= zip(numbers, zip(scored.log.tolist(), scored.greedy.tolist(), strict=True), strict=True)
        for number, (names, _, _) in enumerate(requests):
            self.cache_hook.add_partial("loglikelihood", names, found[number])
        return [found[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        texts = [(request.args, [self._start], self.tok_encode(request.args[0])) for request in requests]
        return [log for log, _ in self._loglikelihood_tokens(texts, disable_tqdm=disable_tqdm)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        written = []
        for request in tqdm(requests, disable=disable_tqdm, desc="writing"):
            context, options = request.args
            try:
                written.append(self._write(self._begun(self.tok_encode(context)), _asked(options)))
            except UserError:
                raise
            except ValueError as error:  # of what is no such number
                raise UserError(f"gen_kwargs: {' '.join(str(error).split())}") from None
            self.cache_hook.add_partial("generate_until", request.args, written[-1])
        return written

    def _write(self, context: list[int], asked: _Asked) -> str:
        """What follows a context, up to the first of the texts that end it."""
        ids, stream, text, tokens, left = torch.tensor([context], device=self._device), None, "", [], asked.tokens
        while left > 0:
            made = generate(
                self.model, ids, min(left, _GLANCE), stream=stream, stop_tokens=[self.eot_token_id], **asked.drawn
            )
            tokens += made.input_ids[0][made.attention_mask[0].bool()].tolist()
            ended = tokens[-1] == self.eot_token_id
            text = self.tokenizer.decode(tokens[:-1] if ended else tokens)
            ends = [place for place in (text.find(stop) for stop in asked.until) if place >= 0]
            if ends or ended:
                return text[: min(ends)] if ends else text
            ids, stream, left = ids[:, :0], made.stream, left - _GLANCE
        return text

    def _begun(self, ids: list[int]) -> list[int]:
        return ids if ids[:1] == [self._start] else [self._start, *ids]

    def _batches(self, lengths: Sequence[int], disable_tqdm: bool) -> Iterator[list[int]]:
        """The numbers of texts that are read side by side; the longest first, for what does not fit fails at once."""
        order = iter(tqdm(sorted(range(len(lengths)), key=lambda n: -lengths[n]), disable=disable_tqdm, desc="reading"))
        while numbers := list(islice(order, self.batch_size)):
            yield numbers

    def _padded(self, texts: Iterable[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [torch.tensor(ids, device=self._device) for ids in texts]
        masks = [torch.ones_like(row) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        return pad(rows, batch_first=True), pad(masks, batch_first=True)


class _Asked(NamedTuple):
    """What is to be written: up to which texts, how many tokens at most, and how they are drawn."""

    until: list[str]
    tokens: int
    drawn: dict[str, Any]


def _asked(options: dict[str, Any]) -> _Asked:
    """What gen_kwargs ask for; they mean what they mean for the other models of the harness.

    Raises:
        ValueError: if they ask for what is not known here, or there can be no such thing.
    """
    try:
        left: dict[str, Any] = dict(normalize_gen_kwargs(cast(Any, options)))
    except (TypeError, OverflowError) as error:
        raise ValueError(error) from None
    until, tokens, draws = (left.pop(name) for name in ("until", "max_gen_toks", "do_sample"))
    until = [text for text in until if text not in (None, "")]
    drawn = {name: left.pop(name) for name in _DRAWN if name in left}
    if left:
        raise ValueError(f"{', '.join(left)}: not known here; give until, max_gen_toks, do_sample, {', '.join(_DRAWN)}")
    if not all(isinstance(text, str) for text in until):
        raise ValueError(f"until={until}: give a text, or a list of texts")
    if tokens < 0:
        raise ValueError(f"max_gen_toks={tokens}: give 0 or more")
    if not isinstance(draws, bool):
        raise ValueError(f"do_sample={draws}: give true or false")
    for name, value in drawn.items():
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise ValueError(f"{name}={value}: give a number")
    # One that is given with do_sample=false has become 0.
    return _Asked(until, tokens, {"temperature": 1.0 if draws else 0.0} | drawn)
