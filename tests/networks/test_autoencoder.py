"""The enhancer: equal to the published autoencoder's decoded mean, and fit for batching, export, reduced precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bsdiff_rt.config import PRESETS, EnhancerConfig
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.published import enhancer_state

# Both compute in float32 with differently ordered sums (fused attention); seen: up to 3e-6.
TOLERANCE = 1e-4

CONFIGS = {
    **{name: preset.enhancer for name, preset in PRESETS.items()},
    "no middle": replace(PRESETS["tiny"].enhancer, middle_attention=False),
    "unequal levels": EnhancerConfig((8, 16, 24), (1, 3, 2), (True, False, True), latent_channels=3, norm_groups=4),
}


def _image(batch: int, size: int) -> torch.Tensor:
    """[batch, 1, size, size], float32, in [-1, 1]."""
    return torch.rand(batch, 1, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def tiny(randomise) -> Enhancer:
    network = Enhancer(PRESETS["tiny"].enhancer).eval()
    randomise(network, 2)
    return network


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_equals_decoded_mean_of_published_network(name, published_enhancer, relative_difference):
    config = CONFIGS[name]
    published = published_enhancer(config)
    with torch.device("meta"):
        ours = Enhancer(config).eval()
    ours.load_state_dict(enhancer_state(published.state_dict(), config), assign=True)
    x = _image(1, 64)
    mu, _sigma = published.encode(x)
    expected = published.decode(mu)
    expected = expected + x if config.residual else expected  # ours alone; see the next test
    assert relative_difference(ours(x), expected) < TOLERANCE


def test_only_the_demo_preset_is_residual():
    assert {name for name, preset in PRESETS.items() if preset.enhancer.residual} == {"demo"}
    x = _image(1, 16)
    assert torch.equal(Enhancer(PRESETS["demo"].enhancer)(x), x)  # starts with no correction


def test_parameter_count_of_the_paper_preset():
    with torch.device("meta"):
        network = Enhancer(PRESETS["paper"].enhancer)
    log_sigma = 8 * 8 + 8
    # proj_attn, created and never applied by the published code: weight and bias of 4 + 1 and 4 + 2 attentions.
    unused = sum(count * (c * c + c) for count, c in ((4, 256), (6, 384)))
    assert sum(p.numel() for p in network.parameters()) == 34_449_889 - log_sigma - unused


@torch.no_grad()
def test_is_deterministic(tiny):
    x = _image(1, 16)
    assert torch.equal(tiny(x), tiny(x))


@torch.no_grad()
def test_images_of_a_batch_do_not_influence_each_other(tiny):
    x = _image(3, 16)
    together = tiny(x)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], tiny(x[i : i + 1]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_channels_last_and_reduced_precision(tiny, relative_difference):
    x = _image(2, 16)
    expected = tiny(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = tiny(x)
    assert mixed.dtype == torch.bfloat16
    assert relative_difference(mixed.float(), expected) < 0.1  # 8 bits of mantissa through some 30 layers
    tiny.to(memory_format=torch.channels_last)
    assert relative_difference(tiny(x), expected) < 1e-5
    tiny.half()
    assert relative_difference(tiny(x.half()).float(), expected) < 0.02  # 11 bits


@pytest.mark.slow
@torch.no_grad()
def test_exports_with_a_dynamic_batch(tiny, relative_difference):
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(tiny, (_image(2, 16),), dynamic_shapes=({0: batch},))
    x = _image(3, 16)
    assert relative_difference(program.module()(x), tiny(x)) < 1e-5
