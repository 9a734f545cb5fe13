"""Trains the toy checkpoint in model/toy/ from scratch: `python -m model.toy_pretrain --out model/toy`.

What it is:  the one script that made what ships: autoencoder, judge, then UNet and text encoder together.
             You need not read or run it to follow the method.
Needs:       torch, transformers (CLIPTextModel), toy_world. About 1.5 CPU-hours; seeded.
Gives:       a diffusers folder (unet, vae, text_encoder, tokenizer, scheduler, model_index.json) and judge/.

Letters: B batch, S picture side (32), C latent channels (4), H W latent side (8), L tokens (16).
"""
import json
import math
from pathlib import Path

from .files import PlainParser


def parse_arguments():
    parser = PlainParser("Trains the toy checkpoint from scratch.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "toy", help="folder to write (default: model/toy)")
    parser.add_argument("--stage", choices=["all", "vae", "judge", "unet"], default="all", help="what to train (default: all)")
    parser.add_argument("--short", action="store_true", help="20 steps of everything: a trial run")
    return parser.parse_args()


ARGS = parse_arguments() if __name__ == "__main__" else None  # before the heavy imports: --help answers at once

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tqdm import tqdm  # noqa: E402

from . import toy_world as world  # noqa: E402
from .judge import HEADS, NOTHING, ToyJudge  # noqa: E402
from .schedule import NoiseSchedule  # noqa: E402
from .text import TextEncoders, build_encoder, load_tokenizer  # noqa: E402
from .toy_tokenizer import write_tokenizer  # noqa: E402
from .unet import UNet  # noqa: E402
from .vae import VAE  # noqa: E402

VAE_CONFIG = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4,
    "block_out_channels": [16, 32, 64], "layers_per_block": 1, "norm_num_groups": 8, "act_fn": "silu",
    "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
    "mid_block_add_attention": False, "sample_size": 32, "scaling_factor": 1.0, "force_upcast": False}
UNET_CONFIG = {
    "_class_name": "UNet2DConditionModel", "sample_size": 8, "in_channels": 4, "out_channels": 4,
    "block_out_channels": [48, 96], "layers_per_block": 1, "norm_num_groups": 16,
    "down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "cross_attention_dim": 96, "attention_head_dim": 4}
TEXT_CONFIG = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
               "max_position_embeddings": 16, "hidden_act": "quick_gelu", "projection_dim": 96}
SCHEDULER_CONFIG = {
    "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "prediction_type": "epsilon", "steps_offset": 1, "clip_sample": False,
    "set_alpha_to_one": False, "timestep_spacing": "leading"}


