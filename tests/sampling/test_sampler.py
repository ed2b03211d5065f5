"""Whole trajectories against diffusers and against the release's loop; what the hot loop may and may not do."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch.utils._python_dispatch import TorchDispatchMode
from toy import SCHEDULES, ToyRunner, draws, images

from bsdiff_rt.config import SAMPLERS, Objective, SamplerName, Schedule
from bsdiff_rt.errors import EngineError, SettingsError
from bsdiff_rt.sampling.buffers import StepBuffers
from bsdiff_rt.sampling.sampler import sample, step
from bsdiff_rt.sampling.schedule import alpha_bar, sampler_table, timesteps

STEPS = (1, 2, 3, 10, 50, 1000)
OBJECTIVES: tuple[Objective, ...] = ("eps", "v", "x0")
PREDICTION_TYPE = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def run(schedule: Schedule, name: SamplerName, steps: int, clamped: bool = False) -> torch.Tensor:
    return sample(ToyRunner(schedule, clamped), images(), sampler_table(schedule, name, steps), draws())


def peer_arguments(schedule: Schedule) -> dict[str, Any]:
    """What our schedule is called in diffusers."""
    arguments = {"timestep_spacing": "trailing", "prediction_type": PREDICTION_TYPE[schedule.objective]}
    if schedule.name == "squaredcos_cap_v2":
        return {**arguments, "beta_schedule": "squaredcos_cap_v2"}
    abar = alpha_bar(schedule)
    return {**arguments, "trained_betas": 1.0 - abar / np.append(1.0, abar[:-1])}


def peer_loop(
    schedule: Schedule, peer: Any, steps: int, clamped: bool, round_state: bool = False, **options: Any
) -> Any:
    """A diffusers scheduler's trajectory with our noise, in float64. [B, 1, H, W].

    The schedulers keep alpha_bar (and sigmas) in float32; ours, in float64, is put in their place (that both agree to
    float32's precision is tested in test_schedule.py), so that what is compared here is the equations.
    """
    abar = torch.from_numpy(alpha_bar(schedule))
    peer.alphas_cumprod = abar
    peer.set_timesteps(steps)
    if isinstance(peer, DPMSolverMultistepScheduler):
        chosen = abar[peer.timesteps]
        peer.sigmas = torch.cat([((1 - chosen) / chosen).sqrt(), torch.zeros(1, dtype=torch.float64)])
    runner, cxr, draw = ToyRunner(schedule, clamped), images(), draws()
    fresh = (draw(k).double() for k in range(1, steps + 1))
    x_t = draw(0).double()
    with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", side_effect=fresh):
        for t in peer.timesteps:
            if round_state:
                x_t = x_t.float().double()
            out = runner.predict(x_t, cxr, t.expand(len(cxr)))
            x_t = peer.step(out, t, x_t, **options).prev_sample
    return x_t


def with_objective(schedule: Schedule, objective: Objective) -> Schedule:
    return dataclasses.replace(schedule, objective=objective)


every_diffusion = pytest.mark.parametrize(
    "schedule", [with_objective(s, o) for s in SCHEDULES for o in OBJECTIVES], ids=lambda s: f"{s.name}-{s.objective}"
)


@every_diffusion
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("clamped", [False, True])
def test_ddpm_is_diffusers(schedule: Schedule, steps: int, clamped: bool) -> None:
    peer = DDPMScheduler(variance_type="fixed_small", clip_sample=True, **peer_arguments(schedule))
    theirs = peer_loop(schedule, peer, steps, clamped)
    # float64 on both sides; when strided, theirs adds noise of 1e-10 after the last step where ours adds none.
    torch.testing.assert_close(run(schedule, "ddpm", steps, clamped), theirs, rtol=0, atol=2e-9)


@every_diffusion
@pytest.mark.parametrize(
    "steps", [n for n in STEPS if n != 3]
)  # 3: see test_ddim_where_diffusers_misses_its_own_timesteps
@pytest.mark.parametrize("clamped", [False, True])
def test_ddim_is_diffusers(schedule: Schedule, steps: int, clamped: bool) -> None:
    peer = DDIMScheduler(clip_sample=True, set_alpha_to_one=True, **peer_arguments(schedule))
    theirs = peer_loop(schedule, peer, steps, clamped, eta=0.0, use_clipped_model_output=True)
    torch.testing.assert_close(run(schedule, "ddim", steps, clamped), theirs, rtol=0, atol=1e-9)  # float64


def solver(schedule: Schedule, order: int) -> Any:
    return DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=order,
        solver_type="midpoint",
        lower_order_final=True,
        final_sigmas_type="zero",
        **peer_arguments(schedule),
    )


@every_diffusion
@pytest.mark.parametrize("steps", STEPS)
def test_dpmpp_2m_is_diffusers(schedule: Schedule, steps: int) -> None:
    # Not `clamped`: theirs has no clamp, so x0 stays inside by itself. Its step rounds x_t to float32: 2e-7 seen.
    theirs = peer_loop(schedule, solver(schedule, 2), steps, clamped=False, round_state=True)
    torch.testing.assert_close(run(schedule, "dpmpp-2m", steps), theirs, rtol=0, atol=1e-6)


@every_diffusion
@pytest.mark.parametrize("steps", [3, 7, 30])
def test_ddim_where_diffusers_misses_its_own_timesteps(schedule: Schedule, steps: int) -> None:
    """Where N does not divide T, DDIMScheduler steps to t - T // N, which is not the timestep it visits next.

    Ours goes to the next one, as does first-order DPM-Solver++, which is DDIM (Lu 2022, section 4).
    """
    theirs = peer_loop(schedule, solver(schedule, 1), steps, clamped=False, round_state=True)
    torch.testing.assert_close(run(schedule, "ddim", steps), theirs, rtol=0, atol=1e-6)  # float32 rounding of x_t


@every_diffusion
@pytest.mark.parametrize("steps", [1, 3, 50, 1000])
@pytest.mark.parametrize("clamped", [False, True])
def test_release_is_its_description(schedule: Schedule, steps: int, clamped: bool) -> None:
    """The published loop: predict, solve for x0, clamp, and feed that back as the next x_t, down to t = 0."""
    abar = alpha_bar(schedule)
    runner, cxr, x = ToyRunner(schedule, clamped), images(), draws()(0).double()
    chosen = range(999, -1, -1) if steps == 1000 else timesteps(1000, steps).tolist()
    for t in chosen:
        out = runner.predict(x, cxr, torch.full((len(cxr),), t))
        alpha, sigma = abar[t] ** 0.5, (1 - abar[t]) ** 0.5
        x0 = {"eps": (x - sigma * out) / alpha, "v": alpha * x - sigma * out, "x0": out}[schedule.objective]
        x = x0.clamp(-1, 1)
    # float64; with eps, 1 / alpha is 2e4 in the noisiest step of squaredcos_cap_v2.
    torch.testing.assert_close(run(schedule, "release", steps, clamped), x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_float32_follows_float64(name: SamplerName, objective: Objective) -> None:
    schedule = with_objective(SCHEDULES[0], objective)
    table = sampler_table(schedule, name, 50)
    x0 = sample(ToyRunner(schedule), images(dtype=torch.float32), table, draws())
    assert x0.dtype == torch.float32
    # Rounding of 6e-8 a few times over; what eps adds in the noisiest step (P is 255 there) fades as steps go on.
    torch.testing.assert_close(x0.double(), run(schedule, name, 50), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_same_pixels_in_any_batch_and_order(name: SamplerName) -> None:
    """Bitwise: every operation of loop and toy works on one pixel, and 128 px fill whole vector registers."""
    schedule = SCHEDULES[0]
    table, cxr = sampler_table(schedule, name, 10), images(5, torch.float32)
    together = sample(ToyRunner(schedule), cxr, table, draws(5))
    order = [3, 0, 4, 1, 2]
    shuffled = sample(ToyRunner(schedule), cxr[order], table, draws(order))
    assert torch.equal(shuffled, together[order])
    for i in range(5):
        alone = sample(ToyRunner(schedule), cxr[i : i + 1], table, draws([i]))
        assert torch.equal(alone, together[i : i + 1])


def test_asks_the_denoiser_once_per_timestep_and_leaves_the_input_alone() -> None:
    schedule = SCHEDULES[0]
    runner, cxr = ToyRunner(schedule), images(2, torch.float32)
    before = cxr.clone()
    sample(runner, cxr, sampler_table(schedule, "ddpm", 1000), draws())
    assert runner.asked == [[float(t)] * 2 for t in range(999, -1, -1)]
    assert torch.equal(cxr, before)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("ddpm", [0, 1, 2, 3, 4]), ("ddim", [0]), ("dpmpp-2m", [0]), ("release", [0])],  # the last step adds no noise
)
def test_takes_only_the_draws_it_needs(name: SamplerName, expected: list[int]) -> None:
    taken: list[int] = []

    def draw(number: int) -> torch.Tensor:
        taken.append(number)
        return draws()(number)

    sample(ToyRunner(SCHEDULES[0]), images(), sampler_table(SCHEDULES[0], name, 5), draw)
    assert taken == expected


@pytest.mark.parametrize("name", SAMPLERS)
def test_only_the_first_noise_reaches_a_deterministic_output(name: SamplerName) -> None:
    """And every draw reaches a stochastic one."""
    table = sampler_table(SCHEDULES[0], name, 5)
    ours = sample(ToyRunner(SCHEDULES[0]), images(), table, draws())
    for changed in range(5):
        other = sample(ToyRunner(SCHEDULES[0]), images(), table, lambda k, c=changed: draws()(k + 100 if k == c else k))
        assert torch.equal(ours, other) == (changed > 0 and not table.S.any())


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("bad_step", [0, 2, 4])
def test_a_nan_is_never_hidden(name: SamplerName, objective: Objective, bad_step: int) -> None:
    schedule = with_objective(SCHEDULES[0], objective)

    class Broken(ToyRunner):
        def denoise(self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
            super().denoise(x_t, cxr, t, out)
            if len(self.asked) == bad_step + 1:
                out[0, 0, 3, 5] = torch.nan

    x0 = sample(Broken(schedule), images(), sampler_table(schedule, name, 5), draws())
    assert torch.isnan(x0[0, 0, 3, 5])
    assert torch.isnan(x0).sum() == 1


def test_a_nan_does_not_reach_the_next_batch() -> None:
    table, runner = sampler_table(SCHEDULES[0], "dpmpp-2m", 3), ToyRunner(SCHEDULES[0])
    buffers = StepBuffers.allocate(images(), table)
    for x_T in (torch.full_like(images(), torch.nan), draws()(0)):
        buffers.start(x_T)
        for _ in range(3):
            step(runner, buffers)
    assert torch.equal(buffers.x0, run(SCHEDULES[0], "dpmpp-2m", 3))


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("objective", ["eps", "v", "x0"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_an_infinity_is_no_white_pixel(name, objective, bad):
    """fp16 that overflows: clamped, it would be a picture. Its neighbours stay what they are."""

    class Overflowing(ToyRunner):
        def denoise(self, x_t, cxr, t, out):
            torch.mul(x_t, cxr, out=out)
            out[0, 0, 2, 3] = bad

    cxr = torch.full((2, 1, 4, 4), 0.5)
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    schedule = Schedule(objective=objective)
    result = sample(Overflowing(schedule), cxr, sampler_table(schedule, name, 2), lambda _: noise)
    broken = torch.isnan(result)
    assert broken[0, 0, 2, 3]
    assert int(broken.sum()) == 1
    assert result[~broken].abs().max() <= 1


class InPlaceOnly(TorchDispatchMode):
    """Fails on any operation that returns memory of its own or hands a value to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        view = any(result.alias_info is not None for result in schema.returns)
        assert schema.is_mutable or view, f"{func} allocates or synchronises"
        self.operations.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class SilentRunner(ToyRunner):
    """Writes its prediction without allocating, so that all that a step does besides is the step's own."""

    def denoise(self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
        torch.mul(x_t, cxr, out=out)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_step_neither_allocates_nor_reads_back(name: SamplerName) -> None:
    buffers = StepBuffers.allocate(images(), sampler_table(SCHEDULES[0], name, 5))
    runner = SilentRunner(SCHEDULES[0])
    addresses = [getattr(buffers, field.name).data_ptr() for field in dataclasses.fields(buffers)]
    with InPlaceOnly() as watch:
        for _ in range(5):
            step(runner, buffers)
    assert addresses == [getattr(buffers, field.name).data_ptr() for field in dataclasses.fields(buffers)]
    assert buffers.index.tolist() == [5]
    per_step = len(watch.operations) // 5
    assert watch.operations[:per_step] * 5 == watch.operations  # every step is the same recording


def test_the_watch_above_catches_a_read_back_and_an_allocation() -> None:
    one = torch.ones(1)
    with InPlaceOnly(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        one.item()
    with InPlaceOnly(), pytest.raises(AssertionError, match="allocates"):
        torch.add(one, one)


def test_a_step_runs_without_any_values() -> None:
    """On the meta device a tensor has no values: reading one, or branching on one, is an error."""
    buffers = StepBuffers.allocate(images().to("meta"), sampler_table(SCHEDULES[0], "ddpm", 5))
    step(SilentRunner(SCHEDULES[0]), buffers)


def test_sample_takes_part_in_no_gradient() -> None:
    x0 = sample(ToyRunner(SCHEDULES[0]), images().requires_grad_(), sampler_table(SCHEDULES[0], "ddim", 2), draws())
    assert not x0.requires_grad


def test_noise_for_one_image_is_not_spread_over_a_batch() -> None:
    with pytest.raises(SettingsError, match=r"noise of shape \(1, 1, 8, 16\) for images of \(2, 1, 8, 16\); draw one"):
        sample(ToyRunner(SCHEDULES[0]), images(), sampler_table(SCHEDULES[0], "ddim", 2), draws(1))


class Fixed(ToyRunner):
    """For `Runner.check`: 8 px images, batch 2 to 4."""

    name = "fixed"

    def __init__(self) -> None:
        super().__init__(SCHEDULES[0])
        self.batch_range = (2, 4)


def square(batch: int = 2, **options: Any) -> torch.Tensor:
    return torch.zeros(batch, 1, 8, 8, **options)


def test_runner_check_accepts_what_fits() -> None:
    Fixed().check(square(2), square(2))
    Fixed().check(square(4))
    ToyRunner(SCHEDULES[0]).check(square(1000))


@pytest.mark.parametrize(
    ("buffers", "message"),
    [
        ([square(1)], "batch of 1 given to the fixed runner, which takes 2 to 4. Change the batch size"),
        ([square(5)], "batch of 5 given to the fixed runner, which takes 2 to 4"),
        ([square(2), square(3)], r"buffer of shape \(3, 1, 8, 8\) given to the fixed runner; give \(2, 1, 8, 8\)"),
        ([torch.zeros(2, 1, 8, 9)], r"buffer of shape \(2, 1, 8, 9\) given"),
        ([square(dtype=torch.float16)], "torch.float16 buffer given to the fixed runner; give torch.float32"),
        ([square(device="meta")], "buffer on meta given to the fixed runner on cpu; move it"),
        ([torch.zeros(2, 1, 8, 16)[..., ::2]], r"buffer with strides \(128, 128, 16, 2\) given to the fixed runner"),
    ],
)
def test_runner_check_names_what_is_wrong(buffers: list[torch.Tensor], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Fixed().check(*buffers)


def test_runner_check_without_upper_limit() -> None:
    runner = Fixed()
    runner.batch_range = (2, None)
    with pytest.raises(EngineError, match="batch of 1 given to the fixed runner, which takes 2 or more"):
        runner.check(square(1))


def test_runner_closes_as_a_context_manager() -> None:
    with pytest.raises(ZeroDivisionError), ToyRunner(SCHEDULES[0]) as runner:
        raise ZeroDivisionError
    assert runner.closed
