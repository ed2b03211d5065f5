"""Make a data set of dual-energy pairs: match, register and resize them, split them by patient, and record it.

    DATASET/train/ val/ test/    NAME_cxr.png, NAME_soft_tissue.png: 16 bits, the full range is [0, 1]
    DATASET/dataset.json         settings, patients of each part, and what became of each pair
    DATASET/contact_sheet.png    to look at before training

Images are read and resized as in inference, so the model sees in training what it sees later. The split comes before
any augmentation, so no patient is in two parts. Patients are ordered by a hash of seed and identity, and the order is
cut at the requested shares. A patient added later moves at most one other over each border.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bsdiff_rt import __version__
from bsdiff_rt.config import Preprocessing
from bsdiff_rt.errors import BsdiffError, InputFailed, InputRefused, SettingsError
from bsdiff_rt.files import write_atomically
from bsdiff_rt.formats.raster import write_png
from bsdiff_rt.imaging.network_input import to_network
from bsdiff_rt.imaging.view import remove_borders
from train.contact_sheet import Row, contact_sheet
from train.data import DATASET_BITS, DATASET_FILE, PARTS, xray_digest
from train.folders import require_empty
from train.pair_images import explain_same_image, explain_swap, read_pair
from train.pairing import Match, Unmatched, pair_files
from train.registration import MIN_CORRELATION, Image, apply_motion, measure_unregistered, register

logger = logging.getLogger(__name__)

CONTACT_SHEET = "contact_sheet.png"


@dataclass(frozen=True)
class PrepareOptions:
    """How a data set is made. Recorded in it.

    Attributes:
        size: side of the images, px.
        clahe: CLAHE clip limit, 0 for none. X-ray and soft-tissue image are equalised separately.
        register: register the soft-tissue image to its X-ray. Without it, only their correlation is measured.
        trim: cut off uniform borders of the X-ray in both images, as inference does.
        min_correlation: of a pair's edges. Below it, a pair is bad. At -1 no pair is called bad by its look.
        split: shares of train, val and test.
        seed: of the split.
        cxr_suffix: ending of an X-ray's stem.
        soft_tissue_suffix: ending of a soft-tissue image's stem.
        patient_pattern: regular expression whose first group, in an X-ray's stem or path, is the patient.
    """

    size: int = 256
    clahe: float = 0.0
    register: bool = True
    trim: bool = True
    min_correlation: float = MIN_CORRELATION
    split: tuple[float, float, float] = (7.0, 2.0, 1.0)
    seed: int = 0
    cxr_suffix: str = "_cxr"
    soft_tissue_suffix: str = "_soft_tissue"
    patient_pattern: str | None = None


@dataclass
class Entry:
    """One pair in dataset.json. `status` is used, excluded (as asked) or bad. Patients are numbered, not named."""

    name: str
    cxr: str
    soft_tissue: str
    matched_by: str
    patient: str | None = None
    part: str | None = None
    status: str = "used"
    reason: str | None = None
    registration: dict[str, Any] | None = None
    digest: str | None = None  # of the X-ray as it was read (`data.xray_digest`), whatever is made of it


@dataclass(frozen=True)
class Dataset:
    """The result of `prepare`: every pair, every unmatched file, and the number of used patients in each part."""

    pairs: list[Entry]
    unmatched: list[Unmatched]
    patients: dict[str, int]

    @property
    def complete(self) -> bool:
        """Return whether every file was used or excluded on request."""
        return not self.unmatched and all(entry.status != "bad" for entry in self.pairs)

    def summarise(self) -> str:
        """Return one line per part, then one for each pair and file that is in no part, with the reason."""
        lines = []
        for part in PARTS:
            pairs = sum(entry.part == part for entry in self.pairs)
            lines.append(f"{part:5}  {pairs} pairs of {self.patients[part]} patients")
        lines += [f"{entry.status}  {entry.name}: {entry.reason}" for entry in self.pairs if entry.status != "used"]
        lines += [f"unmatched  {each.role} {each.file}: {each.reason}" for each in self.unmatched]
        return "\n".join(lines)


def prepare(
    cxr_folder: Path, soft_tissue_folder: Path, output: Path, options: PrepareOptions, exclude: dict[str, str]
) -> Dataset:
    """Make a data set in `output`. It appears whole or not at all.

    Args:
        cxr_folder: folder of X-rays.
        soft_tissue_folder: folder of soft-tissue images; may be the same.
        output: new or empty folder.
        options: see `PrepareOptions`.
        exclude: names, file names or stems to leave out, with the reason.

    Raises:
        SettingsError: folders or options cannot be used, no pair is found, or an excluded name does not exist.
    """
    require_empty(output)
    for folder in (cxr_folder, soft_tissue_folder):
        if output.resolve().is_relative_to(folder.resolve()):
            raise SettingsError(f"{output}: lies in {folder}, which is searched for images. Choose another folder.")
    pattern = _compile(options.patient_pattern)
    matches, unmatched = pair_files(cxr_folder, soft_tissue_folder, options.cxr_suffix, options.soft_tissue_suffix)
    if not matches:
        why = f" ({unmatched[0].file}: {unmatched[0].reason})" if unmatched else ""
        raise SettingsError(f"{cxr_folder}, {soft_tissue_folder}: no file of one belongs to a file of the other{why}")
    reasons = _exclusions(matches, exclude)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".prepare-") as temporary:
        work = Path(temporary) / "dataset"
        for part in ("", *PARTS):
            (work / part).mkdir()
        entries: list[Entry] = []
        rows: list[Row] = []
        patients: dict[str, str] = {}  # who is behind each pair; never written
        seen: dict[str, str] = {}  # the first pair of each X-ray
        for number, one in enumerate(matches, 1):
            entry = Entry(one.name, one.cxr.relative, one.soft_tissue.relative, one.matched_by)
            entries.append(entry)
            if one.name in reasons:
                entry.status, entry.reason = "excluded", reasons[one.name]
            else:
                try:
                    patients[one.name] = identify_patient(one, pattern)
                    rows.append(_make(one, entry, work, options, seen))
                except BsdiffError as error:
                    entry.status, entry.reason = "bad", str(error)
            logger.info("%d of %d: %s %s", number, len(matches), one.name, entry.status)
        _warn_of_split_patients(matches, patients)
        dataset = _divide(entries, unmatched, patients, work, options)
        _write_record(work / DATASET_FILE, dataset, options)
        if rows:
            write_atomically(work / CONTACT_SHEET, contact_sheet(rows))
        if output.is_dir():
            output.rmdir()
        os.replace(work, output)
    return dataset


def identify_patient(one: Match, pattern: re.Pattern[str] | None) -> str:
    """Return what identifies the patient of a pair.

    This is the match of `pattern`, if given. Else it is PatientID, study, the folder of the X-ray, or its stem,
    whichever exists first.

    Raises:
        InputRefused: the pattern fits neither the stem nor the path.
    """
    if pattern is not None:
        found = pattern.search(one.cxr.stem) or pattern.search(one.cxr.key)
        if found is None or not found.group(1):
            raise InputRefused("--patient-pattern does not fit its name, so it cannot be put into one part safely")
        return f"pattern {found.group(1)}"
    if known := one.cxr.patient or one.soft_tissue.patient:
        return f"PatientID {known}"
    if study := one.cxr.study or one.soft_tissue.study:
        return f"study {study}"
    folder = one.cxr.key.rpartition("/")[0]
    return f"folder {folder}" if folder else f"stem {one.cxr.stem}"


def _warn_of_split_patients(matches: list[Match], patients: dict[str, str]) -> None:
    """Warn if the pattern splits files of one PatientID into several patients."""
    behind: dict[str, set[str]] = {}
    for one in matches:
        if one.cxr.patient and one.name in patients:
            behind.setdefault(one.cxr.patient, set()).add(patients[one.name])
    if spread := sum(len(found) > 1 for found in behind.values()):
        logger.warning(
            "--patient-pattern splits %d of %d PatientIDs into several patients, which may land in two parts. Leave it "
            "out, unless PatientID is the same word in all these files.",
            spread,
            len(behind),
        )


def split_patients(patients: set[str], shares: tuple[float, float, float], seed: int) -> dict[str, str]:
    """Return the part of each patient: ordered by SHA-256 of seed and patient, cut at the shares in whole patients."""
    order = sorted(patients, key=lambda patient: hashlib.sha256(f"{seed} {patient}".encode()).digest())
    borders = np.floor(np.cumsum(shares) / sum(shares) * len(order) + 0.5).astype(int)
    return {patient: PARTS[int(np.searchsorted(borders, i, side="right"))] for i, patient in enumerate(order)}


def read_exclusions(path: Path) -> dict[str, str]:
    """Read the names to leave out and the reasons from a text file: one name a line, then ` # reason`.

    Lines that begin with `#` are comments.

    Raises:
        SettingsError: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # Windows' editors put a mark in front
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: the list of exclusions cannot be read ({type(error).__name__})") from None
    parted = (re.split(r"(?:^|\s)#", line.strip(), maxsplit=1) for line in lines)  # names may hold a `#`
    return {
        name.strip(): "".join(reason).strip() or "on the exclusion list" for name, *reason in parted if name.strip()
    }


