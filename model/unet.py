"""The denoiser of Stable Diffusion: the UNet, by hand, for SD 1.x, SD 2.x and SDXL.

Needs: torch, and the dict of a checkpoint's unet/config.json.
Gives: UNet, and the parts that vae.py shares.

From a noisy latent x_t, the time t and the prompt's embedding it predicts the noise (or v).

    sample -> conv_in -> down_blocks -> mid_block -> up_blocks -> conv_out -> prediction
                             |______ skips, a stack ______|

Attributes are named as the public checkpoints name them: loading is one strict load_state_dict. A
block is a list of layers: one resnet each (mixes neighbouring pixels, hears the time) and maybe one
transformer (mixes all pixels, reads the prompt).

Letters:  B batch   C channels   H W height and width of the latent   N = H*W as tokens
          L prompt tokens   D context width   E time embedding width   P pooled prompt width
"""
import math
from collections import OrderedDict
from functools import partial
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"    # the blocks that attend

# What a config means when it leaves a key out (early SD 1.x files leave out many).
DEFAULTS = dict(
    in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
    down_block_types=(DOWN, DOWN, DOWN, "DownBlock2D"), up_block_types=("UpBlock2D", UP, UP, UP),
    attention_head_dim=8, cross_attention_dim=1280, transformer_layers_per_block=1,
    use_linear_projection=False, norm_num_groups=32, norm_eps=1e-5, addition_embed_type=None)

# Keys that change the arithmetic, with the values implemented here. Others are refused: ignored,
# they could draw subtly wrong pictures. (upcast_attention changes nothing: fused attention
# accumulates in fp32.)
OFF = """only_cross_attention mid_block_only_cross_attention dual_cross_attention dropout
    cross_attention_norm num_attention_heads reverse_transformer_layers_per_block num_class_embeds
    center_input_sample time_embedding_dim time_embedding_act_fn timestep_post_act
    time_cond_proj_dim class_embed_type class_embeddings_concat encoder_hid_dim
    encoder_hid_dim_type resnet_skip_time_act""".split()
IMPLEMENTED = dict.fromkeys(OFF, (None, False)) | dict(
    down_block_types=(DOWN, "DownBlock2D"), up_block_types=(UP, "UpBlock2D"),
    mid_block_type=("UNetMidBlock2DCrossAttn",), addition_embed_type=(None, "text_time"),
    resnet_out_scale_factor=(1,), mid_block_scale_factor=(1,), downsample_padding=(1,),
    attention_type=("default",), resnet_time_scale_shift=("default",), act_fn=("silu", "swish"),
    time_embedding_type=("positional",), flip_sin_to_cos=(True,), freq_shift=(0,),
    conv_in_kernel=(3,), conv_out_kernel=(3,))
PER_LEVEL = ("down_block_types", "up_block_types", "attention_head_dim", "layers_per_block",
             "transformer_layers_per_block")    # one value, or one for each level


def refuse_unknown(config, implemented):
    """Raises ValueError, naming key and value, for a value outside implemented = {key: values}."""
    for key, values in implemented.items():
        value = config.get(key, values[0])
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if one not in values:
                raise ValueError(f"{key} = {one!r} is not implemented, only "
                                 f"{' or '.join(map(repr, values))}")


