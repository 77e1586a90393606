"""What napari finds through `napari.yaml`: reader, writer, sample data. No Qt and no torch here."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from particle_explorer.files import UserError

if TYPE_CHECKING:
    from particle_explorer.cache import CachedImages
    from particle_explorer.particles import ImageStack, Particles

METADATA = "particle_explorer"
"""Key of the metadata of layers that were read here; the Particles dock opens their source."""
N_FOR_CONTRAST = 32

LayerData = tuple[Any, dict[str, Any], str]


class LazyStack:
    """Images of one box size as an array `(N, n, n)` or `(N, n, n, 3)` that is read image by image."""

    dtype = np.dtype(np.float32)

    def __init__(self, images: ImageStack | CachedImages, channels: int, n: int) -> None:
        self._images = images
        self.shape = (len(images), n, n) if channels == 1 else (len(images), n, n, channels)
        self.ndim = len(self.shape)
        self.size = int(np.prod(self.shape))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        first, rest = (key[0], key[1:]) if isinstance(key, tuple) else (key, ())
        if isinstance(first, int | np.integer):
            image = self.read([int(first)])[0]
            return image[rest] if rest else image
        images = self.read(np.arange(len(self))[first])
        return images[(slice(None), *rest)] if rest else images

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        raise TypeError("a particle stack may be larger than memory; index it")

    def read(self, rows: Any) -> NDArray[np.float32]:
        """Images of `rows`, `(k, n, n)` or `(k, n, n, 3)`."""
        images = self._images.read(rows)
        return images[:, 0] if images.shape[1] == 1 else np.moveaxis(images, 1, -1)


def get_reader(path: str | list[str]) -> Callable[[Any], list[LayerData]] | None:
    """A reader for particle stacks and sessions; None for anything else, and for several paths at once."""
    if not isinstance(path, str):
        if len(path) != 1:
            return None
        path = path[0]
    file = Path(path)
    if file.name == "session.json" or (file.is_dir() and (file / "session.json").is_file()):
        return read_session
    from particle_explorer.io import stacks

    name = file.name.lower()
    if name.endswith((".star", ".cs")):
        return read_stack
    is_ours = stacks.kind_of(file) and not name.endswith(stacks.LEFT_TO_OTHERS)
    return read_stack if is_ours else None


def read_stack(path: str | list[str]) -> list[LayerData]:
    """A particle stack as one lazy image layer, scaled in Å where the pixel size is known."""
    from particle_explorer.io.reading import read

    file = Path(path if isinstance(path, str) else path[0]).absolute()
    return [stack_layer(read(file), file)]


def stack_layer(particles: Particles, source: Path) -> LayerData:
    """The particles of the most frequent box size as a layer; the rest cannot lie in one array."""
    boxes, counts = np.unique(particles.images.box_px, return_counts=True)
    if not len(boxes):
        raise UserError(f"{source} holds no particles")
    rows = np.flatnonzero(particles.images.box_px == boxes[np.argmax(counts)])
    images = particles.images.take(rows)
    data = LazyStack(images, images.n_channels, int(images.box_px[0]))
    sizes = particles.table["pixel_size_A"].to_numpy(float)[rows]
    size = float(sizes[0]) if math.isfinite(float(sizes[0])) and sizes[0] > 0 else 1.0
    attributes = {
        "name": source.stem,
        "scale": (1.0, size, size),
        "axis_labels": ("particle", "y", "x"),
        "contrast_limits": _limits(data),
        "rgb": data.ndim == 4,
        "metadata": {METADATA: {"source": str(source), "n_particles": len(particles.table)}},
    }
    return data, attributes, "image"


def _limits(data: LazyStack) -> tuple[float, float]:
    few = data.read(np.linspace(0, len(data) - 1, min(N_FOR_CONTRAST, len(data))).astype(int))
    low, high = np.percentile(few, [0.5, 99.5])
    return float(low), float(max(high, low + 1e-6))


def read_session(path: str | list[str]) -> list[LayerData]:
    """Open a session in the workspace of the current viewer; without a window, its images as a layer."""
    file = Path(path if isinstance(path, str) else path[0]).absolute()
    folder = file.parent if file.name == "session.json" else file
    if _open_workspace(folder):
        return [(None,)]  # type: ignore[list-item]  # napari's way to say: read, and no layer comes of it
    return [session_layer(folder)]


def session_layer(folder: Path) -> LayerData:
    """The prepared images of a session as a layer."""
    from particle_explorer.session import Session

    session = Session.open(folder)
    data = LazyStack(session.images, *session.images.shape[1:3])
    attributes = {
        "name": session.name,
        "contrast_limits": _limits(data),
        "rgb": data.ndim == 4,
        "metadata": {METADATA: {"session": str(folder)}},
    }
    return data, attributes, "image"


def write_stack(path: str, data: Any, attributes: dict[str, Any]) -> list[str]:
    """Write an image layer as a stack of float32 images with its pixel size in the header."""
    from particle_explorer.io.mrc import write_stack as write

    images = np.asarray(data, np.float32) if not isinstance(data, LazyStack) else data[:]
    if images.ndim == 2:
        images = images[None]
    if images.ndim != 3:
        raise UserError(
            f"an .mrcs file holds grey images (number, y, x); this layer has shape {images.shape}"
        )
    scale = attributes.get("scale", (1.0,))
    write(Path(path), images, float(scale[-1]))
    return [path]


# --- sample data -----------------------------------------------------------------------------------------


def sample_folder() -> Path:
    """`sample_data/` as it was installed."""
    spec = importlib.util.find_spec("particle_explorer_dist")
    places = (
        [] if spec is None or spec.submodule_search_locations is None else spec.submodule_search_locations
    )
    for place in places:
        folder = Path(place, "sample_data")
        if folder.is_dir():
            return folder
    raise UserError(
        "the sample data were not installed; install napari-particle-explorer from a wheel or a clone"
    )


def cache_folder() -> Path:
    """Where the user's own copies of the sample live."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(base, "napari-particle-explorer")


