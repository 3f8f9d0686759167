#!/usr/bin/env bash
# diffusers 0.42.1: a LoRA for motion under AnimateDiff's own names loads without an error, and does nothing.
#
# The motion LoRAs of AnimateDiff were published under names such as `down_blocks.0.motion_modules.0.temporal_transformer.
# transformer_blocks.0.attention_blocks.0.processor.to_q_lora.down.weight`, and training code of others still writes them. One
# would expect `AnimateDiffPipeline.load_lora_weights` to convert them, as it does kohya's names, or to raise, as it does for a
# name that has no place. It returns; the log has a line that ends in "safe to ignore"; no adapter is there, and the output
# is that of the bare module to the bit. Under diffusers' names the same two matrices change it.
#
# Seen with torch 2.15.0, transformers and peft as below, on a CPU: largest difference to the bare module, and adapters
#   AnimateDiff's names  0.0      {}
#   diffusers' names     0.08     {'unet': ['motion']}
# Exits with 1 if the first has an effect, or the second none.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter, UNet2DConditionModel
from diffusers.utils import logging

logging.set_verbosity_error()
torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8,
    norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
adapter = MotionAdapter(
    block_out_channels=(32, 64), motion_layers_per_block=1, motion_num_attention_heads=4,
    motion_norm_num_groups=8, motion_max_seq_length=8, use_motion_mid_block=False,
)
for parameter in adapter.parameters():
    parameter.data = 0.3 * torch.randn_like(parameter)
parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
pipe = AnimateDiffPipeline(**parts, unet=unet, motion_adapter=adapter, scheduler=DDIMScheduler())
clip, states = torch.randn(1, 4, 4, 8, 8), torch.randn(4, 5, 16)


@torch.no_grad()
def output():
    return pipe.unet(clip, torch.tensor(5), states, return_dict=False)[0]


plain, down, up = output(), torch.randn(4, 32), torch.randn(32, 4)
block = "down_blocks.0.motion_modules.0."
original = block + "temporal_transformer.transformer_blocks.0.attention_blocks.0.processor.to_q_lora.{}.weight"
diffusers = "unet." + block + "transformer_blocks.0.attn1.to_q.lora_{}.weight"
files = {
    "AnimateDiff's names": {original.format("down"): down, original.format("up"): up},
    "diffusers' names": {diffusers.format("A"): down, diffusers.format("B"): up},
}
found = []
for name, tensors in files.items():
    pipe.load_lora_weights(tensors, adapter_name="motion")
    found.append(float((output() - plain).abs().max()))
    print(f"{name:20s} {found[-1]:.3g}  {pipe.get_list_adapters()}")
    pipe.unload_lora_weights()
raise SystemExit(not (found[0] == 0 < 0.01 < found[1]))
PYTHON
