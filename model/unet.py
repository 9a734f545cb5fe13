"""The denoiser of Stable Diffusion: the UNet, by hand, for SD 1.x, SD 2.x and SDXL.

Needs: torch, and the dict of a checkpoint's unet/config.json.
Gives: UNet, and the small parts that vae.py shares: Block, ResnetBlock, Downsample, Upsample, refuse_unknown.

From a noisy latent x_t, the time t and the prompt's embedding it predicts the noise (or v, as the checkpoint has it).

    sample -> conv_in -> down_blocks -> mid_block -> up_blocks -> conv_out -> prediction
                             |______ skips, a stack ______|

Attributes are named as the public checkpoints name them, so that loading is one strict load_state_dict: there is no
converter to get wrong. A block is a list of layers; a layer is one resnet (mixes neighbouring pixels, hears the time)
and then, where there is attention, one transformer (mixes all pixels, reads the prompt).

Letters:  B batch   C channels   H W height and width of the latent (an eighth of the picture's)   N = H*W as tokens
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

# What a config means when it leaves a key out (early SD 1.x files leave out many).
DEFAULTS = dict(
    in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, attention_head_dim=8,
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), cross_attention_dim=1280, norm_num_groups=32,
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, transformer_layers_per_block=1, norm_eps=1e-5,
    use_linear_projection=False, flip_sin_to_cos=True, freq_shift=0, addition_embed_type=None,
    addition_time_embed_dim=None, projection_class_embeddings_input_dim=None)

KINDS = dict(down_block_types={"CrossAttnDownBlock2D": True, "DownBlock2D": False},      # True: the block attends
             up_block_types={"CrossAttnUpBlock2D": True, "UpBlock2D": False})

# Keys that change the arithmetic, with the values implemented here. Others are refused: ignored, they could load, run,
# and draw subtly wrong pictures. (SD 2.1's upcast_attention is no matter: fused attention accumulates in fp32.)
IMPLEMENTED = dict(
    dict.fromkeys((
        "only_cross_attention", "mid_block_only_cross_attention", "dual_cross_attention", "cross_attention_norm",
        "num_attention_heads", "reverse_transformer_layers_per_block", "dropout", "center_input_sample",
        "time_embedding_dim", "time_embedding_act_fn", "timestep_post_act", "time_cond_proj_dim", "class_embed_type",
        "num_class_embeds", "class_embeddings_concat", "encoder_hid_dim", "encoder_hid_dim_type"), (None, False)),
    **dict.fromkeys(("resnet_out_scale_factor", "mid_block_scale_factor", "downsample_padding"), (1,)),
    **dict.fromkeys(("attention_type", "resnet_time_scale_shift"), ("default",)),
    mid_block_type=("UNetMidBlock2DCrossAttn",), act_fn=("silu", "swish"), addition_embed_type=(None, "text_time"),
    time_embedding_type=("positional",), resnet_skip_time_act=(False,), conv_in_kernel=(3,), conv_out_kernel=(3,))


def refuse_unknown(what, config, implemented):
    """Raise ValueError, naming key and value, if config has a value outside implemented = {key: values}."""
    for key, values in implemented.items():
        if key in config and config[key] not in values:
            raise ValueError(f"{what} config: {key} = {config[key]!r} is not implemented, only "
                             f"{' or '.join(map(repr, values))}; use a Stable Diffusion 1, 2 or XL checkpoint.")


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions around a skip: x [B,in,H,W], time [B,E] or None -> [B,out,H,W]."""
    def __init__(self, c_in, c_out, time_width, groups, eps):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in, eps), nn.Conv2d(c_in, c_out, 3, padding=1)
        if time_width:                                    # the VAE's resnets know no time
            self.time_emb_proj = nn.Linear(time_width, c_out)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out, eps), nn.Conv2d(c_out, c_out, 3, padding=1)
        # The key exists only where the width changes; an identity convolution elsewhere would break strict loading.
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x, time=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if time is not None:                              # one offset per channel, the same at every pixel;
            h = h + self.time_emb_proj(time)[:, :, None, None]     # `time` has been through silu already
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class Downsample(nn.Module):
    """[B,C,H,W] -> [B,C,H/2,W/2], a stride-2 convolution."""
    def __init__(self, channels, asymmetric=False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x):
        # Trap: the VAE's encoder pads on the right and at the bottom only, the UNet on all four sides. The wrong
        # one has the right shapes, runs, and shifts the picture by a pixel at every level.
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """[B,C,H,W] -> [B,C,2H,2W], or to `size`: nearest neighbour, then a convolution that smooths the steps."""
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size=None):
        return self.conv(F.interpolate(x, size=size, scale_factor=None if size else 2.0, mode="nearest"))