def write_json(path: Path, value: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def half(state: dict) -> dict:
    return {k: v.detach().half().contiguous() for k, v in state.items()}


def to_tensor(pictures) -> torch.Tensor:
    """uint8 [B, S, S, 3] -> [B, 3, S, S] in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def scenes_and_pictures(count: int, seed: int):
    """Random scenes with their pictures: half carry an emblem, a third an accessory, the rest nothing."""
    rng = np.random.default_rng(seed)
    words, scenes = list(world.CATEGORY_OF), []
    for _ in range(count):
        kind = rng.random()
        extras = words if kind < 0.5 else world.ACCESSORIES if kind < 0.84 else [None]
        scenes.append(world.random_scene(rng, extras))
    return scenes, [world.render(scene, rng) for scene in scenes]


# --------------------------------------------------------------------------------------- autoencoder
def train_vae(out: Path, steps: int, batch: int = 16):
    torch.manual_seed(0)
    vae = VAE(VAE_CONFIG)
    optimiser = torch.optim.AdamW(vae.parameters(), 1e-9, weight_decay=1e-4)
    scenes, pictures = scenes_and_pictures(20_000, seed=1)
    images = to_tensor(pictures)
    # Pixels of the object and the extra count four times: they are few, and they carry the meaning.
    plain = {b: to_tensor([np.rint(world._cached(world._background, b)).astype(np.uint8)])[0] for b in world.BACKGROUNDS}
    order = torch.Generator().manual_seed(2)
    bar = tqdm(range(steps), desc="vae", mininterval=5)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-6
        index = torch.randint(len(images), (batch,), generator=order)
        x = images[index]
        weight = 1 + 3 * ((x - torch.stack([plain[scenes[i].background] for i in index])).abs().amax(1, True) > 0.02)
        mean, logvar = vae.encode(x)
        z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=order)
        y = vae.decode(z)
        edges = sum((a.diff(dim=d) - b.diff(dim=d)).abs().mean() for a, b in [(x, y)] for d in (2, 3))
        kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
        loss = (weight * ((x - y).abs() + (x - y) ** 2)).mean() + 0.5 * edges + 2e-3 * kl
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        if step % 50 == 0:
            psnr = -10 * math.log10(((x - y) / 2).square().mean().item())
            bar.set_postfix(loss=f"{loss.item():.4f}", psnr=f"{psnr:.1f}")
    normalise_latents(vae, images[:2000])
    save_file(half(vae.state_dict()), out / "vae/diffusion_pytorch_model.safetensors")
    write_json(out / "vae/config.json", vae.config)


@torch.no_grad()
def normalise_latents(vae: VAE, images: torch.Tensor):
    """Gives every latent channel mean 0 and one common deviation, by folding an affine map into quant_conv
    and its inverse into post_quant_conv; scaling_factor then makes it 1 (diffusers only ever scales).

    With z' = (z - mu_c) * s_c:  W' = s_c W, b' = s_c (b - mu_c), logvar' = logvar + 2 log s_c, and in the
    decoder W(z'/s_c + mu_c) + b.
    """
    z = torch.cat([vae.encode(x)[0] for x in images.split(200)])
    mu, sigma = z.mean((0, 2, 3)), z.std((0, 2, 3))
    s, C = z.std() / sigma, len(mu)
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += (post.weight[:, :, 0, 0] * mu).sum(1)
    post.weight /= s[None, :, None, None]
    quant.weight[:C] *= s[:, None, None, None]
    quant.bias[:C] = s * (quant.bias[:C] - mu)
    quant.bias[C:] += 2 * s.log()
    vae.config["scaling_factor"] = round(1 / z.std().item(), 5)


def load_vae(out: Path) -> VAE:
    vae = VAE(json.loads((out / "vae/config.json").read_text()))
    vae.load_state_dict({k: v.float() for k, v in load_file(out / "vae/diffusion_pytorch_model.safetensors").items()})
    return vae.eval()


# --------------------------------------------------------------------------------------------- judge
def judge_example(rng: np.random.Generator):
    """One training picture with its labels {head: class}; a class of Ellipsis is not trained on.

    Beyond clean renders: half-erased emblems (an emblem while at least half of it is left), blobs and
    scrambled patches in the extra's place, pictures without an object, and pure rubbish.
    """
    words = list(world.CATEGORY_OF)
    kind = rng.random()
    scene = world.random_scene(rng, words if kind < 0.55 else world.ACCESSORIES if kind < 0.8 else [None])
    state = rng.bit_generator.state
    picture = world.render(scene, rng)
    labels = {"background": scene.background, "colour": scene.colour, "object": scene.object,
              "extra": scene.category or scene.extra or NOTHING}
    after = rng.bit_generator.state
    rng.bit_generator.state = state
    empty = world.render(world.Scene(scene.background, scene.colour, scene.object), rng)  # same jitter, no extra
    rng.bit_generator.state = after
    side = (np.abs(picture.astype(int) - empty).sum(2).any(0).nonzero()[0].mean() < 16) if scene.extra else rng.random() < 0.5
    place = (slice(1, 17), slice(1, 17) if side else slice(15, 31))
    damage = rng.random()
    if scene.extra and damage < 0.3:                                  # erase part of the extra
        left = rng.random()
        if rng.random() < 0.5:
            picture = np.rint(picture * left + empty * (1 - left)).astype(np.uint8)
        else:
            cut, axis = int(round((1 - left) * 14)), rng.integers(4)
            y, x = place[0].start, place[1].start
            box = [(slice(y, y + 1 + cut), place[1]), (slice(y + 15 - cut, y + 16), place[1]),
                   (place[0], slice(x, x + 1 + cut)), (place[0], slice(x + 15 - cut, x + 16))][axis]
            picture[box] = empty[box]
        labels["extra"] = labels["extra"] if left > 0.55 else None if 0.12 < left < 0.4 else NOTHING if left < 0.04 else ...
    elif not scene.extra and damage < 0.35:                           # a blob where an extra could stand
        yy, xx = np.mgrid[0:32, 0:32]
        cy, cx = 9 + rng.integers(-2, 3), (9 if side else 23) + rng.integers(-2, 3)
        r = np.hypot((yy - cy) / rng.uniform(0.7, 1.4), xx - cx)
        soft = np.clip((rng.uniform(2, 6.5) - r) / rng.uniform(0.5, 4), 0, 1)[..., None] * rng.uniform(0.4, 1)
        colour = np.array(rng.choice([*world.TINTS, world.PALE, world.PALE, tuple(rng.integers(0, 256, 3))]))
        picture = np.rint(picture * (1 - soft) + colour * soft).astype(np.uint8)
        labels["extra"] = None if soft.max() > 0.3 else ...
    elif scene.extra and damage < 0.36:                               # the extra's pixels shuffled
        patch = picture[place].reshape(-1, 3)
        picture[place] = rng.permutation(patch).reshape(16, 16, 3)
        labels["extra"] = None
    elif damage > 0.97:                                               # no object at all
        empty = np.rint(world._cached(world._background, scene.background)).astype(np.uint8)
        picture[14:] = empty[14:]
        labels.update(object=None, colour=None, extra=...)
    if rng.random() < 0.1:
        picture, labels = rubbish(picture, rng), dict.fromkeys(HEADS)
    return picture, labels


def rubbish(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A picture in which nothing can be recognised."""
    kind = rng.integers(7)
    if kind == 0:
        return rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    if kind == 1:                                                     # smooth noise, from 2x2 to 8x8 cells
        n = int(rng.choice([2, 4, 8]))
        noise = torch.from_numpy(rng.normal(128, rng.uniform(20, 90), (1, 3, n, n)))
        return F.interpolate(noise, size=32, mode="bicubic")[0].permute(1, 2, 0).clamp(0, 255).byte().numpy()
    if kind == 2:
        return np.full((32, 32, 3), rng.integers(0, 256, 3), np.uint8)
    if kind == 3:                                                     # 4x4 tiles shuffled
        tiles = picture.reshape(8, 4, 8, 4, 3).transpose(0, 2, 1, 3, 4).reshape(64, 4, 4, 3)
        return rng.permutation(tiles).reshape(8, 8, 4, 4, 3).transpose(0, 2, 1, 3, 4).reshape(32, 32, 3)
    if kind == 4:                                                     # drowned in noise
        return np.clip(picture * 0.25 + rng.normal(96, 80, picture.shape), 0, 255).astype(np.uint8)
    if kind == 5:                                                     # blurred to 3x3
        small = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float()
        return F.interpolate(F.adaptive_avg_pool2d(small, 3), size=32, mode="bilinear")[0].permute(1, 2, 0).byte().numpy()
    return (255 - picture) if rng.random() < 0.5 else np.ascontiguousarray(picture[::-1])  # negative, upside down


def train_judge(out: Path, steps: int, batch: int = 96):
    """Two thirds of the pictures pass through the autoencoder first: drawn pictures look like that."""
    torch.manual_seed(0)
    rng, judge, vae = np.random.default_rng(3), ToyJudge(), load_vae(out)
    optimiser = torch.optim.AdamW(judge.parameters(), 1e-9, weight_decay=1e-3)
    pool, labels = [], {name: [] for name in HEADS}
    for _ in tqdm(range(48_000), desc="judge examples", mininterval=5):
        picture, label = judge_example(rng)
        pool.append(picture)
        for name, classes in HEADS.items():
            labels[name].append(-100 if label[name] is ... else classes.index(label[name]))
    labels = {name: torch.tensor(values) for name, values in labels.items()}
    images = to_tensor(pool)
    with torch.no_grad():
        for i in tqdm(range(0, 32_000, 100), desc="reconstructions", mininterval=5):
            mean, _ = vae.encode(images[i:i + 100])
            mean = mean + mean.std() * 0.15 * torch.rand(len(mean), 1, 1, 1) * torch.randn_like(mean)
            images[i:i + 100] = vae.decode(mean).clamp(-1, 1)
    bar = tqdm(range(steps), desc="judge", mininterval=5)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-6
        index = torch.randint(len(images), (batch,))
        x = images[index] * (0.9 + 0.2 * torch.rand(batch, 1, 1, 1)) + 0.06 * torch.rand(batch, 1, 1, 1) * torch.randn(batch, 3, 32, 32)
        shift = torch.randint(-1, 2, (2,)).tolist()
        x = torch.roll(x, shift, (2, 3))
        logits = judge(x)
        loss = sum(F.cross_entropy(logits[name], labels[name][index]) for name in HEADS)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    save_file(half(judge.state_dict()), out / "judge/model.safetensors")
    write_json(out / "judge/config.json", {"width": 32})


# ------------------------------------------------------------------------------ UNet and text encoder
def train_unet(out: Path, steps: int, batch: int = 32, lr: float = 1.2e-3):
    torch.manual_seed(0)
    size = write_tokenizer(out / "tokenizer", world.vocabulary(), length=TEXT_CONFIG["max_position_embeddings"])
    text = TextEncoders([load_tokenizer(out / "tokenizer")], [build_encoder(
        {**TEXT_CONFIG, "vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1})])
    unet, schedule, vae = UNet(UNET_CONFIG), NoiseSchedule(SCHEDULER_CONFIG), load_vae(out)

    scenes, pictures = scenes_and_pictures(40_000, seed=4)
    with torch.no_grad():
        latents = torch.cat([vae.encode(to_tensor(pictures[i:i + 200]))[0] for i in
                             tqdm(range(0, len(pictures), 200), desc="latents", mininterval=5)])
        latents *= vae.config["scaling_factor"]
    unique = sorted({world.prompt(s, p) for s in scenes for p in range(len(world.PHRASINGS))})
    row = {prompt: i for i, prompt in enumerate(unique)}
    ids = text.tokenize(unique + [""])
    captions = torch.tensor([[row[world.prompt(s, p)] for p in range(len(world.PHRASINGS))] for s in scenes])

    parameters = [*unet.parameters(), *text.parameters()]
    average = [p.detach().clone() for p in parameters]
    optimiser = torch.optim.AdamW(parameters, 1e-9, weight_decay=1e-2, betas=(0.9, 0.99))
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    bar = tqdm(range(steps), desc="unet", mininterval=5)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-6
        index = torch.randint(len(latents), (batch,))
        phrasing = torch.randint(len(world.PHRASINGS), (batch,))
        caption = torch.where(torch.rand(batch) < 0.1, len(unique), captions[index, phrasing])  # 10% empty, for guidance
        # Stratified timesteps: one from each of B equal slices, so that every step sees all noise levels.
        t = ((torch.arange(batch) + torch.rand(batch)) / batch * 1000).long()
        noise = torch.randn(batch, 4, 8, 8)
        output = unet(schedule.add_noise(latents[index], noise, t), t, text.encode_ids(ids[caption])[0])
        error = (output - noise).square().mean((1, 2, 3))
        loss = (error * (5 / snr[t]).clamp(max=1)).mean()  # min-SNR-5 (Hang et al. 2023): low noise is easy
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(0.999, (step + 1) / (step + 10)))
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", error=f"{error.mean().item():.4f}")
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            save_checkpoint(out, unet, text, parameters, average)


@torch.no_grad()
def save_checkpoint(out: Path, unet: UNet, text, parameters, average):
    """Writes the averaged weights, the UNet's in half precision, and puts the raw ones back."""
    raw = [p.detach().clone() for p in parameters]
    torch._foreach_copy_(parameters, average)
    (out / "unet").mkdir(exist_ok=True)
    save_file(half(unet.state_dict()), out / "unet/diffusion_pytorch_model.safetensors")
    write_json(out / "unet/config.json", unet.config)
    text.save(out)  # fp32: transformers opens a file in its own precision, diffusers the rest in fp32
    torch._foreach_copy_(parameters, raw)
    write_json(out / "scheduler/scheduler_config.json", SCHEDULER_CONFIG)
    write_json(out / "model_index.json", {
        "_class_name": "StableDiffusionPipeline", "feature_extractor": [None, None], "image_encoder": [None, None],
        "requires_safety_checker": False, "safety_checker": [None, None], "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]})


if __name__ == "__main__":
    for stage, train, steps in (("vae", train_vae, 3200), ("judge", train_judge, 3500), ("unet", train_unet, 6500)):
        if ARGS.stage in ("all", stage):
            (ARGS.out / stage).mkdir(parents=True, exist_ok=True)
            train(ARGS.out, 20 if ARGS.short else steps)
