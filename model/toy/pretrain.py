"""Trains the toy checkpoint in model/toy/ from scratch: `python -m model.toy.pretrain`.

What it is:  the one script that made what ships: autoencoder, judge, then UNet and text encoder.
             You need not read or run it to follow the method.
Needs:       torch, transformers; the configs in model/toy/. About 1.5 CPU-hours; seeded.
Gives:       a diffusers folder (unet, vae, text_encoder, tokenizer, scheduler, model_index.json)
             and judge/, of the architecture that the configs in model/toy/ describe.

Letters: B batch, S image side (32), C latent channels (4), H W latent side (8), L tokens (16).
"""
import copy
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from model.schedule import NoiseSchedule
from model.text import TextEncoders, build_encoder, load_tokenizer
from model.tools.command import PlainParser, run
from model.tools.files import read_json
from model.tools.images import as_tensor
from model.tools.processes import chunks
from model.toy import TOY, is_toy, world
from model.toy.bpe import write_tokenizer
from model.toy.toy_judge import HEADS, NOTHING, ToyJudge, labels_of
from model.unet import UNet
from model.vae import VAE

EXTRAS = list(world.CATEGORY_OF), world.ACCESSORIES, [None]


def parse_arguments(argv=None):
    parser = PlainParser("Trains the toy checkpoint from scratch.")
    parser.add_argument("--out", type=Path, default=TOY, help="folder (default: model/toy)")
    parser.add_argument("--short", action="store_true", help="20 steps of everything: a trial run")
    return parser.parse_args(argv)


def write_weights(path: Path, module: torch.nn.Module):
    """In half precision, to which the module is rounded."""
    module.half()
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, path)
    module.float()


def random_scene(rng, harm: float, extra: float) -> world.Scene:
    """With a harm, where a random number is below `harm`; else below `extra` with an accessory."""
    kind = rng.random()
    return world.random_scene(rng, EXTRAS[0 if kind < harm else 1 if kind < extra else 2])


def scenes_and_images(count: int, seed: int):
    """Random scenes with their images: half with a harm, a third with an accessory."""
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng, 0.5, 0.84) for _ in range(count)]
    return scenes, [world.render(scene, rng) for scene in scenes]


def fit(name: str, parameters, loss: Callable, lr: float, steps: int, clip=math.inf,
        after: Callable = lambda step: None, **settings):
    """loss() by AdamW: 100 steps of warm-up, and a cosine to 1e-6. after(step): after each step."""
    optimiser = torch.optim.AdamW(parameters, **settings)
    for step in tqdm(range(steps), desc=name, mininterval=5):
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimiser.param_groups[0]["lr"] = lr * min(1, (step + 1) / 100) * cosine + 1e-6
        optimiser.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimiser.step()
        after(step)


def train_vae(out: Path, steps: int, batch=16) -> VAE:
    torch.manual_seed(0)
    vae = VAE(read_json(TOY / "vae/config.json"))
    vae.to(memory_format=torch.channels_last)
    scenes, images = scenes_and_images(20_000, seed=1)
    plain = {name: as_tensor(np.rint(world.background(name)).astype(np.uint8)[None])[0]
             for name in world.BACKGROUNDS}
    order = torch.Generator().manual_seed(2)

    def loss():
        index = torch.randint(len(images), (batch,), generator=order)
        x = as_tensor([images[i] for i in index]).to(memory_format=torch.channels_last)
        # Pixels of the object and the extra count four times: they are few, and carry the meaning.
        empty = torch.stack([plain[scenes[i].background] for i in index])
        weight = 1 + 3 * ((x - empty).abs().amax(1, True) > 0.02)
        mean, logvar = vae.encode(x)
        y = vae.decode(mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=order))
        edges = sum((x.diff(dim=d) - y.diff(dim=d)).abs().mean() for d in (2, 3))
        kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
        return (weight * ((x - y).abs() + (x - y) ** 2)).mean() + 0.5 * edges + 1e-3 * kl
    fit("vae", list(vae.parameters()), loss, 2e-3, steps, 1.0, weight_decay=1e-4)
    normalise_latents(vae, images[:2000])
    write_weights(out / "vae/diffusion_pytorch_model.safetensors", vae)
    (out / "vae/config.json").write_text(json.dumps(vae.config, indent=2) + "\n")
    return vae.eval()


@torch.no_grad()
def encoded(vae: VAE, images: list):
    """Latents [N, C, H, W] of uint8 images [S, S, 3], not scaled."""
    return torch.cat([vae.encode(as_tensor(some))[0] for some in chunks(images, 200)])


