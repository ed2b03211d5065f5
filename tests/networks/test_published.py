"""Converting published weights: what is cut, what is shared, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

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
