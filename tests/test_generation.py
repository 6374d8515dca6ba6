"""Writing over the borders of segments, against text that is written word by word with nothing kept."""

from __future__ import annotations

import pytest
import torch
from reference import read_causal_text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rmt_lightning.core.errors import UserError
from rmt_lightning.models.generation import Stream, generate, read
from rmt_lightning.models.likelihood import likelihood
from rmt_lightning.models.rmt import RMTDecoder
from rmt_lightning.models.tiny import TinyGPT

S = 11


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> RMTDecoder:
    torch.manual_seed(0)
    model = RMTDecoder(TinyGPT(16, 2, 2, max_positions=64).decoder(tokenizer), S + 6, memory_size=3)
    # Small random weights would write the same word for ever.
    for name, weight in model.decoder.model.named_parameters():
        weight.data.mul_(20 if ".h." in name and weight.dim() > 1 else 1)
    return model.double().eval()


def prompt(length: int, batch: int = 1) -> Tensor:
    return torch.randint(5, 600, (batch, length), generator=torch.Generator().manual_seed(length))


def written_by_hand(model: RMTDecoder, text: list[int], count: int) -> list[int]:
    """The likeliest words, each found by reading the whole text anew."""
    gpt = model.decoder.model
    length = len(text)
    with torch.no_grad():
        for _ in range(count):
            hidden, _memory = read_causal_text(gpt, text, model.memory, S)
            text = [*text, int(gpt.lm_head(hidden[-1]).argmax())]
    return text[length:]


@pytest.mark.parametrize("length", [1, S - 1, S, S + 1, 3 * S])
def test_greedy_over_borders(model: RMTDecoder, length: int) -> None:
    ids = prompt(length)
    written = generate(model, ids, 2 * S + 2).input_ids[0].tolist()
    assert written == written_by_hand(model, ids[0].tolist(), 2 * S + 2)
    assert len(set(written)) > 3, "the text is too dull to tell anything"


def test_how_likely_a_text_is(model: RMTDecoder) -> None:
    """Of texts of unequal length side by side: what stands after some token, each token given all before it."""
    texts, starts = [prompt(length)[0].tolist() for length in (2, S, 2 * S + 3)], [1, S - 2, S]
    texts[1][-2:] = written_by_hand(model, texts[1][:-2], 2)
    ids = torch.zeros(3, 2 * S + 3, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(text)] for text in texts])
    found = likelihood(model, ids, torch.tensor(starts), mask.long())
    gpt = model.decoder.model
    for number, (text, start) in enumerate(zip(texts, starts, strict=True)):
        expected = 0.0
        for place in range(start, len(text)):
            with torch.no_grad():
                hidden, _memory = read_causal_text(gpt, text[:place], model.memory, S)
                expected += float(gpt.lm_head(hidden[-1]).log_softmax(dim=0)[text[place]])
        assert float(found.log[number]) == pytest.approx(expected, rel=1e-5)
    assert found.greedy.tolist() == [False, True, False]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "top_k": 50, "top_p": 0.9}])
@pytest.mark.parametrize("pieces", [(1,) * 30, (S, S, 8), (3, 20, 0, 7), (29, 1)])
def test_fed_at_once_and_in_pieces(model: RMTDecoder, pieces: tuple[int, ...], sampling: dict) -> None:
    ids = prompt(30, batch=2)
    whole = generate(model, ids, 20, **sampling, generator=torch.Generator().manual_seed(3))
    stream: Stream | None = None
    for piece in ids.split(pieces, dim=1):
        stream = generate(model, piece, 0, stream=stream).stream
    generator = torch.Generator().manual_seed(3)
    first = generate(model, ids[:, :0], 7, stream=stream, **sampling, generator=generator)
    second = generate(model, ids[:, :0], 13, stream=first.stream, **sampling, generator=generator)
    assert torch.equal(torch.cat([first.input_ids, second.input_ids], dim=1), whole.input_ids)
    torch.testing.assert_close(second.stream, whole.stream)
    assert whole.stream.segment.input_ids.shape[1] == 50 - 4 * S


