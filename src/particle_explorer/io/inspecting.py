"""What is in a particle file, in words a microscopist reads, before anything is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from particle_explorer.configs import PreprocessConfig
from particle_explorer.io.checking import PoseCheck, check_poses, listed_twice
from particle_explorer.particles import Images, Particles

SAMPLE = 64
"""Images looked at; the whole stack would take minutes and tell the same."""
_SURE = 3.0


@dataclass(frozen=True)
class Contrast:
    """Centre of the images against their border."""

    sign: int
    """+1 the particle is bright, -1 dark, 0 cannot be told"""
    difference: float
    """Mean of the centre minus mean of the border, in standard deviations of the border pixels."""
    t: float
    """`difference` in units of its own standard error over the images."""
    n_images: int


@dataclass(frozen=True)
class Summary:
    """Facts of a particle file; `lines` says them."""

    source: str
    kind: str
    n: int
    n_stacks: int
    boxes_px: dict[int, int]
    """Side → number of particles"""
    pixel_sizes_A: dict[float, int]
    """Å → number of particles; unknown ones are under 0"""
    n_channels: int
    ctf_states: dict[str, int]
    defocus_range_A: tuple[float, float] | None
    missing_for_ctf: tuple[str, ...]
    """Parameters without which the CTF cannot be computed, though there is a defocus."""
    contrast_sign: int
    """As the file says; 0 it does not, 2 both signs occur"""
    contrast: Contrast
    """As the images look"""
    has_angles: bool
    has_shifts: bool
    is_3d: bool
    """Poses of a 3-D refinement: angles out of the plane differ between particles."""
    n_classes: int
    n_micrographs: int
    n_optics_groups: int
    n_blank: int
    """Blank or broken images among those looked at"""
    notes: tuple[str, ...]
    sizes_by_group: dict[int, tuple[float, ...]]
    """Optics group → its pixel sizes in Å"""
    n_twice: int
    """Rows that name an image which another row names already"""
    n_same: int
    """Images among those looked at with the pixels of another"""
    poses: PoseCheck

    def lines(self) -> list[str]:
        """The summary, one fact a line."""
        lines = [f"{self.n} particles in {_count(self.n_stacks, 'file')} ({self.kind})"]
        lines.append("box " + _listed({f"{box} px": count for box, count in self.boxes_px.items()}))
        sizes = {f"{size:.4g} Å" if size else "unknown": count for size, count in self.pixel_sizes_A.items()}
        lines.append("pixel size " + _listed(sizes))
        if self.n_channels > 1:
            lines.append(f"{self.n_channels} colour channels")
        lines.append(self._ctf_line())
        lines.append(self._contrast_line())
        if self.is_3d:
            lines.append(
                "poses of a 3-D refinement (angles out of the plane); only the in-plane part is used"
            )
        elif self.has_angles or self.has_shifts:
            known = " and ".join([*["in-plane angles"] * self.has_angles, *["shifts"] * self.has_shifts])
            lines.append(f"{known} from an earlier alignment")
        else:
            lines.append("no poses in the file")
        if self.n_classes > 1:
            lines.append(f'{self.n_classes} classes; explore one at a time (--where "class_id == 1")')
        if self.n_micrographs:
            lines.append(_count(self.n_micrographs, "micrograph"))
        if self.poses.verdict != "none":
            lines.append(f"pose self-check: {self.poses.verdict}; {self.poses.words}")
        if self.n_optics_groups > 1:
            lines.append(f"{self.n_optics_groups} optics groups{self._sizes_by_group()}")
        if self.n_twice:
            lines.append(f"{self.n_twice} of the rows name an image that an earlier row names")
        if self.n_same:
            lines.append(f"{self.n_same} of the images looked at have the pixels of another")
        if self.n_blank:
            lines.append(
                f"{self.n_blank} of {self.contrast.n_images + self.n_blank} images looked at are blank or "
                "broken"
            )
        return lines + [f"note: {note}" for note in self.notes]

    def _sizes_by_group(self) -> str:
        if len(self.pixel_sizes_A) < 2:
            return ""
        shown = [
            f"{group}: {' and '.join(f'{size:.4g}' if size else 'unknown' for size in sizes)} Å"
            for group, sizes in list(self.sizes_by_group.items())[:12]
        ]
        return f" ({', '.join(shown)}{' …' if len(self.sizes_by_group) > 12 else ''})"

    def _ctf_line(self) -> str:
        carried = {state: count for state, count in self.ctf_states.items() if state != "none"}
        if not carried:
            return "no CTF parameters"
        words = {
            "raw": "images not corrected",
            "phase-flipped": "phases flipped",
            "premultiplied": "images multiplied by it",
        }
        line = "CTF parameters present, " + _listed({words[state]: count for state, count in carried.items()})
        if self.defocus_range_A is not None:
            low, high = (value / 1e4 for value in self.defocus_range_A)
            line += f", defocus {low:.2f} to {high:.2f} µm"
        if "none" in self.ctf_states:
            line += f"; {self.ctf_states['none']} particles without"
        if self.missing_for_ctf:
            line += f"; not usable without {' and '.join(self.missing_for_ctf)}"
        return line

    def _contrast_line(self) -> str:
        words = {1: "bright", -1: "dark", 2: "bright in some images and dark in others"}
        said, look = words.get(self.contrast_sign), self.contrast
        the_file = f"the file says that the particle is {said}"
        if not look.n_images or self.contrast_sign == 2:
            return the_file if said else "contrast unknown"
        evidence = (
            f"centre {'+' if look.difference >= 0 else '−'}{abs(look.difference):.3f} standard deviations "
            "from the "
            f"border, t = {look.t:.1f} over {_count(look.n_images, 'image')}"
        )
        seen = f"look {words[look.sign]}" if look.sign else "do not show it clearly"
        if said is None:
            joint = "; the images" if look.sign else ", and the images"
            return f"the file does not say the contrast{joint} {seen} ({evidence})"
        if look.sign == self.contrast_sign:
            return f"the particle is {said}: the file says so and the images agree ({evidence})"
        return f"{the_file}{', but' if look.sign else ';'} the images {seen} ({evidence})"


def summarise(particles: Particles) -> Summary:
    """Look at the table and at up to 64 images spread over the whole set."""
    table = particles.table
    size = table["pixel_size_A"].fillna(0.0).round(4)
    states = table["ctf_state"].value_counts()
    has_ctf = bool((table["ctf_state"] != "none").any())
    missing = [
        words
        for name, words in (
            ("defocus_u_A", "the defocus"),
            ("voltage_kV", "the voltage"),
            ("spherical_aberration_mm", "the spherical aberration"),
            ("pixel_size_A", "the pixel size"),
        )
        if has_ctf and not (name in table and bool(np.isfinite(table[name].to_numpy(float)).all()))
    ]
    defocus = None
    if has_ctf:
        both = table[["defocus_u_A", "defocus_v_A"]].to_numpy(float)
        both = both[np.isfinite(both)]
        if both.size:
            defocus = float(both.min()), float(both.max())
    said = np.unique(table["contrast_sign"])
    contrast, n_blank, n_same = _look(particles)
    groups = dict(size.groupby(table["optics_group"]).unique()) if "optics_group" in table else {}
    tilts = [name for name in ("rlnAngleTilt", "alignments3D/pose[0]") if name in table]
    return Summary(
        source=str(particles.source),
        kind=particles.kind,
        n=len(particles),
        n_stacks=table["stack_path"].nunique(),
        boxes_px={int(box): int(count) for box, count in table["box_px"].value_counts().items()},
        pixel_sizes_A={float(value): int(count) for value, count in size.value_counts().items()},
        n_channels=particles.images.n_channels,
        ctf_states={str(state): int(count) for state, count in states.items()},
        defocus_range_A=defocus,
        missing_for_ctf=tuple(missing),
        contrast_sign=int(said[0]) if len(said) == 1 else 2,
        contrast=contrast,
        has_angles="angle_deg" in table,
        has_shifts="shift_y_px" in table,
        is_3d=any(table[name].nunique() > 1 for name in tilts),
        n_classes=table["class_id"].nunique() if "class_id" in table else 0,
        n_micrographs=table["micrograph"].nunique() if "micrograph" in table else 0,
        n_optics_groups=table["optics_group"].nunique() if "optics_group" in table else 0,
        n_blank=n_blank,
        notes=_gathered(particles.notes),
        sizes_by_group={
            int(group): tuple(map(float, sizes)) for group, sizes in sorted(dict(groups).items())
        },
        n_twice=listed_twice(particles),
        n_same=n_same,
        poses=check_poses(particles),
    )


def look_at_contrast(particles: Particles) -> tuple[Contrast, int]:
    """Contrast of up to 64 images spread over the set, and how many of those were blank or broken.

    Images of several boxes are looked at box by box, so that this works before any choice is made.
    """
    contrast, n_blank, _ = _look(particles)
    return contrast, n_blank


def _look(particles: Particles) -> tuple[Contrast, int, int]:
    """The contrast, how many images are blank or broken, and how many have the pixels of another."""
    n = len(particles)
    rows = np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).round().astype(int))
    boxes = particles.images.box_px[rows]
    differences: list[np.ndarray] = []
    blank = same = 0
    for box in np.unique(boxes):
        images = particles.images.read(rows[boxes == box])
        least, largest = images.min(axis=(1, 2, 3)), images.max(axis=(1, 2, 3))
        good = np.isfinite(least) & np.isfinite(largest) & (largest > least)
        blank += int(np.count_nonzero(~good))
        images = images if good.all() else images[good]
        same += len(images) - len({image.tobytes() for image in images})
        differences.append(centre_against_border(images))
    return _contrast(np.concatenate(differences)), blank, same


def guess_contrast(images: Images) -> Contrast:
    """Whether the particle is bright or dark in images `(k, c, n, n)`, from centre against border."""
    return _contrast(centre_against_border(np.asarray(images, np.float32)))


def centre_against_border(images: Images) -> np.ndarray:
    """Mean of the disc of half the box minus mean of what lies outside 0.9 of it, in standard deviations of
    the latter → `(k,)`. A background without any variation counts in standard deviations of the image."""
    n = images.shape[-1]
    y, x = np.indices((n, n)) - n // 2
    radius = np.hypot(y, x)
    flat = images[:, 0] if images.shape[1] == 1 else images.mean(axis=1, dtype=np.float64)
    border = flat[:, radius > 0.45 * n].astype(np.float64)
    centre = flat[:, radius <= 0.25 * n].astype(np.float64)
    spread = np.maximum(border.std(axis=1), 0.1 * flat.std(axis=(1, 2), dtype=np.float64))
    return np.asarray((centre.mean(axis=1) - border.mean(axis=1)) / np.where(spread > 0, spread, 1.0))


def _contrast(differences: np.ndarray) -> Contrast:
    n = len(differences)
    if not n:
        return Contrast(0, 0.0, 0.0, 0)
    mean = float(differences.mean())
    # one image has no spread of its own; images of noise differ by about 0.05 at 64 px
    error = float(differences.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.1
    t = mean / error if error > 0 else math.copysign(99.0, mean) * (mean != 0)
    return Contrast(int(np.sign(mean)) if abs(t) >= _SURE else 0, mean, t, n)


def _gathered(notes: tuple[str, ...]) -> tuple[str, ...]:
    """Each note once, and no more than a screen of them."""
    unique = tuple(dict.fromkeys(notes))
    return unique if len(unique) <= 10 else (*unique[:10], f"and {len(unique) - 10} more of this kind")


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'s' * (n != 1)}"


def _listed(counts: dict[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{what} ({count} particles)" for what, count in counts.items())


def guessed_sign(particles: Particles, config: PreprocessConfig) -> int:
    """What a look at the images says of the contrast (+1 bright, -1 dark, 0 unsure); 0 where it need not."""
    if config.contrast != "auto" or (particles.table["contrast_sign"] != 0).any():
        return 0
    return look_at_contrast(particles)[0].sign
