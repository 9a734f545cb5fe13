"""The noise schedule of a diffusion model, and the samplers that walk it backwards.

Needs   torch alone, and the dictionary in a checkpoint's scheduler/scheduler_config.json.
Gives   NoiseSchedule: clean latents -> noisy latents, the training target, and both ways back;
        sample():      pure noise -> clean latents, by DDIM or by DPM-Solver++ (SAMPLERS).

The one formula everything here follows from (the forward process, Ho et al. 2020, 2006.11239, eq. 4):

    x_t = α_t·x_0 + σ_t·ε,    α_t = √ᾱ_t,  σ_t = √(1−ᾱ_t),  ᾱ_t = Π_{i≤t} (1−β_i),   ε ~ N(0, I)

so α² + σ² = 1: noise replaces signal and the variance stays at 1. (This α is the DPM-Solver papers'
letter; Ho et al. write √ᾱ.) Knowing x_t, the clean x_0, the noise ε and the velocity v are three ways
to say the same thing, and the network may be trained to say any of them.

Letters: B batch, C latent channels, H W latent height and width, T training timesteps (1000).
Timesteps are integers, 0 (nearly clean) to T−1 (nearly pure noise).
"""

import math

import torch

# What would change ᾱ or the steps and is not built here: any true value stops with a sentence, because
# to ignore it gives pictures that are wrong with every shape right.
UNSUPPORTED = ("trained_betas", "rescale_betas_zero_snr", "thresholding")


