"""Files that hold no LoRA for Stable Diffusion 1.x and 2.x, or one that is not read, by their right names."""

import re
from collections.abc import Iterable
from pathlib import Path

from lorakit.ground.errors import UserError
from lorakit.weights.lora_keys import original_base, parse_key
from lorakit.weights.tensors import Shapes

USE_SD = "use a file made for Stable Diffusion 1.x or 2.x"
_CHECKPOINT = r"^model\.diffusion_model\.|^cond_stage_model\."
_BY_LYCORIS = (
    "merge it into a base with LyCORIS (create_lycoris_from_weights, merge_to) and take the difference of "
    "the two bases with `mix_lora.py extract`"
)
_BY_PEFT = (
    "merge it into a base with PEFT (merge_and_unload) and take the difference of the two bases with "
    "`mix_lora.py extract`"
)
_DORA_PRODUCT = (
    "holds DoRA on LoHa or LoKr (dora_scale), which only LyCORIS's own forward pass applies as it was "
    "trained: merges differ from it, LyCORIS's too. Train it without weight_decompose"
)
_FOREIGN = (
    (r"^lora_te2_|^text_encoder_2\.|^conditioner\.|add_embedding", f"is for SDXL; {USE_SD}"),
    (
        r"^transformer\.|^diffusion_model\.(?!(input_blocks|middle_block|output_blocks|time_embed|out)\.)"
        r"|^lora_transformer_|(double|single|joint)_(transformer_)?blocks",
        f"is for Flux, SD3 or another transformer; {USE_SD}",
    ),
    (
        r"\.dora_scale$",
        "holds DoRA in kohya's form, which tools read in two ways; use diffusers' form, or " + _BY_LYCORIS,
    ),
    (r"\.a1\.weight$", f"is a GLoRA file of LyCORIS, not a LoRA; {_BY_LYCORIS}"),
    (r"\.on_input$", f"is an IA3 file of LyCORIS, not a LoRA; {_BY_LYCORIS}"),
    (
        r"\.lambda_layer$",
        "is a T-LoRA file of LyCORIS, whose change depends on timestep and base; only LyCORIS runs it",
    ),
    (r"\.lora_E$", f"is an AdaLoRA of PEFT; {_BY_PEFT}"),
    (
        r"\.lora_embedding_[AB]$",
        f"holds LoRA on embeddings (PEFT's lora_embedding_A), which have no place here; {_BY_PEFT}",
    ),
    (r"\.lora_B\.bias$", f"holds LoRA with a bias of its own (PEFT's lora_bias); {_BY_PEFT}"),
)
# What PEFT's tensors of other kinds are called, where no config tells it.
_PEFT_KINDS = (
    "adamss beft boft c3a deft delora fourierft frod glora gralora hira hra ia3 lily ln_tuning miss oft osf "
    "peanut poly psoft pvera randlora road shadow shira supertuning tinylora trainable_tokens unilora vblora "
    "vera waveft"
).split()
_PEFT = re.compile(rf"^base_model\.(?:.*\.)?({'|'.join(_PEFT_KINDS)})_\w+")
_LOOKS_LIKE = (
    (_CHECKPOINT, "a full Stable Diffusion checkpoint"),
    (r"^first_stage_model\.|^(encoder|decoder)\.(conv_in|mid)|quant_conv", "a VAE"),
    (r"^control_model\.|controlnet|^input_hint_block", "a ControlNet"),
    (r"motion_modules|temporal_transformer", "an AnimateDiff motion module"),
    (r"^emb_params$|^string_to_param|^clip_[lg]$|^<.*>$|^bundle_emb\.", "a textual inversion embedding"),
    (r"^(down_blocks|up_blocks|mid_block)\.", "a U-Net"),
    (r"^(text_model\.)?(encoder\.layers|embeddings)\.", "a text encoder"),
)


def refuse_foreign(path: Path, shapes: Shapes) -> None:
    """Raises UserError unless a file of these tensors may hold a LoRA for SD 1.x or 2.x."""
    if not shapes:
        raise UserError(f"{path}: holds no tensors")
    keys = "\n".join(sorted(shapes))

    def any_key(pattern: str) -> bool:
        return re.search(pattern, keys, re.MULTILINE) is not None

    if not any_key(_CHECKPOINT):
        if any_key(r"\.dora_scale$") and any_key(r"\.(hada|lokr)_w"):
            raise UserError(f"{path}: {_DORA_PRODUCT}")
        for pattern, what in _FOREIGN:
            if any_key(pattern):
                raise UserError(f"{path}: {what}")
        if original_base(shapes) == "SDXL":
            raise UserError(f"{path}: is for SDXL, or has too few modules to tell it from SDXL's; {USE_SD}")
        if blocks := [shape for key, shape in shapes.items() if re.search(r"\.oft_(blocks|diag)$", key)]:
            kind = "a BOFT" if any(len(shape) == 4 for shape in blocks) else "an OFT"
            raise UserError(f"{path}: is {kind} file, not a LoRA; {_BY_LYCORIS}")
        if kind := next(filter(None, map(_PEFT.match, shapes)), None):
            raise UserError(f"{path}: is PEFT's {kind[1].upper()}, not a LoRA; {_BY_PEFT}")
    if not any(parse_key(key) for key in shapes):
        likeness = next((f"; it looks like {what}" for pattern, what in _LOOKS_LIKE if any_key(pattern)), "")
        raise UserError(
            f"{path}: holds no LoRA for Stable Diffusion{likeness} (keys: {some(sorted(shapes), 3)})"
        )


def some(names: Iterable[str], count: int = 5) -> str:
    """The first of these names, and how many there are besides."""
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
