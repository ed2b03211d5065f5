"""Training pairs: real dual-energy pairs, pairs projected from CTs, and phantoms; and the batches made of them.

Everything here is numpy and cv2 on [H, W] float32 images in [0, 1]. The batch of a step depends only on the seed and
the step, so a continued training sees exactly the batches it would have seen.

There are two kinds of target, depending on how the X-ray looks:

- *scanner*: the dual-energy soft-tissue image as its scanner displays it, which is darker than the X-ray overall;
- *tone-matched*: the X-ray minus its local bone layer. It is used whenever the intensities were changed strongly,
because an image of another scanner must keep its own tone.
"""

from __future__ import annotations

import glob
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsdiff_rt.config import Preprocessing
from bsdiff_rt.errors import SettingsError
from bsdiff_rt.folder.evaluate import read_result
from bsdiff_rt.formats import read_together
from bsdiff_rt.formats.radiograph import hash_grey
from bsdiff_rt.formats.raster import find_pairs, read_raster
from bsdiff_rt.imaging.network_input import resize, to_network
from bsdiff_rt.imaging.tone import BONES_WINDOW_PX, measure_tone
from bsdiff_rt.imaging.view import remove_borders
from train.agreement import explain_by_soft_tissue, restore_kept
from train.augment import Augmentation, Curve, Image, degrade, keep_grey_levels, tone_curve, warp
from train.inserts import WHOLE_IMAGE_MM, draw_inserts, weigh

NO_PAIRS = np.empty((0, 2, 1, 1), np.uint8)
ONE_SHAPE_WITHIN = 0.02  # of the aspect ratio: rounding of a reduced picture
FOREIGN_BONE = (0.2, 1.25)  # how strong another scanner shows bone, of what this one does
CALCIFIED_WEIGHT = 0.5  # of drawn calcifications, of that of all inserts of a sample
KEEP_ABOVE = 0.25  # grey level of a reduced mask that still counts as marked
STORED_PX = 384  # real pairs are kept at this size: room to zoom in by half without losing sharpness

# What `python -m train prepare` writes and `load_dataset` reads.
PARTS = ("train", "val", "test")
DATASET_FILE = "dataset.json"
DATASET_BITS = 16


@dataclass(frozen=True)
class Pair:
    """One patient: X-ray, truth, and the truth in the X-ray's own tone. All are [S, S] float32 in [0, 1].

    `tone_matched` also has back what movement between the exposures and the scanner's subtraction took from soft tissue
    (train/agreement.py). `digest` is the `xray_digest` of the X-ray as it was read; "" for a phantom.
    """

    name: str
    cxr: Image
    soft_tissue: Image
    tone_matched: Image
    digest: str = ""


@dataclass(frozen=True)
class Drawn:
    """One augmented sample, [crop, crop] float32.

    Attributes:
        cxr, soft_tissue: X-ray and truth.
        curve: tone curve to put on both.
        calcified: calcifications of the ribs' cartilage that `cxr` lacks: what they add to it.
    """

    cxr: Image
    soft_tissue: Image
    curve: Curve = keep_grey_levels
    calcified: Image | None = None


def load_pair(name: str, cxr_path: Path, soft_tissue_path: Path, size: int = STORED_PX) -> Pair:
    """Read one pair and resize it to `size` x `size` as inference does: borders cut off, aspect kept, padded.

    A mask NAME_keep.* beside the X-ray marks what is no bone although the truth misses it, such as a lead, in white.
    The truth gets it back.

    Raises:
        SettingsError: the two, or the mask, differ in shape.
    """
    images = [picture.cxr for picture in read_together([cxr_path, soft_tissue_path])]
    (rows, columns), (soft_rows, soft_columns) = (image.shape for image in images)
    if abs(rows / columns * soft_columns / soft_rows - 1) > ONE_SHAPE_WITHIN:
        raise SettingsError(
            f"pair {name}: the X-ray is {rows} x {columns} px, its soft tissue {soft_rows} x {soft_columns}, another "
            "shape. Register the pairs with `python -m train prepare`."
        )
    digest = xray_digest(images[0])
    mask = read_mask(cxr_path.parent, name, images[0].shape, images[1].shape)
    images += [] if mask is None else [mask]
    squares = (to_network(image, Preprocessing(size))[0] for image in remove_borders(images))
    cxr, soft_tissue, *keep = (np.asarray((square + 1) / 2, dtype=np.float32) for square in squares)
    if keep:
        soft_tissue = cxr - restore_kept(cxr - soft_tissue, keep[0] > KEEP_ABOVE)
    return Pair(name, cxr, soft_tissue, match_tone(cxr, soft_tissue), digest)


