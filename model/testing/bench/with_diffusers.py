"""diffusers' job (clock.py)."""
import diffusers
import torch

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()


def picture(folder: str, dtype: str, side: str, steps: str, device: str = "cpu"):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype))
    pipe.to(device).set_progress_bar_config(disable=True)
    yield
    for _ in range(2):
        pipe("a red ball", num_inference_steps=int(steps), guidance_scale=4.0, height=int(side),
             width=int(side), generator=torch.Generator().manual_seed(0))
        yield
