"""alpha_bar, the choice of timesteps and the shape of every table; whole trajectories are in test_sampler.py."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from diffusers import DDIMScheduler, DDPMScheduler

from bsdiff_rt.config import SAMPLERS, SamplerName, Schedule
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.sampling.schedule import alpha_bar, sampler_table, timesteps

COSINE = Schedule(name="cosine")
SQUARED = Schedule(name="squaredcos_cap_v2")


def test_cosine_betas_follow_half_a_cosine_between_the_two() -> None:
    betas = 1.0 - alpha_bar(COSINE) / np.append(1.0, alpha_bar(COSINE)[:-1])
    assert betas[0] == pytest.approx(0.0015, abs=1e-12)
    assert betas[-1] == pytest.approx(0.0205, abs=1e-12)
    # Half a cosine is odd about its middle, where it reaches the mean of its ends.
    np.testing.assert_allclose(betas + betas[::-1], 0.022, atol=1e-12)
    assert betas[250] == pytest.approx(0.0015 + 0.019 * (1.0 - np.cos(np.pi * 250 / 999)) / 2.0, abs=1e-12)
    assert (np.diff(betas) > 0).all()


def test_squaredcos_is_diffusers() -> None:
    theirs = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.numpy()
    # Theirs is float32: 1 - 0.999 loses 3e-5 of its value, and 1000 products about as much again.
    np.testing.assert_allclose(alpha_bar(SQUARED), theirs, rtol=1e-4)


def test_squaredcos_ignores_the_betas() -> None:
    np.testing.assert_array_equal(alpha_bar(dataclasses.replace(SQUARED, beta_start=0.1)), alpha_bar(SQUARED))


@pytest.mark.parametrize("schedule", [COSINE, SQUARED])
def test_alpha_bar_falls_from_almost_one_to_almost_zero(schedule: Schedule) -> None:
    abar = alpha_bar(schedule)
    assert abar.shape == (1000,)
    assert abar.dtype == np.float64
    assert (np.diff(abar) < 0).all()
    assert 0.998 < abar[0] < 1.0
    assert 0.0 < abar[-1] < 1e-4


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 8, 10, 15, 20, 25, 30, 50, 100, 250, 500, 1000])
def test_timesteps_are_diffusers_trailing(steps: int) -> None:
    for theirs in (DDPMScheduler(timestep_spacing="trailing"), DDIMScheduler(timestep_spacing="trailing")):
        theirs.set_timesteps(steps)
        np.testing.assert_array_equal(timesteps(1000, steps), theirs.timesteps.numpy())


def test_timesteps_for_every_count() -> None:
    # Not compared with diffusers here: adding up a rounded ratio, it has one timestep too many for 61, 103 and others.
    for steps in range(1, 1001):
        t = timesteps(1000, steps)
        assert t.dtype == np.int64
        assert len(t) == steps
        assert t[0] == 999
        assert t[-1] >= 0
        assert (np.diff(t) < 0).all()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("objective", ["eps", "v", "x0"])
@pytest.mark.parametrize("steps", [1, 2, 3, 50, 1000])
def test_every_table(name: SamplerName, objective: str, steps: int) -> None:
    schedule = dataclasses.replace(SQUARED, objective=objective)
    table = sampler_table(schedule, name, steps)
    assert table.steps == steps
    for column in (table.P, table.Q, table.A, table.B, table.C, table.S):
        assert column.shape == (steps,)
        assert column.dtype == np.float64
        assert np.isfinite(column).all()
    assert (table.A[-1], table.B[-1], table.C[-1], table.S[-1]) == (0.0, 1.0, 0.0, 0.0)
    assert table.C[0] == 0.0
    assert (table.S >= 0.0).all()
    assert bool(table.S.any()) == (name == "ddpm" and steps > 1)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp-2m"])
@pytest.mark.parametrize("schedule", [COSINE, SQUARED])
def test_a_perfect_prediction_stays_on_the_forward_process(name: SamplerName, schedule: Schedule) -> None:
    """With x0 known exactly, x_r has mean sqrt(abar_r) x0 and variance 1 - abar_r (Ho 2020, equation 4)."""
    table = sampler_table(schedule, name, 20)
    abar_s = alpha_bar(schedule)[table.t]
    abar_r = np.append(abar_s[1:], 1.0)
    mean = table.A * np.sqrt(abar_s) + table.B + table.C
    variance = table.A**2 * (1.0 - abar_s) + table.S**2
    np.testing.assert_allclose(mean, np.sqrt(abar_r), atol=1e-12)  # float64 rounding
    np.testing.assert_allclose(variance, 1.0 - abar_r, atol=1e-12)


@pytest.mark.parametrize("objective", ["eps", "v", "x0"])
def test_p_and_q_recover_x0(objective: str) -> None:
    schedule = dataclasses.replace(COSINE, objective=objective)
    table = sampler_table(schedule, "ddim", 1000)
    abar = alpha_bar(schedule)[table.t]
    x0, eps = 0.3, -1.2
    x_t = np.sqrt(abar) * x0 + np.sqrt(1.0 - abar) * eps
    out = {"eps": np.full(1000, eps), "v": np.sqrt(abar) * eps - np.sqrt(1.0 - abar) * x0, "x0": np.full(1000, x0)}
    # eps: P reaches 255 in this schedule, so rounding of 1e-16 grows to about 1e-13.
    np.testing.assert_allclose(table.P * x_t + table.Q * out[objective], x0, atol=1e-12)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_out_of_range(steps: int) -> None:
    with pytest.raises(SettingsError, match=rf"^{steps} sampling steps requested.*trained with 1000\. Use 1 to 1000"):
        sampler_table(COSINE, "ddpm", steps)


def test_unknown_sampler() -> None:
    with pytest.raises(SettingsError, match=r"unknown sampler 'euler'\. Use one of ddpm, ddim, dpmpp-2m, release"):
        sampler_table(COSINE, "euler", 10)


def test_unknown_objective() -> None:
    with pytest.raises(SettingsError, match=r"unknown objective 'score'\. Use one of eps, v, x0"):
        sampler_table(dataclasses.replace(COSINE, objective="score"), "ddpm", 10)


def test_unknown_schedule() -> None:
    with pytest.raises(SettingsError, match=r"unknown schedule 'linear'\. Use one of cosine, squaredcos_cap_v2"):
        alpha_bar(dataclasses.replace(COSINE, name="linear"))


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.02), (0.02, 0.01), (0.1, 1.0), (float("nan"), 0.02)])
def test_impossible_betas(start: float, end: float) -> None:
    with pytest.raises(SettingsError, match=f"beta_start {start} and beta_end {end} must satisfy"):
        alpha_bar(dataclasses.replace(COSINE, beta_start=start, beta_end=end))


def test_too_few_training_steps() -> None:
    with pytest.raises(SettingsError, match=r"a schedule of 1 training steps is not a diffusion\. Use 2 or more"):
        alpha_bar(dataclasses.replace(COSINE, train_steps=1))


def test_importing_schedule_and_noise_loads_no_torch() -> None:
    code = "import sys, bsdiff_rt.sampling.schedule, bsdiff_rt.sampling.noise; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
