"""A narrow Stable Diffusion, random, with every module name of the real one, in the layouts in use.

All layouts of one family hold the same weights. Names of the original code are made here by rules of their
own, the other way round than in lorakit/weights/original_names.py.
"""

import json
import re
from pathlib import Path
from typing import Any

FOLDERS = ("modern", "old", "both", "half", "bin")
FILES = ("file", "file-bare", "file-half-ema")
FULL = ("modern", "old", "both", "file", "file-bare")
HALF = ("half", "file-half-ema")
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
}
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
Tensors = dict[str, Any]

# ---- the models ----


def parts(family: str = "sd1", **unet: Any) -> dict[str, Any]:
    """The three models; "sd2" has linear projections, a list of heads and CLIP's other activation."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    is_v2 = family == "sd2"
    settings = dict(
        sample_size=8,
        block_out_channels=(8, 8, 16, 16),
        cross_attention_dim=16,
        attention_head_dim=(1, 1, 2, 2) if is_v2 else 2,
        norm_num_groups=4,
        use_linear_projection=is_v2,
    )
    levels = 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return {
            "unet": UNet2DConditionModel(**(settings | unet)),
            "vae": AutoencoderKL(
                block_out_channels=(8,) * levels,
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                layers_per_block=2,
                norm_num_groups=4,
                sample_size=64,
            ),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(
                    hidden_size=16,
                    intermediate_size=32,
                    projection_dim=16,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    hidden_act="gelu" if is_v2 else "quick_gelu",
                )
            ),
        }


def scheduler(family: str = "sd1") -> dict[str, Any]:
    """The config of 2022."""
    config: dict[str, Any] = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "clip_sample": False,
    }
    return config | ({"prediction_type": "v_prediction"} if family == "sd2" else {})


# ---- layouts ----


def write_base(root: Path, layout: str, family: str = "sd1", **unet: Any) -> Path:
    """A folder below `root` named by its layout, or a single file; `unet` changes the U-Net's config."""
    import torch
    from safetensors.torch import save_file

    models, path = parts(family, **unet), root / layout
    state = {
        part: {k: v.contiguous() for k, v in model.state_dict().items()} for part, model in models.items()
    }
    if layout in FILES:
        tensors = original(state, family, bare=layout == "file-bare", ema=layout.endswith("ema"))
        if "half" in layout:
            tensors = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
        root.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path.with_suffix(".safetensors"), {"format": "pt"})
        return path.with_suffix(".safetensors")
    for part, model in models.items():
        config = json.loads(model.to_json_string()) if part != "text_encoder" else model.config.to_dict()
        write_json(path / part / "config.json", short(part, config) if layout == "old" else config)
        tensors = old_names(part, state[part]) if layout == "old" else state[part]
        if layout != "half" and layout != "bin":
            save_file(tensors, path / part / f"{STEMS[part]}.safetensors", {"format": "pt"})
        if layout in ("half", "both"):
            halves = {key: value.half() for key, value in tensors.items()}
            save_file(halves, path / part / f"{STEMS[part]}.fp16.safetensors", {"format": "pt"})
        if layout == "bin":
            torch.save(
                tensors, path / part / f"{STEMS[part].replace('model', 'pytorch_model', part != 'unet')}.bin"
            )
    write_json(path / "scheduler/scheduler_config.json", scheduler(family))
    write_tokenizer(path / "tokenizer", family)
    if layout == "modern":
        write_json(path / "model_index.json", MODEL_INDEX)
    return path


def write_controlnet(folder: Path, unet: Any) -> dict[str, Path]:
    """A ControlNet for `unet` as a folder and as single files, by layout."""
    import torch
    from diffusers import ControlNetModel
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 12, 16))
        for parameter in model.parameters():
            if not parameter.any():
                parameter.data = 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(folder / "folder")
    model.save_pretrained(folder / "half", variant="fp16")
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    bare = {original_controlnet(key): value for key, value in state.items()}
    layouts = {"diffusers": state, "bare": bare, "a1111": {f"control_model.{k}": v for k, v in bare.items()}}
    for name, tensors in layouts.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return {name: folder / name for name in ("folder", "half")} | {
        name: folder / f"{name}.safetensors" for name in layouts
    }


