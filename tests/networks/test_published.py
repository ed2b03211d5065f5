"""Converting published weights: what is cut, what is shared, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import randomise as fill_randomly
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from torch import nn

from bsdiff_rt.config import PRESETS
from bsdiff_rt.errors import BundleError
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.published import denoiser_state, enhancer_state
from bsdiff_rt.networks.unet import Denoiser

DENOISER = PRESETS["tiny"].denoiser
ENHANCER = PRESETS["tiny"].enhancer


@pytest.fixture
def denoiser_weights(published_denoiser) -> dict[str, torch.Tensor]:
    return dict(published_denoiser(DENOISER).state_dict())


@pytest.fixture
def enhancer_weights(published_enhancer) -> dict[str, torch.Tensor]:
    return dict(published_enhancer(ENHANCER).state_dict())


def test_keys_and_shapes_are_our_networks(denoiser_weights, enhancer_weights):
    for network, state in (
        (Denoiser(DENOISER), denoiser_state(denoiser_weights, DENOISER)),
        (Enhancer(ENHANCER), enhancer_state(enhancer_weights, ENHANCER)),
    ):
        assert {key: tensor.shape for key, tensor in state.items()} == {
            key: tensor.shape for key, tensor in network.state_dict().items()
        }


def test_final_convolution_keeps_channel_0_in_its_own_memory(denoiser_weights):
    state = denoiser_state(denoiser_weights, DENOISER)
    assert torch.equal(state["conv_out.weight"], denoiser_weights["out.2.conv.weight"][:1])
    assert torch.equal(state["conv_out.bias"], denoiser_weights["out.2.conv.bias"][:1])
    assert state["conv_out.weight"].untyped_storage().nbytes() == state["conv_out.weight"].nbytes
    assert denoiser_weights["out.2.conv.weight"].shape[0] == 2  # the input is left as it was


def test_weights_keep_their_dtype(denoiser_weights):
    half = {key: tensor.half() for key, tensor in denoiser_weights.items()}
    assert {tensor.dtype for tensor in denoiser_state(half, DENOISER).values()} == {torch.float16}


def test_published_proj_attn_has_no_effect(published_denoiser, denoiser_weights):
    # The reason why it may be dropped: should a later monai-generative apply it, this test fails.
    published = published_denoiser(DENOISER)
    x = torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = published(x, torch.tensor([5]))
        for name, parameter in published.named_parameters():
            if "proj_attn" in name:
                parameter.fill_(100.0)
        assert torch.equal(published(x, torch.tensor([5])), before)


def test_weights_without_the_unused_tensors_are_accepted(denoiser_weights, enhancer_weights):
    unused = ("proj_attn", "quant_conv_log_sigma")
    for convert, weights, config in (
        (denoiser_state, denoiser_weights, DENOISER),
        (enhancer_state, enhancer_weights, ENHANCER),
    ):
        pruned = {key: tensor for key, tensor in weights.items() if not any(word in key for word in unused)}
        assert len(pruned) < len(weights)
        assert convert(pruned, config).keys() == convert(weights, config).keys()


def test_missing_keys_are_named(denoiser_weights, enhancer_weights):
    del denoiser_weights["middle_block.attention.to_q.weight"]
    del denoiser_weights["out.2.conv.bias"]
    with pytest.raises(BundleError, match=r"missing: middle_block\.attention\.to_q\.weight, out\.2\.conv\.bias"):
        denoiser_state(denoiser_weights, DENOISER)
    del enhancer_weights["encoder.blocks.0.conv.weight"]
    with pytest.raises(BundleError, match=r"missing: encoder\.blocks\.0\.conv\.weight"):
        enhancer_state(enhancer_weights, ENHANCER)


def test_unknown_keys_are_named(denoiser_weights, enhancer_weights):
    denoiser_weights["module.extra.weight"] = torch.zeros(1)
    with pytest.raises(BundleError, match=r"unknown: module\.extra\.weight"):
        denoiser_state(denoiser_weights, DENOISER)
    enhancer_weights["loss.weight"] = torch.zeros(1)
    with pytest.raises(BundleError, match=r"unknown: loss\.weight"):
        enhancer_state(enhancer_weights, ENHANCER)


def test_weights_of_another_preset_are_refused(denoiser_weights, enhancer_weights):
    with pytest.raises(BundleError, match=r"published denoiser .* and \d+ more.*check the preset"):
        denoiser_state(denoiser_weights, PRESETS["demo"].denoiser)
    with pytest.raises(BundleError, match="published enhancer"):
        enhancer_state(denoiser_weights, ENHANCER)


def test_other_shapes_are_named(denoiser_weights):
    with pytest.raises(BundleError, match=r"conv_in\.conv\.weight is \(8, 2, 3, 3\), expected \(4, 2, 3, 3\)"):
        denoiser_state(denoiser_weights, replace(DENOISER, channels=(4, 16)))
    denoiser_weights["out.2.conv.weight"] = denoiser_weights["out.2.conv.weight"][:0]
    with pytest.raises(BundleError, match=r"out\.2\.conv\.weight is \(0, 8, 3, 3\), expected \(1, 8, 3, 3\)"):
        denoiser_state(denoiser_weights, DENOISER)


# --- MONAI >= 1.4: the same networks with other keys, and an output projection that is applied ---

# Both compute in float32 with differently ordered sums, and the projection is multiplied in; seen: up to 1.2e-6.
TOLERANCE = 1e-4


def monai_denoiser(seed: int = 0, **options) -> nn.Module:
    network = DiffusionModelUNet(
        spatial_dims=2,
        in_channels=2,
        out_channels=2,
        channels=DENOISER.channels,
        num_res_blocks=DENOISER.res_blocks,
        attention_levels=DENOISER.attention,
        num_head_channels=DENOISER.channels,
        norm_num_groups=DENOISER.norm_groups,
        **options,
    )
    fill_randomly(network, seed)
    return network.eval()


def monai_enhancer(seed: int = 0, **options) -> nn.Module:
    network = AutoencoderKL(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=ENHANCER.channels,
        num_res_blocks=ENHANCER.res_blocks,
        attention_levels=ENHANCER.attention,
        latent_channels=ENHANCER.latent_channels,
        norm_num_groups=ENHANCER.norm_groups,
        **options,
    )
    fill_randomly(network, seed)
    return network.eval()


def fields(channels: int, size: int = 16) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def our_denoiser():
    def make(state):
        network = Denoiser(DENOISER).eval()
        network.load_state_dict(denoiser_state(state, DENOISER))
        return lambda x, t: network(x[:, :1], x[:, 1:], t)

    return make


@pytest.mark.parametrize("projected", [True, False])
@torch.no_grad()
def test_denoiser_equals_that_of_monai(projected, our_denoiser, relative_difference):
    monai = monai_denoiser(include_fc=projected)
    assert any("attn.out_proj.weight" in key for key in monai.state_dict()) == projected
    x, steps = fields(2), torch.tensor([7, 800])
    assert relative_difference(our_denoiser(monai.state_dict())(x, steps), monai(x, steps)[:, :1]) < TOLERANCE


@pytest.mark.parametrize("projected", [True, False])
@torch.no_grad()
def test_enhancer_equals_that_of_monai(projected, relative_difference):
    monai = monai_enhancer(include_fc=projected)
    ours = Enhancer(ENHANCER).eval()
    ours.load_state_dict(enhancer_state(monai.state_dict(), ENHANCER))
    x = fields(1)
    assert relative_difference(ours(x), monai.decode(monai.encode(x)[0])) < TOLERANCE


@torch.no_grad()
def test_the_projection_reaches_the_output(our_denoiser):
    """Else the comparisons above would not notice a wrong one."""
    state = monai_denoiser().state_dict()
    x, steps = fields(2), torch.tensor([7, 800])
    before = our_denoiser(state)(x, steps)
    for part in ("weight", "bias"):
        changed = state | {
            key: -tensor
            for key, tensor in state.items()
            if key.endswith(f"middle_block.attention.attn.out_proj.{part}")
        }
        assert (our_denoiser(changed)(x, steps) - before).abs().max() > 0.01


@torch.no_grad()
def test_monai_applies_the_projection_of_old_weights(published_denoiser, our_denoiser, relative_difference):
    """Its own loader makes the never applied `proj_attn` an applied `out_proj`: another network than was published."""
    published = published_denoiser(DENOISER)
    monai = monai_denoiser()
    monai.load_old_state_dict(dict(published.state_dict()))
    x, steps = fields(2), torch.tensor([7, 800])
    expected = published(x, steps)[:, :1]
    assert relative_difference(monai(x, steps)[:, :1], expected) > 0.01
    assert relative_difference(our_denoiser(published.state_dict())(x, steps), expected) < TOLERANCE
    assert relative_difference(our_denoiser(monai.state_dict())(x, steps), monai(x, steps)[:, :1]) < TOLERANCE


def test_monai_weights_keep_their_dtype_and_stay_as_they_were():
    weights = {key: tensor.half() for key, tensor in monai_denoiser().state_dict().items()}
    before = {key: tensor.clone() for key, tensor in weights.items()}
    assert {tensor.dtype for tensor in denoiser_state(weights, DENOISER).values()} == {torch.float16}
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights.items())


@pytest.mark.parametrize(
    ("dropped", "added", "message"),
    [
        ("middle_block.attention.attn.to_q.bias", None, r"missing: middle_block\.attention\.attn\.to_q\.bias\)"),
        ("middle_block.attention.attn.out_proj.bias", None, r"missing: middle_block\.attention\.attn\.out_proj\.bias"),
        ("up_blocks.0.upsampler.postconv.conv.bias", None, r"missing: up_blocks\.0\.upsampler\.postconv\.conv\.bias"),
        (None, "middle_block.attention.attn.qkv.weight", r"unknown: middle_block\.attention\.attn\.qkv\.weight\)"),
        (None, "middle_block.attention.to_q.weight", r"unknown: middle_block\.attention\.to_q\.weight\)"),
    ],
)
def test_monai_keys_are_named_as_monai_names_them(dropped, added, message):
    weights = dict(monai_denoiser().state_dict())
    weights.pop(dropped, None)
    if added:
        weights[added] = torch.zeros(1)
    with pytest.raises(BundleError, match=message):
        denoiser_state(weights, DENOISER)


def test_a_projection_of_another_shape_is_named():
    weights = dict(monai_enhancer().state_dict())
    weights["encoder.blocks.4.attn.out_proj.weight"] = torch.zeros(16, 8)
    with pytest.raises(
        BundleError, match=r"encoder\.blocks\.4\.attn\.out_proj\.weight is \(16, 8\), expected \(16, 16\)"
    ):
        enhancer_state(weights, ENHANCER)