def test_rows_of_unequal_length(model: RMTDecoder) -> None:
    rows = [prompt(n)[0] for n in (1, 5, S, S + 1, 40)]
    ids, mask = torch.full((5, 43), 7), torch.zeros(5, 43, dtype=torch.long)
    for number, row in enumerate(rows):
        start = (0, 43 - len(row), 2)[number % 3]
        ids[number, start : start + len(row)] = row
        mask[number, start : start + len(row)] = 1
    together = generate(model, ids, 15, attention_mask=mask)
    assert together.attention_mask.all()
    for number, row in enumerate(rows):
        alone = generate(model, row[None], 15)
        assert torch.equal(together.input_ids[number], alone.input_ids[0])
        torch.testing.assert_close(together.stream.state[number], alone.stream.state[0])


def test_stop_tokens(model: RMTDecoder) -> None:
    ids = prompt(4, batch=2)
    free = generate(model, ids, 30)
    stop = int(free.input_ids[0, 6])
    first = [row.index(stop) + 1 if stop in row else 30 for row in free.input_ids.tolist()]
    assert first[0] != first[1]
    stopped = generate(model, ids, 30, stop_tokens=[stop])
    assert stopped.attention_mask.sum(dim=1).tolist() == first
    written = [row[: first[number]] for number, row in enumerate(free.input_ids.tolist())]
    for number in range(2):
        assert stopped.input_ids[number, : first[number]].tolist() == written[number]
        # A row that has stopped can be asked to go on.
    again = generate(model, ids[:, :0], 5, stream=stopped.stream)
    assert again.input_ids[0].tolist() == free.input_ids[0, first[0] : first[0] + 5].tolist()


def test_sampling_follows_the_scores(model: RMTDecoder) -> None:
    ids = prompt(6).expand(1000, -1)
    state, segment = read(model, ids[:1])
    hidden, _ = model.step(segment, state)
    scores = model.logits(hidden[0, -1])
    generator = torch.Generator().manual_seed(0)
    for options, expected in (
        ({"temperature": 2.0}, (scores / 2).softmax(-1)),
        ({"temperature": 1.0, "top_k": 3}, scores.where(scores >= scores.topk(3).values[-1], -torch.inf).softmax(-1)),
    ):
        drawn = generate(model, ids, 1, **options, generator=generator).input_ids[:, 0]
        frequency = drawn.bincount(minlength=len(expected)) / len(drawn)
        assert (frequency - expected).abs().max() < 0.06
        assert not frequency[expected == 0].any()
    for options in ({"top_k": 1}, {"top_p": 1e-6}):
        likeliest = generate(model, ids[:2], 5, temperature=1.0, **options)
        assert torch.equal(likeliest.input_ids, generate(model, ids[:2], 5).input_ids)


def test_what_cannot_be_asked_for(model: RMTDecoder) -> None:
    with pytest.raises(ValueError, match="holds no token"):
        generate(model, prompt(1)[:, :0], 1)
    with pytest.raises(ValueError, match="max_new_tokens=-1; give 0 or more"):
        generate(model, prompt(3), -1)
    for mask in (torch.ones(1, 2), -torch.ones(1, 3), torch.full((1, 3), float("nan"))):
        with pytest.raises(UserError, match=r"^attention_mask: give a tensor of 1 for text"):
            generate(model, prompt(3), 1, mask)
    for options in (
        {"temperature": -1.0},
        {"top_p": 2.0},
        {"top_p": float("nan")},
        {"top_k": 0},
        {"temperature": 1.0, "top_k": 0},
    ):
        with pytest.raises(ValueError, match=r"strictly positive|> 0"):
            generate(model, prompt(3), 1, **options)
