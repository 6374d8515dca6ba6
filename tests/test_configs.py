"""Every shipped config is composed, checked and, where that needs no network, built."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override

from rmt_lightning.app.recipes import build_recipe
from rmt_lightning.app.schema import CONF, check
from rmt_lightning.app.training import tell_idle
from rmt_lightning.core.errors import UserError
from rmt_lightning.train import Root

CHOICES = sorted(
    f"{path.parent.relative_to(CONF)}={path.stem}"
    for path in CONF.glob("*/*.yaml")
    if path.parent.name not in ("experiment", "sweep")
)
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
PRESETS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
BUILT = (
    "backbone.width=16", "backbone.layers=1", "backbone.heads=2", "noise.documents=20", "curriculum.max_segments=2",
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_hydra_left_over() -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()


def compose(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = hydra.compose("train", list(overrides), return_hydra_config=True)
    with flag_override(config, ["readonly", "struct"], False):
        OmegaConf.set_readonly(config.hydra, False)
        config.hydra.runtime.output_dir = "."
        HydraConfig.instance().set_config(config)
        config.pop("hydra")
    return config


@pytest.mark.parametrize("choice", CHOICES)
def test_choice(choice: str) -> None:
    missing = {
        "task=babi": ["task.path=qa.txt"],
        "task=babilong": ["task.folder=en-10k"],
        "noise=files": ["noise.path=book.txt"],
    }
    check(compose(choice, *missing.get(choice, [])), Root)


@pytest.mark.parametrize("sweep", ["memory_size", "bptt_depth", "num_segments"])
def test_sweep(sweep: str) -> None:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = hydra.compose("train", [f"+sweep={sweep}"], return_hydra_config=True)
        (axis, values), (seed, seeds) = config.hydra.sweeper.params.items()
        assert config.hydra.mode == RunMode.MULTIRUN and axis.endswith(sweep.replace("num", "max")) and seed == "seed"
        for value, number in zip(values.split(","), (seeds + ",1").split(","), strict=True):
            hydra.compose("train", [f"{axis}={value}", f"seed={number}"])


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset.startswith("paper_")])
def test_paper_preset(preset: str) -> None:
    config = compose(f"experiment={preset}")
    check(config, Root)
    # The recipe of RMT-2023: 512 tokens, 10 memory tokens, a global batch of 32, up to 7 segments.
    assert config.task._target_.lower().endswith(preset.removeprefix("paper_"))
    assert (config.data.segment_length, config.model.memory_size, config.curriculum.max_segments) == (512, 10, 7)
    assert config.data.batch_size * config.trainer.devices == 32
    assert config.backbone.name == "bert-base-cased" and config.noise.name == "emozilla/quality"
    assert config.trainer.precision == "32-true" and config.optim.weight_decay == 1e-3


@pytest.mark.parametrize("preset", ["tiny_carried", "tiny_reasoning"])
def test_tiny_preset(preset: str) -> None:
    config = compose(f"experiment={preset}")
    check(config, Root)
    assert config.task._target_.lower().endswith(preset.removeprefix("tiny_"))
    assert config.data.batch_size * config.trainer.devices == 64
    assert len(config.curriculum.steps) == config.curriculum.max_segments
    # Whatever stands after it on the command line wins.
    assert compose(f"experiment={preset}", "trainer=auto").trainer.devices == "auto"


def test_the_preset_for_who_is_where_is_on_the_task_that_mentions_do_not_give_away() -> None:
    config = compose("experiment=tiny_whereabouts")
    check(config, Root)
    assert config.task._target_ == "rmt_lightning.Whereabouts" and config.noise.mentions > 0


def test_there_is_a_preset_for_each_paper_task_for_one_gpu_and_for_what_the_default_run_does_not_learn() -> None:
    papers, tiny = (
        ("paper_detect", "paper_memorize", "paper_reasoning"),
        ("tiny_carried", "tiny_reasoning", "tiny_whereabouts"),
    )
    assert set(PRESETS) == {"minilm_512", *papers, *tiny}


@pytest.mark.parametrize("task", ["memorize", "detect", "reasoning", "carried"])
def test_the_preset_for_one_gpu_takes_any_task(task: str) -> None:
    config = compose("experiment=minilm_512", f"task={task}")
    check(config, Root)
    assert config.task._target_.lower().endswith(task)
    assert (config.data.segment_length, config.model.memory_size, config.trainer.devices) == (512, 10, 1)


@pytest.mark.parametrize("task", ["memorize", "detect", "reasoning", "carried"])
def test_built(task: str, cache: Path) -> None:
    recipe = build_recipe(compose(f"task={task}", *BUILT, f"cache_dir={cache}"))
    recipe.phases.prepare(recipe.module, recipe.data)
    batch = next(iter(recipe.data.train_dataloader()))
    assert recipe.module(batch.input_ids).shape == (32, 6)


CAUSAL = (
    "rmt_decoder classify",
    "rmt_decoder generate",
    "armt classify",
    "armt generate",
    "prmt generate",
    "rmt_retrieval generate",
)


@pytest.mark.parametrize(
    ("model", "answer", "backbone"),
    [
        *((model, "classify", "tiny_roformer") for model in MODELS if model != "rmt_decoder"),
        *((*choice.split(), "tiny_gpt") for choice in CAUSAL),
    ],
)
@pytest.mark.filterwarnings("ignore:.*self.log.*")
def test_one_segment_uses_all_weights(model: str, answer: str, backbone: str, cache: Path) -> None:
    """DDP waits for the gradient of every weight, and the first stage has no second segment to use them in."""
    # A choice of a model may bring a backbone of its own.
    backbones = [f"backbone={backbone}"] if backbone == "tiny_gpt" else []
    words = [f"model={model}", f"answer={answer}", *backbones, "data.batch_size=2", f"cache_dir={cache}"]
    config = compose(*words, *BUILT)
    recipe = build_recipe(config)
    recipe.phases.prepare(recipe.module, recipe.data)
    recipe.module.training_step(next(iter(recipe.data.train_dataloader())), 0)["loss"].backward()
    trained = {name: weight for name, weight in recipe.module.named_parameters() if weight.requires_grad}
    assert [name for name, weight in trained.items() if weight.grad is None] == []


IDLE = [
    ("model=lstm", "backbone.width=32", "changes nothing, for a LSTM takes the tokenizer alone"),
    ("model=lstm", "backbone.vocabulary_size=400", None),
    ("model=rmt_encoder", "backbone.width=32", None),
    (
        "curriculum.max_segments=2",
        "curriculum.steps=[25,50,75]",
        "[75] changes nothing, for curriculum.max_segments=2 ",
    ),
    ("curriculum.max_segments=2", "optim.lr=[1e-3,1e-3]", None),
    ("task=detect", "answer.all_questions=true", "changes nothing, for task=detect has one question"),
    ("task=reasoning", "answer.all_questions=true", None),
    (
        "hold=state_passing hold.until_rate=1",
        "hold.rounds=2",
        "changes nothing, for hold.until_rate=1 is met after one",
    ),
    ("curriculum.max_segments=3", "model.bptt_depth=2", "changes nothing, for the longest inputs have 2 borders"),
    ("curriculum.max_segments=3", "model.bptt_depth=1", None),
    ("curriculum.max_segments=1", "model.bptt_depth=-1", None),
    ("model.memory_size=0", "model.bptt_depth=1", "changes nothing, for model.memory_size=0 leaves no gradient to"),
    ("task=language_modeling model=rmt_transformer_xl", "model.bptt_depth=3", "changes nothing, for the longest inpu"),
    ("task=language_modeling model=rmt_transformer_xl", "model.bptt_depth=2", None),
    ("curriculum.max_segments=2", "curriculum.steps=4", "is rounded up to whole 25s, for a validation ends a stage"),
    ("curriculum.max_segments=2 +trainer.accumulate_grad_batches=2", "curriculum.steps=26", None),
    ("curriculum.max_segments=2", "curriculum.steps=[25,4]", None),
    (
        "curriculum.max_segments=2 hold=state_passing",
        "curriculum.steps=[25,4]",
        "is rounded up to whole 25s, for a valida",
    ),
]


@pytest.mark.parametrize(("others", "word", "why"), IDLE, ids=[word for _, word, _ in IDLE])
def test_what_is_typed_and_changes_nothing_is_said(
    others: str, word: str, why: str | None, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    typed = [*others.split(), word]
    given = {setting.partition("=")[0] for setting in typed}
    given |= {"curriculum.max_segments"} if "task=language_modeling" in typed else set()
    small = [setting for setting in BUILT if setting.partition("=")[0] not in given]
    config = compose(*typed, *small, f"cache_dir={cache}")
    with caplog.at_level("INFO"):
        recipe = build_recipe(config)
        recipe.phases.prepare(recipe.module, recipe.data)
        tell_idle(config, recipe, typed)
    told = [message for message in caplog.messages if message.startswith(word)]
    assert [message[: len(f"{word}: {why}")] for message in told] == ([f"{word}: {why}"] if why else [])


def test_a_new_component_needs_a_class_and_a_yaml(tmp_path: Path) -> None:
    """Limits are read off the constructor, wherever it is."""
    root = {"seed": 1, "resume": None, "cache_dir": "."}
    config = OmegaConf.create(root | {"task": {"_target_": "rmt_lightning.tasks.babi.Babi", "path": 3}})
    with pytest.raises(UserError, match=r"^task\.path=3: must be a valid string or must be a valid list$"):
        check(config, Root)
    config = OmegaConf.create(root | {"task": {"_target_": "rmt_lightning.tasks.babi.Babi", "file": "x"}})
    with pytest.raises(UserError, match=r"^task\.file: no such setting.*allowed: path, validation_path, test_path$"):
        check(config, Root)
