"""What people type by mistake: one line that names the key, the value and what is allowed; exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from conftest import SMALL, Run
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from transformers import BertConfig, BertModel, PreTrainedTokenizerBase

from rmt_lightning import train as front_door
from rmt_lightning.app.resume import overrides, run_folder, save_config, saved_config
from rmt_lightning.app.schema import instantiate
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.quoting import literal, setting
from rmt_lightning.core.run_folder import claimed, in_the_way
from rmt_lightning.models.tiny import TinyBert, TinyGPT

UNREAD = "cannot be read; a text with such characters needs quotes: type"
NO_TEXT = "must be a valid string; for a text, type"

TABLE = [
    # unknown keys
    ("model.memry_size=3", r"model.memry_size: no such setting; did you mean memory_size? allowed: update, segment"),
    ("tusk=detect", r"tusk: no such setting; did you mean task? allowed: "),
    ("+model.heads=3", r"model.heads: no such setting; "),
    ("+foo=1", r"foo: no such setting; allowed: seed, resume, cache_dir"),
    ("task.path=qa.txt", r"task.path: no such setting; there is none here"),
    ("noise.path=book.txt", r"noise.path: no such setting; allowed: documents, seed"),
    ("curriculum.max_segment=3", r"curriculum.max_segment: no such setting; did you mean max_segments?"),
    # wrong types
    ("model.memory_size=ten", r"model.memory_size=ten: must be a valid integer"),
    ("model.memory_size=2.5", r"model.memory_size=2.5: must be a valid integer"),
    ("optim.lr=fast", r"optim.lr=fast: must be a valid number or must be a valid list"),
    ("model.gradient_checkpointing=perhaps", r"model.gradient_checkpointing=perhaps: must be a valid boolean"),
    ("trainer.max_steps=many", r"trainer.max_steps=many: must be -1 or must be a valid integer"),
    ("seed=one", r"seed=one: must be a valid integer"),
    ("seed=-1", r"seed=-1: must be greater than or equal to 0"),
    ("test.segments=[1,two]", r"test.segments="),
    ("test.segments=[0]", r"test.segments="),
    ("test.segments=[]", r"test.segments=[]: names no length"),
    ("test.samples=0", r"test.samples=0: must be greater than or equal to 1"),
    ("test.tokens=1k", r"test.tokens=1k: must be a valid list"),
    ("test.tokens=[-1]", "test.tokens=[-1]: must be greater than or equal to 0 or must be a valid string\n"),
    ("test.tokens=[1.5]", r"test.tokens=[1.5]: must be "),
    ("test.tokens=[1G]", r"test.tokens: 1G is no number of tokens; give whole numbers up to 1000M, with k for thou"),
    (
        "model=full_attention test.segments=[] test.tokens=[1M]",
        "test.tokens: too long for positions; at most 12 segments of 40 tokens fit; give fewer",
    ),
    ("model=full_attention model.memory_size=3", r"model.memory_size: no such setting; allowed: segment_length"),
    # unknown choices
    ("task=detekt", r"task=detekt: no such choice; did you mean detect? allowed: babi, babilong, carried, detect, "),
    ("noise=silence", "noise=silence: no such choice; allowed: files, mentions, none, pg19, prose, quality, wiki"),
    ("backbone=gpt", "backbone=gpt: no such choice; did you mean gpt2? allowed: bert_base_cased, bigbird"),
    ("model=lsmt", r"model=lsmt: no such choice; did you mean lstm? allowed: armt, bigbird, full_attention, "),
    ("experiment=paper_carried", r"experiment=paper_carried: no such choice; did you mean paper_"),
    ("logger=mlflow", r"logger=mlflow: no such choice; allowed: csv, tensorboard, wandb, wandb_and_tensorboard"),
    ("logger=wandb_and_tensorboard logger.project=x", "logger.project: no such setting"),
    ("logger=wandb_and_tensorboard +logger.wandb.nosuch=x", "logger.wandb.nosuch: no such setting; allowed: "),
    ("logger=tensorboard +logger.b._target_=lightning.pytorch.loggers.CSVLogger", "logger.b: no such setting; allowed"),
    ("curriculum.lengths=random", r"curriculum.lengths=random: must be 'exact' or 'uniform'"),
    ("curriculum.when_stuck=cry", r"curriculum.when_stuck=cry: must be 'stop' or 'continue'"),
    ("trainer.precision=8", r"trainer.precision=8: must be "),
    ("trainer.precision=fp16", r"trainer.precision=fp16: must be 64, 32, 16, '64', '32', '16', 'bf16', '64-true', "),
    ("model.memory_size", r"'model.memory_size': settings are given as key=value"),
    ("trainer.accelerator=abacus", r"trainer.accelerator=abacus: must be 'auto', 'cpu', 'gpu', 'cuda' or 'mps'"),
    # ranges
    ("model.memory_size=-1", r"model.memory_size=-1: must be greater than or equal to 0"),
    ("model.bptt_depth=0", r"model.bptt_depth=0: memory would never learn; give 1 or more, or -1 for all segments"),
    ("task=whereabouts task.moves=2000000000", "task.moves=2000000000: must be less than or equal to 1000"),
    ("logger=tensorboard +logger.nosuch=1", "logger.nosuch: no such setting; allowed: "),
    ("backbone.initializer_range=1e-9", "backbone.initializer_range=1e-09: must be greater than or equal to 0.001"),
    ("model.bptt_depth=-2", r"model.bptt_depth=-2: must be greater than or equal to -1"),
    ("model.schedule=diagonal", r"model.schedule=diagonal: is for memory that each layer keeps for itself, and here"),
    ("data.segment_length=513", r"data.segment_length=513: the backbone sees at most 512 tokens; give 512 or less"),
    ("data.segment_length=12", r"data.segment_length=12: 10 memory and 3 special tokens leave no room for text; "),
    ("model=rmt_decoder backbone=tiny_gpt data.segment_length=20", r"data.segment_length=20: 10 read memory and"),
    ("model=rmt_decoder backbone=tiny_gpt data.segment_length=600", r"data.segment_length=600: the backbone see"),
    ("model=rmt_decoder model.memory_attention=no", r"model.memory_attention=no: must be 'free' or 'causal'"),
    ("model.memory_attention=free", r"model.memory_attention: no such setting"),
    ("data.segment_length=20", r"data.segment_length: leaves room for 7 tokens of text, too small for the facts"),
    ("hold=null", r"hold=null: no such choice; allowed: state_passing; or leave hold= out"),
    ("hold.steps=9", r"hold.steps: no such setting; it comes with hold=state_passing"),
    ("~curriculum", "~curriculum: the run needs it; leave it out"),
    ("~optim.lr", "~optim.lr: the run needs it; leave it out"),
    ("~curriculum.patience", "~curriculum.patience: there is no such setting, or it is null already; leave it out"),
    ("finetune=lora lora=null", "lora=null: is a part of the run, whose settings are given one by one; leave it out"),
    ("hold=", r"hold=: no such choice; allowed: state_passing; or leave hold= out"),
    ("+sweep=null", r"+sweep=null: no such choice; allowed: bptt_depth, "),
    ("trainer=2", r"trainer=2: no such choice; allowed: auto, ddp, ddp_cpu; or leave trainer= out"),
    ("model=full_attention hold=state_passing", r"hold=state_passing: this model has no memory to hold; leave it out"),
    ("hold=state_passing curriculum.max_segments=1", r"curriculum.max_segments=1: leaves no memory to carry; "),
    ("model=full_attention data.segment_length=511", r"data.segment_length=511: too long for positions; "),
    (
        "model=full_attention curriculum.max_segments=13",
        r"curriculum.max_segments=13: too long for positions; at most 12 segments of 40 tokens fit; give 12 or less",
    ),
    ("model=bigbird test.segments=[26,99]", r"test.segments=26,99: too long for positions; at most 25 segments of 40 "),
    ("model=lstm model.bptt_depth=0", r"model.bptt_depth=0: memory would never learn"),
    ("model=lstm data.segment_length=9", r"data.segment_length: leaves room for 9 tokens of text, too small for the"),
    ("model=memory_network model.hops=0", r"model.hops=0: must be greater than or equal to 1"),
    ("model=ntm model.slots=2", r"model.slots=2: must be greater than or equal to 3"),
    ("data.batch_size=0", r"data.batch_size=0: must be greater than or equal to 1"),
    ("data.validation_samples=1000001", r"data.validation_samples=1000001: must be less than or equal to 1000000"),
    ("test.samples=1000001", r"test.samples=1000001: must be less than or equal to 1000000"),
    ("data.num_workers=-1", r"data.num_workers=-1: must be greater than or equal to 0"),
    ("curriculum.max_segments=0", r"curriculum.max_segments=0: must be greater than or equal to 1"),
    ("curriculum.threshold=1.5", r"curriculum.threshold=1.5: must be less than or equal to 1"),
    ("curriculum.steps=[]", r"curriculum.steps=[]: must be a valid integer or list should have at least 1 item"),
    ("curriculum.threshold=[]", r"curriculum.threshold=[]: must be a valid number or list should have at least 1 item"),
    ("optim.lr=[]", r"optim.lr=[]: must be a valid number or list should have at least 1 item"),
    ("optim.lr=-0.1", r"optim.lr=-0.1: must be greater than 0"),
    ("backbone.heads=3", r"backbone.width=16: must be a multiple of backbone.heads=3"),
    ("backbone=tiny_longformer backbone.window=7", r"backbone.window=7: must be even and divide backbone.max_posit"),
    ("model=bigbird backbone.block_size=100", r"backbone.block_size=100: must divide backbone.max_positions=1024"),
    ("model=transformer_xl model.cache_length=-1", r"model.cache_length=-1: must be greater than or equal to 0"),
    ("model=transformer_xl model.cache_length=99999", r"model.cache_length=99999: must be less than or equal to 16384"),
    ("model=transformer_xl model.memory_size=3", r"model.memory_size: no such setting"),
    ("model=rmt_transformer_xl model.memory_size=20", r"data.segment_length=40: 20 memory tokens at each end leave no"),
    ("model=transformer_xl model.heads=5", r"model.width=128: must be even and a multiple of model.heads=5"),
    # files
    ("task=babi", r"task.path: is missing; give task.path=…"),
    ("task=babi task.path=absent.txt", r"task.path=absent.txt: cannot be read as a bAbI file"),
    ("task=qa", r"task.path: is missing; give task.path=…"),
    ("task=qa task.path=absent.jsonl", r"task.path=absent.jsonl: no .json, .jsonl, .parquet file there; give a file"),
    ("task=qa task.path=rows.jsonl", r"task.path=rows.jsonl: line 2 has no answer; it has facts, question"),
    ("task=babilong", r"task.folder: is missing; give task.folder=…"),
    ("task=babilong task.folder=. task.name=1", f"""task.name=1: {NO_TEXT} 'task.name="1"'"""),
    ("task=babilong task.folder=.", "task.name=qa1: task.folder=. has no train file of it; give the folder of"),
    ("noise=files", r"noise.path: is missing; give noise.path=…"),
    ("noise=files noise.path=absent.txt", r"noise.path=absent.txt: no .txt, .jsonl, .parquet file there"),
    ("noise=files noise.path=empty.txt", r"noise.path=empty.txt: is empty; give text"),
    ("noise=files noise.path=binary.txt", r"noise.path=binary.txt: is "),
    ("noise=files noise.path=short.txt", r"noise: "),
    # what Hydra reads in its own way
    ("noise=files noise.path=~/x", f"""noise.path=~/x: {UNREAD} 'noise.path="~/x"'"""),
    ("noise=files noise.path=/книга.txt", f"""noise.path=/книга.txt: {UNREAD} 'noise.path="/книга.txt"'"""),
    ("noise=files noise.path=/a&b", f"""noise.path=/a&b: {UNREAD} 'noise.path="/a&b"'"""),
    ("noise=files noise.path=o'brien", f"""noise.path=o'brien: {UNREAD} 'noise.path="o'"'"'brien"'"""),
    ("noise=files noise.path=book(1).txt", f"""noise.path=book(1).txt: {UNREAD} 'noise.path="book(1).txt"'"""),
    ("noise=files noise.path=a,b.txt", "noise.path=a,b.txt: a comma separates the values of a sweep (--multirun) or"),
    ("noise=files noise.path=a${b}", r"Interpolation key 'b' not found; for a text as it stands, type 'noise.path="),
    ("noise=files noise.path=[a]", f"""noise.path=['a']: {NO_TEXT} 'noise.path="[a]"'"""),
    ("noise=files noise.path=1e3", f"""noise.path=1000.0: {NO_TEXT} 'noise.path="1e3"'"""),
    ("resume=2026", f"""resume=2026: {NO_TEXT} 'resume="2026"'"""),
    ("ключ=1", "'ключ=1': settings are given as key=value, such as seed=2"),
    ("=x", "'=x': settings are given as key=value, such as seed=2"),
    ("--bogus", "unrecognized arguments: --bogus; see --hydra-help"),
    ("hydra.run.dir=run/config.yaml/x", "hydra.run.dir=run/config.yaml/x: Not a directory; choose another folder"),
    (f"hydra.run.dir={'x' * 300}", f"hydra.run.dir={'x' * 300}: File name too long; choose another folder"),
    # folders in which something would be lost or mixed, and what has no effect
    ("hydra.run.dir=", "hydra.run.dir=: is empty; name a folder, or leave it out"),
    ("hydra.run.dir=null", "hydra.run.dir=null: field 'hydra.run.dir' is not Optional; give another value, or leave "),
    ("hydra.mode=x", "hydra.mode=x: Invalid value 'x', expected one of [RUN, MULTIRUN]; give another value, or leave"),
    ("hydra.verbose=5", "hydra.verbose=5: Hydra cannot obey that (AssertionError"),
    ("hydra.searchpath=[absent]", "hydra.searchpath: absent is no folder; name one that holds choices of your own"),
    ("--package=model", "--package=model: is the part that --cfg job shows; add that, or leave it out"),
    ("--config-name=evaluate", "--config-name: each command has a config of its own; give choices of your own with -"),
    ("--experimental-rerun=run", "--experimental-rerun: go on with a run by resume=<its folder>, or leave it out"),
    ("-m hydra.sweeper.max_batch_size=0", "hydra.sweeper.max_batch_size=0: must be 1 or more"),
    ("hydra.run.dir=.", "hydra.run.dir=.: holds bare, which is none of this run's; choose a folder of its own"),
    ("hydra.run.dir=..", "hydra.run.dir=..: holds "),
    ("hydra.run.dir=notes", "hydra.run.dir=notes: holds evaluation.csv, which is none of this run's; choose a folder"),
    ("hydra.sweep.dir=x", "hydra.sweep.dir=x: is for sweeps alone; add --multirun, or leave it out"),
    ("hydra.job.chdir=true", "hydra.job.chdir=true: all paths are seen from where the command"),
    ("+trainer.accumulate_grad_batches=4", "trainer.accumulate_grad_batches=4: a validation ends each step,"),
    ("noise=files noise.path=short.txt noise.field=x", "noise.field=x: is for rows of jsonl and parquet, and"),
    ("cache_dir=", "cache_dir=: is empty; give a value, or leave it out"),
    (f"resume={'x' * 300}", f"resume={'x' * 300}: no run there; give a run folder or one of its checkpoints/*.ckpt"),
    # models
    ("backbone=minilm backbone.name=/absent/model", r"backbone.name=/absent/model: no such folder"),
    ("backbone=minilm", r"backbone.name=sentence-transformers/all-MiniLM-L6-v2: cannot be loaded"),
    ("backbone=minilm backbone.name=notes", r"backbone.name=notes: cannot be loaded"),
    ("backbone=minilm backbone.name=code", r"backbone.name=code: brings code of its own, which is not executed; give"),
    (
        "backbone=minilm backbone.name=kernel",
        "backbone.name=kernel: names code (attn_implementation=some/kernel), which is not executed; take that out",
    ),
    (
        "backbone=minilm backbone.name=mary",
        "backbone.name=mary: holds a model of this package, which has a backbone inside; give a Hugging Face model, or",
    ),
    ("backbone=minilm backbone.name=bare", r"backbone.name=bare: its tokenizer knows 0 words, and the model 40; put"),
    ("backbone=minilm backbone.name=greek", r"backbone: its tokenizer (greek) knows 0% of the characters of the noise"),
    (
        "backbone.name=bert",
        "backbone.name: no such setting; allowed: width, layers, heads, max_positions, vocabulary_size, dropout, "
        "initializer_range; it comes with backbone=bert_base_cased or ",
    ),
    ("model=rmt_decoder", r"backbone: RMTDecoder needs a causal language model; choose backbone=tiny_gpt or gpt2"),
    ("backbone=tiny_gpt", r"backbone: RMTEncoder needs an encoder; choose backbone=tiny_roformer, minilm or bert_base"),
    ("backbone=minilm backbone.name=bert model=rmt_decoder", r"backbone.name=bert: bert is an encoder; choose"),
    ("backbone=gpt2 backbone.name=gpt", r"backbone: gpt2 has no tokens to begin and to end a segment; choose an enc"),
    ("answer=generate", r"answer=generate: RMTEncoder cannot write; choose model=rmt_decoder"),
    ("model=[lstm,rmt_encoder]", "model=[lstm,rmt_encoder]: a run has one model; give one choice, without brackets"),
    (
        "model=bigbird backbone.random_blocks=99",
        "backbone.random_blocks=99: with blocks of 16 tokens, no input within backbone.max_positions=1024",
    ),
    ("answer=guess", r"answer=guess: no such choice; allowed: classify, generate"),
    ("noise=wikitext", r"noise.name=Salesforce/wikitext: cannot be loaded from the Hugging Face Hub"),
    # resuming
    ("resume=absent", r"resume=absent: no run there; give a run folder or one of its checkpoints/*.ckpt"),
    ("resume=notes", r"resume=notes: no run there"),
    ("hydra.run.dir=run", r"hydra.run.dir=run: already holds a run; choose another folder, or go on with resume=run"),
    ("resume=run task=memorize", r"task=memorize: a resumed run keeps its task; leave it out, or start a new run"),
    ("resume=run model.memry_size=3", r"model.memry_size: no such setting"),
    ("resume=run/checkpoints/absent.ckpt", r"resume=run/checkpoints/absent.ckpt: no run there"),
    ("resume=run/checkpoints/truncated.ckpt", r"HERE/run/checkpoints/truncated.ckpt: is damaged or no checkpoint"),
    ("resume=run/checkpoints/text.ckpt", r"HERE/run/checkpoints/text.ckpt: is damaged or no checkpoint"),
    ("resume=run model.memory_size=3", r"model.memory_size=3: a resumed run keeps its model (model.memory_size=10)"),
    ("resume=run model.update=gated", r"model.update=gated: a resumed run keeps its model (model.update._target_=rmt"),
    ("resume=run backbone.width=32", r"backbone.width=32: a resumed run keeps its backbone (backbone.width=16); st"),
    ("resume=run ~backbone.width", r"~backbone.width: a resumed run keeps its backbone (backbone.width=16); start a"),
    ("resume=run ~model.update", r"~model.update: a resumed run keeps its model (model.update._target_=rmt"),
    ("resume=run model.bptt_depth=0", r"model.bptt_depth=0: memory would never learn"),
]  # fmt: skip