def write_motion_adapter(folder: Path, unet: Any, **config: Any) -> dict[str, Path]:
    """A motion adapter for `unet`, random in all its weights, as a folder and in AnimateDiff's own names."""
    import torch
    from diffusers import MotionAdapter
    from safetensors.torch import save_file

    own = unet.config
    settings = dict(
        block_out_channels=own["block_out_channels"],
        motion_layers_per_block=own["layers_per_block"],
        motion_norm_num_groups=own["norm_num_groups"],
        motion_num_attention_heads=8,
        motion_max_seq_length=8,
        use_motion_mid_block=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = MotionAdapter(**(settings | config))
        for name, parameter in model.named_parameters():
            if "proj_out" in name:  # zero, as published ones begin
                parameter.data = 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(folder / "folder")
    state = {
        original_motion(name): value.contiguous()
        for name, value in model.state_dict().items()
        if "pos_embed" not in name
    }
    positions = model.config["motion_max_seq_length"]
    tables = {name.rpartition(".to_q")[0] for name in state if name.endswith(".to_q.weight")}
    state |= {f"{name}.pos_encoder.pe": torch.zeros(1, positions, 8) for name in tables}
    save_file(state, folder / "original.safetensors")
    return {"folder": folder / "folder", "original": folder / "original.safetensors"}


def original_motion(name: str) -> str:
    """AnimateDiff's name of a tensor of a motion adapter."""
    name = re.sub(r"(motion_modules\.\d+)\.", r"\1.temporal_transformer.", name)
    name = re.sub(r"\.attn(\d)\.", lambda m: f".attention_blocks.{int(m[1]) - 1}.", name)
    name = re.sub(r"\.norm([12])\.", lambda m: f".norms.{int(m[1]) - 1}.", name)
    return name.replace(".norm3.", ".ff_norm.")


def write_header(path: Path, shapes: dict[str, list[int]], metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file of names and shapes alone, which is all that is read of it."""
    entries = {
        name: {"dtype": "F16", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()
    }
    text = json.dumps(entries | ({"__metadata__": metadata} if metadata else {})).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return path


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))


def write_tokenizer(folder: Path, family: str) -> None:
    """CLIP's vocabulary and merges as in repositories of 2022, the pad token in a map of its own."""
    from lorakit.weights.published import load_tokenizer

    model = json.loads(load_tokenizer(None, "!").backend_tokenizer.to_str())["model"]
    write_json(folder / "vocab.json", model["vocab"])
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    end = "<|endoftext|>"
    names = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end}
    write_json(folder / "tokenizer_config.json", names | {"pad_token": end, "model_max_length": 77})
    write_json(folder / "special_tokens_map.json", names | {"pad_token": "!" if family == "sd2" else end})


def write_cache(home: Path, folder: Path, name: str, leave_out: str = "never") -> Path:
    """HF_HOME with `folder` as the cached snapshot of the repository `name`; returns the snapshot."""
    root = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / ("0" * 40)
    for path in (path for path in folder.rglob("*") if path.is_file() and leave_out not in str(path)):
        place = snapshot / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(path)
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text("0" * 40)
    return snapshot


# ---- names of other times ----


def short(part: str, config: dict[str, Any]) -> dict[str, Any]:
    """A config as it was written in 2022: without the keys that came later and have their default here."""
    later = {
        "vae": {"scaling_factor", "force_upcast", "use_quant_conv", "use_post_quant_conv", "shift_factor"},
        "unet": {
            key for key in config if key.startswith(("addition", "class_", "time_embedding_", "resnet_"))
        },
        "text_encoder": {"dtype", "transformers_version"},
    }
    return {key: value for key, value in config.items() if key not in later[part]}


def old_names(part: str, tensors: Tensors) -> Tensors:
    """The names of diffusers before 0.17 and transformers before 5.6, with CLIP's positions."""
    import torch

    if part == "text_encoder":
        named = {f"text_model.{key}": value for key, value in tensors.items()}
        return named | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    if part == "vae":
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            tensors = {key.replace(f".{new}.", f".{old}."): value for key, value in tensors.items()}
    return tensors


def original(state: dict[str, Tensors], family: str, *, bare: bool = False, ema: bool = False) -> Tensors:
    """A checkpoint of the original code; `bare`: without `text_model.`; `ema`: with averages left in."""
    import torch

    unet = {original_unet(key): value for key, value in state["unet"].items()}
    found = {f"model.diffusion_model.{key}": value for key, value in unet.items()}
    for key, value in state["vae"].items():
        is_matrix = ".attentions." in key and value.ndim == 2
        found[f"first_stage_model.{original_vae(key)}"] = value[..., None, None] if is_matrix else value
    text = state["text_encoder"]
    if family == "sd2":
        found |= {f"cond_stage_model.model.{key}": value for key, value in open_clip(text).items()}
    else:
        prefix = "cond_stage_model.transformer." + ("" if bare else "text_model.")
        found |= {f"{prefix}{key}": value for key, value in text.items()}
        if not bare:
            found[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    if ema:
        averaged = {
            f"model_ema.diffusion_model{key.replace('.', '')}": value + 1 for key, value in unet.items()
        }
        found |= averaged | {
            "model_ema.decay": torch.tensor(0.9999),
            "model_ema.num_updates": torch.tensor(8),
        }
    return {key: value.contiguous() for key, value in (found | {"betas": torch.linspace(0, 1, 1000)}).items()}


def original_unet(name: str) -> str:
    """down_blocks.1.resnets.0.norm1.weight -> input_blocks.4.0.in_layers.0.weight"""
    fixed = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    fixed |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    stem, _, end = name.rpartition(".")
    if stem in fixed:
        return f"{fixed[stem]}.{end}"
    block = re.match(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.*)", name)
    assert block, name
    side, level, kind, number, rest = block.groups()
    i, j = int(level or 0), int(number)
    if side == "mid":
        place = "middle_block.1" if kind == "attentions" else f"middle_block.{2 * j}"
    elif kind in ("resnets", "attentions"):
        inner = int(kind == "attentions")
        place = (
            f"input_blocks.{3 * i + j + 1}.{inner}"
            if side == "down"
            else f"output_blocks.{3 * i + j}.{inner}"
        )
    else:
        place = (
            f"input_blocks.{3 * i + 3}.0" if side == "down" else f"output_blocks.{3 * i + 2}.{1 + (i > 0)}"
        )
    new = ("norm1", "conv1", "norm2", "conv2", "time_emb_proj", "conv_shortcut")
    old = ("in_layers.0", "in_layers.2", "out_layers.0", "out_layers.3", "emb_layers.1", "skip_connection")
    if kind == "resnets":
        part, end = rest.split(".")
        rest = f"{dict(zip(new, old, strict=True))[part]}.{end}"
    elif kind == "downsamplers":
        rest = rest.replace("conv.", "op.")
    return f"{place}.{rest}"


def original_controlnet(name: str) -> str:
    """controlnet_cond_embedding.blocks.0.weight -> input_hint_block.2.weight, for a reduction by 8"""
    if found := re.match(r"controlnet_cond_embedding\.(?:blocks\.(\d+)|(conv_in|conv_out))\.(.*)", name):
        number = {"conv_in": 0, "conv_out": 14}.get(found[2], 2 * int(found[1] or 0) + 2)
        return f"input_hint_block.{number}.{found[3]}"
    if found := re.match(r"controlnet_down_blocks\.(\d+)\.(.*)", name):
        return f"zero_convs.{found[1]}.0.{found[2]}"
    if name.startswith("controlnet_mid_block."):
        return name.replace("controlnet_mid_block.", "middle_block_out.0.")
    return original_unet(name)


def original_vae(name: str) -> str:
    """decoder.up_blocks.0.resnets.1.conv_shortcut.weight -> decoder.up.3.block.1.nin_shortcut.weight"""
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0.", "mid.attn_1.")
    for new, old in (
        ("group_norm", "norm"),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
        ("to_out.0", "proj_out"),
    ):
        name = name.replace(f"attn_1.{new}.", f"attn_1.{old}.")
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def open_clip(text: Tensors) -> Tensors:
    """OpenCLIP's names: queries, keys and values stacked; one layer more than is read, and its projection."""
    import torch

    found = {
        "token_embedding.weight": text["embeddings.token_embedding.weight"],
        "positional_embedding": text["embeddings.position_embedding.weight"],
        "ln_final.weight": text["final_layer_norm.weight"],
        "ln_final.bias": text["final_layer_norm.bias"],
        "text_projection": torch.zeros_like(text["encoder.layers.0.self_attn.q_proj.weight"]),
        "logit_scale": torch.tensor(4.6),
    }
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    names["attn.out_proj"] = "self_attn.out_proj"
    last = max(int(name.split(".")[2]) for name in text if name.startswith("encoder.layers."))
    for layer in range(last + 2):
        own = f"encoder.layers.{min(layer, last)}"
        for end in ("weight", "bias"):
            stacked = [text[f"{own}.self_attn.{each}_proj.{end}"] for each in "qkv"]
            found[f"transformer.resblocks.{layer}.attn.in_proj_{end}"] = torch.cat(stacked)
            for old, new in names.items():
                found[f"transformer.resblocks.{layer}.{old}.{end}"] = text[f"{own}.{new}.{end}"] + (
                    layer > last
                )
    return found


def animatediff_pipeline(base: Any, adapter: str | Path) -> Any:
    """diffusers' own pipeline on the parts of a base and a motion adapter's folder, silent."""
    from diffusers import AnimateDiffPipeline, MotionAdapter

    parts = {name: getattr(base, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    pipe = AnimateDiffPipeline(**parts, motion_adapter=MotionAdapter.from_pretrained(adapter))
    pipe.set_progress_bar_config(disable=True)
    return pipe
