"""Noise schedules, and every sampler as a table of coefficients. Torch-free, float64.

Notation. `s` is the timestep of a step, and `r < s` the next one. After the last step `r` is clean data, abar_r = 1.

| here             | in the papers                                        | meaning                                  |
|------------------|------------------------------------------------------|------------------------------------------|
| `alpha_bar[t]`   | abar_t (Ho 2020), alpha_t (Song 2021), alpha_t^2 (Lu) | product of 1 - beta up to and including t |
| `alpha`, `sigma` | sqrt(abar_t), sqrt(1 - abar_t)                       | signal and noise scale of x_t            |
| `lam`            | lambda_t = log(alpha_t / sigma_t) (Lu 2022)          | half the log signal-to-noise ratio       |

    x_t = alpha x0 + sigma eps                      Ho 2020, equation 4
    v   = alpha eps - sigma x0                      Salimans and Ho 2022, section 4

Every sampler here is linear in what a step knows. So one row of numbers describes a step, and one loop runs them all:

    x0     = clamp(P x_s + Q out, -1, 1)            `out` is what the denoiser predicts: eps, v or x0
    x_r    = A x_s + B x0 + C x0_previous + S z     z is standard normal

Sources: Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239); Song et al. 2021, "Denoising
Diffusion Implicit Models" (2010.02502); Nichol and Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models"
(2102.09672); Salimans and Ho 2022, "Progressive Distillation" (2202.00512); Lu et al. 2022, "DPM-Solver++"
(2211.01095); Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2305.08891).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.config import SAMPLERS, Schedule
from bsdiff_rt.errors import SettingsError

Float64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class Table:
    """One row per denoiser call, first call first. The equations are in the module's docstring.

    Attributes:
        t: [N] int64, timesteps of the denoiser calls, strictly falling from T - 1.
        P: [N] float64, weight of x_t in x0.
        Q: [N] float64, weight of the denoiser's output in x0.
        A: [N] float64, weight of x_t in the next x_t.
        B: [N] float64, weight of x0 in the next x_t.
        C: [N] float64, weight of the previous step's x0 in the next x_t; 0 in the first row.
        S: [N] float64, standard deviation of the fresh noise in the next x_t.

    The last row has A = C = S = 0 and B = 1 exactly, so a sampler returns its last, clamped x0.
    """

    t: NDArray[np.int64]
    P: Float64
    Q: Float64
    A: Float64
    B: Float64
    C: Float64
    S: Float64

    @property
    def steps(self) -> int:
        """Return the number of rows and of denoiser calls."""
        return len(self.t)


class _Ladder(NamedTuple):
    """Signal and noise scales of each step, at its start (`_s`) and at its end (`_r`). [N] float64."""

    alpha_s: Float64
    sigma_s: Float64
    alpha_r: Float64
    sigma_r: Float64


def alpha_bar(schedule: Schedule) -> Float64:
    """Return the cumulative product of 1 - beta: the share of x0's variance in x_t (Ho 2020, below equation 4).

    Args:
        schedule: name, number of training steps T >= 2, and the two betas where the name uses them.

    Returns:
        [T] float64, strictly falling, each in (0, 1); index t is timestep t.

    Raises:
        SettingsError: unknown name, fewer than 2 training steps, or betas outside 0 < beta_start <= beta_end < 1.
    """
    return np.cumprod(1.0 - _betas(schedule), dtype=np.float64)


def sampler_table(schedule: Schedule, name: str, steps: int) -> Table:
    """Return the coefficients of `steps` steps of a named sampler.

    With fewer than T steps the timesteps are spaced as in `timesteps`. A step then goes from one chosen timestep
    straight to the next: its alphas are ratios of their alpha_bar (Nichol and Dhariwal 2021, section 4).

    Args:
        schedule: the diffusion that the denoiser was trained for. Its `objective` determines P and Q.
        name: ddpm: ancestral, with the posterior variance of Ho 2020, equation 7.
            ddim: with eta 0.
            dpmpp-2m: DPM-Solver++ 2M, data prediction, midpoint; first and last step of first order.
            release: the published BS-Diff code, in which x0 becomes the next x_t.
        steps: number of denoiser calls, 1 to T.

    Returns:
        The table, `steps` rows.

    Raises:
        SettingsError: the sampler, objective or schedule is unknown, or steps are outside 1 to T.
    """
    if name not in SAMPLERS:
        raise SettingsError(f"unknown sampler {name!r}. Use one of {', '.join(SAMPLERS)}.", setting="sampler")
    abar = alpha_bar(schedule)
    t = timesteps(schedule.train_steps, steps)
    abar_s = abar[t]
    abar_r = np.append(abar_s[1:], 1.0)
    ladder = _Ladder(np.sqrt(abar_s), np.sqrt(1.0 - abar_s), np.sqrt(abar_r), np.sqrt(1.0 - abar_r))
    p, q = _x0_from_output(schedule.objective, ladder)
    a, b, c, s = {"ddpm": _ddpm, "ddim": _ddim, "dpmpp-2m": _dpmpp_2m, "release": _release}[name](ladder)
    a[-1], b[-1], c[-1], s[-1] = 0.0, 1.0, 0.0, 0.0  # true of every formula; this removes the rounding
    return Table(t, p, q, a, b, c, s)


def timesteps(train_steps: int, steps: int) -> NDArray[np.int64]:
    """Return the timesteps that a sampler of `steps` steps visits: the `trailing` spacing of Lin et al. 2024, table 2.

    Sampling starts from pure noise, and the denoiser was trained on (almost) pure noise only at T - 1. Of the other two
    spacings, `leading` starts where the denoiser expects some signal, and `linspace` spends a call on t = 0, where
    almost nothing is left to remove. With steps = T all three give every timestep.

    Args:
        train_steps: T, in steps.
        steps: N, 1 to T.

    Returns:
        [N] int64, strictly falling, first T - 1, last round(T / N) - 1.

    Raises:
        SettingsError: steps outside 1 to T.
    """
    if not 1 <= steps <= train_steps:
        raise SettingsError(
            f"{steps} sampling steps requested, but the model was trained with {train_steps}. Use 1 to {train_steps}.",
            setting="steps",
        )
    # T (N - i) is a whole number and is divided only once, so rounding adds or removes no row.
    return np.rint(train_steps * np.arange(steps, 0, -1) / steps).astype(np.int64) - 1


def _betas(schedule: Schedule) -> Float64:
    """Return the variance added at each training step: [T] float64, each in (0, 1)."""
    total = schedule.train_steps
    if total < 2:
        raise SettingsError(f"a schedule of {total} training steps is not a diffusion. Use 2 or more.")
    if schedule.name == "cosine":
        start, end = schedule.beta_start, schedule.beta_end
        if not 0.0 < start <= end < 1.0:
            raise SettingsError(f"beta_start {start} and beta_end {end} must satisfy 0 < beta_start <= beta_end < 1")
        # "Mapping to T steps using a cosine schedule" (BS-Diff, section 2): half a cosine between the two.
        rising: Float64 = (1.0 - np.cos(np.pi * np.arange(total) / (total - 1))) / 2.0
        return start + (end - start) * rising
    if schedule.name == "squaredcos_cap_v2":
        # Nichol and Dhariwal 2021, equation 17 with offset 0.008, and betas capped at 0.999 (their section 3.2).
        remaining: Float64 = np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * np.pi / 2.0) ** 2
        return np.minimum(1.0 - remaining[1:] / remaining[:-1], 0.999)
    raise SettingsError(f"unknown schedule {schedule.name!r}. Use one of cosine, squaredcos_cap_v2")


def _x0_from_output(objective: str, ladder: _Ladder) -> tuple[Float64, Float64]:
    """Return P and Q: the equations for x_t and v in the module's docstring, solved for x0."""
    alpha, sigma = ladder.alpha_s, ladder.sigma_s
    if objective == "eps":
        return 1.0 / alpha, -sigma / alpha
    if objective == "v":
        return alpha.copy(), -sigma
    if objective == "x0":
        return np.zeros_like(alpha), np.ones_like(alpha)
    raise SettingsError(f"unknown objective {objective!r}. Use one of eps, v, x0")


