"""What a plan says, against what then happens."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from lorakit.diffusion.lora import add_lora
from lorakit.diffusion.models import Base
from lorakit.ground.config import load_config
from lorakit.ground.process import launched_processes
from lorakit.ground.shards import Shards
from lorakit.training.config import TrainConfig
from lorakit.training.forecast import activation_bytes, cache_bytes, describe_plan, lora_parameters
from lorakit.training.plan import make_plan, training_views
from lorakit.weights.base import inspect_base


def config_of(arguments: list[str]) -> TrainConfig:
    return load_config(TrainConfig, "cfg/mountain.json", arguments).config


@pytest.mark.parametrize("targets", ["attention", "attention+ff", "all"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"train_text_encoder": True},
        {"train_text_encoder": True, "clip_skip": 2},
        {"use_dora": True, "save_format": "diffusers"},
    ],
)
def test_parameters_are_counted_as_they_will_be(settings, tiny_base, targets, options):
    cfg = config_of(settings(target_modules=targets, **options))
    base = Base(inspect_base(str(tiny_base)), clip_skip=cfg.clip_skip)
    adapter = {"rank": cfg.rank, "alpha": cfg.rank, "targets": targets, "use_dora": cfg.use_dora}
    params = add_lora(base.unet, **adapter)
    if cfg.train_text_encoder:
        params += add_lora(base.text_encoder, **adapter)
    assert lora_parameters(cfg, base.info) == sum(p.numel() for p in params)


@pytest.mark.parametrize(("batch", "resolution", "twice"), [(1, 256, False), (3, 256, False), (1, 192, True)])
def test_activations_are_predicted_within_a_third(settings, batch, resolution, twice):
    """Against what autograd keeps on the miniature, at a size that the constants were not fitted to."""
    own = {"objective": ["denoise", "smooth"], "smooth": {"every": 1}} if twice else {}
    size = {"resolution": resolution, "train_batch_size": batch}
    cfg = config_of(settings(pretrained_model_name_or_path="ckpt/miniature", **size, **own))
    predicted = activation_bytes(cfg, make_plan(cfg))
    base = Base(inspect_base("ckpt/miniature"))
    params = add_lora(base.unet, rank=4, alpha=4)
    base.unet.train()
    weights = {p.untyped_storage().data_ptr() for p in base.unet.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no two have one address
        return tensor

    side = resolution // base.info.vae_factor
    latents = torch.zeros(batch, base.info.latent_channels, side, side).requires_grad_(twice)
    kernels = [SDPBackend.MATH] if twice else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kernels), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = base.unet(latents, torch.tensor([500]), torch.zeros(batch, 32, 128)).sample
        if twice:
            torch.autograd.grad(output.sum(), latents, create_graph=True)
    sizes = {pointer: tensor.untyped_storage().nbytes() for pointer, tensor in kept.items()}
    measured = sum(size for pointer, size in sizes.items() if pointer not in weights)
    assert params and predicted == pytest.approx(measured, rel=1 / 3)


def test_the_plan_says_what_will_happen(settings, pictures):
    cfg = config_of(settings(n_epochs=5, max_train_steps=None))
    text = describe_plan(cfg, make_plan(cfg))
    for words in (
        "20 of 1 sample(s): 5 epochs",
        "on 2 processes 10",
        "4 from",
        "0 of 4 latents",
        "0.png",
        "rank 4",
    ):
        assert words in text


def test_the_cache_line_counts_what_is_there(trained, settings):
    trained(max_train_steps=1)
    cfg = config_of(settings())
    assert "4 of 4 latents" in describe_plan(cfg, make_plan(cfg))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_size_of_the_cache_is_told(trained, settings, tmp_path, dtype):
    changes = {"cache_dtype": dtype, "random_flip": True, "resolution": 64, "sample_prompts": []}
    cfg = config_of(settings(**changes))
    plan = make_plan(cfg)
    views = [view for row in training_views(cfg, plan) for view in row]
    told = cache_bytes(cfg, plan, [view.shape for view in views])
    trained(**changes, max_train_steps=1)
    for kind, size in zip(("latents", "text"), told, strict=True):
        cache = Shards(tmp_path / "cache" / kind)
        held = sum(len(cache.read(name) or b"") for name in cache.names)
        assert size < held < size + 150 * len(cache.names)
    assert f"the cache of all takes {told[0] / 1e6:.1f} MB" in describe_plan(cfg, plan)


def test_buckets_are_shown(settings):
    cfg = config_of(settings(aspect_ratio_buckets=True, resolution=32))
    text = describe_plan(cfg, make_plan(cfg))
    assert "buckets" in text and "32x32: 2" in text


def test_long_captions_are_shown_with_what_is_lost(settings, pictures, tmp_path):
    folder = shutil.copytree(pictures, tmp_path / "long")
    metadata = folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("mountains 0", "a photo of mountains " * 20 + "meadow"))
    cfg = config_of(settings(data_dir=str(folder)))
    lines = describe_plan(cfg, make_plan(cfg))
    assert "metadata.jsonl:1" in lines and "32 are read; lost:" in lines and "meadow" in lines


def test_processes_come_from_the_launcher():
    assert launched_processes({}) == (0, 1)
    assert launched_processes({"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "x"}) == (1, 4)


def test_pictures_of_a_dataset_stay_on_the_disk(tmp_path):
    """Forty pictures of 200 kB; a table that held them would have 8 MB."""
    import tracemalloc

    import datasets

    from lorakit.training.tables import read_table

    noise = np.random.default_rng(0).integers(0, 256, (40, 270, 256, 3), np.uint8)
    records = {"image": [Image.fromarray(each) for each in noise], "text": [str(i) for i in range(40)]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(records, features).save_to_disk(str(tmp_path / "saved"))
    cfg = TrainConfig(data_dir=None, dataset_name=str(tmp_path / "saved"), ckpt_name="x", n_epochs=1)
    read_table(cfg)  # what is imported on the way
    tracemalloc.start()
    try:
        table = read_table(cfg)
        kept, peak = tracemalloc.get_traced_memory()
        contents = [row.source for row in table.rows]
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    size = sum(map(len, contents))
    assert size > 7e6 and kept < 0.1 * size and peak < 0.5 * size and held > size
    assert table.rows[7].caption == "7" and len(table.rows) == 40


@pytest.mark.parametrize("embedded", [True, False])
def test_pictures_of_a_dataset_are_looked_at_once_unless_they_lie_beside_it(
    pictures, tmp_path, monkeypatch, embedded
):
    import datasets

    from lorakit.pictures import inspection
    from lorakit.training.tables import read_table

    def save(numbers):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        images, texts = [pictures / f"{number}.png" for number in numbers], list(map(str, numbers))
        if embedded:
            records = {"image": [Image.open(path) for path in images], "text": texts}
            datasets.Dataset.from_dict(records).save_to_disk(str(tmp_path / "data"))
            return
        (tmp_path / "data").mkdir()
        for path, text in zip(images, texts, strict=True):
            shutil.copy(path, tmp_path / "data")
            with open(tmp_path / "data/metadata.jsonl", "a") as file:
                print(json.dumps({"file_name": path.name, "text": text}), file=file)

    def read():
        looked_at.clear()
        where = {"dataset_name": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache")}
        return read_table(TrainConfig(ckpt_name="x", n_epochs=1, **where))

    looked_at, real = [], inspection._inspected
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr(inspection, "MANY", 1)
    monkeypatch.setattr(inspection, "_SETTLED", 0)
    monkeypatch.setattr(inspection, "_inspected", lambda *args: looked_at.append(args) or real(*args))
    save([0, 1, 2])
    first = read()
    assert len(looked_at) == 3
    assert read().fingerprint == first.fingerprint and len(looked_at) == (0 if embedded else 3)
    save([0, 3, 2])
    assert read().fingerprint != first.fingerprint and len(looked_at) == 3