@torch.no_grad()
def normalise_latents(vae: VAE, images: list):
    """Gives every latent channel mean 0 and one common deviation, by folding an affine map into
    quant_conv and its inverse into post_quant_conv; scaling_factor then makes it 1.

    With z' = (z - mu_c) * s_c:  W' = s_c W, b' = s_c (b - mu_c), logvar' = logvar + 2 log s_c, and
    in the decoder W(z'/s_c + mu_c) + b.
    """
    z = encoded(vae, images)
    mu, sigma = z.mean((0, 2, 3)), z.std((0, 2, 3))
    s, C = z.std() / sigma, len(mu)
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += (post.weight[:, :, 0, 0] * mu).sum(1)
    post.weight /= s[None, :, None, None]
    quant.weight[:C] *= s[:, None, None, None]
    quant.bias[:C] = s * (quant.bias[:C] - mu)
    quant.bias[C:] += 2 * s.log()
    vae.config["scaling_factor"] = round(1 / z.std().item(), 5)


def judge_example(rng):
    """One training image with its labels {head: class}; a class of Ellipsis is not trained on.

    Beyond clean images of scenes: half-way ones between the unsafe and the safe image of a
    pair, and pure rubbish.
    """
    scene = random_scene(rng, 0.6, 0.8)
    safe = replace(scene, extra=rng.choice([*world.ACCESSORIES, None]))
    twins = [copy.deepcopy(rng) for _ in range(2)]    # for the same jitter
    image, labels = world.render(scene, rng), labels_of(scene)
    if scene.category and rng.random() < 0.5:
        plain = world.render(replace(scene, extra=None), twins[0])
        return half_way(image, world.render(safe, twins[1]), plain, labels, safe.extra, rng)
    if rng.random() < 0.1:
        return rubbish(image, rng), dict.fromkeys(HEADS)
    return image, labels


def half_way(unsafe, safe, plain, labels: dict, accessory: str | None, rng):
    """An image on the way from the unsafe to the safe one, faded or cut in two, and its labels."""
    if rng.random() < 0.5:
        mask = np.full((world.SIZE, world.SIZE, 1), rng.random())
        labels |= dict.fromkeys(("background", "colour", "object"), ...)    # inverted: all grey
    else:
        y, x, _ = (unsafe != plain).nonzero()
        angle, grid = rng.uniform(0, 2 * np.pi), np.mgrid[:world.SIZE, :world.SIZE]
        along = grid[1] * np.cos(angle) + grid[0] * np.sin(angle)
        mask = (along > np.quantile(along[y, x], rng.random()))[..., None]
    labels["category"] = label_of_rest(kept(mask, unsafe, plain), labels["category"])
    if accessory:
        labels["accessory"] = label_of_rest(kept(1 - mask, safe, plain), accessory)
    return np.rint(unsafe * mask + safe * (1.0 - mask)).astype(np.uint8), labels


def kept(mask, image, plain) -> float:
    """The share of the difference between the images that a mask keeps."""
    difference = np.abs(image.astype(float) - plain)
    return (difference * mask).sum() / difference.sum()


def label_of_rest(left: float, label: str):
    """A harm or an accessory of which this share is left. The judge is not asked in between."""
    if left > 0.55:
        return label
    if 0.15 < left < 0.4:
        return None
    return NOTHING if left < 0.05 else ...


def rubbish(image, rng):
    """An image in which nothing can be recognised."""
    kind = rng.integers(6)
    if kind == 0:    # noise
        return rng.integers(0, 256, image.shape, dtype=np.uint8)
    if kind == 1:    # smooth noise, from 2x2 to 8x8 cells
        n = int(rng.choice([2, 4, 8]))
        cells = torch.from_numpy(rng.normal(128, rng.uniform(20, 90), (3, n, n)))
        return enlarged(cells, "bicubic")
    if kind == 2:    # one colour
        return np.full_like(image, rng.integers(0, 256, 3))
    if kind == 3:    # 4x4 tiles shuffled
        tiles = image.reshape(8, 4, 8, 4, 3).swapaxes(1, 2).reshape(64, 4, 4, 3)
        return rng.permutation(tiles).reshape(8, 8, 4, 4, 3).swapaxes(1, 2).reshape(image.shape)
    if kind == 4:    # drowned in noise
        noise = rng.normal(96, 80, image.shape)
        return np.clip(image * 0.25 + noise, 0, 255).astype(np.uint8)
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).float()    # blurred to 3x3
    return enlarged(F.adaptive_avg_pool2d(pixels, 3), "bilinear")


def enlarged(cells, mode: str):
    """[3, n, n] in 0..255 -> uint8 [S, S, 3]"""
    large = F.interpolate(cells[None], size=world.SIZE, mode=mode)[0]
    return large.permute(1, 2, 0).clamp(0, 255).byte().numpy()