def parse_split(text: str) -> tuple[float, float, float]:
    """Return the shares of train, val and test from a text such as 7:2:1.

    Raises:
        SettingsError: not three numbers of 0 or more, the first more than 0.
    """
    try:
        train, val, test = (float(share) for share in text.split(":"))
    except ValueError:
        train, val, test = 0.0, 0.0, 0.0
    if not (0 < train < math.inf and 0 <= val < math.inf and 0 <= test < math.inf):
        raise SettingsError(f"--split {text}: give the shares of train, val and test as three numbers, such as 7:2:1")
    return train, val, test


def _compile(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise SettingsError(f"--patient-pattern {pattern}: not a regular expression ({error})") from None
    if not compiled.groups:
        raise SettingsError(f"--patient-pattern {pattern}: has no group. Put brackets around the patient's part.")
    return compiled


def _exclusions(matches: list[Match], exclude: dict[str, str]) -> dict[str, str]:
    """Return the reason for each pair to leave out, by name.

    Raises:
        SettingsError: a line names no pair. A typing error must not put a bad pair into the training.
    """
    reasons: dict[str, str] = {}
    for line, reason in exclude.items():
        meant = [one.name for one in matches if line in _list_names(one)]
        if not meant:
            raise SettingsError(f"{line}: on the exclusion list, but no pair, file or stem has this name")
        reasons |= dict.fromkeys(meant, reason)
    return reasons


def _list_names(one: Match) -> set[str]:
    sides = (one.cxr, one.soft_tissue)
    return {one.name} | {name for each in sides for name in (each.relative, each.key, each.path.name, each.stem)}


def _make(one: Match, entry: Entry, work: Path, options: PrepareOptions, seen: dict[str, str]) -> Row:
    """Read, register and write one pair, fill in its entry, and return its row of the contact sheet."""
    cxr, soft_tissue = read_pair(one.cxr.path, one.soft_tissue.path)
    entry.digest = xray_digest(cxr)
    if (first := seen.setdefault(entry.digest, one.name)) != one.name:
        logger.warning(
            "%s: the same X-ray as %s. Leave one out with --exclude, or training may be validated on it.",
            one.name,
            first,
        )
    reason = explain_same_image(cxr, soft_tissue)
    if options.register and reason is None:
        try:
            found = register(cxr, soft_tissue)
        except InputFailed as error:
            found, reason = measure_unregistered(cxr, soft_tissue), str(error)
    else:
        found = measure_unregistered(cxr, soft_tissue)
    applied = not found.negligible
    if applied:
        soft_tissue = apply_motion(soft_tissue, found.matrix)
    after = found.correlation_after if applied else found.correlation_before
    entry.registration = {
        "correlation_before": round(found.correlation_before, 4),
        "correlation_after": round(after, 4),
        "displacement_px": round(found.displacement * options.size, 3),
        "rotation_deg": round(found.rotation_deg, 4),
        "matrix": found.matrix.round(6).tolist(),
        "applied": applied,
    }
    if reason is None and after < options.min_correlation:
        reason = f"edges of X-ray and soft tissue correlate with {after:.2f}, less than {options.min_correlation:.2f}"
        reason += ": not one patient's, mirrored, or moved apart"
    if reason is None and options.min_correlation > -1:
        reason = explain_swap(cxr, soft_tissue)
    if reason:
        entry.status, entry.reason = "bad", reason
    pictures = remove_borders([cxr, soft_tissue]) if options.trim else [cxr, soft_tissue]
    shown = [_at_size(picture, options) for picture in pictures]
    if not reason:
        for role, image in zip(("cxr", "soft_tissue"), shown, strict=True):
            write_png(work / f"{one.name}_{role}.png", image, DATASET_BITS)
    return Row(entry.name, entry.status == "used", entry.registration, *shown)


def _at_size(image: Image, options: PrepareOptions) -> Image:
    """Return an image as the model sees it: [S, S] float32 in [0, 1], resized and equalised as in inference."""
    square, _ = to_network(image, Preprocessing(size=options.size, clahe_clip_limit=options.clahe))
    return np.asarray((square + 1) / 2, dtype=np.float32)


def _divide(
    entries: list[Entry], unmatched: list[Unmatched], patients: dict[str, str], work: Path, options: PrepareOptions
) -> Dataset:
    """Assign each used pair to its part, move its files there, and number the patients."""
    numbers = {patient: f"p{i:04d}" for i, patient in enumerate(dict.fromkeys(patients.values()), 1)}
    used = {patients[entry.name] for entry in entries if entry.status == "used"}
    part_of = split_patients(used, options.split, options.seed)
    for entry in entries:
        entry.patient = numbers.get(patients.get(entry.name, ""))
        if entry.status == "used":
            entry.part = part_of[patients[entry.name]]
            for role in ("cxr", "soft_tissue"):
                file = f"{entry.name}_{role}.png"
                os.replace(work / file, work / entry.part / file)
    counts = Counter(part_of.values())
    if unnamed := sum(who.startswith(("study ", "stem ", "folder ")) for who in patients.values()):
        logger.warning(
            "%d pairs name no patient. Each study counts as a patient, else each subfolder, else each file. A patient "
            "of two studies, or of two files in one folder, may land in two parts: give --patient-pattern.",
            unnamed,
        )
    for part, share in zip(PARTS, options.split, strict=True):
        if share and not counts[part]:
            logger.warning("the %s part is empty: %d patients are too few for it", part, len(used))
    return Dataset(entries, unmatched, {part: counts[part] for part in PARTS})


def _write_record(path: Path, dataset: Dataset, options: PrepareOptions) -> None:
    parts = {
        part: sorted({entry.patient for entry in dataset.pairs if entry.part == part and entry.patient})
        for part in PARTS
    }
    document = {
        "bsdiff_rt": __version__,
        "settings": asdict(options),
        "patients": parts,
        "pairs": [asdict(entry) for entry in dataset.pairs],
        "unmatched": [asdict(entry) for entry in dataset.unmatched],
    }
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())