@pytest.fixture(scope="module")
def finished_run(trained: Callable[..., Path]) -> Path:
    return trained("curriculum.max_segments=1")


@pytest.fixture(scope="module")
def backbones(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as they could come from the Hub: an encoder, a causal language model, one that brings code of its own."""
    folder = tmp_path_factory.mktemp("backbones")
    size = {"width": 16, "layers": 1, "heads": 2}
    texts = ["Mary went to the garden."]
    (gpt_tokenizer := TinyGPT().tokenizer(texts)).save_pretrained(folder / "gpt")
    TinyGPT(**size).decoder(gpt_tokenizer).model.save_pretrained(folder / "gpt")
    tokenizer.save_pretrained(folder / "bert")
    TinyBert(**size).encoder(tokenizer).model.save_pretrained(folder / "bert")
    # Without its tokenizer; and one that knows no word of English.
    model = BertModel(BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    model.save_pretrained(folder / "bare")
    model.save_pretrained(folder / "greek")
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(945, 970)))
    (folder / "greek" / "vocab.txt").write_text("\n".join(words))
    # A model that would have to be executed.
    tokenizer.save_pretrained(folder / "code")
    auto = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    (folder / "code" / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    tokenizer.save_pretrained(folder / "kernel")
    named = {"model_type": "bert", "attn_implementation": "some/kernel"}
    (folder / "kernel" / "config.json").write_text(json.dumps(named))
    tokenizer.save_pretrained(folder / "mary")
    (folder / "mary" / "config.json").write_text(json.dumps({"model_type": "rmt_lightning"}))
    (folder / "code" / "code.py").write_text("raise SystemExit('executed')")
    return folder


@pytest.fixture
def here(
    finished_run: Path, backbones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> Iterator[Path]:
    """A folder with a finished run and some files that are of no use."""
    shutil.copytree(finished_run, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "truncated.ckpt").write_bytes((checkpoints / "last.ckpt").read_bytes()[:-1000])
    (checkpoints / "text.ckpt").write_text("not a checkpoint")
    (tmp_path / "empty.txt").touch()
    rows = [{"facts": ["Ada is in."], "question": "Where is Ada?", "answer": "in"}]
    rows.append({"facts": ["Bo left."], "question": "Where is Bo?"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "short.txt").write_text("One sentence. Another one. A third one.")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "evaluation.csv").write_text("mine")
    for name in ("bert", "bare", "greek", "code", "kernel", "gpt", "mary"):
        (tmp_path / name).symlink_to(backbones / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RMT_LIGHTNING_CACHE", environment["RMT_LIGHTNING_CACHE"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield tmp_path
    GlobalHydra.instance().clear()


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".log"}


@pytest.mark.parametrize(("typed", "message"), TABLE, ids=[ascii(typed)[:60] for typed, _ in TABLE])
def test_one_line(
    typed: str, message: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(here)
    resumed = typed.startswith("resume=run")
    small = [] if resumed else [s for s in SMALL if not typed.startswith("backbone=") or not s.startswith("backbone.")]
    small = [s for s in small if "noise=" not in typed or not s.startswith("noise.")]
    small = [s for s in small if s.split("=")[0] not in {part.split("=")[0] for part in typed.split(" ")}]
    monkeypatch.setattr(sys, "argv", ["train", *small, *typed.split(" ")])
    with pytest.raises(SystemExit) as exit_:
        front_door.run()
    errors = capsys.readouterr().err
    assert exit_.value.code == 2, errors
    assert errors.startswith(f"error: {message}".replace("HERE", str(here))), errors
    assert errors.count("\n") == 1, errors
    assert contents(here) == before
    assert not (here / "outputs").exists() or not list((here / "outputs").glob("*/*")), "an empty run folder is left"


def test_an_empty_folder_that_one_stands_in(refused: Callable[..., str], tmp_path: Path) -> None:
    assert refused("seed=-1", "hydra.run.dir=.").startswith("error: seed=-1: ")
    assert tmp_path.is_dir() and list(tmp_path.iterdir()) == []
    for name in ("run.sh", "slurm-1.out"):
        (tmp_path / name).touch()
    assert in_the_way(tmp_path) is None


CHOICES = [
    (b"# caf\xe9\n_target_: rmt_lightning.Prose", "mine/noise/x.yaml: is not UTF-8; save it as UTF-8"),
    (b"_target_: a\n  seed: x", "mine/noise/x.yaml: is no yaml: mapping values are not allowed here in"),
    (b"", "noise: names no class; choose one with noise=…, or give its yaml a _target_"),
]


@pytest.mark.parametrize(("content", "message"), CHOICES, ids=[message[:30] for _, message in CHOICES])
def test_choices_that_cannot_be_read(content: bytes, message: str, refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mine" / "noise").mkdir(parents=True)
    (tmp_path / "mine" / "noise" / "x.yaml").write_bytes(content)
    assert refused("--config-dir=mine", "noise=x").startswith(f"error: {message}")


def test_the_place_of_all_runs_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", *SMALL])
    for there in (Path.touch, lambda path: path.symlink_to("absent"), lambda path: path.symlink_to(path)):
        there(tmp_path / "outputs")
        with pytest.raises(SystemExit) as refused:
            front_door.run()
        GlobalHydra.instance().clear()
        told = capsys.readouterr().err
        assert refused.value.code == 2 and told.count("\n") == 1 and "choose another folder with hydra.run.dir=" in told
        (tmp_path / "outputs").unlink()


@pytest.mark.fault("the folder in which a command is started has been removed", "one line says so")
def test_a_folder_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setattr(sys, "argv", ["train", *SMALL])
    with pytest.raises(SystemExit):
        front_door.run()
    assert capsys.readouterr().err == (
        "error: the folder that this was started in is gone; start it again in one that is there\n"
    )


@pytest.mark.fault("a run folder that cannot be written to is resumed", "one line that says what can be done")
def test_a_folder_of_somebody_else(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "run" / ".lock").unlink()
    # Even the superuser writes no file in the place of a folder.
    (here / "run" / ".lock").mkdir()
    monkeypatch.setattr(sys, "argv", ["train", "resume=run"])
    with pytest.raises(SystemExit) as refused:
        front_door.run()
    told = capsys.readouterr().err
    assert refused.value.code == 2 and told.count("\n") == 1
    assert told.startswith("error: run/.lock: is a folder, where a file belongs; remove it")


@pytest.mark.fault("runs are started in the same second", "each has a folder of its own")
def test_new_runs_share_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: run_folder(None, "outputs/day/time-detect"), range(8)))
    assert sorted(made) == ["outputs/day/time-detect", *(f"outputs/day/time-detect-{number}" for number in range(2, 9))]
    # Those that torchrun has started are one run.
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert {run_folder(None, "outputs/day/time-reasoning") for _ in range(2)} == {"outputs/day/time-reasoning"}
    monkeypatch.delenv("WORLD_SIZE")

    def denied(name: str, *_: object) -> None:
        raise PermissionError(13, "Permission denied", name)

    # The day's folder may be somebody else's.
    monkeypatch.setattr(os, "mkdir", denied)
    with pytest.raises(UserError, match=r"^outputs/day/x: Permission denied; choose another folder with hydra"):
        run_folder(None, "outputs/day/x")


def test_what_is_saved_is_read_as_it_was(tmp_path: Path) -> None:
    """Neither what was typed nor what came of it is looked up once more, and no backslash is doubled."""
    name = "${oc.env:HOME}/a\\b\\${x}"
    parts = {
        "seed": 1,
        "answer": {},
        "task": {},
        "backbone": {},
        "model": {},
        "noise": {"path": literal(name), "list": [literal(name)]},
    }
    config = OmegaConf.create({**parts, "resume": None})
    words = [setting("noise.path", name), "+seed=${oc.env:HOME}"]
    settings = OmegaConf.create({"overrides": {"task": words}})
    assert overrides(settings) == words
    save_config(tmp_path, config, overrides(settings), None)
    assert saved_config(tmp_path, None).noise.path == saved_config(tmp_path, None).noise.list[0] == name
    assert yaml.safe_load((tmp_path / "overrides.yaml").read_text()) == words
    part = OmegaConf.create({"_target_": "builtins.dict", "path": literal(name)})
    assert instantiate(part, other=1) == {"path": name, "other": 1}
    save_config(tmp_path, saved_config(tmp_path, None), words, None)
    assert saved_config(tmp_path, None).noise.path == name


CLAIM = "from rmt_lightning.core.run_folder import *\nwith claimed(Path('run')): print('claimed', flush=True), input()"


@pytest.mark.fault("the process that uses a run folder is killed", "until then the folder is refused, then it is free")
def test_a_folder_in_use(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = subprocess.PIPE
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.Popen([sys.executable, "-c", CLAIM], stdin=pipe, stdout=pipe, text=True, env=environment)
    assert other.stdout is not None and other.stdout.readline() == "claimed\n"
    before = contents(here)
    for typed in (["resume=run"], [*SMALL, "hydra.run.dir=run"]):
        monkeypatch.setattr(sys, "argv", ["train", *typed])
        with pytest.raises(SystemExit) as exit_:
            front_door.run()
        errors = capsys.readouterr().err
        assert exit_.value.code == 2 and errors.count("\n") == 1
        assert errors.startswith(f"error: run: a run is going on there (process {other.pid} on "), errors
    assert contents(here) == before
    other.kill()
    other.wait()
    with claimed(Path("run")):
        pass


def test_the_real_command(train: Run, tmp_path: Path) -> None:
    result = train("model.memory_size=-1")
    assert result.returncode == 2
    assert result.stderr == "error: model.memory_size=-1: must be greater than or equal to 0\n"
    assert result.stdout == ""
    assert not list(tmp_path.glob("outputs/*/*"))


def test_a_loss_that_is_no_number_stops_the_run(train: Run, tmp_path: Path) -> None:
    result = train("optim.lr=[1e-3,1e30]", "optim.warmup=0", "trainer.gradient_clip_val=null", "hydra.run.dir=run")
    assert result.returncode == 1, result.stderr
    assert result.stderr.startswith("error: the loss became nan at step ") and result.stderr.count("\n") == 1
    assert "the last good checkpoint is run/checkpoints/last.ckpt" in result.stderr
    import torch

    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] >= 6
    assert all(value.isfinite().all() for value in saved["state_dict"].values() if value.is_floating_point())
