#!/usr/bin/env bash
# Two samplers with "Karras sigmas" from one config start from different noise: 8.4 and 14.6.
# guess: Euler and DPM++ built from SDXL's settings (leading spacing) with
#        `use_karras_sigmas=True` walk the same list of sigmas: Karras' formula has only two ends
#        and a count.
# seen:  10 steps of Euler go from 8.39 to 0.041, of DPM++ from 14.6 to 0.029. Euler (and Heun)
#        take the two ends from the spaced timesteps, which for "leading" begin at t = 901; DPM++
#        takes those of the whole table, and ignores `timestep_spacing`.
# Versions: diffusers 0.42.1, torch 2.13.0.
# Who is hurt: whoever compares samplers, or repeats a picture of one program in another: with few
# steps the first one sees another level of noise. Here Karras sigmas are not read.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 \
    accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'END'
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler

config = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
              timestep_spacing="leading", steps_offset=1, use_karras_sigmas=True)
seen = {}
for kind in (EulerDiscreteScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler):
    scheduler = kind.from_config(config)
    scheduler.set_timesteps(10)
    first, last = scheduler.sigmas[0].item(), scheduler.sigmas[-2].item()
    seen[kind] = (round(first, 2), round(last, 3), round(scheduler.timesteps[0].item()))
    print(f"{kind.__name__}: sigma {seen[kind][0]} to {seen[kind][1]}, from t = {seen[kind][2]}")
assert seen[EulerDiscreteScheduler] == seen[HeunDiscreteScheduler] == (8.39, 0.041, 901)
assert seen[DPMSolverMultistepScheduler] == (14.61, 0.029, 999)
END
