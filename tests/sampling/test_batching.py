"""Batches in flight: what is drawn ahead, what memory is given back, how many images fit."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import ToyRunner

from bsdiff_rt.config import Schedule
from bsdiff_rt.sampling import batching
from bsdiff_rt.sampling.batching import (
    BATCHES_IN_FLIGHT,
    FULL_BATCH,
    NOISE_AHEAD,
    NoiseAhead,
    Suppressor,
    choose_batch,
    suppress,
)
from bsdiff_rt.sampling.noise import ImageNoise, batch_noise
from bsdiff_rt.sampling.schedule import sampler_table

SIZE = (16, 16)
SCHEDULE = Schedule(objective="x0")
STREAMS = [ImageNoise(0, bytes([number])) for number in range(6)]


def images(count):
    return [np.random.default_rng(number).uniform(-1, 1, SIZE).astype(np.float32) for number in range(count)]


@pytest.fixture
def threads():
    with ThreadPoolExecutor(2) as pool:
        yield pool


def test_draws_made_ahead_are_those_of_the_images(threads):
    steps = 3 * NOISE_AHEAD
    draw = NoiseAhead(STREAMS[:2], SIZE, sampler_table(SCHEDULE, "ddpm", steps), threads, pin=False)
    for number in range(steps):  # x_T and all but the last step's z
        assert np.array_equal(draw(number).numpy(), batch_noise(STREAMS[:2], number, SIZE))
    with pytest.raises(ValueError, match=f"draw {steps} was requested, but the next one of this table is None"):
        draw(steps)


def test_a_sampler_without_noise_draws_once(threads):
    draw = NoiseAhead(STREAMS[:1], SIZE, sampler_table(SCHEDULE, "ddim", 50), threads, pin=False)
    assert np.array_equal(draw(0).numpy(), batch_noise(STREAMS[:1], 0, SIZE))
    with pytest.raises(ValueError, match="draw 1 was requested"):
        draw(1)


def test_draws_are_taken_in_order(threads):
    draw = NoiseAhead(STREAMS[:1], SIZE, sampler_table(SCHEDULE, "ddpm", 5), threads, pin=False)
    draw(0)
    with pytest.raises(ValueError, match="draw 2 was requested, but the next one of this table is 1"):
        draw(2)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("enhance", [True, False])
def test_submitting_gives_what_the_plain_function_gives(sampler, enhance):
    runner, table = ToyRunner(SIZE[0]), sampler_table(SCHEDULE, sampler, 12)
    expected = suppress(runner, np.stack(images(5))[:, None], table, STREAMS[:5], enhance=enhance)
    with Suppressor(runner, table, enhance=enhance, batch=2) as suppressor:
        for first in (0, 2, 4):
            count = min(2, 5 - first)
            host = suppressor.submit(images(5)[first : first + count], STREAMS[first : min(first + count, 5)])
            for place in range(count):
                assert np.array_equal(host.take(place)[0], expected[first + place, 0])
        assert suppressor.busy_s > 0


def test_the_seconds_of_a_batch_are_shared_by_its_results():
    runner, table = ToyRunner(SIZE[0]), sampler_table(SCHEDULE, "ddim", 1)
    with Suppressor(runner, table, enhance=False, batch=2) as suppressor:
        host = suppressor.submit(images(2), STREAMS[:2])
        seconds = [host.take(place)[1] for place in range(2)]
        assert seconds[0] == seconds[1] == pytest.approx(suppressor.busy_s / 2)


def test_batches_wait_until_results_are_taken():
    table = sampler_table(SCHEDULE, "ddim", 1)
    with Suppressor(ToyRunner(SIZE[0]), table, enhance=False, batch=1) as suppressor:
        hosts = [suppressor.submit(images(1), STREAMS[:1]) for _ in range(BATCHES_IN_FLIGHT)]
        one_more = threading.Thread(target=lambda: hosts.append(suppressor.submit(images(1), STREAMS[:1])))
        one_more.start()
        one_more.join(0.2)
        assert one_more.is_alive()
        hosts[0].take(0)
        one_more.join(10)
        assert len(hosts) == BATCHES_IN_FLIGHT + 1
        assert hosts[-1] is hosts[0]  # the same memory again


def test_a_failure_gives_the_memory_back():
    runner, table = ToyRunner(SIZE[0]), sampler_table(SCHEDULE, "ddim", 1)
    with Suppressor(runner, table, enhance=True, batch=1) as suppressor:
        runner.before = lambda _: (_ for _ in ()).throw(RuntimeError("failed"))
        for _ in range(2 * BATCHES_IN_FLIGHT):
            with pytest.raises(RuntimeError, match="failed"):
                suppressor.submit(images(1), STREAMS[:1])
        runner.before = lambda _: None
        assert suppressor.submit(images(1), STREAMS[:1]).take(0)[0].shape == SIZE


def test_a_device_error_that_lasts_stops_no_later_call(monkeypatch):
    """Its clean-up fails, too; each call must still end with an error instead of waiting for memory."""
    runner, table = ToyRunner(SIZE[0]), sampler_table(SCHEDULE, "ddim", 1)
    with Suppressor(runner, table, enhance=True, batch=1) as suppressor:
        runner.before = lambda _: (_ for _ in ()).throw(RuntimeError("failed"))

        def close():
            raise RuntimeError("the device is lost")

        with monkeypatch.context() as lost:
            lost.setattr(suppressor._sampler, "close", close)
            for _ in range(2 * BATCHES_IN_FLIGHT):
                with pytest.raises(RuntimeError, match="the device is lost"):
                    suppressor.submit(images(1), STREAMS[:1])


def test_too_few_images_are_filled_up():
    runner, table = ToyRunner(SIZE[0]), sampler_table(SCHEDULE, "ddim", 2)
    expected = suppress(runner, np.stack(images(3))[:, None], table, STREAMS[:3], enhance=True)
    runner.batch_range = (4, 4)
    with Suppressor(runner, table, enhance=True, batch=4) as suppressor:
        for _ in range(2 * BATCHES_IN_FLIGHT):  # the filled-up place is not waited for
            host = suppressor.submit(images(3), STREAMS[:3])
            assert [np.array_equal(host.take(place)[0], expected[place, 0]) for place in range(3)] == [True] * 3
    assert runner.batches[1:] == [4] * 2 * BATCHES_IN_FLIGHT


def test_choose_batch_on_the_cpu_is_the_smallest():
    runner = ToyRunner(SIZE[0])
    assert choose_batch(runner) == 1
    runner.batch_range = (3, 6)
    assert choose_batch(runner) == 3


@pytest.mark.parametrize(
    ("batch_range", "free_mb", "expected"),
    [
        ((1, None), 80_000, FULL_BATCH),  # what fills the device
        ((1, 4), 80_000, 4),  # what the engine takes
        ((1, None), 5_000, 4),  # 0.8 * 5000 MB for 1000 MB each
        ((1, None), 500, 1),  # one is tried, whatever is free
        ((2, 4), 500, 2),
    ],
)
def test_choose_batch_fits_the_free_memory(monkeypatch, batch_range, free_mb, expected):
    runner = ToyRunner(SIZE[0])
    runner.batch_range = batch_range
    used = [0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free_mb * 1_000_000, 0))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 7)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 7 + used[0])

    def denoise(x_t, cxr, t, out):
        used[0] = 1_000_000_000 * len(x_t)

    monkeypatch.setattr(runner, "denoise", denoise)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None: zeros(*shape))  # no such device here
    monkeypatch.setattr(torch.Tensor, "to", lambda self, _: self)
    runner.device = torch.device("cuda", 0)
    assert choose_batch(runner) == expected


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("bad kernel")])
def test_choose_batch_without_the_memory_for_one(monkeypatch, error, caplog):
    runner = ToyRunner(SIZE[0])
    runner.batch_range, runner.device = (2, 6), torch.device("cuda", 0)
    for name in ("reset_peak_memory_stats", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda _: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10_000_000, 0))

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "zeros", fail)
    if isinstance(error, torch.OutOfMemoryError):
        assert choose_batch(runner) == 2
        assert caplog.messages == ["Out of memory with 2 images at once. 10 MB were free."]
    else:
        with pytest.raises(RuntimeError, match="bad kernel"):
            choose_batch(runner)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_failed_batch_keeps_no_memory_through_its_exception(wrapped, monkeypatch):
    """Its traceback would hold what the networks had half made, and smaller batches found the device still full."""

    class Activation:
        """What a network made before there was no more memory."""

    made, alive_at_close = [], []

    def denoise(*_):
        activation = Activation()
        made.append(weakref.ref(activation))
        raise torch.OutOfMemoryError("CUDA out of memory")

    def wrap(*buffers):
        try:
            denoise(*buffers)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError("in an engine") from error

    runner = ToyRunner(SIZE[0])
    monkeypatch.setattr(runner, "denoise", wrap if wrapped else denoise)
    with Suppressor(runner, sampler_table(SCHEDULE, "ddim", 1), enhance=False, batch=2) as suppressor:
        monkeypatch.setattr(suppressor._sampler, "close", lambda: alive_at_close.append(made[-1]() is not None))
        with pytest.raises(torch.OutOfMemoryError) as caught:
            suppressor.submit(images(2), STREAMS[:2])
        assert made[0]() is None
        assert caught.traceback[-1].name == ("wrap" if wrapped else "denoise")  # where it was is still told
    assert alive_at_close[0] is False


def test_results_may_be_taken_in_any_order():
    table = sampler_table(SCHEDULE, "ddim", 1)
    with Suppressor(ToyRunner(SIZE[0]), table, enhance=False, batch=3) as suppressor:
        for order in ((0, 1, 2), (2, 0, 1)) * BATCHES_IN_FLIGHT:
            host = suppressor.submit(images(3), STREAMS[:3])
            for place in order:
                host.take(place)


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_streams_and_pinned_memory_change_no_pixel_on_a_gpu(sampler):
    from helpers import randomise

    from bsdiff_rt.config import PRESETS
    from bsdiff_rt.networks.autoencoder import Enhancer
    from bsdiff_rt.networks.unet import Denoiser
    from bsdiff_rt.runners.eager import EagerRunner

    denoiser, enhancer = Denoiser(PRESETS["tiny"].denoiser), Enhancer(PRESETS["tiny"].enhancer)
    randomise(denoiser, 1)
    randomise(enhancer, 2)
    table = sampler_table(SCHEDULE, sampler, 40)
    with EagerRunner(denoiser, enhancer, SIZE[0], torch.device("cuda", 0)) as runner:
        expected = suppress(runner, np.stack(images(2))[:, None], table, STREAMS[:2], enhance=True)
        with Suppressor(runner, table, enhance=True, batch=2) as suppressor:
            hosts = [suppressor.submit(images(2), STREAMS[:2]) for _ in range(BATCHES_IN_FLIGHT)]
            for host in hosts:
                assert np.array_equal(np.stack([host.take(place)[0] for place in range(2)]), expected[:, 0])
        assert batching.choose_batch(runner) == FULL_BATCH