def _ddpm(ladder: _Ladder) -> tuple[Float64, Float64, Float64, Float64]:
    """Return A, B, C, S of q(x_r | x_s, x0): Ho 2020, equation 7, with beta-tilde as the variance."""
    alpha_s, sigma_s, alpha_r, sigma_r = ladder
    ratio = alpha_s / alpha_r  # square root of the product of 1 - beta over the timesteps in (r, s]
    beta = 1.0 - ratio**2
    a = ratio * sigma_r**2 / sigma_s**2
    b = alpha_r * beta / sigma_s**2
    return a, b, np.zeros_like(a), np.sqrt(beta) * sigma_r / sigma_s


def _ddim(ladder: _Ladder) -> tuple[Float64, Float64, Float64, Float64]:
    """Return A, B, C, S of Song 2021, equation 12 with sigma = 0 and eps = (x_s - alpha_s x0) / sigma_s."""
    alpha_s, sigma_s, alpha_r, sigma_r = ladder
    a = sigma_r / sigma_s
    return a, alpha_r - a * alpha_s, np.zeros_like(a), np.zeros_like(a)


def _dpmpp_2m(ladder: _Ladder) -> tuple[Float64, Float64, Float64, Float64]:
    """Return A, B, C, S of Lu 2022, algorithm 2, with first-order steps (equal to DDIM's) at both ends.

    x_r = (sigma_r / sigma_s) x_s - alpha_r (exp(-h) - 1) D with D = (1 + 1 / 2k) x0 - (1 / 2k) x0_previous, where h is
    this step's rise in lambda and k the previous step's rise over h.
    """
    a, b, c, s = _ddim(ladder)  # alpha_r - a alpha_s = -alpha_r (exp(-h) - 1)
    if len(a) > 2:
        lam = np.log(ladder.alpha_s / ladder.sigma_s)
        rise = np.diff(lam)
        half = rise[1:] / rise[:-1] / 2.0  # 1 / 2k of steps 1 to N - 2
        c[1:-1] = -half * b[1:-1]
        b[1:-1] *= 1.0 + half
    return a, b, c, s


def _release(ladder: _Ladder) -> tuple[Float64, Float64, Float64, Float64]:
    """Return A, B, C, S of the published code: x_t is replaced by x0, so only the first noise reaches the output."""
    zero = np.zeros_like(ladder.alpha_s)
    return zero, np.ones_like(zero), zero.copy(), zero.copy()