def sample_particles() -> Path:
    """The user's own copy of the sample stack: the path of its star file."""
    source = sample_folder()
    target = cache_folder() / "sample"
    for file in source.iterdir():
        if file.is_file():
            copy_once(file, target / file.name)
    stars = sorted(target.glob("*.star"))
    if not stars:
        raise UserError(f"there is no star file in {source}")
    return stars[0]


def sample_session() -> Path:
    """The user's own copy of the trained sample session, its image cache built: the path of its folder."""
    from particle_explorer.session import Session

    star = sample_particles()
    packed = next((path.parent for path in sample_folder().rglob("session.json")), None)
    if packed is None:
        raise UserError(
            "the trained sample session was not installed; open the sample particles and train on them"
        )
    target = star.parent / packed.name
    if not (target / "session.json").exists():
        shutil.copytree(packed, target, dirs_exist_ok=True)
    session = Session.open(target)
    session.prepare_images()
    return target


def pack_session(session: Path, target: Path) -> None:
    """Copy a session without what can be made again and without traces of the computer it was made on.

    This is how the trained session of the sample is made; its image cache is built where it is opened.
    """
    left_out = shutil.ignore_patterns("images.*", "live", "resume.pt", "jobs", "log.txt", ".lock", "stop")
    shutil.copytree(session, target, ignore=left_out)
    for path in target.glob("runs/*/status.json"):
        status = json.loads(path.read_text(encoding="utf-8"))
        status.update(host="", pid=0, process_started="", message="")
        path.write_text(json.dumps(status, indent=1) + "\n", encoding="utf-8")


def copy_once(source: Path, target: Path) -> None:
    """Copy a file unless a copy of the same size is there."""
    from particle_explorer.files import replacing

    if target.exists() and target.stat().st_size == source.stat().st_size:
        return
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def open_sample_particles() -> list[LayerData]:
    """File → Open Sample → Simulated hinge: particles."""
    return read_stack(str(sample_particles()))


def open_sample_session() -> list[LayerData]:
    """File → Open Sample → Simulated hinge: trained session; opens the workspace."""
    folder = sample_session()
    data, attributes, kind = session_layer(folder)
    # napari insists on a layer from a sample; the workspace shows these images itself
    return [(data, {**attributes, "visible": not _open_workspace(folder)}, kind)]


def what_made_this() -> None:
    """Layers → Metadata → What made this picture?"""
    import napari

    from particle_explorer.widgets.provenance import show_layer_provenance

    viewer = napari.current_viewer()
    if viewer is not None:
        show_layer_provenance(viewer)


def _open_workspace(folder: Path) -> bool:
    """Show a session in the current viewer, if there is one with a window."""
    if importlib.util.find_spec("napari") is None:
        return False
    import napari

    viewer = napari.current_viewer()
    if viewer is None:
        return False
    from particle_explorer.widgets.workspace import open_workspace

    open_workspace(viewer, folder)
    return True


def plugin_setting(name: str) -> str:
    """A setting from napari's preferences, "" where it was left alone."""
    from napari.settings import get_plugin_settings

    group = getattr(get_plugin_settings("napari-particle-explorer"), "workspace", None)
    return str(getattr(group, name, "") or "")


__all__: Sequence[str] = ("get_reader", "open_sample_particles", "open_sample_session", "write_stack")