class Block(nn.Module):
    """One level of the U: a plain container whose lists give the checkpoint's keys. An empty list has none."""
    def __init__(self, resnets, attentions=(), downsamplers=(), upsamplers=()):
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)
        self.downsamplers, self.upsamplers = nn.ModuleList(downsamplers), nn.ModuleList(upsamplers)

    def layers(self):
        """(resnet, attention or None) in the order they run; the mid block's resnet, attention, resnet fits too."""
        return zip_longest(self.resnets, self.attentions)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(C/heads)) v:  x [B,N,C] asks, context [B,L,D] (x itself if None) answers -> [B,N,C]."""
    def __init__(self, channels, context_width, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_width, channels, bias=False)
        self.to_v = nn.Linear(context_width, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])     # a list only because the key is to_out.0

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2)     # [B,N,C] -> [B,heads,N,C/heads], a view
                   for t in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """[B,N,C] -> [B,N,C], each pixel by itself: GEGLU, where one half of a projection gates the other through gelu."""
    def __init__(self, channels):
        super().__init__()
        # The keys are net.0.proj and net.2: index 1 held a dropout when the checkpoints were made.
        self.net = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(channels, 8 * channels)}), nn.Identity(),
                                  nn.Linear(4 * channels, channels)])

    def forward(self, x):
        value, gate = self.net[0]["proj"](x).chunk(2, dim=-1)            # value first; swapped, it loads all the same
        return self.net[2](value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Pixels look at each other (attn1), then at the prompt (attn2), then think (ff). x [B,N,C], context [B,L,D]."""
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
    """`depth` TransformerBlocks over an image, with a skip around all of them: [B,C,H,W] -> [B,C,H,W]."""
    def __init__(self, channels, context_width, heads, depth, groups, linear):
        super().__init__()
        # eps 1e-6 here, 1e-5 in the resnets. The wrong one still draws good pictures, but not the same pictures.
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        # A linear layer in SD 2 and XL, a 1x1 convolution in SD 1: the same sum with other weight shapes.
        self.linear = linear
        project = nn.Linear if linear else partial(nn.Conv2d, kernel_size=1)
        self.proj_in = project(channels, channels)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, context_width, heads) for _ in range(depth))
        self.proj_out = project(channels, channels)

    def forward(self, x, context):
        h = self.norm(x) if self.linear else self.proj_in(self.norm(x))
        # Contiguous, since all the norms and sums below would otherwise stride through memory, a channel at a time.
        h = h.flatten(2).transpose(1, 2).contiguous()                    # [B,C,H,W] -> [B,N,C]
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h) if self.linear else h
        h = h.transpose(1, 2).unflatten(2, x.shape[-2:])                 # [B,N,C] -> [B,C,H,W]
        return x + (h if self.linear else self.proj_out(h))


