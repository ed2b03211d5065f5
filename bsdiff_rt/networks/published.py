"""Convert weights of the published networks for `Denoiser` and `Enhancer`.

Two packages contain the published classes. The keys show which one wrote the weights:

| | monai-generative 0.2.x (the published checkpoints) | MONAI >= 1.4 |
|---|---|---|
| attention | `to_q`, `to_k`, `to_v` | `attn.to_q`, `attn.to_k`, `attn.to_v` |
| its output projection | `proj_attn`, never applied: dropped | `attn.out_proj`, applied: multiplied into `to_v` |
| upsampling | `upsampler.conv`, `blocks.N.conv` | `upsampler.postconv`, `blocks.N.postconv` |

Multiplying loses nothing. Attention averages values with weights that sum to 1, so for one head
W_o (sum_j p_j (W_v x_j + b_v)) + b_o = sum_j p_j (W_o W_v x_j + W_o b_v + b_o).

Otherwise both differ from ours by a wrapper around each convolution (`conv1.conv.weight` for `conv1.weight`) and by the
few names below. Weights that do not reach the output are dropped: further output channels of the final convolution,
which were never trained, and the autoencoder's log-sigma branch, which is never decoded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bsdiff_rt.config import DenoiserConfig, EnhancerConfig
from bsdiff_rt.errors import BundleError
from bsdiff_rt.networks.autoencoder import Enhancer
from bsdiff_rt.networks.unet import Denoiser

# Our module name (a regular expression) -> theirs.
_DENOISER_NAMES = {r"\bdownsampler$": "downsampler.op", r"^norm_out$": "out.0", r"^conv_out$": "out.2"}
_ENHANCER_NAMES = {r"^(encoder|decoder)\.": r"\1.blocks.", r"\bskip_connection$": "nin_shortcut"}
# Further names of MONAI >= 1.4, and how to recognise its keys.
_MONAI_NAMES = {r"\.to_([qkv])$": r".attn.to_\1", r"(\bupsampler|^decoder\.blocks\.\d+)\.conv$": r"\1.postconv"}
_MONAI_KEY = re.compile(r"\.(attn|postconv)\.")
# Published keys without effect on the output. They may be absent.
_UNUSED = re.compile(r"(^|\.)proj_attn\.(weight|bias)$|^quant_conv_log_sigma\.conv\.(weight|bias)$")


def denoiser_state(published: Mapping[str, Tensor], config: DenoiserConfig) -> dict[str, Tensor]:
    """Convert the state dict of a published `DiffusionModelUNet` for `Denoiser(config).load_state_dict`.

    Args:
        published: the published state dict. It is not changed.
        config: the shape of the network.

    Returns:
        Every tensor of `Denoiser(config)`, in its dtype and on its device. All share memory with `published`, except
        the final convolution and tensors into which an output projection was multiplied.

    Raises:
        BundleError: keys are missing or unknown, or a tensor has another shape than in `config`. The message lists
            their published names.
    """
    with torch.device("meta"):
        network = Denoiser(config)
    cut = dict(published)
    for key in ("out.2.conv.weight", "out.2.conv.bias"):
        if key in cut:
            # Cloned: a view would keep the dropped channel in memory.
            cut[key] = cut[key][: config.out_channels].clone()
    return _convert(cut, network, _DENOISER_NAMES, "denoiser")


def enhancer_state(published: Mapping[str, Tensor], config: EnhancerConfig) -> dict[str, Tensor]:
    """Convert the state dict of a published `AutoencoderKL` for `Enhancer(config).load_state_dict`.

    Args:
        published: the published state dict. It is not changed.
        config: the shape of the network.

    Returns:
        Every tensor of `Enhancer(config)`, in its dtype and on its device. All share memory with `published`, except
        tensors into which an output projection was multiplied.

    Raises:
        BundleError: keys are missing or unknown, or a tensor has another shape than in `config`. The message lists
            their published names.
    """
    with torch.device("meta"):
        network = Enhancer(config)
    return _convert(published, network, _ENHANCER_NAMES, "enhancer")


def _map_names(network: nn.Module, renamed: Mapping[str, str]) -> dict[str, str]:
    """Return the published key of each of our parameters: {our key: their key}."""
    names: dict[str, str] = {}
    for module_name, module in network.named_modules():
        theirs = module_name
        for pattern, replacement in renamed.items():
            theirs = re.sub(pattern, replacement, theirs)
        if isinstance(module, nn.Conv2d):
            theirs += ".conv"
        for leaf, _ in module.named_parameters(recurse=False):
            names[f"{module_name}.{leaf}"] = f"{theirs}.{leaf}"
    return names


def _join_first(items: list[str], most: int = 10) -> str:
    """Return the first items on one line, and the number of the others."""
    shown = ", ".join(items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"


def _convert(
    published: Mapping[str, Tensor], network: nn.Module, renamed: Mapping[str, str], stage: str
) -> dict[str, Tensor]:
    """Check that keys and shapes are exactly those of the network, rename, and multiply output projections in."""
    monai = any(_MONAI_KEY.search(key) for key in published)
    names = _map_names(network, {**renamed, **_MONAI_NAMES} if monai else renamed)
    projections = {}  # our key in `to_v` -> their key in the output projection, of the same shape
    if any(".attn.out_proj." in key for key in published):
        projections = {ours: key.replace(".to_v.", ".out_proj.") for ours, key in names.items() if ".to_v." in ours}
    expected = {*names.values(), *projections.values()}
    missing = sorted(expected - set(published))
    unknown = sorted(key for key in set(published) - expected if not _UNUSED.search(key))
    if missing or unknown:
        parts = [f"{what}: {_join_first(keys)}" for what, keys in (("missing", missing), ("unknown", unknown)) if keys]
        raise BundleError(
            f"these are not the weights of the published {stage} in the shape asked for ({'; '.join(parts)}); "
            "check the preset, and that the file holds weights of this stage by monai-generative 0.2.x or MONAI >= 1.4"
        )
    misshapen = [
        f"{theirs} is {tuple(published[theirs].shape)}, expected {tuple(parameter.shape)}"
        for ours, parameter in network.named_parameters()
        for theirs in sorted({names[ours], projections.get(ours, names[ours])})
        if published[theirs].shape != parameter.shape
    ]
    if misshapen:
        raise BundleError(f"published {stage} weights of another shape: {_join_first(misshapen)}; check the preset")
    state = {ours: published[theirs] for ours, theirs in names.items()}
    for ours, theirs in projections.items():
        product = published[re.sub("bias$", "weight", theirs)].double() @ state[ours].double()
        if ours.endswith(".bias"):
            product += published[theirs].double()
        state[ours] = product.to(state[ours].dtype)
    return state
