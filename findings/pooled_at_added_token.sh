#!/usr/bin/env bash
# With SDXL's published config, a prompt with a textual-inversion token is pooled AT that token.
# guess: CLIP's pooled output, which SDXL's UNet gets beside the sequence, is the state at the end
#        of the text, whatever tokens the prompt has.
# seen:  with `eos_token_id: 2` (what the published configs of SD's and SDXL's text encoders say)
#        it is the state at the HIGHEST id. That is the end token, 49407, until a token is added
#        behind it: then all that follows the new word is missing. With the true id it is the end.
# Versions: transformers 5.23.0, torch 2.13.0. (Upstream: huggingface/diffusers issue 10754.)
# Who is hurt: LoRAs that come with embeddings (bundles, pivotal tuning) on SDXL: the pooled
# vector changes with the place of the trigger word. Here no token is ever added.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 \
    numpy==2.4.6
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'END'
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

START, END = 49406, 49407    # CLIP's own


@torch.no_grad()
def pooled_at(ids, eos_token_id):
    torch.manual_seed(0)
    config = CLIPTextConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                            num_attention_heads=2, projection_dim=16, eos_token_id=eos_token_id)
    model = CLIPTextModelWithProjection(config).eval()
    model.resize_token_embeddings(END + 2)    # as loading a textual inversion does
    out = model(torch.tensor([ids]))
    every = model.text_projection(out.last_hidden_state[0])
    return (every - out.text_embeds).abs().amax(1).argmin().item()


plain = [START, 320, 736, 3240, END, 0, 0]
inverted = [START, 320, END + 1, 3240, END, 0, 0]
seen = {(name, eos): pooled_at(ids, eos)
        for name, ids in (("plain", plain), ("with an added token", inverted)) for eos in (2, END)}
for (name, eos), place in seen.items():
    print(f"{name}, eos_token_id {eos}: pooled at place {place}; the end is at 4")
assert list(seen.values()) == [4, 4, 2, 4]
END