def completed(config):
    """A copy of the config with the defaults filled in, and each key of PER_LEVEL as a list."""
    refuse_unknown(config, IMPLEMENTED)
    c = {**DEFAULTS, **config}
    levels = len(c["block_out_channels"])
    for key in PER_LEVEL:
        c[key] = c[key] if isinstance(c[key], (list, tuple)) else [c[key]] * levels
        if len(c[key]) != levels:
            raise ValueError(f"{key} = {c[key]!r} must be one value, or {levels}: one a level")
    return c


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions around a skip: x [B,in,H,W], time [B,E] or None -> [B,out,H,W]."""
    def __init__(self, c_in, c_out, time_width, groups, eps):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        if time_width:    # the VAE's resnets know no time
            self.time_emb_proj = nn.Linear(time_width, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        # The key exists only where the width changes.
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x, time=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if time is not None:    # one offset per channel, the same at every pixel
            h = h + self.time_emb_proj(time)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class Downsample(nn.Module):
    """[B,C,H,W] -> [B,C,H/2,W/2], a stride-2 convolution."""
    def __init__(self, channels, asymmetric=False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x):
        # Trap: the VAE's encoder pads on the right and at the bottom only, the UNet on all sides.
        # The wrong one has the right shapes and shifts the picture by a pixel at every level.
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """[B,C,H,W] -> [B,C,2H,2W], or to `size`: nearest neighbour, smoothed by a convolution."""
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size=None):
        factor = None if size else 2.0
        return self.conv(F.interpolate(x, size=size, scale_factor=factor, mode="nearest"))


class Block(nn.Module):
    """One level of the U: a container whose lists give the checkpoint's keys."""
    def __init__(self, resnets, attentions=(), downsamplers=(), upsamplers=()):
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList(downsamplers)
        self.upsamplers = nn.ModuleList(upsamplers)

    def layers(self):
        """(resnet, attention or None) in the order they run, also in the mid block."""
        return zip_longest(self.resnets, self.attentions)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(C/heads)) v: x [B,N,C] asks, context [B,L,D] (or x) answers: [B,N,C]."""
    def __init__(self, channels, context_width, heads):
        super().__init__()
        if channels % heads:
            raise ValueError(f"attention_head_dim = {heads} does not divide {channels} channels")
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_width, channels, bias=False)
        self.to_v = nn.Linear(context_width, channels, bias=False)
        # A list only because the key is to_out.0.
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2)    # [B,heads,N,C/heads]
                   for t in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """[B,N,C] -> [B,N,C], each pixel by itself: one half of a projection gates the other."""
    def __init__(self, channels):
        super().__init__()
        # The keys are net.0.proj and net.2: index 1 held a dropout when the checkpoints were made.
        project = nn.ModuleDict({"proj": nn.Linear(channels, 8 * channels)})
        self.net = nn.ModuleList([project, nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x):
        # GEGLU. Swapped, the two would load all the same.
        value, gate = self.net[0]["proj"](x).chunk(2, dim=-1)
        return self.net[2](value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Pixels look at each other (attn1), then at the prompt (attn2), then think (ff).
    x [B,N,C], context [B,L,D] -> [B,N,C]."""
    def __init__(self, channels, context_width, heads):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(channels), Attention(channels, channels, heads)
        self.norm2, self.attn2 = nn.LayerNorm(channels), Attention(channels, context_width, heads)
        self.norm3, self.ff = nn.LayerNorm(channels), FeedForward(channels)

    def forward(self, x, context):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """`depth` TransformerBlocks over an image, with a skip around all: [B,C,H,W] -> [B,C,H,W]."""
    def __init__(self, channels, context_width, heads, depth, groups, linear):
        super().__init__()
        # eps 1e-6 here, 1e-5 in the resnets. The wrong one draws good pictures, but other ones.
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        # A linear layer in SD 2 and XL, a 1x1 convolution in SD 1: the same sum, other shapes.
        self.linear = linear
        project = nn.Linear if linear else partial(nn.Conv2d, kernel_size=1)
        self.proj_in = project(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context_width, heads) for _ in range(depth))
        self.proj_out = project(channels, channels)

    def forward(self, x, context):
        h = self.norm(x) if self.linear else self.proj_in(self.norm(x))
        # Contiguous: else the norms and sums below would stride through memory.
        h = h.flatten(2).transpose(1, 2).contiguous()       # [B,C,H,W] -> [B,N,C]
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h) if self.linear else h
        h = h.transpose(1, 2).unflatten(2, x.shape[-2:])    # [B,N,C] -> [B,C,H,W]
        return x + (h if self.linear else self.proj_out(h))


