#!/usr/bin/env bash
# One picture with the LoRA's scale at 0 makes the pipeline forget the weight of `set_adapters`.
# guess: `cross_attention_kwargs={"scale": s}` holds for its call alone, for every s: a weight of
#        0.5 is still 0.5 afterwards.
# seen:  so it is after s = 0.7. After s = 0 (the natural way to draw "without LoRA" for a
#        comparison) the weight is 1: dividing by 0 is avoided by setting it anew.
# Versions: diffusers 0.42.1, peft 0.21.2, torch 2.13.0.
# Who is hurt: every before/after grid that is drawn in this way: from the second row on the
# "after" is stronger than asked. Here `--compare` switches the LoRA off and leaves its scale
# alone.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 diffusers==0.42.1 peft==0.21.2 \
    transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'END'
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

def small_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        cross_attention_dim=32, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).eval()


@torch.no_grad()
def run(unet, **kwargs):
    random = torch.Generator().manual_seed(1)
    x, context = (torch.randn(shape, generator=random) for shape in ((1, 4, 8, 8), (1, 7, 32)))
    return unet(x, 500, context, **kwargs).sample


unet = small_unet()
unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_k", "to_v"],
                            init_lora_weights=False), "style")
full = run(unet)
unet.set_adapters(["style"], [0.5])
half = run(unet)
layer = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
seen = {}
for scale in (0.7, 0.0):
    run(unet, cross_attention_kwargs={"scale": scale})
    after = run(unet)
    seen[scale] = (round(layer.scaling["style"], 6), torch.allclose(after, half, atol=1e-6),
                   torch.allclose(after, full, atol=1e-6))
    print(f"after a call at {scale}: weight, as at 0.5, as at 1:", *seen[scale])
assert seen == {0.7: (0.5, True, False), 0.0: (1.0, False, True)}
END
