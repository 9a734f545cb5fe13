"""The noise schedule of a diffusion model, and the samplers that walk it backwards.

Needs   torch, and the dict of a checkpoint's scheduler/scheduler_config.json.
Gives   NoiseSchedule: clean latents -> noisy latents, the training target, and both ways back;
        stratified_times(): the timesteps of a training step;
        sample():      pure noise -> clean latents, by DDIM or by DPM-Solver++ (SAMPLERS).

The one formula everything here follows from (the forward process, Ho et al. 2020, 2006.11239):

    x_t = α_t·x_0 + σ_t·ε,    α_t = √ᾱ_t,  σ_t = √(1−ᾱ_t),  ᾱ_t = Π_{i≤t} (1−β_i),   ε ~ N(0, I)

so α² + σ² = 1: noise replaces signal and the variance stays at 1. (This α is the DPM-Solver papers'
letter; Ho et al. write √ᾱ.) Knowing x_t, the clean x_0, the noise ε and the velocity v are three
ways to say the same thing, and the network may be trained to say any of them.

Letters: B batch, C latent channels, H W latent height and width, T training timesteps (1000).
Timesteps are integers, 0 (nearly clean) to T−1 (nearly pure noise).
"""
import math

import torch

from model.tools.command import BadInput
from model.unet import refuse_unknown

# Other values would change ᾱ or the steps. {key: values, first what a missing key means}
IMPLEMENTED = {
    "beta_schedule": ("linear", "scaled_linear"), "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": (None, "leading", "trailing", "linspace"), "trained_betas": (None,),
    "rescale_betas_zero_snr": (False, None), "thresholding": (False, None)}