def sinusoid(values, width, flip_sin_to_cos=True, freq_shift=0):
    """Numbers [n] (timesteps, or SDXL's sizes in pixels) -> [n,width]: their phases at width/2 frequencies, 1..1/10000.
    Always fp32: bf16 cannot tell t = 999 from t = 998."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device)
    angles = values.float()[:, None] * torch.exp(steps * (-math.log(10000) / (half - freq_shift)))
    waves = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return torch.cat(waves, dim=-1)


def two_layers(c_in, width):
    """[B,c_in] -> [B,width]: how the waves become something the resnets can use."""
    return nn.Sequential(OrderedDict(linear_1=nn.Linear(c_in, width), silu=nn.SiLU(), linear_2=nn.Linear(width, width)))


class UNet(nn.Module):
    """UNet(config): config is the dict of unet/config.json; kept, untouched, as self.config.

    `checkpointing = True` keeps only each layer's input for the backward pass and computes the layer again there:
    one forward more in time, a fraction of the memory. Trap: what the layers read must then be the same in backward()
    as in forward(), so switch a LoRA on or off only after backward().
    Raises ValueError, naming key and value, for a config that this file does not implement.
    """
    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = config, False
        refuse_unknown("UNet", config, IMPLEMENTED)
        c = {**DEFAULTS, **config}
        widths, groups = c["block_out_channels"], c["norm_num_groups"]
        levels, time_width = len(widths), 4 * widths[0]                  # E = time_width
        sdxl = c["addition_embed_type"] == "text_time"
        for key in ("cross_attention_dim", "norm_num_groups") + (
                "addition_time_embed_dim", "projection_class_embeddings_input_dim") * sdxl:
            if not isinstance(c[key], int):
                raise ValueError(f"UNet config: {key} = {c[key]!r} must be one integer.")

        def per_level(key):
            """One value per level; a single value stands for all."""
            values = list(c[key]) if isinstance(c[key], (list, tuple)) else [c[key]] * levels
            if len(values) != levels or not all(isinstance(value, (int, str)) for value in values):
                raise ValueError(f"UNet config: {key} = {c[key]!r} must be one value, or {levels}: one for each level.")
            return values

        # The naming trap: attention_head_dim is the NUMBER of heads, not their width. SD 1.5's 8 means 8 heads of
        # 40, 80 and 160 channels; SD 2's [5, 10, 20, 20] makes heads of 64. Read the other way, everything loads.
        heads, layers = per_level("attention_head_dim"), per_level("layers_per_block")
        depths = per_level("transformer_layers_per_block")
        if any(width % n for width, n in zip(widths, heads)):
            raise ValueError(f"UNet config: attention_head_dim = {heads} must divide block_out_channels = {widths}.")
        for key in KINDS:
            for kind in per_level(key):
                refuse_unknown("UNet", {key: kind}, KINDS)
        down_attends, up_attends = ([KINDS[key][kind] for kind in per_level(key)] for key in KINDS)

        resnet = partial(ResnetBlock, time_width=time_width, groups=groups, eps=c["norm_eps"])

        def transformer(level):
            return Transformer(widths[level], c["cross_attention_dim"], heads[level], depths[level], groups,
                               c["use_linear_projection"])

        self.time_embedding = two_layers(widths[0], time_width)
        self.add_embedding = two_layers(c["projection_class_embeddings_input_dim"], time_width) if sdxl else None
        self.width, self.waves = widths[0], dict(flip_sin_to_cos=c["flip_sin_to_cos"], freq_shift=c["freq_shift"])

        # The skips' widths go on a stack just as forward() stacks the skips: no rule of who meets whom to get wrong.
        self.conv_in = nn.Conv2d(c["in_channels"], widths[0], 3, padding=1)
        now, skips = widths[0], [widths[0]]
        self.down_blocks = nn.ModuleList()
        for i in range(levels):
            resnets = [resnet(now if j == 0 else widths[i], widths[i]) for j in range(layers[i])]
            now, last = widths[i], i == levels - 1
            self.down_blocks.append(Block(resnets, [transformer(i) for _ in resnets if down_attends[i]],
                                          downsamplers=[] if last else [Downsample(now)]))
            skips += [now] * (layers[i] + (not last))
        self.mid_block = Block([resnet(now, now), resnet(now, now)], [transformer(-1)])
        self.up_blocks = nn.ModuleList()                                 # listed from the bottom of the U
        for i, attend in zip(reversed(range(levels)), up_attends):
            # One layer more than on the way down takes the downsampler's skip (at the last level, conv_in's).
            resnets = [resnet((now if j == 0 else widths[i]) + skips.pop(), widths[i]) for j in range(layers[i] + 1)]
            now = widths[i]
            self.up_blocks.append(Block(resnets, [transformer(i) for _ in resnets if attend],
                                        upsamplers=[Upsample(now)] if i else []))

        self.conv_norm_out = nn.GroupNorm(groups, now, c["norm_eps"])
        self.conv_out = nn.Conv2d(now, c["out_channels"], 3, padding=1)

    def _layer(self, resnet, attention, x, time, context, skip=None):
        """One resnet and, if there is one, its transformer: the unit that checkpointing computes twice."""
        def run(x):
            # Joined in here, so that checkpointing keeps the two parts, which live anyway, and not their copy.
            x = resnet(x if skip is None else torch.cat([x, skip], dim=1), time)
            return x if attention is None else attention(x, context)
        again = self.checkpointing and torch.is_grad_enabled()
        return checkpoint(run, x, use_reentrant=False) if again else run(x)

    def forward(self, sample, timestep, context, pooled=None, time_ids=None):
        """Predict the noise (or v) in a latent: -> [B,C,H,W], with out_channels for C.

        sample [B,C,H,W] at the scheduler's scale, any H and W; timestep [B] or 0-dim, 0..999, int or float;
        context [B,L,D] the prompt's hidden states; SDXL also pooled [B,P] and time_ids [B,6] = (original height,
        width, crop top, left, target height, width) in pixels (others ignore both).
        Raises ValueError if SDXL's pooled or time_ids are missing.
        """
        # 1. When: the time (and for SDXL the pooled prompt and the picture's sizes) as one vector [B,E].
        B, dtype = sample.shape[0], self.conv_norm_out.weight.dtype
        time = self.time_embedding(sinusoid(timestep.expand(B), self.width, **self.waves).to(dtype))
        if self.add_embedding is not None:
            if pooled is None or time_ids is None:
                raise ValueError("This UNet is SDXL's: pooled [B,P] and time_ids [B,6] are needed beside the context.")
            sizes = sinusoid(time_ids.flatten(), self.config["addition_time_embed_dim"], **self.waves)   # [B*6,256]
            time = time + self.add_embedding(torch.cat([pooled, sizes.view(B, -1)], dim=-1).to(dtype))   # [B,P+1536]
        time = F.silu(time)              # every resnet starts with this silu: once here rather than in each of them

        # 2. Down: each layer's output and each downsampling go on the stack of skips.
        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            for resnet, attention in block.layers():
                x = self._layer(resnet, attention, x, time, context)
                skips.append(x)
            for downsample in block.downsamplers:
                x = downsample(x)
                skips.append(x)

        # 3. Middle: the fewest pixels, the widest view.
        for resnet, attention in self.mid_block.layers():
            x = self._layer(resnet, attention, x, time, context)

        # 4. Up: each layer takes the newest skip, so that fine detail need not pass through the middle.
        for block in self.up_blocks:
            for resnet, attention in block.layers():
                x = self._layer(resnet, attention, x, time, context, skips.pop())
            for upsample in block.upsamplers:
                x = upsample(x, skips[-1].shape[-2:])    # not simply 2x: an odd size was rounded up on the way down

        # 5. Out: back to the latent's channels.
        return self.conv_out(F.silu(self.conv_norm_out(x)))
