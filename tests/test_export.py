"""Models in and out of folders: nothing is lost, nothing is executed, and what cannot be opened is told in one line."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from test_configs import BUILT, compose
from test_docs import BLOCKS
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rmt_lightning import export as front_door
from rmt_lightning.app.build import build_answering, load
from rmt_lightning.app.schema import CONF
from rmt_lightning.core.errors import UserError
from rmt_lightning.models.answerer import Answerer
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.rmt import RMTDecoder, RMTEncoder
from rmt_lightning.models.segment_model import SegmentModel
from rmt_lightning.models.tiny import TinyBert, TinyGPT
from rmt_lightning.training.answering import FactClassifier

SIZE = {"width": 16, "layers": 1, "heads": 2, "max_positions": 64}


class Counter(SegmentModel[Tensor]):
    """A model of somebody else's: its state counts tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, width: int = 4, sizes: tuple[int, ...] = (1, 2)) -> None:
        super().__init__(text_length=8, width=width)
        self.tokenizer = tokenizer
        self.words = nn.Embedding(len(tokenizer), width)

    def initial_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 1)

    def read_segment(self, segment: Segment, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.words(segment.input_ids), state + segment.input_ids.shape[1]

    def readout(self, hidden: Tensor, segment: Segment) -> Tensor:
        return hidden.mean(dim=1)


def make(kind: type[SegmentModel[Any]], tokenizer: PreTrainedTokenizerBase) -> SegmentModel[Any]:
    torch.manual_seed(0)
    if kind is RMTEncoder:
        return RMTEncoder(TinyBert(**SIZE).encoder(tokenizer), 24, memory_size=3, bptt_depth=2).eval()
    if kind is RMTDecoder:
        return RMTDecoder(TinyGPT(**SIZE).decoder(tokenizer), 24, 3, "causal", gradient_checkpointing=True).eval()
    return Counter(tokenizer, width=6).eval()


@pytest.mark.parametrize("kind", [RMTEncoder, RMTDecoder, Counter])
def test_there_and_back(kind: type[SegmentModel[Any]], tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = make(kind, tokenizer)
    model.save_pretrained(tmp_path / "folder")
    suffixes = {path.suffix for path in (tmp_path / "folder").rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".md"}, "no pickles"
    ids = torch.randint(5, 600, (2, 50))
    for opened in (kind.from_pretrained(tmp_path / "folder"), SegmentModel.from_pretrained(str(tmp_path / "folder"))):
        assert type(opened) is kind and not any(module.training for module in opened.modules())
        with torch.no_grad():
            for found, expected in zip(opened(ids), model(ids), strict=True):
                assert torch.equal(found, expected)
        assert opened.tokenizer("Where is Mary?")["input_ids"] == tokenizer("Where is Mary?")["input_ids"]
        for name in ("text_length", "width", "bptt_depth", "gradient_checkpointing"):
            assert getattr(opened, name) == getattr(model, name)
        if kind is RMTDecoder:
            assert opened.memory_attention == "causal"
            assert opened.decoder.untied == [], "what was tied is tied"
    opened.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "folder" / name).read_bytes()


@pytest.mark.parametrize("choice", sorted(path.stem for path in (CONF / "model").glob("*.yaml")))
def test_every_model_of_the_package(choice: str, cache: Path, tmp_path: Path) -> None:
    GlobalHydra.instance().clear()
    backbone = "tiny_gpt" if choice == "rmt_decoder" else "tiny_bert"
    config = compose(f"model={choice}", f"backbone={backbone}", *BUILT, f"cache_dir={cache}")
    model = build_answering(config)[1].model.eval()
    model.save_pretrained(tmp_path)
    ids = torch.randint(5, 250, (2, 3, model.text_length))
    with torch.no_grad():
        assert torch.equal(type(model).from_pretrained(tmp_path).encode(ids), model.encode(ids))


def test_questions(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = make(RMTEncoder, tokenizer)
    answerer = Answerer(model, nn.Linear(16, 3), ["here", "there", "nowhere"]).eval()
    answerer.save_pretrained(tmp_path / "folder")
    opened = Answerer.from_pretrained(tmp_path / "folder")
    texts = ["Mary went to the garden. " * 20 + "Where is Mary?", "Where is John?", "."]
    assert torch.equal(opened.scores(texts), answerer.scores(texts))
    assert opened(texts) == [answerer([text])[0] for text in texts]
    assert set(opened(texts)) <= {"here", "there", "nowhere"}
    # A single text has a single answer, and is no list of letters.
    assert opened(texts[0]) == opened(texts)[0] and torch.equal(opened.scores(texts[0]), opened.scores(texts[:1]))
    assert opened([]) == [] and opened(tuple(texts)) == opened(texts)
    for wrong in ([1], [None], [texts], b"text", {"text": 1}.values(), {"text": 1}, {"text"}, 5, None):
        with pytest.raises(UserError, match=r"^texts: give a text, or a list of texts$"):
            opened(wrong)
    for blank in ("", [" \n", "Where is Mary?"]):
        with pytest.raises(UserError, match=r"^texts: one is blank, which asks nothing; leave it out$"):
            opened(blank)
    with pytest.raises(UserError, match=r"^texts: half of a surrogate pair"):
        opened("where\ud800")
    with pytest.raises(UserError, match=r"^head: reads 3 numbers, and the model makes 16"):
        Answerer(model, nn.Linear(3, 3), ["here", "there", "nowhere"])
    for answers in ("yes", ["here", "there"], {"here", "there", "nowhere"}, range(3)):
        with pytest.raises(UserError, match=r"^answers: the head gives 3 scores; give a list of so many texts$"):
            Answerer(model, nn.Linear(16, 3), answers)
    with pytest.raises(UserError, match=r"^answers=garden: is a single text"):
        FactClassifier(model, "garden")
    assert type(RMTEncoder.from_pretrained(tmp_path / "folder")) is RMTEncoder


def test_what_cannot_be_opened(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    make(RMTEncoder, tokenizer).save_pretrained("whole")

    def broken(**settings: Any) -> str:
        shutil.rmtree("broken", ignore_errors=True)
        shutil.copytree("whole", "broken")
        config = json.loads(Path("whole/config.json").read_text())
        named = {"model": settings.pop("model", config["model"]), "arguments": config["arguments"] | settings}
        Path("broken/config.json").write_text(json.dumps(config | named))
        return "broken"

    def without(name: str) -> str:
        path = Path(broken()) / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return "broken"

    cases = [
        (RMTDecoder, "whole", r"whole: holds a RMTEncoder and no RMTDecoder; open it with RMTEncoder.from_pretrained"),
        (Answerer, "whole", r"whole: holds a RMTEncoder that was not trained to choose answers"),
        (RMTEncoder, "absent/folder", r"absent/folder: no such folder, and cannot be loaded from the Hugging Face Hub"),
        (RMTEncoder, "/absent/folder/too", r"/absent/folder/too: no such folder, and cannot be loaded from the Hugg"),
        (RMTEncoder, lambda: broken(model="os.system"), r"broken: holds a system and no RMTEncoder"),
        (RMTEncoder, lambda: broken(model="antigravity.RMT"), r"of class antigravity.RMT; import antigravity before"),
        (RMTEncoder, lambda: broken(model="rmt_lightning.absent.RMT"), r"class rmt_lightning.absent.RMT; import rmt_"),
        (RMTEncoder, lambda: broken(memory_size=4), r"broken: holds no whole model \(RuntimeError: .*memory"),
        (RMTEncoder, lambda: broken(colour=4), r"broken: holds no whole model \(TypeError: .*colour"),
        (RMTEncoder, lambda: without("backbone"), r"broken: has no backbone/, which its weights need; put it back"),
        *((RMTEncoder, lambda name=name: without(name), r"broken: holds no whole model")
          for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")),
    ]  # fmt: skip
    for kind, folder, message in cases:
        with pytest.raises(UserError, match=message) as raised:
            kind.from_pretrained(folder() if callable(folder) else folder)
        assert "\n" not in str(raised.value)
    assert "antigravity" not in sys.modules
    Path(broken(), "model.safetensors").write_bytes(pickle.dumps({"weights": 1}))
    with pytest.raises(UserError, match=r"holds no whole model .SafetensorError"):
        RMTEncoder.from_pretrained("broken")
    Path(broken(), "head.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds no whole model .SafetensorError"):
        Answerer.from_pretrained("broken")


class FakeHub:
    """What of the Hub's client is used, with a folder in place of the network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, **options: Any) -> FakeHub:
        return self

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, repo_id: str, folder_path: Path, **options: Any) -> str:
        shutil.copytree(folder_path, self.folder / repo_id)
        return repo_id

    def snapshot_download(self, repo_id: str, allow_patterns: list[str], **options: Any) -> str:
        assert not any(Path("pytorch_model.bin").match(pattern) for pattern in allow_patterns)
        self.options = options
        return str(self.folder / repo_id)


def test_to_and_from_the_hub(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", hub)
    monkeypatch.setattr("rmt_lightning.models.pretrained.snapshot_download", hub.snapshot_download)
    monkeypatch.setattr("rmt_lightning.models.pretrained.out_of_reach", lambda _: "")
    model = make(RMTDecoder, tokenizer)
    model.push_to_hub("somebody/mary")
    assert "SegmentModel.from_pretrained" in (tmp_path / "hub/somebody/mary/README.md").read_text()
    opened = RMTDecoder.from_pretrained("somebody/mary", revision="main")
    assert hub.options == {"revision": "main"}
    for name, value in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], value)
    # What has been loaded once is there without the network.
    monkeypatch.setattr("rmt_lightning.models.pretrained.out_of_reach", lambda _: "it does not answer")
    RMTDecoder.from_pretrained("somebody/mary")
    assert hub.options == {"local_files_only": True}


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    def run(*settings: str) -> None:
        monkeypatch.setattr(sys, "argv", ["export", *settings])
        GlobalHydra.instance().clear()
        front_door.run()

    monkeypatch.chdir(tmp_path)
    yield run
    GlobalHydra.instance().clear()


def test_a_run_is_exported_and_asked(
    train: Run, export: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    result = train("curriculum.max_segments=1", "test.segments=[1]", "hydra.run.dir=run")
    assert result.returncode == 0, result.stderr
    export("checkpoint=run", "folder=models/mary")
    told = 'written; open it with rmt_lightning.Answerer.from_pretrained("models/mary")\n'
    assert capsys.readouterr().out == told
    assert [path.name for path in Path("models").iterdir()] == ["mary"]
    answerer = Answerer.from_pretrained("models/mary")
    config = OmegaConf.load("run/config.yaml")
    classifier = load(config, tmp_path / "run", tmp_path / "run/checkpoints/last.ckpt")[1].eval()
    text = "Mary went to the garden. " * 20 + "Where is Mary?"
    ids = torch.tensor([answerer.model.tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(answerer.scores([text]), classifier(ids))
    assert answerer([text])[0] in classifier.answers

    # The example of the docs, on this folder.
    (example,) = [block for kind, block in BLOCKS if kind == "python" and "RMTEncoder.from_pretrained" in block]
    assert len(example.strip().splitlines()) <= 8
    exec(example.replace('"mary"', '"models/mary"'), {})
    assert capsys.readouterr().out.splitlines()[-1] == answerer(text)
    # And that of transformers.
    (example,) = [block for kind, block in BLOCKS if kind == "python" and "AutoModel.from_pretrained" in block]
    exec(example.replace('"mary"', '"models/mary"'), {})
    number, best = capsys.readouterr().out.splitlines()
    assert number == f"tensor([{answerer.answers.index(answerer(text))}])" and f"'{answerer(text)}'" in best

    for settings, message in (
        (("folder=there",), "checkpoint: is missing; give checkpoint=…"),
        (("checkpoint=absent", "folder=there"), "checkpoint=absent: no run there"),
        (("checkpoint=run", "folder=models"), "folder=models: is there already; choose another"),
        (("checkpoint=run", "foldr=there"), "foldr: no such setting; did you mean folder?"),
    ):
        with pytest.raises(SystemExit) as exit_:
            export(*settings)
        errors = capsys.readouterr().err
        assert exit_.value.code == 2 and errors.startswith(f"error: {message}") and errors.count("\n") == 1, errors
    assert not Path("there").exists()
