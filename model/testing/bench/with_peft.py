"""PEFT's jobs (clock.py): a step of Diffusion-DPO as the official release takes it, and merging."""
from pathlib import Path

import diffusers
import peft
import torch
import torch.nn.functional as F
from diffusers.training_utils import cast_training_params
from safetensors.torch import save_file

from model.formats.lora_file import load
from model.tools.device import precision

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()


def step(folder: str, side: str, pairs: str = "1", device: str = "cpu", wanted: str = "auto",
         checkpointing: str = ""):
    """With VAE and text encoder in the loop, and a second UNet as the reference. wanted: the
    precision of all but the LoRA, as train.py reads it."""
    device, side, n = torch.device(device), int(side), int(pairs)
    dtype = precision(device, wanted)
    cast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
    reference = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet",
                                                               torch_dtype=dtype).to(device)
    noiser = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    for part in (reference, *pipe.components.values()):
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    pipe.unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian",
                                          target_modules=targets))
    cast_training_params(pipe.unet)    # to fp32
    if device.type == "cuda":
        pipe.vae.enable_slicing()    # or a large batch would need the most memory there
        for unet in (pipe.unet, reference):
            unet.to(memory_format=torch.channels_last)
    if checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    parameters = [p for p in pipe.unet.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, 1e-5, fused=device.type == "cuda")
    pictures = torch.rand(2 * n, 3, side, side).to(device, dtype) * 2 - 1    # n winners, n losers
    sizes = torch.tensor([[side, side, 0, 0, side, side]], device=device).repeat(2 * n, 1)
    yield
    for _ in range(3):
        with torch.no_grad():
            latents = pipe.vae.encode(pictures).latent_dist.sample().float()
            latents *= pipe.vae.config.scaling_factor
            context, _, *pooled = pipe.encode_prompt(
                prompt=["a red ball"] * 2 * n, device=device, num_images_per_prompt=1,
                do_classifier_free_guidance=False)
        noise = torch.randn_like(latents[:n]).repeat(2, 1, 1, 1)
        t = torch.randint(1000, (n,), device=device).repeat(2)
        added = {"text_embeds": pooled[0], "time_ids": sizes} if pooled else {}    # SDXL
        inputs = {"sample": noiser.add_noise(latents, noise, t), "timestep": t,
                  "encoder_hidden_states": context, "added_cond_kwargs": added}
        with cast:
            output = pipe.unet(**inputs).sample.float()
            with torch.no_grad():
                output_ref = reference(**inputs).sample.float()
        winner, loser = (output - noise).square().mean((1, 2, 3)).chunk(2)
        winner_ref, loser_ref = (output_ref - noise).square().mean((1, 2, 3)).chunk(2)
        loss = F.logsigmoid(-2500 * ((winner - loser) - (winner_ref - loser_ref))).mean().neg()
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimiser)
        scaler.update()
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
