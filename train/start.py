"""Start stage 1 from the weights of a bundle, with residual blocks added if the preset has more of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from bsdiff_rt.bundle import Bundle, open_bundle
from bsdiff_rt.config import Schedule
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.networks.blocks import ResBlock
from bsdiff_rt.networks.unet import Denoiser, DownBlock, UpBlock
from bsdiff_rt.runners.eager import load_networks


def start_from(denoiser: Denoiser, schedule: Schedule, bundle: str) -> Bundle:
    """Give a new denoiser a bundle's weights. Added residual blocks begin as the identity, so both compute the same.

    Blocks can be added to levels without attention.

    Args:
        denoiser: as built. Its weights are replaced.
        schedule: the diffusion it will be trained for.
        bundle: folder, or name of a bundle in the package.

    Returns:
        The bundle.

    Raises:
        BundleError: there is no such bundle, or it is damaged.
        SettingsError: its network is no smaller form of this one, or was trained for another schedule.
    """
    opened = open_bundle(bundle)
    manifest, asked = opened.manifest, denoiser.config
    if replace(manifest.denoiser, res_blocks=asked.res_blocks) != asked:
        raise SettingsError(f"--start {bundle}: its denoiser is {manifest.denoiser}, not {asked}")
    if manifest.schedule != schedule:
        raise SettingsError(f"--start {bundle}: trained for {manifest.schedule}, not {schedule}")
    source, _ = load_networks(opened)
    with torch.no_grad():
        _copy(denoiser, source, bundle)
    return opened


def _copy(denoiser: Denoiser, source: Denoiser, bundle: str) -> None:
    for name in ("time_embed", "conv_in", "middle_block", "norm_out", "conv_out"):
        getattr(denoiser, name).load_state_dict(getattr(source, name).state_dict())
    config, last = denoiser.config, len(denoiser.config.channels) - 1
    for i, (had, has) in enumerate(zip(source.config.res_blocks, config.res_blocks, strict=True)):
        if has < had or (has > had and config.attention[i]):
            raise SettingsError(
                f"--start {bundle}: {had} residual blocks at level {i + 1}, {has} in this preset. Blocks can only be "
                "added, and only to levels without attention."
            )
        _copy_down(cast(DownBlock, denoiser.down_blocks[i]), cast(DownBlock, source.down_blocks[i]))
        _copy_up(cast(UpBlock, denoiser.up_blocks[last - i]), cast(UpBlock, source.up_blocks[last - i]))


def _copy_down(new: DownBlock, old: DownBlock) -> None:
    """Copy a level of the way down. Added blocks come last and return their input, as every new block does."""
    _load(new.resnets[: len(old.resnets)], old.resnets)
    _load(new.attentions[: len(old.attentions)], old.attentions)
    if new.downsampler is not None and old.downsampler is not None:
        new.downsampler.load_state_dict(old.downsampler.state_dict())


def _copy_up(new: UpBlock, old: UpBlock) -> None:
    """Copy a level of the way up. The first block takes the newest skip; added ones follow and pass it on."""
    added = len(new.resnets) - len(old.resnets)
    _load([new.resnets[0], *new.resnets[1 + added :]], old.resnets)
    for block in new.resnets[1 : 1 + added]:
        _pass_on(cast(ResBlock, block))
    _load(new.attentions[added:], old.attentions)
    if new.upsampler is not None and old.upsampler is not None:
        new.upsampler.load_state_dict(old.upsampler.state_dict())


def _load(new: Iterable[nn.Module], old: Iterable[nn.Module]) -> None:
    for module, from_module in zip(new, old, strict=True):
        module.load_state_dict(from_module.state_dict())


def _pass_on(block: ResBlock) -> None:
    """Make a new block of the way up return the first of its two inputs, whatever the second one is."""
    shortcut = cast(nn.Conv2d, block.skip_connection)
    nn.init.zeros_(cast(nn.Parameter, shortcut.bias))
    nn.init.dirac_(shortcut.weight)
