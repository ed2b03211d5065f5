"""The recorded loop against the plain one: on the CPU the same numbers, with a stand-in for CUDA the same order."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import randomise
from toy import SCHEDULES, SIZE, ToyRunner, draws, images

from bsdiff_rt.config import PRESETS, SAMPLERS, SamplerName
from bsdiff_rt.errors import EngineError, SettingsError
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.unet import Denoiser
from bsdiff_rt.runners.base import Runner
from bsdiff_rt.runners.eager import EagerRunner
from bsdiff_rt.sampling import cuda_graph as module
from bsdiff_rt.sampling.batching import NOISE_AHEAD, NoiseAhead
from bsdiff_rt.sampling.cuda_graph import RING_SLOTS, WARM_UP_STEPS, CapturedSampler
from bsdiff_rt.sampling.noise import ImageNoise, batch_noise
from bsdiff_rt.sampling.sampler import sample
from bsdiff_rt.sampling.schedule import Table, sampler_table

SCHEDULE = SCHEDULES[0]
RECORDING = ["side waits for main", "clear", "record", "clear", "main waits for side"]


def table(name: SamplerName, steps: int) -> Table:
    return sampler_table(SCHEDULE, name, steps)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 2 * RING_SLOTS + 1])
def test_equals_the_plain_loop_bit_for_bit(name: SamplerName, steps: int) -> None:
    runner, cxr = ToyRunner(SCHEDULE), images(3)
    expected = sample(runner, cxr, table(name, steps), draws(len(cxr)))
    with CapturedSampler(runner) as captured:
        for _ in range(2):  # the second call finds the buffers as the first one left them
            assert torch.equal(captured.sample(cxr, table(name, steps), draws(len(cxr))), expected)


def test_a_recording_serves_other_tables_of_as_many_steps() -> None:
    runner, cxr = ToyRunner(SCHEDULE), images(2)
    with CapturedSampler(runner, graphs=1) as captured:
        for name in SAMPLERS:
            expected = sample(runner, cxr, table(name, 6), draws(len(cxr)))
            assert torch.equal(captured.sample(cxr, table(name, 6), draws(len(cxr))), expected)


def test_a_result_outlives_the_next_call() -> None:
    runner, cxr = ToyRunner(SCHEDULE), images(2)
    with CapturedSampler(runner) as captured:
        first = captured.sample(cxr, table("ddpm", 4), draws(len(cxr)))
        kept = first.clone()
        captured.sample(-cxr, table("ddpm", 4), draws(len(cxr)))
        assert torch.equal(first, kept)


def test_a_nan_does_not_reach_the_next_call() -> None:
    runner, cxr = ToyRunner(SCHEDULE), images(2)
    expected = sample(runner, cxr, table("dpmpp-2m", 4), draws(len(cxr)))
    with CapturedSampler(runner) as captured:
        assert captured.sample(cxr * torch.nan, table("dpmpp-2m", 4), draws(len(cxr))).isnan().all()
        assert torch.equal(captured.sample(cxr, table("dpmpp-2m", 4), draws(len(cxr))), expected)


def test_noise_for_one_image_is_not_spread_over_a_batch() -> None:
    cxr = images(2)
    with CapturedSampler(ToyRunner(SCHEDULE)) as captured, pytest.raises(SettingsError, match="draw one field per"):
        captured.sample(cxr, table("ddim", 2), draws(1))


def test_the_number_of_recordings_is_bounded() -> None:
    runner = ToyRunner(SCHEDULE)
    captured = CapturedSampler(runner, graphs=2)
    for batch in (1, 2, 1, 3):
        cxr = images(batch)
        captured.sample(cxr, table("ddim", 2), draws(len(cxr)))
    assert [key[0] for key in captured._recordings] == [1, 3]  # 2 was used longest ago
    captured.close()
    assert not captured._recordings


class FakeCuda:
    """Stands in for torch.cuda: work is done at once, and the order in which it was given is written down.

    A recorded graph replays by doing the step again. What this cannot show is that a device keeps the order; the tests
    marked gpu do.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.names = iter(["copies", "side"] * 9)
        self.current = "main"
        self.fail: BaseException | None = None
        self.waited_for: list[str] = []
        self.pool_ended = False

    def pool_call(self, name: str, device: int, pool: object) -> None:
        """As torch's: ending a pool that was ended is an error."""
        self.log.append(f"{name} pool {pool} of {device}")
        if name == "end" and self.pool_ended:
            raise RuntimeError("INTERNAL ASSERT FAILED")

    def install(self, patch: pytest.MonkeyPatch) -> None:
        cuda = self

        class Stream:
            def __init__(self, _: object = None) -> None:
                self.name = next(cuda.names)

            def wait_stream(self, other: Any) -> None:
                cuda.log.append(f"{self.name} waits for {other.name}")

            def wait_event(self, event: Any) -> None:
                cuda.log.append(f"{self.name} waits for event of {event.of}")

            def record_event(self) -> Event:
                event = Event()
                event.of = self.name
                return event

        class Event:
            of = "nothing"

            def record(self) -> None:
                self.of = cuda.current

            def synchronize(self) -> None:
                cuda.waited_for.append(self.of)

        class Graph:
            def replay(self) -> None:
                cuda.log.append(f"replay on {cuda.current}")
                self.work()

            def reset(self) -> None:
                cuda.log.append("reset")

        @contextmanager
        def stream(value: Any) -> Iterator[None]:
            before, cuda.current = cuda.current, value.name
            yield
            cuda.current = before

        @contextmanager
        def graph(value: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
            assert (pool, stream.name, capture_error_mode) == ((0, 7), "side", "thread_local")
            cuda.log.append("record")
            recorded: list[tuple[Runner, Any]] = []
            with patch.context() as inner:
                inner.setattr(module, "step", lambda runner, buffers: recorded.append((runner, buffers)))
                yield
            ((runner, buffers),) = recorded
            value.work = lambda: module.step(runner, buffers)
            if cuda.fail:
                raise cuda.fail

        def current_stream(_: object = None) -> Any:
            holder = Stream.__new__(Stream)
            holder.name = cuda.current
            return holder

        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "stream", stream)
        patch.setattr(torch.cuda, "graph", graph)
        patch.setattr(torch.cuda, "current_stream", current_stream)
        patch.setattr(torch.cuda, "set_stream", lambda value: setattr(cuda, "current", value.name))
        patch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: cuda.log.append("clear"), raising=False)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        for name in ("end", "release"):
            call = {"end": "_cuda_endAllocateToPool", "release": "_cuda_releasePool"}[name]
            patch.setattr(torch._C, call, functools.partial(cuda.pool_call, name), raising=False)
        patch.setattr(torch.cuda, "synchronize", lambda _: cuda.log.append("synchronize"))
        patch.setattr(module, "_Recording", module._Graph)  # although the images lie on the CPU


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


