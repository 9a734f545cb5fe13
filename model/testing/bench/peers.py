"""diffusers' and PEFT's jobs (clock.py): an image; a step of Diffusion-DPO as the official release
takes it."""
import diffusers
import peft
import torch
import torch.nn.functional as F

from model.tools.device import PRECISIONS

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()


def image(folder: str, precision: str, side: str, steps: str, device: str):
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        folder, torch_dtype=PRECISIONS[precision])
    pipe.to(device).set_progress_bar_config(disable=True)
    yield
    for _ in range(2):
        pipe("a red ball", num_inference_steps=int(steps), guidance_scale=4.0, height=int(side),
             width=int(side), generator=torch.Generator().manual_seed(0))
        yield


def models(folder: str, device: str, dtype: torch.dtype, checkpointing: str):
    """(pipeline, a second UNet as the reference, the LoRA's parameters), frozen but for these."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
    reference = type(pipe.unet).from_pretrained(folder, subfolder="unet", torch_dtype=dtype)
    for part in (reference.to(device), *pipe.components.values()):
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    pipe.unet.add_adapter(peft.LoraConfig(
        r=4, lora_alpha=4, init_lora_weights="gaussian",
        target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    diffusers.training_utils.cast_training_params(pipe.unet)    # to fp32
    if device == "cuda":
        pipe.vae.enable_slicing()    # or a large batch would need the most memory there
        for unet in (pipe.unet, reference):
            unet.to(memory_format=torch.channels_last)
    if checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    return pipe, reference, [p for p in pipe.unet.parameters() if p.requires_grad]


def step(folder: str, side: str, pairs: str, device: str, precision: str, checkpointing=""):
    """With VAE and text encoder in the loop. precision: of all but the LoRA."""
    side, n, dtype = int(side), int(pairs), PRECISIONS[precision]
    pipe, reference, parameters = models(folder, device, dtype, checkpointing)
    cast = torch.autocast(device, dtype, enabled=dtype != torch.float32)
    noiser = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    optimiser = torch.optim.AdamW(parameters, 1e-5, fused=device == "cuda")
    images = torch.rand(2 * n, 3, side, side).to(device, dtype) * 2 - 1    # n winners, n losers
    sizes = torch.tensor([[side, side, 0, 0, side, side]], device=device).repeat(2 * n, 1)
    yield
    for _ in range(3):
        with torch.no_grad():
            latents = pipe.vae.encode(images).latent_dist.sample().float()
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
        errors, errors_ref = ((x - noise).square().mean((1, 2, 3)) for x in (output, output_ref))
        winner, loser = (errors - errors_ref).chunk(2)
        F.logsigmoid(-2500 * (winner - loser)).mean().neg().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        yield