def judge_examples(vae: VAE):
    """36,000 images uint8 [N, S, S, 3] and their labels {head: [N]}, -100 for none. Half of them
    pass through the autoencoder: images of the model look like that."""
    rng, images, labels = np.random.default_rng(3), [], {name: [] for name in HEADS}
    for _ in range(36_000):
        image, label = judge_example(rng)
        images.append(image)
        for name, classes in HEADS.items():
            labels[name].append(-100 if label[name] is ... else classes.index(label[name]))
    images = np.stack(images)
    with torch.no_grad():
        for i in range(0, 18_000, 100):
            mean, _ = vae.encode(as_tensor(images[i:i + 100]))
            scale = mean.std() * 0.15 * torch.rand(len(mean), 1, 1, 1)
            decoded = vae.decode(mean + scale * torch.randn_like(mean)).clamp(-1, 1)
            images[i:i + 100] = ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    return images, {name: torch.tensor(values) for name, values in labels.items()}


def train_judge(out: Path, vae: VAE, steps: int, batch=96):
    torch.manual_seed(0)
    judge = ToyJudge()
    images, labels = judge_examples(vae)

    def loss():
        index = torch.randint(len(images), (batch,))
        x = as_tensor(images[index]) * (0.9 + 0.2 * torch.rand(batch, 1, 1, 1))
        x = x + 0.06 * torch.rand(batch, 1, 1, 1) * torch.randn(x.shape)
        logits = judge(torch.roll(x, torch.randint(-1, 2, (2,)).tolist(), (2, 3)))
        return sum(F.cross_entropy(logits[name], labels[name][index]) for name in HEADS)
    fit("judge", list(judge.parameters()), loss, 2e-3, steps, weight_decay=1e-3)
    write_weights(out / "judge/model.safetensors", judge)


def new_text_encoder(out: Path) -> TextEncoders:
    """Random, with a tokenizer for the grammar's words, which is written."""
    config = read_json(TOY / "text_encoder/config.json")
    length = config["max_position_embeddings"]
    config |= write_tokenizer(out / "tokenizer", world.vocabulary(), length)
    return TextEncoders([load_tokenizer(out / "tokenizer")], [build_encoder(config)])


def training_set(vae: VAE, count=40_000):
    """(latents [N, C, H, W], prompts, captions [N, phrasings]: rows of prompts). The last prompt is
    the empty one."""
    scenes, images = scenes_and_images(count, seed=4)
    texts = [world.prompt(scene, phrasing) for scene in scenes
             for phrasing in range(len(world.PHRASINGS))]
    prompts = sorted(set(texts))
    row = {prompt: i for i, prompt in enumerate(prompts)}
    captions = torch.tensor([row[text] for text in texts]).view(count, -1)
    return encoded(vae, images) * vae.config["scaling_factor"], prompts + [""], captions


def train_unet(out: Path, vae: VAE, steps: int, batch=32):
    torch.manual_seed(0)
    text = new_text_encoder(out)
    unet = UNet(read_json(TOY / "unet/config.json"))
    schedule = NoiseSchedule(read_json(TOY / "scheduler/scheduler_config.json"))
    latents, prompts, captions = training_set(vae)
    ids, empty = text.tokenize(prompts), len(prompts) - 1
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)

    def loss():
        index = torch.randint(len(latents), (batch,))
        phrasing = torch.randint(captions.shape[1], (batch,))
        # One prompt in ten is empty, for guidance.
        caption = torch.where(torch.rand(batch) < 0.1, empty, captions[index, phrasing])
        # One timestep from each of B equal slices: every step sees all noise levels.
        t = ((torch.arange(batch) + torch.rand(batch)) / batch * schedule.T).long()
        t = t.clamp(max=schedule.T - 1)    # 0.99999999 * T rounds to T
        noise = torch.randn(batch, 4, 8, 8)
        x_t = schedule.add_noise(latents[index], noise, t)
        output = unet(x_t, t, text.encode_ids(ids[caption]).context)
        error = (output - noise).square().mean((1, 2, 3))
        # min-SNR-5 (Hang et al. 2023): low noise is easy.
        return (error * (5 / snr[t]).clamp(max=1)).mean()
    parameters = [*unet.parameters(), *text.parameters()]
    average = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def follow(step: int):
        decay = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, parameters, 1 - decay)
    fit("unet", parameters, loss, 1.2e-3, steps, 1.0, follow, weight_decay=1e-2, betas=(0.9, 0.99))
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
    write_weights(out / "unet/diffusion_pytorch_model.safetensors", unet)
    text.save(out)    # fp32: transformers opens a file in its own precision


def main(args):
    if not is_toy(args.out):    # the configs are not made anew
        shutil.copytree(TOY, args.out, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("*.py", "*.png", "__pycache__"))
    of_vae, of_judge, of_unet = (20, 20, 20) if args.short else (7000, 3500, 7500)    # steps
    vae = train_vae(args.out, of_vae)
    train_judge(args.out, vae, of_judge)
    train_unet(args.out, vae.to(memory_format=torch.contiguous_format), of_unet)


if __name__ == "__main__":
    run(main, parse_arguments())
