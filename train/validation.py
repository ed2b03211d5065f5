"""Judge a model in training on held-out phantoms and pairs, and draw a picture of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bsdiff_rt.config import SamplerSettings, Schedule
from bsdiff_rt.formats.radiograph import hash_grey
from bsdiff_rt.imaging.metrics import bsr_tone_matched, mean_quality, quality
from bsdiff_rt.runners.eager import EagerRunner
from bsdiff_rt.sampling.noise import ImageNoise, batch_noise
from bsdiff_rt.sampling.sampler import sample
from bsdiff_rt.sampling.schedule import sampler_table
from train.augment import tone_curve
from train.data import Pair

Image = NDArray[np.float32]
Predict = Callable[[Image], Image]

FEW_STEPS = SamplerSettings("ddim", 3)


@dataclass(frozen=True)
class Validation:
    """Held-out pairs by group name, at the model's size.

    `denoiser`, `both` and `direct` return figures by name and write a picture. It has one row per image: X-ray, truth,
    prediction, true bone, predicted bone.
    """

    groups: dict[str, list[Pair]]
    schedule: Schedule
    sampler: SamplerSettings = FEW_STEPS

    def description(self) -> dict[str, str]:
        """Return what a checkpoint records of the images it is judged on. Early stopping compares figures of the same
        images.
        """
        said = []
        for group, pairs in self.groups.items():
            digests = hashlib.sha256("".join(sorted(pair.digest for pair in pairs)).encode()).hexdigest()
            said.append(f"{len(pairs)} {group}" + (f" ({digests[:8]})" if any(pair.digest for pair in pairs) else ""))
        return {"judged_on": ", ".join(said)}

    def denoiser(self, network: nn.Module, picture: Path) -> dict[str, float]:
        """Judge stage 1 alone after a few steps.

        Args:
            network: stage 1.
            picture: file to write.

        Returns:
            BSR and PSNR per group. For real pairs also the tone-matched BSR in the tone of a foreign scanner.
        """
        return self._judge(lambda cxr: run_stage_one(network, self.schedule, cxr, self.sampler), picture)

    def both(self, denoiser: nn.Module, enhancer: nn.Module, picture: Path) -> dict[str, float]:
        """Judge both stages. Figures and picture are those of stage 1 alone."""

        def predict(cxr: Image) -> Image:
            return run_network(enhancer, run_stage_one(denoiser, self.schedule, cxr, self.sampler))

        return self._judge(predict, picture)

    def direct(self, network: nn.Module, picture: Path) -> dict[str, float]:
        """Judge a network that maps an X-ray to soft tissue in one call."""
        return self._judge(lambda cxr: run_network(network, cxr), picture)

    def _judge(self, predict: Predict, picture: Path) -> dict[str, float]:
        rows: list[Image] = []
        figures: dict[str, float] = {}
        for group, pairs in self.groups.items():
            predicted = [predict(pair.cxr) for pair in pairs]
            known = [(pair.cxr, pair.soft_tissue) for pair in pairs]
            mean = mean_quality([quality(*pair, image) for pair, image in zip(known, predicted, strict=True)])
            figures |= {f"{group}_bsr": mean.bsr, f"{group}_psnr": mean.psnr}
            rows += [_row(*pair, image) for pair, image in zip(known[:4], predicted, strict=False)]
            if group != "phantoms":
                foreign = [_make_foreign(pair) for pair in pairs]
                suppressed = [predict(cxr) for cxr, _ in foreign]
                scores = [bsr_tone_matched(*pair, image) for pair, image in zip(foreign, suppressed, strict=True)]
                figures |= {f"{group}_foreign": float(np.mean(scores))}
                rows += [_row(*pair, image) for pair, image in zip(foreign[:2], suppressed, strict=False)]
        cv2.imwrite(str(picture), (np.clip(np.vstack(rows), 0, 1) * 255).astype(np.uint8))
        return figures


@torch.no_grad()
def run_network(network: nn.Module, image: Image) -> Image:
    """Run an image through a network of one input, on the network's device: [S, S] float32 in [0, 1] to the same."""
    x = torch.from_numpy(image * 2 - 1)[None, None].to(find_device(network))
    made: Tensor = network(x).clamp(-1, 1)
    return (made[0, 0].cpu().numpy() + np.float32(1)) / np.float32(2)


def run_stage_one(network: nn.Module, schedule: Schedule, cxr: Image, sampler: SamplerSettings) -> Image:
    """Run an X-ray through stage 1, on its device: [S, S] float32 in [0, 1] to the same."""
    runner = EagerRunner(network, nn.Identity(), cxr.shape[0], find_device(network))
    noise = [ImageNoise(0, hash_grey(cxr))]

    def draw(number: int) -> Tensor:
        return torch.from_numpy(batch_noise(noise, number, cxr.shape))

    table = sampler_table(schedule, sampler.name, sampler.steps)
    x_0 = sample(runner, torch.from_numpy(2 * cxr - 1)[None, None].to(runner.device), table, draw)
    return (x_0[0, 0].cpu().numpy() + np.float32(1)) / np.float32(2)


def find_device(network: nn.Module) -> torch.device:
    """Return the device of a network's parameters."""
    return next(network.parameters()).device


def _make_foreign(pair: Pair) -> tuple[Image, Image]:
    """Return a pair as another scanner might show it: weaker bone, its own tone, a tone curve of a fixed seed."""
    curve = tone_curve(np.random.default_rng(7))
    weaker = np.clip(pair.tone_matched + 0.6 * (pair.cxr - pair.tone_matched), 0, 1)
    return curve(weaker), curve(pair.tone_matched)


def _row(cxr: Image, soft_tissue: Image, predicted: Image) -> Image:
    return np.hstack([cxr, soft_tissue, predicted, 2 * (cxr - soft_tissue) + 0.3, 2 * (cxr - predicted) + 0.3])
