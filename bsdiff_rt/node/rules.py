"""Rules for which X-rays a DICOM node processes, read from a TOML file. Torch-free.

# The first rule that fits decides.
otherwise = "process"

[[rule]]
station = ["ICU-*", "ER-1"]
view = "AP"
do = "ignore"
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

from bsdiff_rt.errors import SettingsError

Action = Literal["process", "ignore"]
# What a rule may ask for, and the DICOM element that holds it.
ELEMENTS = {
    "modality": "Modality",
    "body_part": "BodyPartExamined",
    "station": "StationName",
    "view": "ViewPosition",
}
MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Rule:
    """One rule. It fits an X-ray if every one of its conditions does.

    Attributes:
        do: what becomes of X-rays that it fits.
        conditions: by name of ELEMENTS, the patterns of which one has to fit, in lower case. `*` is any text, `?` any
            letter. An element that is missing is empty text.
    """

    do: Action
    conditions: Mapping[str, tuple[str, ...]]

    def fits(self, values: Mapping[str, str]) -> bool:
        """Return whether it fits an X-ray with these values, by name of ELEMENTS."""
        return all(
            any(fnmatchcase(values.get(name, "").strip().lower(), pattern) for pattern in patterns)
            for name, patterns in self.conditions.items()
        )


@dataclass(frozen=True)
class Rules:
    """The rules of a node, in order, and what becomes of X-rays that none of them fits."""

    rules: tuple[Rule, ...] = ()
    otherwise: Action = "process"

    def find_reason(self, values: Mapping[str, str]) -> str | None:
        """Return why an X-ray is ignored, or None if it is to be processed. The reason holds no value of the header.

        Args:
            values: text of its elements, by name of ELEMENTS.
        """
        for number, rule in enumerate(self.rules, 1):
            if rule.fits(values):
                return f"ignored by rule {number}" if rule.do == "ignore" else None
        return "ignored: no rule fits" if self.otherwise == "ignore" else None


def read_rules(path: Path) -> Rules:
    """Read rules from a TOML file.

    Raises:
        SettingsError: it cannot be read, is no TOML, or holds something else than rules.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise SettingsError(f"{path}: larger than {MOST_BYTES >> 20} MiB. Name a file of rules.", setting="rules")
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror}). Name a file.", setting="rules") from error
    except (ValueError, RecursionError) as error:  # no TOML, or no UTF-8
        raise SettingsError(f"{path}: not a TOML file ({error}). Mend it.", setting="rules") from error
    return _parse(content, path)


def _parse(content: dict[str, Any], path: Path) -> Rules:
    if unknown := sorted(set(content) - {"rule", "otherwise"}):
        raise SettingsError(f'{path}: {unknown[0]!r} is not known. Use "otherwise" and [[rule]].', setting="rules")
    listed = content.get("rule", [])
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise SettingsError(f"{path}: begin each rule with a line [[rule]].", setting="rules")
    rules = tuple(_parse_rule(one, f"{path}: rule {number}") for number, one in enumerate(listed, 1))
    if not rules:
        raise SettingsError(f"{path}: no rule. Begin each rule with a line [[rule]].", setting="rules")
    return Rules(rules, _parse_action(content.get("otherwise", "process"), f"{path}: otherwise"))


def _parse_rule(content: dict[str, Any], place: str) -> Rule:
    names = ", ".join(ELEMENTS)
    if unknown := sorted(set(content) - {*ELEMENTS, "do"}):
        raise SettingsError(f"{place}: {unknown[0]!r} is not known. Use {names} and do.", setting="rules")
    if "do" not in content:
        raise SettingsError(f'{place}: "do" is missing. Use do = "process" or do = "ignore".', setting="rules")
    conditions = {}
    for name in ELEMENTS:
        if name not in content:
            continue
        patterns = content[name] if isinstance(content[name], list) else [content[name]]
        if not patterns or not all(isinstance(one, str) for one in patterns):
            raise SettingsError(
                f'{place}: {name} is not text. Use "CR", or a list such as ["CR", "DX"].', setting="rules"
            )
        conditions[name] = tuple(one.strip().lower() for one in patterns)
    if not conditions:
        raise SettingsError(
            f'{place}: it asks for nothing. Use {names}, or "otherwise" for all other X-rays.', setting="rules"
        )
    return Rule(_parse_action(content["do"], f"{place}: do"), conditions)


def _parse_action(value: object, place: str) -> Action:
    for action in get_args(Action):
        if value == action:
            return action  # type: ignore[no-any-return]
    raise SettingsError(f'{place} is {value!r}. Use "process" or "ignore".', setting="rules")