def read_mask(folder: Path, name: str, *shapes: tuple[int, ...]) -> Image | None:
    """Read the mask NAME_keep.* of a pair, [H, W] in [0, 1]; None if there is none.

    Raises:
        SettingsError: it has none of `shapes`.
    """
    for path in sorted(folder.glob(f"{glob.escape(name)}_keep.*"))[:1]:
        mask = read_raster(path).cxr
        if mask.shape not in shapes:
            raise SettingsError(f"pair {name}: the mask {path.name} is {mask.shape}, not {shapes[0]} px")
        return mask
    return None


def load_projected(folder: Path, size: int) -> NDArray[np.uint8]:
    """Read the pairs of a folder that were projected from CTs.

    Returns:
        [N, 2, size, size] uint8, X-ray and soft tissue. If a pair has the X-ray without drawn calcifications
        (NAME_plain.*), [N, 3, size, size] with it, or with the X-ray again where there is none.

    Raises:
        SettingsError: a pair's images differ in shape, or there is no pair.
    """
    pool = []
    calcified = any(folder.glob("*_plain.*"))
    for name, *paths in find_pairs(folder):
        if calcified:
            paths += sorted(folder.glob(f"{glob.escape(name)}_plain.*"))[:1] or paths[:1]
        images = [picture.cxr for picture in read_together(paths)]
        if len({image.shape for image in images}) > 1:
            raise SettingsError(f"pair {name}: its images differ in shape; project the CT anew")
        squares = (to_network(image, Preprocessing(size))[0] for image in images)
        pool.append(np.rint((np.stack(list(squares)) + 1) * np.float32(127.5)).astype(np.uint8))
    return np.stack(pool)


def xray_digest(cxr: Image) -> str:
    """Return a name for an X-ray, [H, W] in [0, 1], made of its pixels: 16 hexadecimal digits.

    benchmarks/table1.py uses the same.
    """
    return hash_grey(cxr).hex()[:16]


def read_dataset_settings(folder: Path) -> tuple[int, float]:
    """Return side in px and CLAHE clip limit (0: none) of a data set written by `python -m train prepare`.

    Raises:
        SettingsError: there is no such data set.
    """
    _, settings = _record(folder)
    return int(settings["size"]), float(settings["clahe"])


def load_dataset(folder: Path, part: str, size: int | None = None) -> list[Pair]:
    """Read one part of a data set. It may be empty. Masks NAME_keep.* in it count as in `load_pair`.

    Args:
        folder: written by `python -m train prepare`.
        part: train, val or test.
        size: side to resize to, px; None keeps the stored one.

    Raises:
        SettingsError: there is no such data set, or a mask differs in shape from its X-ray.
        InputFailed: a file of it is missing or damaged.
    """
    pairs = []
    parts, _ = _record(folder)
    for name, digest in ((name, digest) for name, its, digest in parts if its == part):
        cxr, soft_tissue = (
            read_result(folder / part / f"{name}_{role}.png", DATASET_BITS) for role in ("cxr", "soft_tissue")
        )
        digest = digest or xray_digest(cxr)  # a data set by an older version says none
        images = [cxr, soft_tissue]
        mask = read_mask(folder / part, name, cxr.shape)
        images += [] if mask is None else [mask]
        if size is not None:
            images = [np.clip(resize(image, (size, size)), 0, 1) for image in images]
        cxr, soft_tissue, *keep = images
        if keep:
            soft_tissue = cxr - restore_kept(cxr - soft_tissue, keep[0] > KEEP_ABOVE)
        pairs.append(Pair(name, cxr, soft_tissue, match_tone(cxr, soft_tissue), digest))
    return pairs


