"""A Hugging Face causal language model under masks of its own, read at once or piece by piece.

Shapes: B batch, N tokens that the backbone sees, E width of the embeddings, D width of the hidden states,
V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.masking_utils import create_masks_for_generate

from rmt_lightning.core.errors import UserError
from rmt_lightning.models.backbone import DECODERS, UNREAL, Layers, Transformer, alike, inside, tried


class SegmentCache(Cache):
    """Keys and values of a segment that is read piece by piece, each in the slot that its token's position tells.

    So rows may be of unequal length. What a row has not filled yet, or still holds from before, is hidden from it.

    Args:
        size: how many positions there are.
    """

    # Where the tokens stand that are being read, (B, N), and how many slots they see at most.
    places: Tensor
    end: int

    def __init__(self, size: int) -> None:
        super().__init__(layers=[])
        self.size = size
        self._kept: list[tuple[Tensor, ...]] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_named: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep those of new tokens (B, H, N, …), and hand back all that are seen (B, H, end, …)."""
        new = key_states, value_states
        if layer_idx == len(self._kept):
            self._kept.append(tuple(part.new_zeros(*part.shape[:2], self.size, part.shape[3]) for part in new))
        keys, values = self._kept[layer_idx]
        for kept, part in zip((keys, values), new, strict=True):
            kept.scatter_(2, self.places[:, None, :, None].expand_as(part), part)
        return keys[:, :, : self.end], values[:, :, : self.end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are told, not counted."""
        return 0


class Decoder(Transformer):
    """What the recurrence needs of a causal language model: hidden states under a mask of its own, and next words.

    Args:
        model: any Hugging Face causal language model with scaled-dot-product attention, such as GPT-2, OPT, GPT-NeoX,
            Llama or Qwen.
        tokenizer: the one that goes with it.

    Raises:
        UserError: if the model cannot be told which tokens see which, or where they stand, or if it reads words off its
            last states by more than a linear map.

    Attributes:
        can_write: whether the weights that words are read off with have been trained.
    """

    AUTO = AutoModelForCausalLM
    OTHERS = DECODERS
    can_write = True

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        model = inside(model)
        kind, attention = model.config.model_type, model.config._attn_implementation
        # Other kinds of attention may ignore a mask of four dimensions without a word.
        if attention != "sdpa":
            raise UserError(
                f"backbone: {kind} comes with {attention} attention, and memory needs scaled-dot-product attention "
                f"(sdpa); choose {self.OTHERS}"
            )
        if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
            raise UserError(f"backbone: {kind} cannot be told the positions of tokens; choose {self.OTHERS}")
        if model.get_output_embeddings() is None:
            raise UserError(f"backbone: {kind} comes without what words are read off with; give AutoModelForCausalLM")
        super().__init__(model, tokenizer)
        # Whether pieces make the whole, by its size, which is not known before it is tried.
        self._in_pieces: dict[int, bool] = {}

    def _fault(self, words: Tensor) -> str | None:
        length = words.shape[1]
        size, half = length * 3 // 4, length * 3 // 8
        text, other = words[0, :size], words[1]
        places = torch.arange(length, device=words.device)
        hole = (places >= half) & (places < half + length - size)
        # The same text around a hole with one filling and another; and two texts that share but the first token, which
        # sees all the others.
        rows = words[:1].repeat(4, 1)
        rows[:2, ~hole] = text
        rows[1, hole] = other[hole]
        rows[3, 1:] = other[1:]
        visible = places.new_ones(4, length, length, dtype=torch.bool)
        visible[:2] = visible[:2].tril() & ~hole | torch.eye(length, dtype=torch.bool, device=words.device)
        positions = places.repeat(4, 1)
        positions[:2, ~hole] = places[:size]
        with _windows(self.model.config, length):
            plain = text_states = self.model.base_model(input_ids=text[None])[0][0]
            scores = self.model(input_ids=text[None, :3]).logits[0]
            embedded = self.embed(rows)
            # Memory is no word.
            embedded[2:, 1] = embedded[2].mean(dim=0)
            hidden = self(embedded, visible, positions, slice(0, 1))
        if not hidden.isfinite().all():
            return UNREAL
        if not (alike(hidden[1, ~hole], hidden[0, ~hole], 1e-5) and alike(hidden[0, ~hole], plain)):
            return "does not obey masks and positions: what it makes of a text depends on what is hidden from it"
        if alike(hidden[3, 0], hidden[2, 0], 1e-6):
            return "lets no token see a later one, as those of memory must"
        with _windows(self.model.config, 3) as windowed:
            if windowed:
                plain = self.model.base_model(input_ids=text[None])[0][0]
                hidden = self(
                    self.embed(text[None]), visible[2:3, :size, :size].tril(), places[None, :size], slice(0, size)
                )
                if not alike(hidden[0], plain):
                    return "sees a window of a text otherwise than its masks tell"
        # Those of Gemma 2, Cohere and Granite are not.
        if not alike(self._to_words(text_states[:3]), scores):
            return "scales or bounds its scores of words, and only plain ones are read"
        return None

    @property
    def _to_words(self) -> nn.Linear:
        return cast(nn.Linear, self.model.get_output_embeddings())

    @property
    def width(self) -> int:
        """D, that of the states which words are read from. In the OPT of 350M it is smaller than the layers are."""
        return int(self._to_words.weight.shape[1])

    @property
    def untied(self) -> list[nn.Parameter]:
        """Those that only `logits` uses: none if words are read off with the embeddings that write them."""
        return [weight for weight in self._to_words.parameters() if weight is not self._words.weight]

    def forward(self, embeddings: Tensor, visible: Tensor, position_ids: Tensor, text: slice) -> Tensor:
        """What the last layer makes of embeddings.

        Args:
            embeddings: (B, N, E).
            visible: (B or 1, N, N) bool: row q tells what q may see.
            position_ids: (B or 1, N).
            text: which of the embeddings are text. Where layers see a window of the text, they see all else beside it.

        Returns:
            (B, N, D).
        """
        return self._whole(embeddings, visible, position_ids, text)

    def _whole(self, embeddings: Tensor, visible: Tensor, position_ids: Tensor, text: slice) -> Tensor:
        hidden: Tensor = self.model.base_model(
            inputs_embeds=embeddings,
            attention_mask=self._masks(visible, embeddings, text),
            position_ids=position_ids,
            use_cache=False,
        )[0]
        return hidden

    def reads_pieces(self, size: int) -> bool:
        """Whether a segment of so many tokens may be read by `go_on`."""
        if self.model.training or self.config.output_attentions:
            # Dropout would stay with a token, layers that compute activations again take no cache, and maps of
            # attention are those of whole segments.
            return False
        if size not in self._in_pieces:
            self._in_pieces[size] = self._try_pieces(size)
        return self._in_pieces[size]

    def _try_pieces(self, size: int) -> bool:
        words = self.some_words(6)
        # The last one stands at the end, for there are rotations that depend on how far a text reaches.
        places, seen = (words.new_tensor([x, x]) for x in ((0, 1, 2, 3, 4, size - 1), (2, 2, 3, 4, 5, 5)))
        # Families fail in ways of their own.
        with tried(self.model), suppress(Exception):
            embedded, cache = self.embed(words), SegmentCache(size)
            whole = self(embedded, torch.arange(6, device=words.device) < seen[..., None], places, slice(2, 6))
            made = [
                self.go_on(embedded[:, piece], places[:, piece], seen[:, piece], cache)
                for piece in (slice(4), slice(4, 5), slice(5, 6))
            ]
            unbounded = self._windows(embedded[:1, :1].expand(-1, size, -1)) is None
            return unbounded and alike(torch.cat(made, dim=1), whole)
        return False

    def go_on(self, embeddings: Tensor, position_ids: Tensor, seen: Tensor, cache: SegmentCache) -> Tensor:
        """What `forward` makes of some tokens of a segment, if those before them have been read into a cache.

        Args:
            embeddings: (B, N, E) of the new tokens.
            position_ids: (B, N).
            seen: (B, N), how many positions each of them sees, counted from the first one.
            cache: takes up what is read.

        Returns:
            (B, N, D).
        """
        return self._piece(embeddings, position_ids, seen, cache)

    def go_on_apart(self, embeddings: Tensor, position_ids: Tensor, seen: Tensor, cache: SegmentCache) -> Layers:
        """The parts of `go_on`; what has been read by `apart` before tells whether there are any."""
        return self._apart(lambda: self._piece(embeddings, position_ids, seen, cache))

    def _piece(self, embeddings: Tensor, position_ids: Tensor, seen: Tensor, cache: SegmentCache) -> Tensor:
        cache.places, cache.end = position_ids, int(seen.max())
        visible = torch.arange(cache.end, device=seen.device) < seen[..., None]
        hidden: Tensor = self.model.base_model(
            inputs_embeds=embeddings,
            attention_mask=_added(visible, embeddings.dtype),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )[0]
        return hidden

    def _windows(self, text: Tensor) -> dict[str, Tensor | None] | None:
        """(1, 1, S, S), what each kind of layers sees of a text (1, S, E) alone; None for all that came before."""
        own = create_masks_for_generate(self.model.config, text, None, None)
        windows = own if isinstance(own, dict) else {"all": own}
        return None if all(window is None or window.dim() != 4 for window in windows.values()) else windows

    def _masks(self, visible: Tensor, embeddings: Tensor, text: slice) -> Tensor | dict[str, Tensor]:
        """What is added to the scores, (B or 1, 1, N, N): 0 for what may be seen; by kinds of layers if they differ."""
        windows = self._windows(embeddings[:1, text])
        if windows is None:
            return _added(visible, embeddings.dtype)
        masks = {}
        for kind, window in windows.items():
            seen = torch.ones_like(visible[:1])
            if window is not None:
                seen[:, text, text] = window[:, 0] if window.dtype == torch.bool else window[:, 0] == 0
            masks[kind] = _added(visible & seen, embeddings.dtype)
        return masks.get("all", masks)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the words that may come next: (…, D) -> (…, V)."""
        if not self.can_write:
            raise UserError(
                "backbone.name: its folder has no weights that words are read off with, so it can only classify; "
                "choose answer=classify, or give the folder of a whole language model"
            )
        scores: Tensor = self._to_words(hidden)
        return scores


@contextmanager
def _windows(config: PreTrainedConfig, size: int) -> Iterator[bool]:
    """While it is open, layers that see a window of text see so many tokens. Whether there are such layers."""
    config = config.get_text_config()
    kept = {name: getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")}
    kept = {name: value for name, value in kept.items() if value is not None}
    try:
        for name in kept:
            setattr(config, name, size)
        yield bool(kept)
    finally:
        for name, value in kept.items():
            setattr(config, name, value)


def _added(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores so that only what is visible counts: (B, N, N) bool -> (B, 1, N, N)."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None]