class NoiseSchedule:
    """β and ᾱ of a checkpoint, and the algebra between x_0, ε, v and x_t.

    config: a diffusers scheduler_config.json as a dict. A missing key means what it means there:
        clip_sample and set_alpha_to_one (DDIM alone reads them) are then True, where Stable
        Diffusion's files say false. A solver's own settings (order, Karras sigmas) are ignored.
    Raises ValueError or KeyError, naming the key, for a config that is not implemented.
    """
    def __init__(self, config: dict):
        refuse_unknown(config, IMPLEMENTED)
        T, start, end = (config[key] for key in ("num_train_timesteps", "beta_start", "beta_end"))
        if not (1 <= T <= 100_000 and 0 < start < 1 and 0 < end < 1):
            raise ValueError(f"num_train_timesteps {T} and betas {start} to {end} are no schedule")
        self.T, self.prediction_type = T, config.get("prediction_type", "epsilon")
        self.timestep_spacing = config.get("timestep_spacing")    # None: the sampler's own
        self.steps_offset = int(config.get("steps_offset", 0))
        clips = config.get("clip_sample", True)
        self.clip_range = float(config.get("clip_sample_range") or 1.0) if clips else None

        # "scaled" is linear in √β: the first steps add less noise than the linear schedule's.
        power = 0.5 if config.get("beta_schedule") == "scaled_linear" else 1.0
        betas = torch.linspace(start ** power, end ** power, T, dtype=torch.float32)
        betas = betas ** (1 / power)    # [T]
        # Always fp32: near t = 0, 1−ᾱ is 8.5e-4, of which bf16 keeps no digit.
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)    # ᾱ [T]
        # The same numbers for the samplers, which need not wait for a device.
        self.table = self.alphas_cumprod.tolist()
        # What DDIM's last step lands on: exactly clean, or as clean as t = 0 (as SD was sampled).
        self.final_alpha_cumprod = 1.0 if config.get("set_alpha_to_one", True) else self.table[0]

    def alpha_sigma(self, t, x):
        """(α_t, σ_t) to multiply x [B,C,H,W] with: floats for an int t, [B,1,1,1] for a t [B]."""
        if isinstance(t, int):
            return math.sqrt(self.table[t]), math.sqrt(1.0 - self.table[t])
        if self.alphas_cumprod.device != x.device:    # once, not at every training step
            self.alphas_cumprod = self.alphas_cumprod.to(x.device)
        abar = self.alphas_cumprod[t.to(x.device)].reshape(-1, *[1] * (x.dim() - 1))
        return abar.sqrt(), (1.0 - abar).sqrt()

    def add_noise(self, x0, noise, t):
        """x_t [B,C,H,W], fp32, from clean x0 and normal noise; t [B] or an int. (README, eq. 1)"""
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0.float() + sigma * noise.float()    # x_t = α·x_0 + σ·ε

    def target(self, x0, noise, t):
        """What the network should output at x_t [B,C,H,W], fp32: ε, or for v-prediction the
        velocity (Salimans & Ho 2022, 2202.00512), the direction in which x_t turns as noise grows.
        ε in its place would be wrong at every t, and no shape gives it away."""
        if self.prediction_type == "epsilon":
            return noise.float()
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * noise.float() - sigma * x0.float()    # v = α·ε − σ·x_0

    def noised(self, x0, noise, t):
        """(x_t, what the network should output there), both [B,C,H,W] fp32: a training example."""
        return self.add_noise(x0, noise, t), self.target(x0, noise, t)

    def to_x0_and_noise(self, output, x_t, t):
        """(x_0, ε), both [B,C,H,W] fp32, that the network's output [B,C,H,W] at x_t stands for."""
        alpha, sigma = self.alpha_sigma(t, x_t)
        output, x_t = output.float(), x_t.float()
        if self.prediction_type == "epsilon":
            return (x_t - sigma * output) / alpha, output    # x_0 = (x_t − σ·ε)/α
        # (x_t, v) is (x_0, ε) turned by an angle whose cosine is α: to invert it is to turn back.
        return alpha * x_t - sigma * output, sigma * x_t + alpha * output

    def timesteps(self, steps: int, default: str, skip_lowest=False) -> list[int]:
        """`steps` descending ints out of 0..T−1, by the config's spacing, else by `default`.

        leading   0, k, 2k, … plus steps_offset (k = T // steps): never starts from pure noise;
        linspace  evenly from 0 to T−1, both ends visited;
        trailing  T−1, T−1−k, …: starts from pure noise, for zero-SNR models (2305.08891, table 2).
        skip_lowest: one step more, without the one nearest to clean: the jump to zero noise takes
            its place (in diffusers' DPM-Solver, not in its DDIM). Raises BadInput for too many.
        """
        spacing, n = self.timestep_spacing or default, steps + skip_lowest
        if spacing == "trailing":
            # Rounded as numpy.arange rounds: k+½ must fall the same way. But diffusers' own list
            # is one too long for 62 of the counts up to 1000 (61, 103, …), with t = −1 at its end.
            stride = (self.T - self.T / steps) - self.T
            times = [round(self.T + i * stride) - 1 for i in range(steps)]
        elif spacing == "leading":
            k = self.T // n
            times = [i * k + self.steps_offset for i in reversed(range(skip_lowest, n))]
        else:
            stride = (self.T - 1) / max(n - 1, 1)
            times = [round(i * stride) for i in reversed(range(skip_lowest, n))]
        if times != sorted(set(times), reverse=True) or times[0] >= self.T or times[-1] < 0:
            raise BadInput(f"--steps {steps} do not fit {self.T} training timesteps with "
                           f"{spacing!r} spacing; use fewer steps")
        return times


def stratified_times(n: int, T: int, rng: torch.Generator):
    """n timesteps [n] in 0..T-1, one from each of n equal slices, in random order: every step sees
    all noise levels. The minimum is needed: 0.99999999 * T rounds to T."""
    u = (torch.randperm(n, generator=rng) + torch.rand(n, generator=rng)) / n
    return (u * T).long().clamp(max=T - 1)


