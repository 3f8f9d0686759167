"""A base that is not the one before: nothing that was made with the one is taken for the other's."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

import morph
import train_lora
from lorakit.ground.errors import UserError
from lorakit.ground.shards import Shards


@pytest.fixture
def base(tiny_base, tmp_path) -> Path:
    """The tiny base elsewhere, as another library would have written its configs: the same base."""
    folder = Path(shutil.copytree(tiny_base, tmp_path / "moved"))
    for path in folder.rglob("*.json"):
        if "config" in path.name:
            edit(path, _diffusers_version="0.1", _name_or_path="/elsewhere", transformers_version="4.0")
    return folder


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def one_layer(base: Path) -> Path:
    """The text encoder's config says one layer of the two that its file holds."""
    edit(base / "text_encoder/config.json", num_hidden_layers=1)
    return base


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights(path: Path) -> dict[str, bytes]:
    from safetensors.torch import load_file

    return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}


def entries(cache: Path, kind: str) -> set[bytes]:
    return set(Shards(cache / kind).names)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_text_states_of_a_text_encoder_with_fewer_layers_are_made_anew(trained, base, tmp_path):
    cache = tmp_path / "cache"
    plain = trained()
    before = {kind: entries(cache, kind) for kind in ("text", "latents")}
    moved = trained(pretrained_model_name_or_path=str(base), output_dir=str(tmp_path / "moved_out"))
    assert weights(moved) == weights(plain)  # the control: the same base, from the same entries
    assert {kind: entries(cache, kind) for kind in before} == before
    base = one_layer(base)
    other = trained(pretrained_model_name_or_path=str(base), output_dir=str(tmp_path / "other"))
    cold = trained(
        pretrained_model_name_or_path=str(base),
        output_dir=str(tmp_path / "cold"),
        cache_dir=str(tmp_path / "empty"),
    )
    assert weights(other) == weights(cold) != weights(plain)
    assert entries(cache, "latents") == before["latents"]  # the VAE is the one before
    assert len(entries(cache, "text")) == 2 * len(before["text"])


def test_text_states_of_another_tokenizer_are_made_anew(trained, base, tmp_path):
    trained(max_train_steps=1)
    before = {kind: entries(tmp_path / "cache", kind) for kind in ("text", "latents")}
    edit(base / "tokenizer/tokenizer_config.json", pad_token="<|startoftext|>")
    options = {"pretrained_model_name_or_path": str(base), "max_train_steps": 1, "overwrite": True}
    warm = sha(trained(**options))
    assert len(entries(tmp_path / "cache", "text")) == 2 * len(before["text"])
    assert entries(tmp_path / "cache", "latents") == before["latents"]
    assert sha(trained(cache_dir=str(tmp_path / "empty"), **options)) == warm


def test_latents_of_a_vae_with_another_config_are_made_anew(trained, base, tmp_path):
    trained(max_train_steps=1)
    cache = tmp_path / "cache"
    before = {kind: entries(cache, kind) for kind in ("text", "latents")}
    edit(base / "vae/config.json", norm_num_groups=8)
    options = {"pretrained_model_name_or_path": str(base), "max_train_steps": 1, "overwrite": True}
    warm = sha(trained(**options))
    assert len(entries(cache, "latents")) == 2 * len(before["latents"])
    assert entries(cache, "text") == before["text"]
    assert sha(trained(cache_dir=str(tmp_path / "empty"), **options)) == warm


CHANGES = {
    "text_encoder": (one_layer, "base, text_encoder: num_hidden_layers: 2 -> 1"),
    "scheduler": (
        lambda base: edit(base / "scheduler/scheduler_config.json", beta_end=0.02),
        "base, scheduler: beta_end: 0.012 -> 0.02",
    ),
    "unet": (
        lambda base: (base / "unet/diffusion_pytorch_model.safetensors").write_bytes(
            (base / "unet/diffusion_pytorch_model.safetensors").read_bytes()[:-1] + b"x"
        ),
        r"base, unet: other files \(sha256 ",
    ),
}


@pytest.mark.parametrize("part", CHANGES)
def test_a_base_that_changed_is_refused_at_resume(trained, settings, base, part):
    options = {"pretrained_model_name_or_path": str(base), "resume_from_checkpoint": True}
    trained(**options, max_train_steps=2)
    edit(base / "unet/config.json", _diffusers_version="0.2")
    trained(**options, max_train_steps=4)  # the control: the same base still
    change, message = CHANGES[part]
    change(base)
    with pytest.raises(UserError, match=f"(?s)was trained otherwise:\n  {message}.*start a new ckpt_name"):
        train_lora.main(settings(**options))


def test_a_base_that_is_known_only_once_it_is_loaded_is_compared_then(trained, settings, base, monkeypatch):
    """As a hub id that is yet to be fetched."""
    from lorakit.diffusion import models
    from lorakit.training import plan
    from lorakit.weights.base import BaseInfo, inspect_base

    unknown = {"kind": "hub", "resolution": 16, "size_multiple": 4}
    monkeypatch.setattr(plan, "inspect_base", lambda name, *_, **__: BaseInfo(name, **unknown))
    monkeypatch.setattr(models, "fetch_base", lambda info, _: inspect_base(info.name))
    options = {"pretrained_model_name_or_path": str(base), "resume_from_checkpoint": True}
    trained(**options, max_train_steps=2)
    trained(**options, max_train_steps=4)
    one_layer(base)
    with pytest.raises(UserError, match="num_hidden_layers: 2 -> 1"):
        train_lora.main(settings(**options))


def test_a_film_of_a_base_that_changed_is_another_film(morphed, morph_settings, base, tmp_path):
    cache = tmp_path / "out/cache/paths"
    folder, _ = morphed()
    paths, made = files(cache), sha(folder / "frames/0002.png")
    morphed(pretrained_model_name_or_path=str(base))  # the control: the same film, finished already
    assert files(cache) == paths and sha(folder / "frames/0002.png") == made
    edit(base / "tokenizer/tokenizer_config.json", pad_token="<|startoftext|>")
    with pytest.raises(UserError, match="holds another morph"):
        morph.main(morph_settings(pretrained_model_name_or_path=str(base)))
    morphed(pretrained_model_name_or_path=str(base), overwrite=True)
    assert len(files(cache)) == 2 * len(paths)
    assert sha(folder / "frames/0002.png") != made
