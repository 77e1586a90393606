"""Options given as text: paths and lists of numbers."""

from __future__ import annotations

from pathlib import Path

from particle_explorer.files import UserError


def path_or_none(text: str) -> Path | None:
    """The path that an option names, None where it is empty."""
    return Path(text) if text else None


def numbers(text: str, option: str) -> list[float]:
    """Numbers with commas between, as 0.2,-0.5."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: give numbers separated by commas, as 0.2,-0.5") from None


def whole_numbers(text: str, option: str) -> list[int]:
    """Whole numbers with commas between, as 1,2."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: give whole numbers separated by commas, as 1,2") from None
