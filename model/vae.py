"""The VAE of Stable Diffusion: pictures to latents an eighth of their size, and back.

Needs: torch, and the dict of a checkpoint's vae/config.json.
Gives: VAE with encode() and decode().

The encoder gives each latent pixel a normal distribution (mean and log-variance); a latent is a
draw from it. The decoder turns a latent into a picture. No scaling here: what the UNet sees is
latent * scaling_factor (0.18215 in SD 1 and 2, 0.13025 in SDXL), applied once, by the caller.
Forgotten or applied twice, it raises no error: the pictures are just wrong.

Attributes are named as the public checkpoints name them: loading is one strict load_state_dict.

Letters:  B batch   H W a picture's height and width   f = 2^(levels-1), the reduction (SD: 8)
          h w = H/f, W/f   Z latent channels (SD: 4)   C channels inside   N = pixels as tokens
"""
import torch.nn.functional as F
from torch import nn

from model.tools.command import BadInput
from model.unet import Block, Downsample, ResnetBlock, Upsample, refuse_unknown

EPS = 1e-6    # of every GroupNorm in here; the UNet's resnets have 1e-5
DEFAULTS = dict(
    in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(64,), layers_per_block=1,
    norm_num_groups=32, mid_block_add_attention=True, use_quant_conv=True, use_post_quant_conv=True)
IMPLEMENTED = dict(act_fn=("silu", "swish"), down_block_types=("DownEncoderBlock2D",),
                   up_block_types=("UpDecoderBlock2D",))    # other values are refused


class Attention(nn.Module):
    """Every pixel looks at every other: [B,C,h,w] -> [B,C,h,w]. Unlike the UNet's: one head, its
    own norm and skip inside, biases on q, k and v, and no context."""
    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        # A list only because the key is to_out.0.
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)          # [B,C,h,w] -> [B,N,C]
        q, k, v = (proj(tokens)[:, None] for proj in (self.to_q, self.to_k, self.to_v))
        tokens = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + tokens.transpose(1, 2).unflatten(2, x.shape[-2:])    # [B,N,C] -> [B,C,h,w]


def resnet(c_in, c_out, groups):
    """The UNet's resnet without a time: a picture's code has none."""
    return ResnetBlock(c_in, c_out, time_width=None, groups=groups, eps=EPS)


def mid_block(channels, groups, attention):
    """resnet, attention (left out if the config says so), resnet, all at the smallest size."""
    return Block([resnet(channels, channels, groups) for _ in range(2)],
                 [Attention(channels, groups)] if attention else [])


def run(blocks, x):
    """Blocks of layers (resnet, attention if there is one, and so on), each with its sampling."""
    for block in blocks:
        for res, attention in block.layers():
            x = res(x)
            x = x if attention is None else attention(x)
        for sampling in (*block.downsamplers, *block.upsamplers):
            x = sampling(x)
    return x


class Encoder(nn.Module):
    """[B,3,H,W] -> [B,2Z,h,w]."""
    def __init__(self, c_in, c_out, widths, layers, groups, attention):
        super().__init__()
        now, last = widths[0], len(widths) - 1
        self.conv_in = nn.Conv2d(c_in, now, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            resnets = [resnet(width if j else now, width, groups) for j in range(layers)]
            downsamplers = [Downsample(width, asymmetric=True)] if i < last else []
            self.down_blocks.append(Block(resnets, downsamplers=downsamplers))
            now = width
        self.mid_block = mid_block(now, groups, attention)
        self.conv_norm_out = nn.GroupNorm(groups, now, EPS)
        self.conv_out = nn.Conv2d(now, c_out, 3, padding=1)

    def forward(self, x):
        x = run([*self.down_blocks, self.mid_block], self.conv_in(x))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """[B,Z,h,w] -> [B,3,H,W]: the encoder mirrored, with one resnet more a level, and no skips."""
    def __init__(self, c_in, c_out, widths, layers, groups, attention):
        super().__init__()
        now = widths[-1]
        self.conv_in = nn.Conv2d(c_in, now, 3, padding=1)
        self.mid_block = mid_block(now, groups, attention)
        self.up_blocks = nn.ModuleList()    # listed from the smallest picture up
        for i, width in reversed(list(enumerate(widths))):
            resnets = [resnet(width if j else now, width, groups) for j in range(layers + 1)]
            self.up_blocks.append(Block(resnets, upsamplers=[Upsample(width)] if i else []))
            now = width
        self.conv_norm_out = nn.GroupNorm(groups, now, EPS)
        self.conv_out = nn.Conv2d(now, c_out, 3, padding=1)

    def forward(self, z):
        x = run([self.mid_block, *self.up_blocks], self.conv_in(z))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """config: the dict of vae/config.json; kept, untouched. reduction: f.

    Trap: SDXL's original weights overflow in fp16 (black pictures): run it in fp32 or bf16. Raises
    ValueError, naming key and value, for a config that is not implemented.
    """
    def __init__(self, config):
        super().__init__()
        refuse_unknown(config, IMPLEMENTED)
        c = {**DEFAULTS, **config}
        widths, Z = c["block_out_channels"], c["latent_channels"]
        self.config, self.reduction = config, 2 ** (len(widths) - 1)
        # Both halves take the same description; the decoder reads the widths backwards.
        shape = (widths, c["layers_per_block"], c["norm_num_groups"], c["mid_block_add_attention"])
        self.encoder = Encoder(c["in_channels"], 2 * Z, *shape)    # a mean and a log-variance each
        self.decoder = Decoder(Z, c["out_channels"], *shape)
        self.quant_conv = nn.Conv2d(2 * Z, 2 * Z, 1) if c["use_quant_conv"] else nn.Identity()
        self.post_quant_conv = nn.Conv2d(Z, Z, 1) if c["use_post_quant_conv"] else nn.Identity()

    def encode(self, images):
        """Pictures [B,3,H,W] in [-1,1] -> (mean, logvar), each [B,Z,h,w], not scaled. Raises
        BadInput unless H and W are multiples of f: the edge would be cut off in silence."""
        H, W = images.shape[-2:]
        if H % self.reduction or W % self.reduction:
            raise BadInput(f"pictures of {W}x{H} pixels; both sides must be multiples of "
                           f"{self.reduction}; crop them")
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)    # exp() of a stray log-variance would be infinite

    def decode(self, z):
        """Latents [B,Z,h,w], already divided by the scaling factor -> pictures [B,3,H,W], about
        [-1,1]. Not clamped: before a loss, clipping would kill the gradient."""
        return self.decoder(self.post_quant_conv(z))
