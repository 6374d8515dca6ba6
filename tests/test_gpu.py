"""What is different on a GPU: precision, compiled steps, graphs, memory. Skipped where there is none.

RMT_TEST_DEVICE=cpu runs the same checks without one, so that they are tried wherever they are changed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SMALL, final
from test_language import SMALL as RUNNING_TEXT
from test_resume import KILLER
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rmt_lightning import FactClassifier, RMTEncoder, TinyBert
from rmt_lightning.analysis.extrapolation import replies, score_length
from rmt_lightning.core.files import read_csv
from rmt_lightning.models import state as tree
from rmt_lightning.tasks.placement import Key, Placement
from rmt_lightning.training.callbacks.hardware import host_memory
from rmt_lightning.training.trainer import compile_step

DEVICE = os.environ.get("RMT_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="torch finds no GPU")

# As the placement has it.
TEXT = 30


@pytest.fixture
def build(tokenizer: PreTrainedTokenizerBase) -> Callable[..., RMTEncoder]:
    def make(**options: Any) -> RMTEncoder:
        torch.manual_seed(0)
        encoder = TinyBert(width=32, layers=1, heads=2).encoder(tokenizer)
        model = RMTEncoder(encoder, TEXT + 4 + RMTEncoder.NUM_SPECIAL_TOKENS, 4, **options)
        # Without dropout: compiled code draws other random numbers.
        return model.to(DEVICE).eval()

    return make


def text(segments: int, seed: int = 1) -> Tensor:
    """(4, T, S) tokens."""
    return torch.randint(5, 500, (4, segments, TEXT), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Gradients or weights, but for biases of keys: a softmax does not see them, and their gradient is rounding."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        if "key.bias" not in name:
            torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4, msg=name)


def test_a_step_in_bf16_is_finite_and_near_that_in_fp32(build: Callable[..., RMTEncoder]) -> None:
    model = build()
    found = []
    for enabled in (False, True):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            loss = model.encode(text(4)).float().square().mean(dim=1).log().sum()
        found.append(torch.cat([gradient.flatten() for gradient in gradients(model, loss).values()]))
        assert loss.isfinite() and found[-1].isfinite().all()
    assert torch.cosine_similarity(*found, dim=0) > 0.98
    torch.testing.assert_close(found[1].norm(), found[0].norm(), rtol=0.05, atol=0)


def test_checkpointing_gives_the_same_gradients(build: Callable[..., RMTEncoder]) -> None:
    found = []
    for checkpointing in (False, True):
        model = build(gradient_checkpointing=checkpointing)
        found.append(gradients(model, model.encode(text(4)).square().sum()))
    assert_near(found[1], found[0])


def lived(model: RMTEncoder) -> Iterator[Tensor]:
    """All that comes out of a model: in training, with a state that is carried over steps, then in streaming."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    state = model.initial_state(4)
    for step, segments in enumerate((3, 1, 3, 2, 3, 3)):  # warmed up, recorded, replayed, from different beginnings
        readings = list(model.read(text(segments, step), state=tree.detach(state)))
        torch.stack([reading.hidden.square().mean() for reading in readings]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        state = readings[-1].state
        for reading in readings:
            yield from (reading.hidden, *tree.leaves(reading.state))
    with torch.inference_mode():
        for reading in model.read(iter(text(8).unbind(dim=1))):
            yield from (reading.hidden, *tree.leaves(reading.state))
    yield from model.parameters()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_steps_give_the_same_and_keep_it(mode: Any, build: Callable[..., RMTEncoder]) -> None:
    """Nothing that is kept until the end is written over."""
    torch._dynamo.reset()
    compiled, plain = build(), build()
    compile_step(compiled, mode)
    for found, expected in zip(list(lived(compiled)), list(lived(plain)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.fixture
def run(tmp_path: Path, environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A door or a program, in a process that has not been forked: CUDA does not survive that."""
    device = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    device |= {"CUDA_VISIBLE_DEVICES": ""} if DEVICE == "cpu" else {}
    # Products whose sums have one order.
    device |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}

    def start(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment | device, capture_output=True, text=True
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return start


TRAIN = ("-m", "rmt_lightning.train", f"trainer.accelerator={'gpu' if DEVICE == 'cuda' else 'cpu'}")
HOLD = ("curriculum.max_segments=2", "hold=state_passing", "hold.steps=6", "hold.rounds=1", "hold.until_rate=1")
CARRIED = {"hold": (*SMALL, *HOLD), "language modeling": RUNNING_TEXT}


@pytest.mark.parametrize("name", CARRIED)
def test_a_run_with_graphs_is_the_same_run(name: str, run: Callable[..., Any], tmp_path: Path) -> None:
    """A state that is carried from step to step is not written over."""
    found = []
    for mode in ("null", "reduce-overhead"):
        settings = (*CARRIED[name], "trainer.precision=32-true", f"trainer.compile={mode}")
        run(*TRAIN, *settings, f"hydra.run.dir=compile-{mode}")
        found.append(final(tmp_path / f"compile-{mode}"))
    assert_near(found[1], found[0])


def test_a_run_that_is_killed_ends_with_the_same_weights(run: Callable[..., Any], tmp_path: Path) -> None:
    settings = (*SMALL, "trainer.precision=32-true", "+trainer.deterministic=warn", "backbone.dropout=0.1")
    run(*TRAIN, *settings, "hydra.run.dir=whole")
    (tmp_path / "driver.py").write_text(KILLER.format(where="step", calls=9))
    run("driver.py", *TRAIN[2:], *settings, "hydra.run.dir=killed", code=-9)
    run(*TRAIN[:2], "resume=killed")
    assert_near(final(tmp_path / "killed"), final(tmp_path / "whole"))


@pytest.mark.parametrize(("first", "then"), [("bf16-mixed", "32-true"), ("32-true", "bf16-mixed")])
def test_a_run_goes_on_in_another_precision(first: str, then: str, run: Callable[..., Any]) -> None:
    """The optimizer is fused in one of them alone."""
    run(*TRAIN, *SMALL, f"trainer.precision={first}", "trainer.max_steps=2", "hydra.run.dir=run")
    run(*TRAIN[:2], "resume=run", f"trainer.precision={then}", "trainer.max_steps=4")


def test_evaluate_is_right_as_often_as_on_a_cpu(run: Callable[..., Any], tmp_path: Path) -> None:
    run(*TRAIN, *SMALL, "hydra.run.dir=run")
    for device in ("cpu", DEVICE):
        words = (f"device={device}", "segments=[1,8]", "samples=64", "follow=0", f"output={device}")
        run("-m", "rmt_lightning.evaluate", "checkpoint=run", *words)
    first, second = (read_csv(next((tmp_path / name).rglob("evaluation.csv"))) for name in ("cpu", DEVICE))
    # In bf16 on a GPU, a run of a few steps may waver where two answers are as likely.
    for row, other in zip(first, second, strict=True):
        assert abs(int(row["right"]) - int(other["right"])) <= 6


def test_longer_inputs_take_no_more_memory(build: Callable[..., RMTEncoder], placement: Placement) -> None:
    """And in fp32 a GPU answers as a CPU does."""
    model = build()
    module = FactClassifier(model, placement.task.answers).eval()
    peaks, right = [], []
    for segments in (8, 256):
        like = Key(segments, 0)
        found = replies(module.to(DEVICE), placement, like, 8, 8, torch.device(DEVICE))
        result = score_length(found, placement, like)
        peaks.append(torch.cuda.max_memory_allocated() / 1e6 if DEVICE == "cuda" else host_memory())
        right.append(result.right)
    assert peaks[1] - peaks[0] < (1 if DEVICE == "cuda" else 50)
    on_cpu = (replies(module.cpu(), placement, Key(n, 0), 8, 8, torch.device("cpu")) for n in (8, 256))
    assert right == [sum(reply.right for reply in found) for found in on_cpu]
