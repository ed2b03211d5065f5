"""The denoiser: equal to the published network, and fit for batching, export and reduced precision."""

from __future__ import annotations

import pytest
import torch

from bsdiff_rt.config import PRESETS, DenoiserConfig
from bsdiff_rt.networks.blocks import ResBlock, sinusoidal_embedding
from bsdiff_rt.networks.published import denoiser_state
from bsdiff_rt.networks.unet import Denoiser

# Both compute in float32 with differently ordered sums (fused attention); seen: below 1e-6.
TOLERANCE = 1e-4


def _inputs(batch: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x_t and cxr, each [batch, 1, size, size], float32."""
    x_t, cxr = torch.randn(2, batch, 1, size, size, generator=torch.Generator().manual_seed(1))
    return x_t, cxr.clamp(-1, 1)


@pytest.fixture
def tiny(randomise) -> Denoiser:
    network = Denoiser(PRESETS["tiny"].denoiser).eval()
    randomise(network, 2)
    return network


@pytest.mark.parametrize(
    ("preset", "size"), [("tiny", 32), ("demo", 32), pytest.param("paper", 64, marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_equals_published_network(preset, size, published_denoiser, relative_difference):
    config = PRESETS[preset].denoiser
    published = published_denoiser(config)
    with torch.device("meta"):
        ours = Denoiser(config).eval()
    # assign: at paper width a second copy of the weights would cost 0.9 GB.
    ours.load_state_dict(denoiser_state(published.state_dict(), config), assign=True)
    x_t, cxr = _inputs(1, size)
    for t in (0, 500, 999):
        steps = torch.tensor([t])
        expected = published(torch.cat((x_t, cxr), dim=1), steps)[:, :1]
        expected = expected + cxr if config.residual else expected  # ours alone; see the next test
        assert relative_difference(ours(x_t, cxr, steps), expected) < TOLERANCE, f"t = {t}"


def test_only_the_demo_preset_is_residual():
    assert {name for name, preset in PRESETS.items() if preset.denoiser.residual} == {"demo"}
    network = Denoiser(PRESETS["demo"].denoiser)  # its last convolution starts at zero: no bone found yet
    x_t, cxr = _inputs(1, 16)
    assert torch.equal(network(x_t, cxr, torch.tensor([5])), cxr)


@torch.no_grad()
def test_equals_published_network_with_unequal_levels(published_denoiser, relative_difference):
    # A count of residual blocks that differs between levels, and attention at the top: neither is in a preset.
    config = DenoiserConfig((8, 16, 24), (1, 3, 2), (True, False, True), norm_groups=4)
    published = published_denoiser(config)
    ours = Denoiser(config).eval()
    ours.load_state_dict(denoiser_state(published.state_dict(), config))
    x_t, cxr = _inputs(2, 16)
    steps = torch.tensor([7, 800])
    expected = published(torch.cat((x_t, cxr), dim=1), steps)[:, :1]
    assert relative_difference(ours(x_t, cxr, steps), expected) < TOLERANCE


def test_parameter_count_of_the_paper_preset():
    with torch.device("meta"):
        network = Denoiser(PRESETS["paper"].denoiser)
    cut_channel = 64 * 3 * 3 + 1
    # proj_attn, created and never applied by the published code: weight and bias of 7, 7, 7 and 8 attentions.
    unused = sum(count * (c * c + c) for count, c in ((7, 128), (7, 256), (7, 512), (8, 768)))
    assert sum(p.numel() for p in network.parameters()) == 220_237_762 - cut_channel - unused


def test_starts_at_zero_like_the_published_network():
    network = Denoiser(PRESETS["tiny"].denoiser)
    blocks = [module for module in network.modules() if isinstance(module, ResBlock)]
    assert len(blocks) == 2 + 2 + 4  # down, middle, up
    for layer in (network.conv_out, *(block.conv2 for block in blocks)):
        assert not layer.weight.any()
        assert not layer.bias.any()
    assert all(block.conv1.weight.any() for block in blocks)
    x_t, cxr = _inputs(1, 16)
    assert not network(x_t, cxr, torch.tensor([5])).any()


def test_sinusoidal_embedding_values():
    embedding = sinusoidal_embedding(torch.tensor([0, 1, 999]), 4)  # frequencies 1 and 1/100, cosines first
    angles = torch.tensor([[0.0, 0.0], [1.0, 0.01], [999.0, 9.99]], dtype=torch.float64)
    expected = torch.cat((angles.cos(), angles.sin()), dim=1).float()
    torch.testing.assert_close(embedding, expected, rtol=0, atol=1e-4)  # 999 rad carries 6e-5 rad of float32 rounding


@torch.no_grad()
def test_images_of_a_batch_do_not_influence_each_other(tiny):
    x_t, cxr = _inputs(3, 16)
    t = torch.tensor([0, 400, 999])
    together = tiny(x_t, cxr, t)
    for i in range(3):
        alone = tiny(x_t[i : i + 1], cxr[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)  # sums in another order


@torch.no_grad()
def test_every_input_matters(tiny):
    x_t, cxr = _inputs(1, 16)
    reference = tiny(x_t, cxr, torch.tensor([10]))
    assert not torch.allclose(reference, tiny(cxr, x_t, torch.tensor([10])), atol=1e-3)
    assert not torch.allclose(reference, tiny(x_t, cxr, torch.tensor([900])), atol=1e-3)


@torch.no_grad()
def test_time_may_be_float(tiny):
    x_t, cxr = _inputs(1, 16)
    assert torch.equal(tiny(x_t, cxr, torch.tensor([10])), tiny(x_t, cxr, torch.tensor([10.0])))


@torch.no_grad()
def test_channels_last_and_reduced_precision(tiny, relative_difference):
    x_t, cxr = _inputs(2, 16)
    t = torch.tensor([3, 990])
    expected = tiny(x_t, cxr, t)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = tiny(x_t, cxr, t)
    assert mixed.dtype == torch.bfloat16
    assert relative_difference(mixed.float(), expected) < 0.1  # 8 bits of mantissa through some 30 layers
    tiny.to(memory_format=torch.channels_last)
    assert relative_difference(tiny(x_t, cxr, t), expected) < 1e-5
    tiny.half()
    half = tiny(x_t.half(), cxr.half(), t)
    assert half.dtype == torch.float16
    assert relative_difference(half.float(), expected) < 0.02  # 11 bits


@pytest.mark.slow
@torch.no_grad()
def test_exports_with_a_dynamic_batch(tiny, relative_difference):
    batch = torch.export.Dim("batch", min=1, max=8)
    example = (*_inputs(2, 16), torch.tensor([1, 2]))
    program = torch.export.export(tiny, example, dynamic_shapes=({0: batch}, {0: batch}, {0: batch}))
    x_t, cxr = _inputs(3, 16)
    t = torch.tensor([0, 500, 999])
    assert relative_difference(program.module()(x_t, cxr, t), tiny(x_t, cxr, t)) < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        DenoiserConfig((8, 16), (1,), (False, True), norm_groups=4),
        DenoiserConfig((8, 18), (1, 1), (False, True), norm_groups=4),
    ],
    ids=["levels differ in length", "channels not a multiple of the groups"],
)
def test_impossible_shapes_are_refused(config):
    with pytest.raises(ValueError):  # noqa: PT011 - torch's and zip's own messages
        Denoiser(config)