def test_records_after_warming_up_on_a_side_stream_and_replays(cuda: FakeCuda) -> None:
    runner, cxr = ToyRunner(SCHEDULE), images(2)
    expected = sample(ToyRunner(SCHEDULE), cxr, table("ddim", 3), draws(len(cxr)))
    with CapturedSampler(runner) as captured:
        assert torch.equal(captured.sample(cxr, table("ddim", 3), draws(len(cxr))), expected)
        assert cuda.log == [*RECORDING, *["replay on main"] * 3]
        assert len(runner.asked) == WARM_UP_STEPS + 3
        cuda.log.clear()
        assert torch.equal(captured.sample(cxr, table("ddim", 3), draws(len(cxr))), expected)
        assert cuda.log == ["replay on main"] * 3  # recorded once
        cuda.log.clear()
    assert cuda.log == ["synchronize", "reset"]


def test_reuse_of_deep_features_has_two_graphs(cuda: FakeCuda) -> None:
    """One of a whole step and one of the first level, warmed up and recorded in this order, in one pool."""
    denoiser = Denoiser(PRESETS["tiny"].denoiser).eval()
    randomise(denoiser, 1)
    cxr, noise = torch.randn(2, 2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with EagerRunner(denoiser, torch.nn.Identity(), 32, torch.device("cpu")) as runner:
        expected = sample(runner, cxr, table("ddim", 20), lambda _: noise, 3)
        with CapturedSampler(runner, cache_every=3) as captured:
            for _ in range(2):
                assert torch.equal(captured.sample(cxr, table("ddim", 20), lambda _: noise), expected)
        recording = [*RECORDING]
        recording.insert(RECORDING.index("record"), "record")
        assert cuda.log == [*recording, *["replay on main"] * 40, "synchronize", "reset", "reset"]


def test_noise_is_sent_on_its_own_stream_and_never_overtakes(cuda: FakeCuda) -> None:
    cxr, steps = images(1), RING_SLOTS + 2
    expected = sample(ToyRunner(SCHEDULE), cxr, table("ddpm", steps), draws(len(cxr)))
    captured = CapturedSampler(ToyRunner(SCHEDULE))
    assert torch.equal(captured.sample(cxr, table("ddpm", steps), draws(len(cxr))), expected)
    sent = "main waits for event of copies"
    first = ["copies waits for event of nothing", sent, "replay on main"]  # the slot was never used
    later = ["copies waits for event of main", sent, "replay on main"]
    last = ["replay on main"]  # adds no noise
    assert cuda.log[len(RECORDING) :] == first * RING_SLOTS + later * (steps - RING_SLOTS - 1) + last


def test_noise_made_ahead_waits_for_the_stream_that_copies_it(cuda: FakeCuda) -> None:
    """x_T is copied by the computing stream, z by the other: their memory is filled again after those copies only."""
    cxr, steps = images(1), NOISE_AHEAD + 4
    with ThreadPoolExecutor(1) as threads:
        noise = NoiseAhead([ImageNoise(0, b"")], SIZE, table("ddpm", steps), threads, pin=False)
        noise._pin = True  # the memory was allocated before: there is none to pin
        CapturedSampler(ToyRunner(SCHEDULE)).sample(cxr, table("ddpm", steps), noise)
    assert cuda.waited_for == ["main", "copies", "copies", "copies"]


def test_a_step_that_cannot_be_recorded_is_an_error(cuda: FakeCuda) -> None:
    cuda.fail = RuntimeError("operation not permitted when stream is capturing\nmore")
    with pytest.raises(EngineError, match=r"toy: its step cannot be recorded in a CUDA graph \(RuntimeError: op"):
        CapturedSampler(ToyRunner(SCHEDULE)).sample(images(1), table("ddim", 2), draws(1))
    assert cuda.current == "main"


def test_under_auto_a_step_that_cannot_be_recorded_is_called_each_time(cuda: FakeCuda, caplog: Any) -> None:
    cuda.fail = RuntimeError("operation not permitted when stream is capturing")
    cxr, steps = images(2), RING_SLOTS + 2
    expected = sample(ToyRunner(SCHEDULE), cxr, table("ddpm", steps), draws(len(cxr)))
    with CapturedSampler(ToyRunner(SCHEDULE), step_down=True) as captured:
        for _ in range(2):
            assert torch.equal(captured.sample(cxr, table("ddpm", steps), draws(len(cxr))), expected)
    assert cuda.current == "main"
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]  # once
    assert "toy: its step cannot be recorded in a CUDA graph (RuntimeError: operation not" in warning
    assert warning.endswith("The step is called each time instead, which is slower.")


