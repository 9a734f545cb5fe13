"""PEFT's jobs (clock.py): a step of Diffusion-DPO as the official release takes it, and merging."""
from pathlib import Path

import diffusers
import peft
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from model.formats.lora_file import load

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()


def step(folder: str, side: str):
    """With VAE and text encoder in the loop, and a second UNet as the reference."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    reference = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    noiser = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, reference):
        part.requires_grad_(False)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    pipe.unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian",
                                          target_modules=targets))
    parameters = [p for p in pipe.unet.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, 1e-5)
    pictures = torch.rand(2, 3, int(side), int(side)) * 2 - 1    # winner, loser
    yield
    for _ in range(3):
        with torch.no_grad():
            latents = pipe.vae.encode(pictures).latent_dist.sample()
            latents *= pipe.vae.config.scaling_factor
            words = pipe.tokenizer(["a red ball"] * 2, padding="max_length", return_tensors="pt")
            context = pipe.text_encoder(words.input_ids)[0]
        noise = torch.randn_like(latents[:1]).repeat(2, 1, 1, 1)
        t = torch.randint(1000, (1,)).repeat(2)
        x_t = noiser.add_noise(latents, noise, t)
        winner, loser = (pipe.unet(x_t, t, context).sample - noise).square().mean((1, 2, 3))
        with torch.no_grad():
            output = reference(x_t, t, context).sample
            winner_ref, loser_ref = (output - noise).square().mean((1, 2, 3))
        F.logsigmoid(-2500 * ((winner - loser) - (winner_ref - loser_ref))).neg().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        yield


def combine(experts: str, rule: str, rank: str):
    """add_weighted_adapter. Ready when all adapters are in memory."""
    loras = [load(path)[0] for path in sorted(Path(experts).glob("*.safetensors"))]
    network = torch.nn.Module()
    for name, f in loras[0].items():    # weights are pages that nobody touches
        layer = torch.nn.utils.skip_init(torch.nn.Linear, f.down.shape[1], len(f.up), bias=False)
        network.add_module(name, layer)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=list(loras[0]))
    adapted, names = peft.PeftModel(network, config, "0"), [str(i) for i in range(len(loras))]
    for name, lora in zip(names, loras):
        if name != "0":
            adapted.add_adapter(name, config)
        state = {f"base_model.model.{key}.lora_A.weight": f.down for key, f in lora.items()}
        state |= {f"base_model.model.{key}.lora_B.weight": f.up for key, f in lora.items()}
        peft.set_peft_model_state_dict(adapted, state, name)
    del loras
    yield
    with torch.no_grad():
        adapted.add_weighted_adapter(names, [1.0] * len(names), "merged", rule,
                                     svd_rank=int(rank), density=0.2)
    state = peft.get_peft_model_state_dict(adapted, adapter_name="merged")
    save_file({key: value.contiguous() for key, value in state.items()}, f"{experts}/peft.out")
    yield