# A sampler is two functions: the pairs (t, s) to visit, and one step from noise level t to the
# lower s. s < 0 stands for "no noise left". A step takes and returns its memory (`state`, None at
# the start).

def ddim_pairs(schedule, steps):
    # DDIM steps by a fixed stride T // steps, which meets the next t only with leading spacing.
    # diffusers keeps it for the others too: another stride would give another picture.
    return [(t, t - schedule.T // steps) for t in schedule.timesteps(steps, default="leading")]


def ddim_step(schedule, x, output, t, s, state):
    """One deterministic DDIM step (η = 0; Song et al. 2020, 2010.02502, eq. 12), x at t -> at s."""
    x0, noise = schedule.to_x0_and_noise(output, x, t)
    if schedule.clip_range is not None:    # for pixel models; latents are not confined to [−1, 1]
        x0 = x0.clamp(-schedule.clip_range, schedule.clip_range)
    abar = schedule.table[s] if s >= 0 else schedule.final_alpha_cumprod
    return math.sqrt(abar) * x0 + math.sqrt(1.0 - abar) * noise, state    # x_s = α_s·x̂_0 + σ_s·ε̂


def dpmpp_pairs(schedule, steps):
    # Each step goes to the next visited t, the last one to zero noise. Without timestep_spacing a
    # config means leading for DDIM but linspace here, as the two diffusers classes do.
    times = schedule.timesteps(steps, default="linspace", skip_lowest=True)
    return list(zip(times, times[1:] + [-1]))


def dpmpp_step(schedule, x, output, t, s, state):
    """One DPM-Solver++(2M) step (Lu et al. 2022, 2211.01095, algorithm 2), x at t -> at s.

    Its clock is the half log-SNR λ = log(α/σ), in which the x_0-prediction ODE is solved exactly
    but for the curve of x̂_0(λ). A line through the last two x̂_0 stands in for that curve, at no
    network call. state: (x̂_0, λ) of the step before. Without one, D = x̂_0: DDIM's step.
    """
    x0, _ = schedule.to_x0_and_noise(output, x, t)
    if s < 0:
        return x0, None    # σ_s = 0: e^{−h} = 0, α_s = 1; h = ∞ leaves no line to extend
    alpha_t, sigma_t = schedule.alpha_sigma(t, x)
    alpha_s, sigma_s = schedule.alpha_sigma(s, x)
    lam = math.log(alpha_t / sigma_t)        # λ_t
    h = math.log(alpha_s / sigma_s) - lam    # h = λ_s − λ_t > 0
    D = x0
    if state is not None:
        x0_before, lam_before = state
        r = (lam - lam_before) / h    # r = h_before / h
        D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_before
    # x_s = (σ_s/σ_t)·x_t − α_s(e^{−h} − 1)·D
    return sigma_s / sigma_t * x - alpha_s * math.expm1(-h) * D, (x0, lam)


SAMPLERS = {"ddim": (ddim_pairs, ddim_step), "dpm++": (dpmpp_pairs, dpmpp_step)}


@torch.no_grad()
def sample(predict, x_T, schedule: NoiseSchedule, steps: int, sampler: str):
    """Pure noise x_T [B,C,H,W] -> clean latents x_0 [B,C,H,W], fp32, after `steps` network calls.

    predict(x_t [B,C,H,W] fp32, t int) -> the network's output [B,C,H,W], guidance already applied,
        any float dtype: x itself stays in fp32, where the small last steps do not round away.
    sampler: of SAMPLERS; equal to diffusers' DDIMScheduler (η 0) and DPMSolverMultistepScheduler,
        built by from_config(config), within rounding. Raises BadInput for too many steps.
    """
    pairs, step = SAMPLERS[sampler]
    x, state = x_T.float(), None
    for t, s in pairs(schedule, steps):
        x, state = step(schedule, x, predict(x, t), t, s, state)
    return x
