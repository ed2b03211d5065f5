"""Frozen training settings by name: `demo`, the model that ships with the package, and `paper`.

The paper's recipe (Chen et al., ISBI 2024, section 3) where its words and its published code differ:

| | the paper, and here | the published code |
|---|---|---|
| conditioning | the clean X-ray | X-ray noised like the truth in training, clean in use |
| gradient of stage 1 | of the loss | multiplied by the loss |
| learning rate | a tenth after epochs 25, 40, 70 | that is set, but its scheduler steps once in ten epochs: constant |
| early stopping | five checks, ten epochs apart, without a better one | counts anew at every check: never |
| stage 2 | as stage 1 | neither averaged weights, schedule nor early stopping; validated on the test set |
| stage 2's latent | its mean | drawn, although nothing trains the variance |
| perceptual loss | VGG-16 features | the same layers with the learned weights of LPIPS |
| batch norm, 0.01 on the discriminator's loss | as published | |

Not said in the paper, chosen here: what is watched for early stopping (PSNR after a few steps; published: the error of
the predicted noise); flip, rotation and contrast drawn anew for every sample, where the paper has seven fixed versions
of a pair; bf16 where the device computes it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bsdiff_rt.config import SamplerSettings, Schedule
from bsdiff_rt.errors import SettingsError
from train.augment import Augmentation
from train.loop import TrainOptions
from train.losses import LossWeights
from train.validation import FEW_STEPS

VERSIONS_PER_PAIR = 7  # 120 pairs became 840: an epoch shows each pair seven times
CHECK_EPOCHS = 10  # between two checkpoints of a recipe that counts epochs


@dataclass(frozen=True)
class Recipe:
    """How both stages are trained.

    Attributes:
        preset: shape of the networks.
        schedule: the diffusion, and what the denoiser predicts.
        phantoms: drawn patients to train on.
        real_share: share of real samples in a batch, where there are both.
        augmentation: see `Augmentation`.
        drr_share: share of samples projected from CTs, where there are such.
        response: weight of the error of what inserts change in the denoiser's output (`train.denoiser`); 0: none.
        denoiser, enhancer: options of each stage; `steps` and `save_every` are replaced where epochs are counted.
        epochs: of `VERSIONS_PER_PAIR` samples per training pair; 0 counts steps.
        losses: terms of stage 2's loss.
        clean_share: share of stage 2's samples whose input is the truth itself.
        samples: stage 1 outputs stage 2 learns from; 0: `VERSIONS_PER_PAIR` per training pair.
        stage_one: sampler that makes them.
        validation: sampler that checkpoints are judged with.
    """

    preset: str
    schedule: Schedule
    phantoms: int
    real_share: float
    augmentation: Augmentation
    drr_share: float
    response: float
    denoiser: TrainOptions
    enhancer: TrainOptions
    epochs: int
    losses: LossWeights
    clean_share: float
    samples: int
    stage_one: SamplerSettings
    validation: SamplerSettings

    def options(self, stage: TrainOptions, pairs: int, processes: int) -> TrainOptions:
        """Return the options of a stage with its number of steps, if the recipe counts epochs.

        Args:
            stage: options of the stage.
            pairs: number of training pairs.
            processes: number of processes that share an epoch.

        Raises:
            SettingsError: the recipe counts epochs, and there are no pairs.
        """
        if not self.epochs:
            return stage
        if not pairs:
            raise SettingsError("this recipe counts epochs over real pairs. Give --pairs, --dataset or --steps.")
        steps_per_epoch = max(1, round(VERSIONS_PER_PAIR * pairs / (stage.images * processes)))
        return replace(stage, steps=self.epochs * steps_per_epoch, save_every=CHECK_EPOCHS * steps_per_epoch)


_PAPER_OPTIONS = TrainOptions(
    learning_rate=1e-4,
    warmup=0,
    weight_decay=0.01,  # AdamW's default; the paper names no other
    ema=0.995,
    images=2,
    crops=((1.0,),),
    drops=(25 / 200, 40 / 200, 70 / 200),
    clip=0.0,
    patience=5,
)

RECIPES: dict[str, Recipe] = {
    "demo": Recipe(
        preset="demo",
        schedule=Schedule(objective="x0"),
        phantoms=900,
        real_share=0.5,
        augmentation=Augmentation(),
        drr_share=0.3,
        response=0.015,
        denoiser=TrainOptions(steps=6000, clip_to_usual=1.5),
        enhancer=TrainOptions(steps=1500),
        epochs=0,
        losses=LossWeights(),
        clean_share=0.25,  # an autoencoder that cannot return a sharp image unchanged would blur whatever it is given
        samples=600,
        stage_one=FEW_STEPS,
        validation=FEW_STEPS,
    ),
    "paper": Recipe(
        preset="paper",
        schedule=Schedule(name="cosine", objective="eps"),
        phantoms=0,
        real_share=1.0,
        augmentation=Augmentation.of("paper"),
        drr_share=0.0,
        response=0.0,
        denoiser=_PAPER_OPTIONS,
        enhancer=_PAPER_OPTIONS,
        epochs=200,
        losses=LossWeights(mae=1.0, ms_ssim=1.0, perceptual=0.001, adversarial=0.01),
        clean_share=0.0,
        samples=0,
        stage_one=SamplerSettings("ddpm", 1000),
        validation=SamplerSettings("ddim", 20),
    ),
}