def test_a_call_is_recorded_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[object] = []

    @contextmanager
    def graph(value: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        log.append(("record", stream, capture_error_mode))
        yield
        log.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: log.append("replay")))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "side")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    replay = module.record_call(lambda: log.append("call"), torch.device("cuda", 0))
    assert log == [("record", "side", "thread_local"), "call", "end"]
    replay()
    replay()
    assert log[3:] == ["replay", "replay"]

    def call() -> None:
        """Nothing."""

    assert module.record_call(call, torch.device("cpu")) is call


@pytest.mark.parametrize("ended", [True, False])
def test_the_pool_of_a_recording_that_broke_off_is_closed(cuda: FakeCuda, ended: bool) -> None:
    """Where torch has not done so itself; what it says of the other case does not hide the error."""
    cuda.fail, cuda.pool_ended = RuntimeError("operation not permitted"), ended
    with pytest.raises(EngineError, match="cannot be recorded in a CUDA graph"):
        CapturedSampler(ToyRunner(SCHEDULE)).sample(images(1), table("ddim", 2), draws(1))
    calls = ["end pool (0, 7) of 0", "release pool (0, 7) of 0"]
    assert cuda.log[-2:] == calls if not ended else cuda.log[-1] == calls[0]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Failed to allocate memory for a buffer")],
)
def test_no_memory_for_a_recording_is_reported_as_such(cuda: FakeCuda, error: RuntimeError) -> None:
    cuda.fail = error
    with pytest.raises(type(error), match="memory"):
        CapturedSampler(ToyRunner(SCHEDULE)).sample(images(1), table("ddim", 2), draws(1))
    assert cuda.current == "main"


@pytest.mark.gpu
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_recorded_network_equals_the_plain_loop_bit_for_bit_on_a_gpu(name: SamplerName) -> None:
    denoiser, enhancer = Denoiser(PRESETS["tiny"].denoiser), Enhancer(PRESETS["tiny"].enhancer)
    randomise(denoiser, 1)
    randomise(enhancer, 2)
    device = torch.device("cuda", 0)
    cxr = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = [ImageNoise(0, bytes([number])) for number in range(2)]

    def pinned(number: int) -> torch.Tensor:
        return torch.from_numpy(batch_noise(noise, number, (64, 64))).pin_memory()

    stream = torch.cuda.Stream(device)
    with EagerRunner(denoiser, enhancer, 64, device) as runner, torch.cuda.stream(stream):
        expected = sample(runner, cxr.to(device), table(name, 50), pinned)
        with CapturedSampler(runner) as captured:
            for _ in range(3):
                assert torch.equal(captured.sample(cxr.to(device), table(name, 50), pinned), expected)