def sinusoid(values, width):
    """Numbers [n] (timesteps, or SDXL's sizes in pixels) -> [n,width]: their phases at width/2
    frequencies, from 1 to 1/10000. Always fp32: bf16 cannot tell t = 999 from t = 998."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device)
    angles = values.float()[:, None] * torch.exp(steps * (-math.log(10000) / half))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def two_layers(c_in, width):
    """[B,c_in] -> [B,width]: makes of the waves something that the resnets can use."""
    return nn.Sequential(OrderedDict(
        linear_1=nn.Linear(c_in, width), silu=nn.SiLU(), linear_2=nn.Linear(width, width)))


def build_block(c, level, inputs, transformers, down=False, up=False):
    """One level: a resnet for each of the input widths, and so many transformers."""
    widths, groups = c["block_out_channels"], c["norm_num_groups"]
    width, E = widths[level], 4 * widths[0]
    # Trap: attention_head_dim is the NUMBER of heads, not their width. SD 1.5's 8 means 8 heads of
    # 40, 80 and 160 channels; SD 2's [5, 10, 20, 20] makes heads of 64. Read otherwise, it loads.
    heads, depth = c["attention_head_dim"][level], c["transformer_layers_per_block"][level]
    linear, D = c["use_linear_projection"], c["cross_attention_dim"]
    return Block([ResnetBlock(c_in, width, E, groups, c["norm_eps"]) for c_in in inputs],
                 [Transformer(width, D, heads, depth, groups, linear) for _ in range(transformers)],
                 [Downsample(width)] if down else [], [Upsample(width)] if up else [])


def build_blocks(c):
    """(down_blocks, mid_block, up_blocks). The skips' widths go on a stack and come off it, just as
    the skips do in forward()."""
    widths, layers = c["block_out_channels"], c["layers_per_block"]
    down_blocks, up_blocks = nn.ModuleList(), nn.ModuleList()    # up: from the bottom of the U
    now, skips, levels = widths[0], [widths[0]], range(len(widths))
    for level, kind in zip(levels, c["down_block_types"]):
        width, n, down = widths[level], layers[level], level < levels[-1]
        inputs = [now] + [width] * (n - 1)
        down_blocks.append(build_block(c, level, inputs, n * (kind == DOWN), down=down))
        skips += [width] * (n + down)
        now = width
    mid_block = build_block(c, -1, [now, now], 1)
    for level, kind in zip(reversed(levels), c["up_block_types"]):
        # One layer more than on the way down: it takes the downsampler's skip, or conv_in's.
        width, n = widths[level], layers[level] + 1
        below = [now] + [width] * (n - 1)
        inputs = [own + skip for own, skip in zip(below, reversed(skips[-n:]))]
        del skips[-n:]
        up_blocks.append(build_block(c, level, inputs, n * (kind == UP), up=level > 0))
        now = width
    return down_blocks, mid_block, up_blocks


def run_layer(resnet, attention, x, time, context, skip=None):
    """One resnet and, if there is one, its transformer: what checkpointing computes twice."""
    # Joined in here: checkpointing then keeps the two parts, and not their copy.
    x = resnet(x if skip is None else torch.cat([x, skip], dim=1), time)
    return x if attention is None else attention(x, context)


class UNet(nn.Module):
    """config: the dict of unet/config.json; kept, untouched. Raises ValueError, naming key and
    value, for one that is not implemented.

    `checkpointing = True` keeps only each layer's input for the backward pass and computes the
    layer again there: one forward more in time, a fraction of the memory. Trap: a LoRA must then be
    switched on or off only after backward(), which reads it again.
    """
    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = config, False
        c = completed(config)
        width = c["block_out_channels"][0]
        self.context_width = c["cross_attention_dim"]    # D
        self.time_embedding = two_layers(width, 4 * width)
        self.add_embedding, self.pooled_width = None, 0    # P
        if c["addition_embed_type"]:    # SDXL
            c_in = c["projection_class_embeddings_input_dim"]
            self.add_embedding = two_layers(c_in, 4 * width)
            self.pooled_width = c_in - 6 * c["addition_time_embed_dim"]
        self.conv_in = nn.Conv2d(c["in_channels"], width, 3, padding=1)
        self.down_blocks, self.mid_block, self.up_blocks = build_blocks(c)
        self.conv_norm_out = nn.GroupNorm(c["norm_num_groups"], width, c["norm_eps"])
        self.conv_out = nn.Conv2d(width, c["out_channels"], 3, padding=1)

    def run(self, *layer):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(run_layer, *layer, use_reentrant=False)
        return run_layer(*layer)

    def embed_time(self, sample, timestep, pooled, time_ids):
        """The time, and for SDXL the pooled prompt and the picture's sizes, as one vector [B,E]."""
        B, dtype = len(sample), self.conv_norm_out.weight.dtype
        waves = sinusoid(timestep.expand(B), self.conv_norm_out.num_channels)
        time = self.time_embedding(waves.to(dtype))
        if self.add_embedding is not None:
            sizes = sinusoid(time_ids.flatten(), self.config["addition_time_embed_dim"])
            added = torch.cat([pooled, sizes.view(B, -1)], dim=-1)    # [B,P+6*256]
            time = time + self.add_embedding(added.to(dtype))
        return F.silu(time)    # every resnet starts with this silu: once here, not in each of them

    def forward(self, sample, timestep, context, pooled=None, time_ids=None):
        """Predicts the noise (or v) in a latent: -> [B,C,H,W], with out_channels for C.

        sample [B,C,H,W] at the scheduler's scale, any H and W; timestep [B] or 0-dim, 0..999, int
        or float; context [B,L,D] the prompt's hidden states; SDXL also pooled [B,P] and time_ids
        [B,6] = (original height, width, crop top, left, target height, width) in pixels.
        """
        time = self.embed_time(sample, timestep, pooled, time_ids)

        # 1. Down: each layer's output and each downsampling go on the stack of skips.
        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            for resnet, attention in block.layers():
                x = self.run(resnet, attention, x, time, context)
                skips.append(x)
            for downsample in block.downsamplers:
                x = downsample(x)
                skips.append(x)

        # 2. Middle: the fewest pixels, the widest view.
        for resnet, attention in self.mid_block.layers():
            x = self.run(resnet, attention, x, time, context)

        # 3. Up: each layer takes the newest skip: fine detail need not pass through the middle.
        for block in self.up_blocks:
            for resnet, attention in block.layers():
                x = self.run(resnet, attention, x, time, context, skips.pop())
            for upsample in block.upsamplers:
                # Not simply 2x: an odd size was rounded up on the way down.
                x = upsample(x, skips[-1].shape[-2:])
        return self.conv_out(F.silu(self.conv_norm_out(x)))
