"""The recurrence against a plain transcription of its equations, and gradients against a graph cut by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from reference import read_text
from torch import Tensor

from rmt_lightning.core.errors import UserError
from rmt_lightning.models.recurrence import Segment, unroll
from rmt_lightning.models.rmt import RMTEncoder
from rmt_lightning.models.segment_model import SegmentModel

Make = Callable[..., RMTEncoder]
ATOL = 1e-10


def texts(batch: int, segments: int, length: int) -> Tensor:
    return torch.randint(5, 600, (batch, segments, length), generator=torch.Generator().manual_seed(1))


def reference(model: RMTEncoder, row: Tensor, **options: int) -> tuple[Tensor, Tensor]:
    encoder = model.encoder
    specials = encoder.cls_token_id, encoder.sep_token_id
    return read_text(encoder.model, *specials, row.tolist(), model.memory, model.text_length, **options)


def probe(cls: Tensor) -> Tensor:
    """A loss of the hidden states at [CLS], (…, D). Their squares would not do: LayerNorm makes their sum constant."""
    return (cls * torch.randn(cls.shape[-1], dtype=cls.dtype, generator=torch.Generator().manual_seed(2))).sum()


def gradients(model: RMTEncoder, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], atol=ATOL, rtol=1e-6, msg=lambda t, name=name: f"{name}: {t}")


@pytest.mark.parametrize("memory_size", [0, 1, 4])
@pytest.mark.parametrize("segments", [1, 2, 5])
def test_equals_the_transcription(make_model: Make, memory_size: int, segments: int) -> None:
    model = make_model(memory_size=memory_size)
    ids = texts(3, segments, model.text_length)
    hidden, memory = model(ids)
    for row in range(3):
        expected_hidden, expected_memory = reference(model, ids[row].flatten())
        torch.testing.assert_close(hidden[row], expected_hidden[: 1 + memory_size], atol=ATOL, rtol=1e-6)
        torch.testing.assert_close(memory[row], expected_memory, atol=ATOL, rtol=1e-6)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 9, -1])
def test_gradients_equal_a_graph_cut_by_hand(make_model: Make, depth: int) -> None:
    model = make_model(bptt_depth=depth)
    segments = 5
    ids = texts(1, segments, model.text_length)
    cut = segments - 1 - depth if 0 <= depth < segments - 1 else None
    own = gradients(model, probe(model(ids)[0][0, 0]))
    options = {} if cut is None else {"cut_before": cut}
    by_hand = gradients(model, probe(reference(model, ids[0].flatten(), **options)[0][0]))
    assert_same(own, by_hand)
    # The cut is felt: the first memory learns only if gradients reach back to it.
    assert (own["memory"].abs().sum() > 0) == (cut is None)


def test_depths_differ(make_model: Make) -> None:
    ids = texts(2, 5, 13)
    found = []
    for depth in (1, 2, 3, -1):
        model = make_model(bptt_depth=depth)
        found.append(gradients(model, probe(model(ids)[0][:, 0])))
    for one, other in pairwise(found):
        name = "encoder.model.embeddings.word_embeddings.weight"
        assert not torch.allclose(one[name], other[name], atol=1e-6)


@pytest.mark.parametrize("depth", [1, 3, -1])
def test_checkpointing_changes_nothing(make_model: Make, depth: int) -> None:
    ids = texts(2, 4, 13)
    plain, checkpointed = (
        gradients(model, probe(model(ids)[0][:, 0]))
        for model in (make_model(bptt_depth=depth), make_model(bptt_depth=depth, gradient_checkpointing=True))
    )
    assert_same(plain, checkpointed)


def test_gradient_equals_finite_differences(make_model: Make) -> None:
    model = make_model()
    ids = texts(1, 3, model.text_length)
    memory = model.memory.detach().clone().requires_grad_()

    def loss(memory: Tensor) -> Tensor:
        return probe(model(ids, state=memory[None])[0][0, 0])

    assert torch.autograd.gradcheck(loss, memory, atol=1e-6)


def test_no_graph_before_the_cut() -> None:
    graphs = []

    def step(segment: Segment, state: Tensor) -> tuple[Tensor, Tensor]:
        state = state * weight
        graphs.append(state.requires_grad)
        return state, state

    weight = torch.ones(1, requires_grad=True)
    segments = [Segment(torch.zeros(1, 1, dtype=torch.long))] * 6
    list(unroll(step, segments, torch.ones(1), bptt_depth=2))
    assert graphs == [False, False, False, True, True, True]


def test_truncation_needs_a_known_length(make_model: Make) -> None:
    model = make_model(bptt_depth=1)
    with pytest.raises(TypeError, match="bptt_depth"):
        model(iter([torch.ones(1, 13, dtype=torch.long)]))


def test_a_stream_equals_all_at_once_and_is_read_lazily(make_model: Make) -> None:
    model = make_model().eval()
    ids = texts(2, 6, model.text_length)
    alive = 0

    def stream() -> Iterator[Tensor]:
        nonlocal alive
        for segment in ids.unbind(dim=1):
            alive += 1
            yield segment

    with torch.no_grad():
        whole, _ = model(ids)
        streamed, _ = model(stream())
        _, half = model(ids[:, :3])
        resumed, _ = model(ids[:, 3:], state=half)
    assert alive == 6
    torch.testing.assert_close(streamed, whole)
    torch.testing.assert_close(resumed, whole)


def test_plain_ids_of_unequal_length(make_model: Make) -> None:
    """Each row gives what it gives alone, wherever its padding stands, whatever stands in the padding."""
    model = make_model()
    rows = [texts(1, 1, n)[0, 0] for n in (1, 7, 13, 14, 26, 40)]
    width = max(map(len, rows)) + 3
    ids = torch.full((len(rows), width), 3)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        start = (0, width - len(row), 2)[number % 3]
        ids[number, start : start + len(row)] = row
        mask[number, start : start + len(row)] = 1
    hidden, memory = model(ids, mask)
    other, _ = model(torch.where(mask.bool(), ids, 99), mask)
    torch.testing.assert_close(hidden[:, 0], other[:, 0], atol=0, rtol=0)
    for number, row in enumerate(rows):
        expected_hidden, expected_memory = reference(model, row)
        torch.testing.assert_close(hidden[number, 0], expected_hidden[0], atol=ATOL, rtol=1e-6)
        torch.testing.assert_close(memory[number], expected_memory, atol=ATOL, rtol=1e-6)


def test_padding_carries_no_gradient_and_no_nan(make_model: Make) -> None:
    model = make_model()
    ids = torch.full((2, 30), 50)
    mask = torch.zeros(2, 30, dtype=torch.long)
    mask[0, :5] = 1  # the second row holds nothing at all
    hidden, memory = model(ids, mask)
    assert hidden.isfinite().all() and memory.isfinite().all()
    torch.testing.assert_close(memory[1], model.memory)
    own = gradients(model, probe(hidden[0, 0]))
    assert all(gradient.isfinite().all() for gradient in own.values())
    alone = gradients(model, probe(model(ids[:1, :5])[0][0, 0]))
    assert_same(own, alone)


def test_plain_ids_that_fill_segments_equal_segments(make_model: Make) -> None:
    model = make_model()
    ids = texts(2, 3, model.text_length)
    torch.testing.assert_close(model(ids.flatten(1))[0][:, 0], model(ids)[0][:, 0], atol=ATOL, rtol=1e-6)


def test_what_is_no_text_is_not_read(make_model: Make) -> None:
    model = make_model()
    ids = texts(2, 1, 20)[:, 0]
    told = r"^attention_mask: give a tensor of 1 for text and 0 for padding, \(2, 20\)$"
    masks = (torch.ones(2, 3), torch.ones(1, 20), torch.full((2, 20), 0.5), torch.full((2, 20), 2), [[1] * 20] * 2)
    for mask in masks:
        with pytest.raises(UserError, match=told):
            model(ids, mask)
    for wrong in (ids[0], ids.float(), ids.bool(), ids[None, None]):
        with pytest.raises(UserError, match=r"^input_ids: give a tensor of whole numbers, \(texts, tokens\)$"):
            model.encode(wrong)
    for longer in (ids[None], iter([ids]), iter([ids[:, :9], ids[0]]), ids[:, :9].tolist()):
        with pytest.raises(UserError, match=r"^input_ids: a segment has room for 13 tokens; give tensors"):
            model(longer)
    for nothing in (iter([]), ids[:, None, :0].expand(2, 0, 0)):
        with pytest.raises(UserError, match=r"^input_ids: holds no segment; give one at least$"):
            model(nothing)
    with pytest.raises(UserError, match=r"^attention_mask: is for plain ids"):
        model(ids[:, None, :10], torch.ones(2, 10))


@pytest.mark.parametrize("settings", [{"segment_length": 20.0}, {"bptt_depth": -2}, {"bptt_depth": 1.5}], ids=str)
def test_what_is_no_length_and_no_depth(settings: dict[str, float], make_model: Make) -> None:
    with pytest.raises(
        UserError, match=r"^segment_length: leaves no room for text|^bptt_depth=.*: is no number of borders"
    ):
        make_model(**settings)


def test_first_memory_starts_at_the_scale_of_the_words(make_model: Make) -> None:
    model = make_model(segment_length=64, memory_size=50)
    words = model.encoder.model.embeddings.word_embeddings.weight
    assert 0.7 < (model.memory.std() / words.std()).item() < 1.4
    distances = torch.pdist(model.memory)
    assert distances.min() > 0.2 * distances.mean()


class Sums(NamedTuple):
    tokens: Tensor
    segments: Tensor


class Summing(SegmentModel[Sums]):
    """A newcomer that has not thought of rows without text: state and readout are right all the same."""

    def initial_state(self, batch_size: int) -> Sums:
        return Sums(torch.zeros(batch_size, 1, dtype=torch.long), torch.zeros(batch_size, dtype=torch.long))

    def read_segment(self, segment: Segment, state: Sums) -> tuple[Tensor, Sums]:
        ids = segment.input_ids
        return ids[:, :, None], Sums(state.tokens + ids.sum(dim=1, keepdim=True), state.segments + 1)


def test_the_base_class_keeps_rows_without_text_and_finds_the_last_token() -> None:
    model = Summing(text_length=4, width=1)
    ids = torch.arange(1, 10).repeat(3, 1)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    mask[2] = 0
    _, state = model(ids, mask)
    assert state.segments.tolist() == [3, 1, 0] and state.tokens[2].item() == 0
    # What stands in the padding of a row with text is for the model to leave out.
    assert model.encode(ids, mask)[:2].tolist() == [[9], [3]]
    assert model.encode(ids).tolist() == [[9]] * 3
    whole, pieces = model(ids[:, None, :4])[1], model(ids[:, :4])[1]
    assert all(torch.equal(one, other) for one, other in zip(whole, pieces, strict=True))
