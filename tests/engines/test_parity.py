"""The parity gate: lets an engine through that draws eager's picture, and says where any other goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers import randomise
from torch import nn

from bsdiff_rt.bundle import Manifest, open_bundle
from bsdiff_rt.config import PRESETS, Precision, SamplerSettings, Schedule
from bsdiff_rt.engines import parity
from bsdiff_rt.engines.parity import DIFFERENCE, PSNR, TAKEN, Parity, compare
from bsdiff_rt.errors import EngineError
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.unet import Denoiser
from bsdiff_rt.runners.aoti_builder import DTYPES, lower_precision
from bsdiff_rt.runners.eager import EagerRunner, load_networks
from bsdiff_rt.sampling.sampler import sample
from bsdiff_rt.sampling.schedule import sampler_table

CPU = torch.device("cpu")
SIZE = 32
CALLS = [f"denoiser, t = {t}, batch {batch}" for batch in (1, 2) for t in (0, 500, 999)]
NAMES = [
    *CALLS,
    *(f"enhancer, batch {batch}" for batch in (1, 2)),
    *(f"picture after stage {stage}, batch 2" for stage in (1, 2)),
]


def networks() -> tuple[Denoiser, Enhancer]:
    preset = PRESETS["tiny"]
    denoiser, enhancer = Denoiser(preset.denoiser), Enhancer(preset.enhancer)
    randomise(denoiser, 1)
    randomise(enhancer, 2)
    return denoiser, enhancer


class Candidate(EagerRunner):
    """Eager, with whatever a test does to its outputs."""

    def __init__(self, precision: Precision = "fp32", batch_range: tuple[int, int | None] = (1, None)) -> None:
        denoiser, enhancer = networks()
        lower_precision(denoiser, DTYPES[precision])
        super().__init__(denoiser, enhancer, SIZE, CPU)
        self.precision, self.batch_range = precision, batch_range
        self.distort: Callable[[torch.Tensor, float], None] = lambda out, t: None
        self.distort_enhancer: Callable[[torch.Tensor], None] = lambda out: None
        self.batches: set[int] = set()

    def denoise(self, x_t: torch.Tensor, cxr: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
        super().denoise(x_t, cxr, t, out)
        self.batches.add(len(out))
        self.distort(out, float(t[0]))

    def enhance(self, x: torch.Tensor, out: torch.Tensor) -> None:
        super().enhance(x, out)
        self.distort_enhancer(out)


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    """The gate takes schedule and sampler from it."""
    return replace(open_bundle("demo").manifest, schedule=Schedule(objective="x0"), sampler=SamplerSettings("ddim", 3))


@pytest.fixture(scope="module")
def reference() -> EagerRunner:
    return EagerRunner(*networks(), SIZE, CPU)


def gate(reference: EagerRunner, candidate: EagerRunner, manifest: Manifest) -> Parity:
    return compare(reference, candidate, manifest, lambda *_: None)


def names(checks) -> list[str]:
    """What was compared, each once: a picture has two figures."""
    return list(dict.fromkeys(check.what for check in checks))


def test_the_same_networks_pass(reference, manifest):
    phases = []
    found = compare(reference, Candidate(), manifest, lambda *phase: phases.append(phase))
    assert found.failed == []
    assert names(found.checks) == NAMES
    assert (found.sampler, found.steps, found.tolerance, found.reference) == ("ddim", 3, "fp32", "eager fp32 on cpu")
    assert (found.worst_call, found.psnr_db) == (0.0, parity.EQUAL_DB)
    assert phases == [
        ("comparing single calls with eager fp32", None),
        ("comparing 3 steps of ddim with eager fp32", None),
    ]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_rounding_passes_in_its_own_precision_and_fails_as_fp32(reference, manifest, precision):
    candidate = Candidate(precision)
    found = gate(reference, candidate, manifest)
    assert found.failed == []
    assert found.tolerance == precision
    candidate.precision = "fp32"
    assert set(CALLS) <= set(names(gate(reference, candidate, manifest).failed))


@pytest.mark.parametrize(
    ("batch_range", "used"),
    [((1, None), {1, 2}), ((1, 1), {1}), ((1, 2), {1, 2}), ((2, 8), {2, 8}), ((4, 4), {4}), ((1, 7), {1, 2, 7})],
)
def test_batches_keep_to_the_range(reference, manifest, batch_range, used):
    candidate = Candidate(batch_range=batch_range)
    assert gate(reference, candidate, manifest).failed == []
    assert candidate.batches == used


@pytest.mark.parametrize("t", [0, 500, 999])
def test_a_wrong_timestep_is_named(reference, manifest, t):
    candidate = Candidate()

    def distort(out, at):
        if at == t:
            out[0, 0, 5, 7] += 0.1 * out.abs().max()

    candidate.distort = distort
    failed = gate(reference, candidate, manifest).failed
    assert names(failed)[:2] == [f"denoiser, t = {t}, batch {batch}" for batch in (1, 2)]
    assert failed[0].value == pytest.approx(0.1, rel=0.2)  # the pixel changed was perhaps the largest itself
    assert str(failed[0]).startswith(f"denoiser, t = {t}, batch 1: largest difference, share of the largest output: ")
    assert str(failed[0]).endswith(", at most 0.0001 is needed")


def test_wrong_only_beyond_batch_1(reference, manifest):
    candidate = Candidate()

    def distort(out, _):
        if len(out) == 2:
            out[1] = out[0]

    candidate.distort = distort
    failed = names(gate(reference, candidate, manifest).failed)
    assert failed == [name for name in NAMES if name.endswith("batch 2") and not name.startswith("enhancer")]


def test_wrong_only_at_the_largest_batch(reference, manifest):
    candidate = Candidate(batch_range=(1, 5))

    def distort(out, _=None):
        if len(out) == 5:
            out[4] = out[3]

    candidate.distort = candidate.distort_enhancer = distort
    found = gate(reference, candidate, manifest)
    assert names(found.failed) == ["denoiser, t = 999, batch 5", "enhancer, batch 5"]


def test_a_wrong_enhancer(reference, manifest):
    candidate = Candidate()
    candidate.distort_enhancer = lambda out: out.mul_(1.05)
    failed = names(gate(reference, candidate, manifest).failed)
    assert failed == ["enhancer, batch 1", "enhancer, batch 2", "picture after stage 2, batch 2"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_enhancer_is_held_to_fp32_whatever_the_denoisers_precision(reference, manifest, precision):
    candidate = Candidate()
    candidate.precision = precision
    candidate.distort_enhancer = lambda out: out.mul_(1.001)
    assert names(gate(reference, candidate, manifest).failed)[:2] == ["enhancer, batch 1", "enhancer, batch 2"]


def test_calls_within_tolerance_and_a_picture_that_is_not(reference, manifest):
    """4 % of every x0, as a single call in fp16 may be off."""
    candidate = Candidate()
    candidate.precision = "fp16"
    candidate.distort = lambda out, _: out.mul_(0.96)
    failed = gate(reference, candidate, manifest).failed
    assert "picture after stage 1, batch 2" in names(failed)
    assert not set(CALLS) & set(names(failed))
    (check,) = (check for check in failed if check.what.startswith("picture after stage 1"))
    assert check.figure == PSNR
    assert 20 < check.value < 45
    assert str(check).endswith("at least 45 is needed")


@pytest.mark.parametrize(("share", "passes"), [(0.55, False), (0.85, False), (0.95, True)])
def test_an_engine_that_leaves_bone_is_rejected(monkeypatch, share, passes):
    """Half of it may be within 45 dB: bones are a small part of a picture. The demo model at a quarter of its side."""
    bundle = open_bundle("demo")
    both = load_networks(bundle)

    class Weak(EagerRunner):
        def denoise(self, x_t, cxr, t, out):
            super().denoise(x_t, cxr, t, out)
            out.copy_(cxr + share * (out - cxr))

    weak = Weak(*both, 64, CPU)
    weak.precision = "bf16"
    monkeypatch.setitem(parity.TOLERANCES, "bf16", replace(parity.TOLERANCES["bf16"], psnr_db=20.0))
    found = gate(EagerRunner(*both, 64, CPU), weak, bundle.manifest)
    taken = [check for check in found.checks if check.figure == TAKEN]
    assert taken[0].value == pytest.approx(1 - share, rel=0.1)
    assert [check.passed for check in taken] == [passes] * 2


def test_a_network_that_takes_nothing_away(manifest):
    """A grey level is what a difference is then compared with."""

    class Same(nn.Module):
        def forward(self, x, cxr=None, *_):
            return x if cxr is None else cxr

    candidate = EagerRunner(Same(), Same(), SIZE, CPU)
    assert gate(candidate, candidate, manifest).failed == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_single_call_that_is_not_finite(reference, manifest, bad):
    candidate = Candidate()
    candidate.distort = lambda out, t: out[0, 0, 3, 3].fill_(bad) if t == 500 else None
    failed = gate(reference, candidate, manifest).failed
    assert names(failed) == ["denoiser, t = 500, batch 1", "denoiser, t = 500, batch 2"]
    assert "the output is NaN or infinite" in str(failed[0])


def test_an_infinity_in_the_midst_of_a_trajectory(reference, manifest):
    """ddim's 3 steps of 1000 are t = 999, 666, 332: the second is no single call; the gate says where it began."""
    candidate = Candidate()
    candidate.distort = lambda out, t: out[0, 0, 3, 3].fill_(float("inf")) if t == 666 else None
    table = sampler_table(manifest.schedule, "ddim", 3)
    draw = torch.randn(4, 1, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    picture = sample(candidate, torch.zeros(1, 1, SIZE, SIZE), table, lambda number: draw[number])
    assert not torch.isfinite(picture).any()
    failed = gate(reference, candidate, manifest).failed
    assert names(failed) == ["picture after stage 1, batch 2", "picture after stage 2, batch 2"]
    assert "the denoiser's output at step 1 is NaN or infinite" in str(failed[0])


def test_an_enhancer_that_is_not_finite(reference, manifest):
    candidate = Candidate()
    candidate.distort_enhancer = lambda out: out[0, 0, 0, 0].fill_(float("inf"))
    failed = gate(reference, candidate, manifest).failed
    assert names(failed) == ["enhancer, batch 1", "enhancer, batch 2", "picture after stage 2, batch 2"]
    assert "the output is NaN or infinite" in str(failed[-1])


def test_a_broken_bundle_is_not_blamed_on_the_engine(manifest):
    broken = Candidate()
    broken.distort = lambda out, t: out.fill_(float("nan"))
    failed = gate(broken, Candidate(), manifest).failed
    assert "eager fp32 itself returned NaN or infinity: the bundle is broken" in str(failed[0])


@pytest.mark.parametrize(("steps", "run"), [(3, 3), (50, 50), (1000, 50)])
def test_the_trajectory_is_bounded_and_says_so(manifest, steps, run):
    """Every step of the bundle's own sampler, up to 50."""

    class Zero(nn.Module):
        def forward(self, x, *_):
            return 0.5 * x

    count = []

    class Counting(EagerRunner):
        def denoise(self, x_t, cxr, t, out):
            super().denoise(x_t, cxr, t, out)
            count.append(len(out))

    longer = replace(manifest, sampler=SamplerSettings("ddpm", steps))
    found = gate(EagerRunner(Zero(), Zero(), SIZE, CPU), Counting(Zero(), Zero(), SIZE, CPU), longer)
    assert found.failed == []
    assert (found.sampler, found.steps, len(count)) == ("ddpm", run, len(CALLS) + run)


@pytest.mark.parametrize("objective", ["eps", "v", "x0"])
def test_fp32_that_sums_in_another_order_passes_whatever_is_predicted(reference, manifest, objective):
    """With eps a call's own error of 1e-6 becomes 2e-4 in the x0 of the noisiest step, which is not judged."""
    candidate = Candidate()
    generator = torch.Generator().manual_seed(0)
    candidate.distort = lambda out, _: out.add_(1e-6 * torch.randn(out.shape, generator=generator))
    for sampler in (SamplerSettings("ddim", 3), SamplerSettings("ddpm", 10)):
        changed = replace(manifest, schedule=Schedule(objective=objective), sampler=sampler)
        found = gate(reference, candidate, changed)
        assert found.failed == []
        assert 0 < found.worst_call < 1e-4
        assert found.psnr_db < parity.EQUAL_DB


def test_json_holds_every_figure(reference, manifest):
    candidate = Candidate()
    candidate.distort = lambda out, t: out.fill_(float("nan")) if t == 0 else None
    found = gate(reference, candidate, manifest)
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert list(dict.fromkeys(check["what"] for check in content["checks"])) == NAMES
    assert [check["figure"] for check in content["checks"][-4:]] == [PSNR, TAKEN] * 2
    first, second = content["checks"][:2]
    assert (first["value"], first["passed"], first["note"]) == (None, False, "the output is NaN or infinite")
    assert (second["figure"], second["limit"], second["passed"]) == (DIFFERENCE, 1e-4, True)
    assert (content["steps"], content["tolerance"]) == (3, "fp32")


def test_the_reference_is_computed_without_tf32_and_the_candidate_is_not(manifest, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen: dict[str, set[bool]] = {"reference": set(), "candidate": set()}

    def watching(who: str) -> Candidate:
        runner = Candidate()
        runner.distort = lambda *_: seen[who].add(torch.backends.cudnn.allow_tf32)
        runner.distort_enhancer = lambda *_: seen[who].add(torch.backends.cudnn.allow_tf32)
        return runner

    gate(watching("reference"), watching("candidate"), manifest)
    assert seen == {"reference": {False}, "candidate": {True}}
    assert torch.backends.cudnn.allow_tf32 is True


def test_one_device(reference, manifest):
    candidate = Candidate()
    candidate.device = torch.device("meta")
    with pytest.raises(EngineError, match="an engine on meta cannot be compared with eager on cpu"):
        gate(reference, candidate, manifest)
