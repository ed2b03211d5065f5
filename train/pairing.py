"""Match X-rays and soft-tissue images: by relative path, then stem, then StudyInstanceUID.

A name or study counts only if exactly one file of each folder has it. Two DICOM files of different studies or patients
are never a pair, whatever their names.
"""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bsdiff_rt.errors import SettingsError
from bsdiff_rt.folder.search import is_input, strip_suffix
from bsdiff_rt.formats import read_identity

logger = logging.getLogger(__name__)

KINDS = ("X-ray", "soft-tissue image")


@dataclass(frozen=True)
class Source:
    """A file that may be half of a pair.

    Attributes:
        path: the file.
        relative: its path below the searched folder, as written into records.
        key: `relative` without image suffix and role suffix.
        labelled: whether it had the role suffix.
        study: StudyInstanceUID, or None. Never written anywhere.
        patient: PatientID, or None. Never written anywhere.
    """

    path: Path
    relative: str
    key: str
    labelled: bool = False
    study: str | None = None
    patient: str | None = None

    @property
    def stem(self) -> str:
        """Return the file's name without image suffix and role suffix."""
        return self.key.rpartition("/")[2]


@dataclass(frozen=True)
class Match:
    """A pair. Its `name` is unique among the pairs and has no slashes."""

    name: str
    cxr: Source
    soft_tissue: Source
    matched_by: str


@dataclass(frozen=True)
class Unmatched:
    """A file that belongs to no pair, its role (cxr, soft_tissue or unknown), and the reason."""

    file: str
    role: str
    reason: str


Groups = dict[str, list[Source]]  # files by what they are called on one level
# What two halves of a pair may share, most certain first.
LEVELS: dict[str, Callable[[Source], str | None]] = {
    "path": lambda source: source.key,
    "stem": lambda source: source.stem,
    "study": lambda source: source.study,
}


def pair_files(
    cxr_folder: Path, soft_tissue_folder: Path, cxr_suffix: str, soft_tissue_suffix: str
) -> tuple[list[Match], list[Unmatched]]:
    """Match the files of two folders, searched recursively.

    A suffix at the end of a stem states the role and is not part of the name. If one folder holds both roles, the
    suffixes tell them apart.

    Args:
        cxr_folder: folder of X-rays.
        soft_tissue_folder: folder of soft-tissue images; may be the same.
        cxr_suffix: ending of an X-ray's stem.
        soft_tissue_suffix: ending of a soft-tissue image's stem.

    Returns:
        The pairs, and the files left over with the reason; both sorted by path.

    Raises:
        SettingsError: a folder does not exist, or the suffixes do not tell the roles in one folder apart.
    """
    for folder in (cxr_folder, soft_tissue_folder):
        if not folder.is_dir():
            raise SettingsError(f"{folder}: no such folder")
    if cxr_folder.resolve() != soft_tissue_folder.resolve():
        return match_sources(find_sources(cxr_folder, cxr_suffix), find_sources(soft_tissue_folder, soft_tissue_suffix))
    if not cxr_suffix or not soft_tissue_suffix or cxr_suffix == soft_tissue_suffix:
        raise SettingsError(
            f"{cxr_folder} is to hold X-rays and soft-tissue images: give two different suffixes to tell them apart"
        )
    cxrs, soft_tissues = (
        [each for each in find_sources(cxr_folder, suffix) if each.labelled]
        for suffix in (cxr_suffix, soft_tissue_suffix)
    )
    matches, unmatched = match_sources(cxrs, soft_tissues)
    known = {each.relative for each in (*cxrs, *soft_tissues)}
    reason = f"its name ends neither in {cxr_suffix} nor in {soft_tissue_suffix}"
    others = (each.relative for each in find_sources(cxr_folder, "") if each.relative not in known)
    return matches, unmatched + [Unmatched(relative, "unknown", reason) for relative in others]


def find_sources(folder: Path, suffix: str) -> list[Source]:
    """Return every image and DICOM file below `folder`, sorted by path.

    Hidden folders are left out. Links to folders are reported, not followed.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.is_symlink() and path.is_dir():
            logger.warning("%s: a link to a folder is not followed. Put the folder itself there.", path)
        elif is_input(path):
            relative, stem = path.relative_to(folder), strip_suffix(path)
            labelled = bool(suffix) and stem.endswith(suffix) and stem != suffix
            key = (relative.parent / (stem.removesuffix(suffix) if labelled else stem)).as_posix()
            identity = read_identity(path)
            found.append(Source(path, relative.as_posix(), key, labelled, identity.study, identity.patient))
    return found


def match_sources(cxrs: list[Source], soft_tissues: list[Source]) -> tuple[list[Match], list[Unmatched]]:
    """Return the pairs, and the files left over."""
    partner_of: dict[str, tuple[Source, str]] = {}  # by the X-ray's relative path
    taken: set[str] = set()
    by_level = _by_level(cxrs), _by_level(soft_tissues)
    for level in LEVELS:
        ours, theirs = (groups[level] for groups in by_level)
        for key in ours.keys() & theirs.keys():
            if len(ours[key]) == len(theirs[key]) == 1:
                cxr, soft_tissue = ours[key][0], theirs[key][0]
                free = cxr.relative not in partner_of and soft_tissue.relative not in taken
                if free and _compatible(cxr, soft_tissue):
                    partner_of[cxr.relative] = soft_tissue, level
                    taken.add(soft_tissue.relative)
    matches: list[Match] = []
    names: set[str] = set()
    for cxr in cxrs:
        if cxr.relative in partner_of:
            name = _unique(cxr.key.replace("/", "_"), names)
            names.add(name)
            matches.append(Match(name, cxr, *partner_of[cxr.relative]))
    left = [
        Unmatched(each.relative, role, _reason(each, own, others, role))
        for role, files, own, others, done in (
            ("cxr", cxrs, *by_level, partner_of),
            ("soft_tissue", soft_tissues, *by_level[::-1], taken),
        )
        for each in files
        if each.relative not in done
    ]
    return matches, left


def _reason(source: Source, ours: dict[str, Groups], theirs: dict[str, Groups], role: str) -> str:
    """Return why a file has no partner.

    Args:
        source: the file.
        ours: all files of its kind, by level and key.
        theirs: all files of the other kind, by level and key.
        role: of the file.
    """
    kind, other = KINDS if role == "cxr" else KINDS[::-1]
    for level, key_of in LEVELS.items():
        key = key_of(source)
        own, candidates = ours[level].get(key or "", []), theirs[level].get(key or "", [])
        if not candidates:
            continue
        if len(own) > 1 or len(candidates) > 1:
            return f"ambiguous: {len(own)} {kind}s and {len(candidates)} {other}s share its {level}"
        if not _compatible(source, candidates[0]):
            return f"the {other} of the same {level} is of another study or patient, by its DICOM header"
        return f"the {other} of the same {level} belongs to another {kind}"
    return f"no {other} of the same path, stem or study"


def _by_level(files: list[Source]) -> dict[str, Groups]:
    """Group files by their key on each level."""
    groups: dict[str, Groups] = {level: defaultdict(list) for level in LEVELS}
    for level, key_of in LEVELS.items():
        for each in files:
            if key := key_of(each):
                groups[level][key].append(each)
    return groups


def _compatible(one: Source, other: Source) -> bool:
    known = ((one.study, other.study), (one.patient, other.patient))
    return all(a is None or b is None or a == b for a, b in known)


def _unique(name: str, taken: set[str]) -> str:
    """Return `name`, with a number if it is taken: `a/b_c` and `a_b/c` are two pairs."""
    candidates = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(each for each in candidates if each not in taken)
