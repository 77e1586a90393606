"""What the window says of averages: how good they are, how they were made, how two sets compare."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from particle_explorer.widgets.colours import title_of
from particle_explorer.widgets.job_bar import number

if TYPE_CHECKING:
    from particle_explorer.class_sets import StoredClasses

SHARED = "shared alignment: self-consistency, upper bound"


def quality_words(one: dict[str, Any], known: bool) -> str:
    """What the curves of an average may be called, and what they say."""
    words = SHARED
    if one["halves_independent"]:
        found = one.get("resolution_A")
        words = "independent halves: " + (
            f"resolution {found:.3g} Å (FRC 0.143)"
            if known and found is not None
            else "no resolution to speak of"
        )
    counts = f"N {number(one['n'])}"
    if one["n_effective"] < 0.99 * one["n"]:
        counts += f", as good as {number(round(one['n_effective']))} of equal weight"
    reach = one.get("ssnr_radius_A")
    if known and reach is not None:
        counts += f"; signal above noise to {reach:.3g} Å"
    if one.get("control_frc") and known:
        beyond = one.get("believable_radius_A")
        counts += (
            f"; above what noise alone gives to {beyond:.3g} Å"
            if beyond is not None
            else "; nowhere clearly above what noise alone gives"
        )
    return f"{words}. {counts}."


def refined_words(record: dict[str, Any]) -> str:
    """How far a refinement moved poses, and how far they are from those of the file."""
    last = record["history"][-1]
    words = (
        f"In the last of {len(record['history'])} iterations angles moved by {last['median_deg']:.2f}°,"
        f" shifts by {last['median_px']:.2f} px (medians)."
    )
    apart = record.get("from_the_file")
    if apart:
        words += (
            f" Beside the poses of the file: angles {apart['median_deg']:.1f}° apart,"
            f" {apart['within_10_deg']:.0%} within 10°, shifts {apart['median_px']:.2f} px."
        )
    return words


POSES = {
    "run": "poses of the run",
    "held": "poses that hold a part still",
    "refined": "refined poses",
    "file": "poses of the particle file",
    "independent": "poses of two models, a half of the particles each",
}


def made_words(stored: StoredClasses, index: int) -> str:
    """Which particles, poses and settings made an average, and where they are written down."""
    how, one = stored.how, stored.classes[index]
    settings = one.get("settings") or {}
    parts = [f"run {how['run']}"] if how.get("run") else []
    parts += [f"by {title_of(str(how['by']))}"] if how.get("by") else []
    parts += [f"selection {how['selection']}"] if how.get("selection") else []
    parts += [f"changed from {how['from']}"] if how.get("from") else []
    poses = how.get("poses") or ("held" if how.get("held") else "run")
    parts.append(POSES.get(str(poses), str(poses)))
    apart = how.get("apart")
    if apart:
        median = f"{apart['median_deg']:.1f}°, {apart['median_px']:.2f} px"
        parts.append(f"those of the {apart['from']} are {median} away (medians)")
    if how.get("weights", "hard") != "hard":
        parts.append(f"weights by {how['weights']}")
    parts.append(f"CTF: {one['ctf']}")
    if settings.get("interpolation"):
        on = f", on {settings['computed_on']}" if settings.get("computed_on") else ""
        parts.append(f"{settings['interpolation']}, box {settings.get('box_px')} px{on}")
    symmetry, mirror = one.get("symmetry") or {}, one.get("mirror")
    if symmetry.get("fold", 1) > 1:
        parts.append(f"looks C{symmetry['fold']} (r {symmetry['correlation']:.2f})")
    if mirror:
        parts.append(f"its mirror image is most like {mirror['of']} (r {mirror['correlation']:.2f})")
    return f"{'; '.join(parts)}. Members, weights, poses: classes/{stored.name}.parquet"
