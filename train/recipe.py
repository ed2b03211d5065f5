"""Frozen training settings by name: `demo`, for a small model like the bundled one, and `paper`.

The text of the paper (Chen et al., ISBI 2024, section 3) and its published code differ. `paper` follows the text:

| item | text of the paper | published code |
|---|---|---|
| condition in training | the clean X-ray | the X-ray with the truth's noise |
| gradient of stage 1 | of the loss | of the loss, multiplied by the loss |
| learning rate | a tenth after epochs 25, 40 and 70 | constant |
| early stopping | after five checks without a better one | never |
| weights of stage 2 | averaged | not averaged |
| stage 2 is validated on | the validation set | the test set |
| latent of stage 2 | its mean | drawn |
| perceptual loss | features of VGG-16 | features of VGG-16, weighted as in LPIPS |

The discriminator has batch norm and a weight of 0.01, as in the published code. The paper does not say the rest:

- Early stopping watches the PSNR after a few steps. The published code watches the error of the predicted noise.
- Flip, rotation and contrast are drawn anew for each sample. The paper has seven fixed versions of each pair.
- bf16 is used if the device computes it.
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
        preset: shape of both networks.
        schedule: the diffusion, and what the denoiser predicts.
        phantoms: number of drawn patients to train on.
        real_share: share of real samples in a batch, if there are real pairs and phantoms.
        augmentation: see `Augmentation`.
        drr_share: share of samples projected from CTs, if there are any.
        response: weight of the error of what inserts change in the denoiser's output (`train.denoiser`); 0: none.
        denoiser: options of stage 1. If epochs are counted, `steps` and `save_every` are replaced.
        enhancer: options of stage 2, likewise.
        epochs: of `VERSIONS_PER_PAIR` samples per training pair; 0 counts steps.
        losses: terms of stage 2's loss.
        clean_share: share of stage 2's samples whose input is the truth itself.
        samples: number of stage 1 outputs that stage 2 learns from; 0: `VERSIONS_PER_PAIR` per training pair.
        stage_one: sampler that makes these outputs.
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
        phantoms=400,
        real_share=0.35,
        augmentation=Augmentation(),
        drr_share=0.45,
        response=0.02,
        denoiser=TrainOptions(steps=5000, clip_to_usual=1.5, crops=((0.5,), (1.0,), (1.0,), (1.0,))),
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