class NoiseSchedule:
    """β and ᾱ of a checkpoint, and the algebra between x_0, ε, v and x_t.

    config: a diffusers scheduler_config.json as a dict. Keys read: num_train_timesteps, beta_start,
        beta_end, beta_schedule (linear | scaled_linear), prediction_type (epsilon | v_prediction,
        default epsilon), timestep_spacing (leading | trailing | linspace, default the sampler's own),
        steps_offset (0), set_alpha_to_one and clip_sample (DDIM only; True where absent, as in
        diffusers; Stable Diffusion's files say false for both). A solver's own settings (order, Karras
        sigmas) are ignored: the sampler's name says which solver runs.
    Raises ValueError, one sentence, for a missing key or a setting that is not supported.
    """

    def __init__(self, config: dict):
        for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule"):
            if key not in config:
                raise ValueError(f"the scheduler config has no {key!r}; use the checkpoint's own file")
        for key in UNSUPPORTED:
            if config.get(key):
                raise ValueError(f"the scheduler config sets {key!r}, not supported here; use a checkpoint without it")

        def choice(key, default, allowed):
            value = config.get(key, default)
            if value not in allowed:
                raise ValueError(f"{key} {value!r} in the scheduler config is not supported; "
                                 f"use one of {', '.join(filter(None, allowed))}")
            return value

        beta_schedule = choice("beta_schedule", None, ("linear", "scaled_linear"))
        self.prediction_type = choice("prediction_type", "epsilon", ("epsilon", "v_prediction"))
        self.timestep_spacing = choice("timestep_spacing", None, (None, "leading", "trailing", "linspace"))
        self.steps_offset = config.get("steps_offset", 0)
        self.clip_range = config.get("clip_sample_range", 1.0) if config.get("clip_sample", True) else None

        T, ends, number = config["num_train_timesteps"], (config["beta_start"], config["beta_end"]), (int, float)
        if not (isinstance(T, int) and 1 <= T <= 100_000 and all(isinstance(beta, number) and 0 < beta < 1 for beta in ends)
                and isinstance(self.steps_offset, int) and isinstance(self.clip_range, (*number, type(None)))):
            raise ValueError(f"the scheduler config's num_train_timesteps {T!r}, betas {ends[0]!r} to {ends[1]!r}, steps_offset {self.steps_offset!r} "
                             f"and clip_sample_range {self.clip_range!r} make no schedule; use the checkpoint's own file")

        # "scaled" is linear in √β, so the first steps add less noise than the linear schedule's.
        self.T, power = T, 0.5 if beta_schedule == "scaled_linear" else 1.0
        betas = torch.linspace(*(beta ** power for beta in ends), T, dtype=torch.float32) ** (1 / power)   # [T]
        # Always fp32: near t = 0, 1−ᾱ is 8.5e-4, of which bf16 keeps no digit.
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)                                        # [T]
        self._table = self.alphas_cumprod.tolist()  # the same numbers for the samplers, without a device sync
        # What DDIM's last step lands on: exactly clean, or as clean as t = 0 (what SD was sampled with).
        self.final_alpha_cumprod = 1.0 if config.get("set_alpha_to_one", True) else self._table[0]

    # ---- between x_0, ε, v and x_t ------------------------------------------------------------------

    def alpha_sigma(self, t, x):
        """(α_t, σ_t) ready to multiply x [B,C,H,W]: two floats for an int t, two [B,1,1,1] for a t [B]."""
        if isinstance(t, int):
            return math.sqrt(self._table[t]), math.sqrt(1.0 - self._table[t])
        if self.alphas_cumprod.device != x.device:  # once, not at every training step
            self.alphas_cumprod = self.alphas_cumprod.to(x.device)
        abar = self.alphas_cumprod[t.to(x.device)].reshape(-1, *[1] * (x.dim() - 1))
        return abar.sqrt(), (1.0 - abar).sqrt()

    def add_noise(self, x0, noise, t):
        """x_t [B,C,H,W] in fp32 from clean x0 and standard normal noise [B,C,H,W]; t [B] or one int. (README, eq. 1)"""
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0.float() + sigma * noise.float()                       # x_t = α·x_0 + σ·ε

    def target(self, x0, noise, t):
        """What the network should output at x_t [B,C,H,W], fp32: ε, or for v-prediction the velocity
        (Salimans & Ho 2022, 2202.00512), which is the direction in which x_t turns as noise grows.
        To train a v-model against ε is wrong at every t, and no shape gives it away."""
        if self.prediction_type == "epsilon":
            return noise.float()
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * noise.float() - sigma * x0.float()                       # v = α·ε − σ·x_0

    def to_x0_and_noise(self, output, x_t, t):
        """(x_0, ε), both [B,C,H,W] fp32, that the network's output [B,C,H,W] at x_t stands for."""
        alpha, sigma = self.alpha_sigma(t, x_t)
        output, x_t = output.float(), x_t.float()
        if self.prediction_type == "epsilon":
            return (x_t - sigma * output) / alpha, output                       # x_0 = (x_t − σ·ε)/α
        # (x_t, v) is (x_0, ε) turned by an angle whose cosine is α: to invert it is to turn back.
        return alpha * x_t - sigma * output, sigma * x_t + alpha * output

    # ---- which timesteps to visit -------------------------------------------------------------------

    def timesteps(self, steps: int, default: str = "leading", skip_lowest: bool = False) -> list[int]:
        """`steps` descending ints out of 0..T−1, by the config's spacing, or `default` if it names none.

        leading   0, k, 2k, … plus steps_offset (k = T // steps): never starts from quite pure noise;
        linspace  evenly from 0 to T−1, both ends visited;
        trailing  T−1, T−1−k, …: starts from pure noise, the one for zero-SNR models (2305.08891, table 2).
        skip_lowest: space out one step more, and leave out the one nearest to clean, whose place is
            taken by the jump to zero noise (diffusers' DPM-Solver does so, its DDIM does not).
        Raises ValueError where T has no room for so many different steps.
        """
        spacing, n = self.timestep_spacing or default, steps + skip_lowest
        if steps < 1:
            raise ValueError(f"{steps} sampling steps are not possible; use 1 or more")
        if spacing == "trailing":
            # Rounded as numpy.arange rounds (start + i·((start + step) − start)): k+½ must fall the same way.
            # Its length, though, overshoots for 62 of the counts up to 1000 (61, 103, …): diffusers then adds
            # a step at t = −1, which is no timestep. Ours takes exactly `steps`.
            stride = (self.T - self.T / steps) - self.T
            times = [round(self.T + i * stride) - 1 for i in range(steps)]
        elif spacing == "leading":
            times = [i * (self.T // n) + self.steps_offset for i in reversed(range(skip_lowest, n))]
        else:
            stride = (self.T - 1) / max(n - 1, 1)
            times = [round(i * stride) for i in reversed(range(skip_lowest, n))]
        if times[0] >= self.T or times[-1] < 0 or any(a <= b for a, b in zip(times, times[1:])):
            raise ValueError(f"{steps} sampling steps do not fit {self.T} training timesteps "
                             f"with {spacing!r} spacing; use fewer steps")
        return times


# ---- samplers: each is (the pairs (t, s) to visit, one step from noise level t to the lower s) -------
# s < 0 stands for "no noise left". A step takes and returns its memory (`state`, None at the start), so
# that nothing is hidden in an object and one loop serves all.

def ddim_pairs(schedule, steps):
    # DDIM steps by a fixed stride T // steps. It meets the next t only with leading spacing; diffusers
    # keeps the stride for the others too, and we with it, else the same seed gives another picture.
    return [(t, t - schedule.T // steps) for t in schedule.timesteps(steps)]


def ddim_step(schedule, x, output, t, s, state):
    """One deterministic DDIM step (η = 0; Song et al. 2020, 2010.02502, eq. 12), x [B,C,H,W] at t -> at s."""
    x0, noise = schedule.to_x0_and_noise(output, x, t)
    if schedule.clip_range is not None:  # for pixel models; latents are not confined to [−1, 1]
        x0 = x0.clamp(-schedule.clip_range, schedule.clip_range)
    abar = schedule._table[s] if s >= 0 else schedule.final_alpha_cumprod
    return math.sqrt(abar) * x0 + math.sqrt(1.0 - abar) * noise, state          # x_s = α_s·x̂_0 + σ_s·ε̂


def dpmpp_pairs(schedule, steps):
    # Each step goes to the next visited t, the last one to zero noise. A config without timestep_spacing
    # means leading for DDIM but linspace here: these are the defaults of the two diffusers classes.
    times = schedule.timesteps(steps, default="linspace", skip_lowest=True)
    return list(zip(times, times[1:] + [-1]))


def dpmpp_step(schedule, x, output, t, s, state):
    """One DPM-Solver++(2M) step (Lu et al. 2022, 2211.01095, algorithm 2), x [B,C,H,W] at t -> at s.

    Its clock is the half log-SNR λ = log(α/σ), in which the x_0-prediction ODE is solved exactly but for
    the curve of x̂_0(λ); a line through the last two x̂_0 stands in for that curve, at no extra network
    call. state: (x̂_0, λ) of the step before. Without one, D = x̂_0, and the step is DDIM's.
    """
    x0, _ = schedule.to_x0_and_noise(output, x, t)
    if s < 0:
        return x0, None  # σ_s = 0: e^{−h} = 0 and α_s = 1; first order, since h = ∞ leaves no line to extend
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t, x), schedule.alpha_sigma(s, x)
    lam = math.log(alpha_t / sigma_t)                                           # λ_t
    h = math.log(alpha_s / sigma_s) - lam                                       # h = λ_s − λ_t > 0
    D = x0
    if state is not None:
        x0_before, lam_before = state
        r = (lam - lam_before) / h                                              # r = h_before / h
        D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_before        # D = (1+1/2r)·x̂_0 − (1/2r)·x̂_0 before
    x = sigma_s / sigma_t * x - alpha_s * math.expm1(-h) * D         # x_s = (σ_s/σ_t)·x_t − α_s(e^{−h}−1)·D
    return x, (x0, lam)


SAMPLERS = {"ddim": (ddim_pairs, ddim_step), "dpm++": (dpmpp_pairs, dpmpp_step)}


@torch.no_grad()
def sample(predict, x_T, schedule: NoiseSchedule, steps: int, sampler: str = "ddim"):
    """Pure noise x_T [B,C,H,W] -> clean latents x_0 [B,C,H,W], fp32, after `steps` network calls.

    predict(x_t [B,C,H,W] fp32, t int) -> the network's output [B,C,H,W], guidance already applied, any
        float dtype: x itself stays in fp32, where the small last steps do not round away.
    sampler: a name in SAMPLERS.
    Equal to diffusers' DDIMScheduler (η 0) and DPMSolverMultistepScheduler, each built by
    from_config(config), within float rounding. Raises ValueError for an unknown sampler or too many steps.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is unknown; use one of {', '.join(SAMPLERS)}")
    pairs, step = SAMPLERS[sampler]
    x, state = x_T.float(), None
    for t, s in pairs(schedule, steps):
        x, state = step(schedule, x, predict(x, t), t, s, state)
    return x