def _record(folder: Path) -> tuple[list[tuple[str, str, str | None]], dict[str, float]]:
    """Return name, part and digest of each pair of a data set, and its size and CLAHE clip limit."""
    path = folder / DATASET_FILE
    try:
        record = json.loads(path.read_text())
        settings = {name: record["settings"][name] for name in ("size", "clahe")}
        return [(entry["name"], entry["part"], entry.get("digest")) for entry in record["pairs"]], settings
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such file. Make a data set with `python -m train prepare`.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"{path}: not the record of a data set ({type(error).__name__}). Make one with `python -m train prepare`."
        ) from None


def match_tone(cxr: Image, soft_tissue: Image) -> Image:
    """Return the truth in the X-ray's tone: the X-ray minus its local bone layer, of which soft tissue was taken out.

    Args:
        cxr: [S, S] in [0, 1].
        soft_tissue: as `cxr`.

    Returns:
        [S, S] float32 in [0, 1].
    """
    matched = soft_tissue + measure_tone(cxr - soft_tissue, cxr.shape[0], BONES_WINDOW_PX)
    matched += explain_by_soft_tissue(cxr - matched, matched)
    clipped: Image = np.clip(matched, 0.0, 1.0)
    return clipped


class Batches:
    """Deterministic source of augmented batches: `Batches.batch(step)` for any step, in any order.

    Args:
        real: dual-energy pairs.
        phantoms: [N, 2, P, P] uint8, X-ray and soft tissue of each phantom.
        real_share: share of real samples in a batch; 0 when there are no pairs. Without phantoms, all that `projected`
            leaves.
        augmentation: see `Augmentation`.
        seed: every batch is a function of this and its step.
        clahe: clip limit the pairs were equalised with; 0: they were not; None: not known.
        projected: pairs projected from CTs, see `load_projected`.
        projected_share: share of such samples in a batch; 0 when there are none, all when there is nothing else.

    Raises:
        SettingsError: no samples, or some that would never be drawn or are not equalised as the pairs are.
    """

    def __init__(
        self,
        real: list[Pair],
        phantoms: NDArray[np.uint8],
        real_share: float,
        augmentation: Augmentation,
        seed: int,
        clahe: float | None = None,
        projected: NDArray[np.uint8] = NO_PAIRS,
        projected_share: float = 0.0,
    ) -> None:
        if not real and not len(phantoms) and not len(projected):
            raise SettingsError("nothing to train on: give pairs, pairs projected from CTs, or a number of phantoms")
        others = [name for name, pool in (("phantoms", phantoms), ("pairs projected from CTs", projected)) if len(pool)]
        if clahe and others:
            raise SettingsError(
                f"the data set is equalised (CLAHE {clahe:g}), {' and '.join(others)} are not. Give --phantoms 0 and "
                "no --drrs, or prepare it with --clahe 0."
            )
        self.clahe = clahe
        self.real = real
        self.phantoms = phantoms
        self.projected = projected
        self.real_share, self.projected_share = self._share_out(real_share, projected_share)
        self.augmentation = augmentation
        self.seed = seed

    def _share_out(self, real: float, projected: float) -> tuple[float, float]:
        """Return the shares of real and of projected samples; phantoms have the rest.

        Raises:
            SettingsError: something that was given would not be drawn.
        """
        if len(self.projected) and (self.real or len(self.phantoms)) and not projected:
            raise SettingsError(
                f"{len(self.projected)} pairs projected from CTs, but their share is 0. Give --drr-share, or no --drrs."
            )
        projected = projected if len(self.projected) else 0.0
        if not len(self.phantoms):
            projected = projected if self.real else 1.0
            real = 1.0 - projected
            if self.real and not real:
                raise SettingsError("pairs are given, but --drr-share 1 leaves none to them. Give less.")
        elif not self.real:
            real = 0.0
        if len(self.phantoms) and real + projected >= 1 - 1e-9:  # 0.7 + 0.3 is a little less than 1
            raise SettingsError(
                f"{len(self.phantoms)} phantoms, but --real-share {real:g} and --drr-share {projected:g} leave none to "
                "them. Give less, or --phantoms 0."
            )
        return real, projected

    def fingerprint(self) -> str:
        """Return the SHA-256 of everything that a sample depends on except its step.

        Pairs count as they were read, at 16 bits. The last bits of computed values depend on the processor.
        """
        rest = (self.seed, self.real_share, asdict(self.augmentation), self.phantoms.shape, len(self.real))
        digest = hashlib.sha256(repr(rest).encode())
        for pool in (self.phantoms, self.projected):
            digest.update(np.ascontiguousarray(pool).data)
        for pair in self.real:
            for image in (pair.cxr, pair.soft_tissue):
                digest.update(np.rint(image * 65535).astype("<u2").data)
        return digest.hexdigest()

    def description(self) -> dict[str, Any]:
        """Return what a checkpoint records of the samples. `trained_on` holds the X-rays' digests.

        The most telling values come first, because the first difference between two runs is reported.
        """
        return {
            "clahe": self.clahe,
            "phantoms": len(self.phantoms),
            "real_share": self.real_share,
            "projected": len(self.projected),
            "projected_share": self.projected_share,
            "augmentation": asdict(self.augmentation),
            "data": self.fingerprint(),
            "trained_on": sorted(pair.digest for pair in self.real),
        }

    def batch(self, step: int, count: int, size: int, crop: int) -> NDArray[np.float32]:
        """Draw augmented samples for a step.

        Args:
            step: number of the step, which seeds the samples.
            count: number of samples.
            size: side of the whole image in px.
            crop: side of the random window in px that is cut out of it.

        Returns:
            [count, 2, crop, crop] float32 in [-1, 1], X-ray then soft tissue.
        """
        rng = np.random.default_rng([self.seed, step])
        samples = [self._sample(rng, size, crop) for _ in range(count)]
        return np.stack(samples) * 2.0 - 1.0

    def draw_pairs(self, step: int, count: int, size: int, crop: int) -> NDArray[np.float32]:
        """Draw augmented samples for a step, each without and with inserts. For the arguments see `batch`.

        Returns:
            [count, 5, crop, crop] float32: X-ray and truth without the inserts, X-ray and truth with them, all in
            [-1, 1]; and the weight of inserts and calcifications (`train.inserts.Inserts`) for errors in [-1, 1].
        """
        rng = np.random.default_rng([self.seed, step])
        inserts = 1.0 if self.augmentation.inserts else 0.0  # each sample is shown without them anyway
        samples = []
        for _ in range(count):
            *images, weight = self._draw_pair(rng, size, crop, inserts)
            samples.append(np.stack([*(image * np.float32(2) - np.float32(1) for image in images), weight / 4]))
        return np.stack(samples)

    def _sample(self, rng: np.random.Generator, size: int, crop: int) -> NDArray[np.float32]:
        return np.stack(self._draw_pair(rng, size, crop, self.augmentation.inserts)[2:4])

    def _draw_pair(self, rng: np.random.Generator, size: int, crop: int, inserts: float) -> list[Image]:
        """Return X-ray and truth without and with inserts, in [0, 1], and the inserts' weight; all [crop, crop].

        Drawn calcifications of the ribs' cartilage come with the inserts, in the X-ray alone. `inserts` is the share of
        samples that have inserts.
        """
        drawn = self._draw_any(rng, size, crop)
        cxr, soft_tissue = drawn.cxr, drawn.soft_tissue
        weight = np.zeros_like(cxr)
        if drawn.calcified is not None:
            cxr = cxr + drawn.calcified
            weight = CALCIFIED_WEIGHT * weigh(drawn.calcified)
        images = [drawn.cxr, soft_tissue]
        if rng.random() < inserts:
            added = draw_inserts(rng, cxr, cxr - soft_tissue, WHOLE_IMAGE_MM / size)
            images += [cxr + added.layer, soft_tissue + added.layer]
            weight = np.maximum(weight, added.weight)
        else:
            images += [cxr, soft_tissue]
        images = [drawn.curve(image) for image in images]
        if rng.random() < self.augmentation.blur_noise:
            images = degrade(rng, *images)
        return [*(np.clip(image, 0.0, 1.0) for image in images), weight]

    def _draw_any(self, rng: np.random.Generator, size: int, crop: int) -> Drawn:
        """Draw one sample of any kind."""
        kind = rng.random()
        if kind < self.real_share:
            return self._draw_real(rng, size, crop)
        if kind < self.real_share + self.projected_share:
            return self._draw_projected(rng, size, crop)
        return self._phantom(rng, size, crop)

    def _phantom(self, rng: np.random.Generator, size: int, crop: int) -> Drawn:
        stored = self.phantoms[rng.integers(len(self.phantoms))].astype(np.float32) / 255.0
        augmentation = self.augmentation
        if rng.random() >= augmentation.phantoms:
            augmentation = replace(augmentation, foreign=0.0, rotation=False, zoom=False, elastic=False)
        cxr, soft_tissue = warp(rng, [stored[0], stored[1]], size, crop, augmentation)
        if augmentation.foreign:
            cxr = soft_tissue + rng.uniform(*FOREIGN_BONE) * (cxr - soft_tissue)
        if rng.random() < augmentation.foreign:
            return Drawn(cxr, soft_tissue, tone_curve(rng))
        return Drawn(cxr, soft_tissue)

    def _draw_projected(self, rng: np.random.Generator, size: int, crop: int) -> Drawn:
        """Draw a pair projected from a CT, and its calcifications. Its truth is exact and has the X-ray's tone."""
        stored = self.projected[rng.integers(len(self.projected))].astype(np.float32) / 255.0
        cxr, soft_tissue, *plain = warp(rng, list(stored), size, crop, self.augmentation)
        bones = [cxr - image for image in (soft_tissue, *plain)]
        if rng.random() < self.augmentation.swap_bones / 2:
            donor = self.projected[rng.integers(len(self.projected))].astype(np.float32) / 255.0
            bones = warp(rng, list(donor[0] - donor[1:]), size, crop, self.augmentation)
        strength = np.float32(rng.uniform(*FOREIGN_BONE))
        bone, calcified = strength * bones[0], strength * bones[1] if plain else None
        cxr = soft_tissue + (bone if calcified is None else bone - calcified)
        if rng.random() < self.augmentation.foreign:
            return Drawn(np.clip(cxr, 0, 1), soft_tissue, tone_curve(rng), calcified)
        return Drawn(cxr, soft_tissue, calcified=calcified)

    def _draw_real(self, rng: np.random.Generator, size: int, crop: int) -> Drawn:
        pair = self.real[rng.integers(len(self.real))]
        foreign = rng.random() < self.augmentation.foreign
        truth = pair.tone_matched if foreign else pair.soft_tissue
        cxr, soft_tissue = warp(rng, [pair.cxr, truth], size, crop, self.augmentation)
        bone = cxr - soft_tissue
        if rng.random() < self.augmentation.swap_bones:
            bone = self._draw_other_bone(rng, size, crop, foreign)
        if foreign:
            cxr = soft_tissue + rng.uniform(*FOREIGN_BONE) * bone
            return Drawn(np.clip(cxr, 0, 1), soft_tissue, tone_curve(rng))
        if not self.augmentation.contrast:
            return Drawn(soft_tissue + bone, soft_tissue)
        # The scanner's own look: only as much variation as exposures of one scanner show.
        gain, offset = rng.uniform(0.96, 1.04), rng.uniform(-0.02, 0.02)
        cxr = soft_tissue + rng.uniform(0.9, 1.1) * bone
        return Drawn(gain * cxr + offset, gain * soft_tissue + offset)

    def _draw_other_bone(self, rng: np.random.Generator, size: int, crop: int, foreign: bool) -> Image:
        """Draw a bone layer of another patient or of a phantom."""
        if foreign and len(self.phantoms) and rng.random() < 0.5:
            pool = self.projected if len(self.projected) and rng.random() < 0.5 else self.phantoms
            stored = pool[rng.integers(len(pool))].astype(np.float32) / 255.0
            cxr, soft_tissue = warp(rng, [stored[0], stored[1]], size, crop, self.augmentation)
            bone = cxr - soft_tissue
            spread = float(bone.std())
            return bone * (0.035 / spread) if spread > 1e-3 else bone
        donor = self.real[rng.integers(len(self.real))]
        truth = donor.tone_matched if foreign else donor.soft_tissue
        (bone,) = warp(rng, [donor.cxr - truth], size, crop, self.augmentation)
        return bone
