#!/usr/bin/env bash
# The average of a LoRA with its own copy is twice the LoRA, or half of it: PEFT's merging
# methods.
# guess: `add_weighted_adapter([a, copy of a], [0.5, 0.5])` gives a, by every `combination_type`
#        (density 1, so that nothing is dropped).
# seen:  1 by cat, svd, dare_linear_svd and magnitude_prune_svd; 2 by linear, dare_linear and
#        magnitude_prune; 0.5 by all four with "ties". The first three add A and B apart, (A +
#        A)(B + B)/2; ties divides by the number of adapters what the weights have already halved.
# Versions: peft 0.21.2, torch 2.13.0.
# Who is hurt: a table that compares merging rules at one weight compares strengths: the rules
# differ by a factor of 4 before any of them has chosen anything. Here all rules act on B A
# itself.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 peft==0.21.2 transformers==5.23.0 \
    accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'END'
import torch
from peft import LoraConfig, get_peft_model

torch.manual_seed(0)
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 12)),
                       LoraConfig(r=4, lora_alpha=4, target_modules=["0"],
                                  init_lora_weights=False), "a")
model.add_adapter("copy", LoraConfig(r=4, lora_alpha=4, target_modules=["0"]))
layer = model.base_model.model[0]
for factors in (layer.lora_A, layer.lora_B):
    factors["copy"].load_state_dict(factors["a"].state_dict())
one = layer.get_delta_weight("a")
seen = {}
for rule in ("cat", "svd", "dare_linear_svd", "magnitude_prune_svd", "linear", "dare_linear",
             "magnitude_prune", "ties", "dare_ties", "ties_svd", "dare_ties_svd"):
    density = None if rule in ("cat", "svd", "linear") else 1.0
    model.add_weighted_adapter(["a", "copy"], [0.5, 0.5], rule, rule, density=density)
    merged = layer.get_delta_weight(rule)
    strength = (merged.norm() / one.norm()).item()
    assert torch.allclose(merged, strength * one, atol=1e-4), rule    # only the strength differs
    seen[rule] = round(strength, 3)
print(seen)
assert list(seen.values()) == [1.0] * 4 + [2.0] * 3 + [0.5] * 4
END
