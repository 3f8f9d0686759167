"""Names of the original code's checkpoints, which A1111 and ComfyUI keep, as today's libraries have them.

Those libraries are diffusers and transformers: without CLIP's `text_model.`, with the autoencoder's `to_q`.
Everything is a rule on one name; what no part uses (averages, schedules) has none.
"""

import re
from collections.abc import Mapping
from typing import Any

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.",
}
_UNET = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OLD_VAE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OPEN_CLIP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_CLIP = re.compile(r"embeddings\.(token|position)_embedding\.weight|encoder\.layers\..+|final_layer_norm\..+")
_CONTROL = {
    "middle_block_out.0": "controlnet_mid_block",
    "input_hint_block.0": "controlnet_cond_embedding.conv_in",
}


def names_of(part: str, key: str, configs: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """The names of a checkpoint's tensor `key` in a part: none if the part has no use for it.

    Three names are stacked along the first axis: OpenCLIP's queries, keys and values.

    Args:
        configs: of the parts; how many resnets and levels there are decides which one a number means.
    """
    if not key.startswith(PREFIXES[part]):
        return ()
    key = key.removeprefix(PREFIXES[part])
    if part == "unet":
        name = unet_name(key, configs["unet"]["layers_per_block"])
    elif part == "vae":
        name = _vae_name(key, len(configs["vae"]["block_out_channels"]))
    elif key.startswith("model."):
        return _open_clip_names(key.removeprefix("model."), configs["text_encoder"]["num_hidden_layers"])
    else:
        name = plain_name(part, key.removeprefix("transformer."))
        name = name if name and _CLIP.fullmatch(name) else None
    return (name,) if name else ()


def plain_name(part: str, key: str) -> str | None:
    """A name in a diffusers folder of any age as it is today; None for positions, which CLIP counts."""
    if part == "text_encoder":
        key = key.removeprefix("text_model.")
        return None if key == "embeddings.position_ids" else key
    if part == "vae":
        stem, _, end = key.rpartition(".")
        path, _, last = stem.rpartition(".")
        if path.endswith(".attentions.0") and last in _OLD_VAE:
            return f"{path}.{_OLD_VAE[last]}.{end}"
    return key


def unet_name(key: str, layers: int) -> str | None:
    """`input_blocks.4.0.in_layers.0.weight` -> `down_blocks.1.resnets.0.norm1.weight` (2 layers a level)."""
    stem, _, end = key.rpartition(".")
    if stem in _UNET:
        return f"{_UNET[stem]}.{end}"
    found = re.fullmatch(r"(input|middle|output)_blocks?\.(\d+)\.(.+)", key)
    if not found:
        return None
    side, number, rest = found[1], int(found[2]), found[3]
    block, index = "mid_block", number // 2
    if side != "middle":
        rest = rest.partition(".")[2]
        level, index = divmod(number - (side == "input"), layers + 1)
        block = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
    if resnet := _renamed(rest, _RESNET):
        return f"{block}.resnets.{index}.{resnet}"
    if sampler := re.fullmatch(r"(op|conv)\.(weight|bias)", rest):
        return f"{block}.{'downsamplers' if sampler[1] == 'op' else 'upsamplers'}.0.conv.{sampler[2]}"
    return f"{block}.attentions.{index}.{rest}"


def controlnet_name(key: str, layers: int, last_hint: int) -> str | None:
    """A ControlNet's tensor, without `control_model.`.

    Args:
        last_hint: the highest number in `input_hint_block`, 14 for a reduction by 8.
    """
    if name := _renamed(key, _CONTROL):
        return name
    if found := re.fullmatch(r"zero_convs\.(\d+)\.0\.(.+)", key):
        return f"controlnet_down_blocks.{found[1]}.{found[2]}"
    if found := re.fullmatch(r"input_hint_block\.(\d+)\.(.+)", key):
        number = int(found[1])
        place = "conv_out" if number == last_hint else f"blocks.{number // 2 - 1}"
        return f"controlnet_cond_embedding.{place}.{found[2]}"
    return unet_name(key, layers)


def _vae_name(key: str, levels: int) -> str | None:
    """`decoder.up.3.block.1.nin_shortcut.weight` -> `decoder.up_blocks.0.resnets.1.conv_shortcut.weight`."""
    side, _, rest = key.partition(".")
    if side in ("quant_conv", "post_quant_conv"):
        return key
    if side not in ("encoder", "decoder"):
        return None
    if found := re.fullmatch(r"(down|up)\.(\d+)\.(block|downsample|upsample)\.(.+)", rest):
        way, level, kind, inner = found.groups()
        block = f"{side}.{way}_blocks.{int(level) if way == 'down' else levels - 1 - int(level)}"
        if kind == "block":
            return f"{block}.resnets.{inner.replace('nin_shortcut', 'conv_shortcut')}"
        return f"{block}.{kind}rs.0.{inner}"
    if found := re.fullmatch(r"mid\.(block|attn)_([12])\.(.+)", rest):
        kind, number, inner = found.groups()
        if kind == "block":
            return f"{side}.mid_block.resnets.{int(number) - 1}.{inner}"
        return f"{side}.mid_block.attentions.0.{_renamed(inner, _VAE_ATTENTION) or inner}"
    return f"{side}.{rest.replace('norm_out', 'conv_norm_out')}"


def _open_clip_names(key: str, layers: int) -> tuple[str, ...]:
    if key in _OPEN_CLIP:
        return (_OPEN_CLIP[key],)
    found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", key)
    if not found or int(found[1]) >= layers:  # the last layer is not read in SD 2.x
        return ()
    layer, inner = f"encoder.layers.{found[1]}", found[2]
    if stacked := re.fullmatch(r"attn\.in_proj_(weight|bias)", inner):
        return tuple(f"{layer}.self_attn.{each}_proj.{stacked[1]}" for each in "qkv")
    name = _renamed(inner, _OPEN_CLIP_LAYER)
    return (f"{layer}.{name}",) if name else ()


def _renamed(key: str, table: Mapping[str, str]) -> str | None:
    stem, _, end = key.rpartition(".")
    return f"{table[stem]}.{end}" if stem in table else None


# ---- AnimateDiff's motion modules ----

_MOTION = (
    (".temporal_transformer.", "."),
    (".attention_blocks.0.", ".attn1."),
    (".attention_blocks.1.", ".attn2."),
    (".norms.0.", ".norm1."),
    (".norms.1.", ".norm2."),
    (".ff_norm.", ".norm3."),
)
"""What AnimateDiff calls it, and diffusers."""


def motion_name(name: str) -> str:
    """diffusers' name of a tensor or a layer of AnimateDiff's; any other stays as it is."""
    for original, today in _MOTION:
        name = name.replace(original, today)
    return name


def original_motion_layer(name: str) -> str:
    """AnimateDiff's name of a projection of the temporal attention, as its LoRAs have it."""
    name = re.sub(r"(\.motion_modules\.\d+)\.", r"\1.temporal_transformer.", name)
    for original, today in _MOTION[1:3]:
        name = name.replace(today, f"{original}processor.")
    return name.removesuffix(".0")
