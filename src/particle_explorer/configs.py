"""Every setting of the product, declared once.

The command line, the forms of the window and the `config.json` of a run all read these classes, so a
default, a bound or a help text exists in one place. No torch here: forms and `--help` are instant.

Two habits make one class fit all readers: every number has bounds, and "off" or "automatic" is a value
(`0`, `"none"`, `"auto"`) rather than `None`. A field marked `advanced` is folded away in the window.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import sys
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


def setting(
    default: Any, title: str, *, advanced: bool = False, unit: str = "", zero: str = "", **bounds: Any
) -> Any:
    """A field with the title, unit and place that forms show; its attribute docstring is the help.

    `zero` is what forms write instead of 0 where 0 means "choose for me".
    """
    extra: dict[str, Any] = {"advanced": advanced, "unit": unit, "zero": zero}
    return Field(default, title=title, json_schema_extra=extra, **bounds)


class Config(BaseModel):
    """A frozen group of settings; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Read the descriptions of the fields."""
        describe(cls)


def describe(config: type[BaseModel]) -> None:
    """Make the attribute docstrings of a class the descriptions of its fields.

    pydantic's `use_attribute_docstrings` does the same, but reads the source again for every class, which
    would be most of the time that the command line takes to start.
    """
    for base in reversed(config.__mro__):
        if not issubclass(base, Config):
            continue
        for name, text in _attribute_docstrings(base.__module__).get(base.__qualname__, {}).items():
            if name in config.model_fields:
                config.model_fields[name].description = text


@functools.cache
def _attribute_docstrings(module: str) -> dict[str, dict[str, str]]:
    """{class: {attribute: docstring}} of the classes at the top of a module."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if not file or not file.endswith(".py"):
        return {}
    with open(file, encoding="utf-8") as source:
        tree = ast.parse(source.read())
    found: dict[str, dict[str, str]] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            texts = found.setdefault(node.name, {})
            for field, after in itertools.pairwise(node.body):
                said = after.value if isinstance(after, ast.Expr) else None
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(field.target, ast.Name)
                    and isinstance(said, ast.Constant)
                    and isinstance(said.value, str)
                ):
                    texts[field.target.id] = inspect.cleandoc(said.value)
    return found


class PreprocessConfig(Config):
    """How original images become the cached images that models see."""

    diameter_A: float = setting(0.0, "Particle diameter", unit="Å", ge=0, le=100_000, zero="0.9 of the box")
    """Longest diameter of the particle. 0 takes 0.9 of the box. The mask, the background ring, the shift
    range and the box follow from it. For images without a pixel size, this number is in pixels."""

    pixel_size_A: float = setting(0.0, "Pixel size", unit="Å", ge=0, le=1000, zero="as the file says")
    """Å per pixel of the original images. 0 takes what the file says; another number is for files that do
    not say it, and replaces what a file says wrongly."""

    box_px: int = setting(0, "Box", unit="px", ge=0, le=512, zero="automatic")
    """Side of the cached images; larger originals are cropped in Fourier space. 0 chooses: the original
    box, at most 64 px."""

    prepared_pixel_size_A: float = setting(
        0.0, "Prepared pixel size", unit="Å", advanced=True, ge=0, le=1000, zero="by the box"
    )
    """Instead of a box: crop in Fourier space to about this pixel size; the box is the even number of pixels
    nearest to it. 0 goes by the box."""

    contrast: Literal["auto", "keep", "invert"] = setting("auto", "Contrast")
    """`auto` makes the particle bright by what the file says of its sign, or, where it says nothing, by
    comparing the centre of the images with their border."""

    background: Literal["ring", "none"] = setting("ring", "Background", advanced=True)
    """`ring` brings the pixels outside the particle to mean 0 and standard deviation 1 in every image."""

    mask: Literal["none", "soft"] = setting("none", "Mask", advanced=True)
    """`soft` brings the pixels outside the particle to 0, over an edge of a tenth of its diameter."""

    ctf: Literal["auto", "phase-flip", "model", "none"] = setting("auto", "CTF", advanced=True)
    """`auto` flips the phases unless the file says that they are flipped or premultiplied already; `model`
    leaves the images as they are and tells models their CTF; `none` leaves it out altogether."""

    low_pass_A: float = setting(0.0, "Low-pass", unit="Å", advanced=True, ge=0, le=10_000, zero="off")
    """Details finer than this are taken out, with a soft edge. 0 is off."""

    high_pass_A: float = setting(0.0, "High-pass", unit="Å", advanced=True, ge=0, le=100_000, zero="off")
    """What changes more slowly than this (gradients of ice) is taken out, with a soft edge. 0 is off."""

    bad_images: Literal["leave-out", "stop"] = setting("leave-out", "Blank or broken images", advanced=True)
    """Images whose pixels are all equal, or not all finite, are left out of the session and listed, or none
    of them is accepted."""

    outlier_sd: float = setting(0.0, "Outliers beyond", unit="SD", advanced=True, ge=0, le=100, zero="off")
    """Images whose mean or contrast (SD of the pixels) lies this many robust standard deviations from the
    others are left out: ice edges, contaminations, empty frames. 6 is cautious, 0 is off."""


PREPROCESS_PRESETS: dict[str, dict[str, Any]] = {
    "ice": {name: PreprocessConfig.model_fields[name].default for name in ("contrast", "ctf", "low_pass_A")},
    "stain": {"contrast": "keep", "ctf": "none", "low_pass_A": 20.0},
}
"""What is set for particles in ice and in negative stain. In stain a particle is bright as it is recorded,
its contrast is no matter of phases, and grains of stain hide details finer than about 20 Å."""

FILAMENT_PRIOR_DEG = 10.0
"""`psi_prior_deg` for segments of filaments."""

MOST_DIMS_OF_A_GRID = 3
"""A class map of more dimensions has an encoder beside its grid."""

CLASS_MAP_WARM_UP = 0.4
"""Share of a fit in which the class map's posterior is still being sharpened; only afterwards is its
likelihood that of the model, so that one epoch can be compared with another."""


class ClassMapConfig(Config):
    """2D classification whose classes lie on a smooth map: exact search over angle and shift, no encoder
    to train. The one to start with: minutes on a laptop."""

    kind: Literal["class-map"] = "class-map"

    latent_dim: int = setting(2, "Dimensions of the map", ge=0, le=32, zero="chosen")
    """1 orders the particles along one motion, 2 lays them out on a square, 3 in a cube, which takes two to
    four times as long as a square. From 4 on poses are found by a map of two dimensions, and an encoder and a
    decoder are trained for the content: for stacks of many kinds of images, several times as long again. 0
    chooses 1, 2 or 3, and the classes along each, by how well a part of the particles that was not fitted is
    explained; the run says how well each was."""

    varies: Literal["motion", "classes"] = setting("motion", "What varies")
    """`motion` starts the map from the main motions of one object. `classes` is for different objects or
    views in one stack: particles are laid out by which look alike at some turn, and where nothing lies there
    is no class. In much noise, which makes neighbours of anything, the map freezes slowly out of disorder. It
    takes some five times as long, in noise ten."""

    nodes_per_dim: int = setting(0, "Nodes per dimension", advanced=True, ge=0, le=64, zero="automatic")
    """Classes along each side of the map, of the one that finds poses from 4 dimensions on. 0 chooses: 24 in
    one dimension, 12 in two, 7 in three; where classes vary 18 in two, 11 in three."""

    angle_step_deg: float = setting(10.0, "Angle step", unit="°", advanced=True, ge=2, le=30)
    """Step of the angular search while fitting; reported angles are refined far below it."""

    shift_range_px: float = setting(
        0.0, "Shift range", unit="px", advanced=True, ge=0, le=64, zero="automatic"
    )
    """Largest shift searched, in pixels of the cached images. 0 chooses from diameter and box. Beyond an
    eighth of the box the place of each particle is found first, and what lies about it is compared."""

    psi_prior_deg: float = setting(
        0.0, "Angles near the file's", unit="°", advanced=True, ge=0, le=90, zero="off"
    )
    """For filaments: how far angles in the plane may lie from those in the star or cs file (standard
    deviation), or from these turned by half. 10 suits segments that were picked along filaments, 0 is off."""

    junk: bool = setting(True, "Junk class", advanced=True)
    """One more class takes what is no particle, so that it does not bend the map; every particle gets its
    probability. Off fits everything."""

    mirror: bool = setting(False, "Mirror images", advanced=True)
    """Compare each particle with the mirror image of every class too, as views from opposite sides are mirror
    images of each other. Each gets its probability of being mirrored, and the position of its mirror image;
    position and pose stay those of the particle as it is, so that nothing is merged. Takes twice as long."""

    use_ctf: bool = setting(True, "CTF in the likelihood", advanced=True)
    """Where particles carry CTF parameters, every class image is compared through each particle's own CTF,
    and the map shows molecules without it. Off compares images as they are, after phase flipping."""

    @property
    def warm_up(self) -> float:
        """Share of a fit in which the posterior is still being sharpened."""
        return 0.7 if self.varies == "classes" else CLASS_MAP_WARM_UP


Likelihood = Literal["gaussian", "gaussian-learned", "bernoulli"]
"""How a network's picture is compared with an image."""


class VAEConfig(Config):
    """Variational autoencoder, plain or β: the baseline. It knows no pose, so on particles that are not
    aligned its map orders orientations, not conformations. Minutes on a laptop."""

    kind: Literal["vae"] = "vae"

    latent_dim: int = setting(2, "Dimensions of the map", ge=1, le=64)
    """Number of coordinates per particle. The comparisons of the TARGET-VAE paper take 4."""

    beta: float = setting(1.0, "β", ge=0, le=1000)
    """Weight of the prior on the coordinates. 1 is the plain VAE; the β-VAE of the papers takes 4."""

    hidden: int = setting(500, "Width of the networks", advanced=True, ge=8, le=5000)
    """Units per hidden layer of encoder and decoder."""

    layers: int = setting(2, "Hidden layers", advanced=True, ge=1, le=8)
    """Hidden layers of encoder and decoder."""

    likelihood: Likelihood = setting("gaussian", "Pixel noise", advanced=True)
    """`gaussian` takes noise of variance 1, as prepared images have; `gaussian-learned` draws a variance for
    every pixel too; `bernoulli` is for grey values from 0 to 1, prepared with Background "none"."""


class SpatialVAEConfig(Config):
    """spatial-VAE (Bepler et al., NeurIPS 2019): a network infers angle, shift and content, another draws
    the image pixel by pixel. Ten minutes to an hour on a laptop."""

    kind: Literal["spatial-vae"] = "spatial-vae"

    latent_dim: int = setting(2, "Dimensions of the map", ge=1, le=64)
    """Number of content coordinates per particle."""

    hidden: int = setting(500, "Width of the networks", advanced=True, ge=8, le=5000)
    """Units per hidden layer of encoder and decoder; the paper takes 500 (simulated) or 1000 (recorded)."""

    layers: int = setting(2, "Hidden layers", advanced=True, ge=1, le=8)
    """Hidden layers of encoder and decoder."""

    infer_shift: bool = setting(True, "Infer shifts")
    """Infer a shift per particle beside the angle; the paper's 5HDB experiment has this off."""

    shift_sd_px: float = setting(
        0.0, "Spread of shifts", unit="px", advanced=True, ge=0, le=64, zero="automatic"
    )
    """Standard deviation of the shift prior in pixels of the cached images. 0 takes 0.05 of the box."""

    content_freeze_epochs: int = setting(2, "Epochs of pose only", advanced=True, ge=0, le=100)
    """The content is held at 0 for this many epochs, and for a twentieth of the training at least, so that
    pose is learned first; in the first half of them there is no shift either. 0 holds nothing."""

    starts: int = setting(3, "Starts", advanced=True, ge=1, le=20)
    """Pose is learned for a short time from this many random starts, and the one that explains the particles
    best goes on: some starts get stuck on two half-turned copies of the particle drawn over each other."""

    augment_rotation: bool = setting(True, "Turn images for the encoder", advanced=True)
    """Each image is turned by a random angle before encoding; without it, uniform angles are not learned."""

    non_negative: bool = setting(False, "Non-negative mean", advanced=True)
    """Softplus on the decoder's mean: keeps structure out of the background."""

    likelihood: Likelihood = setting("gaussian", "Pixel noise", advanced=True)
    """`gaussian` takes noise of variance 1, as prepared images have; `gaussian-learned` draws a variance for
    every pixel too; `bernoulli` is for grey values from 0 to 1, prepared with Background "none"."""

    apply_ctf: bool = setting(False, "CTF in the model", advanced=True)
    """Draw the particle free of the CTF and compare it with the image through the CTF of that image, where
    the particles carry one. Every pixel is drawn then, so training takes up to ten times as long."""

    pixel_fraction: float = setting(0.1, "Share of pixels per step", advanced=True, gt=0.01, le=1)
    """Train each step on this random share of the pixels inside the mask, the sum rescaled (unbiased)."""


class TargetVAEConfig(Config):
    """TARGET-VAE (Nasiri & Bepler, NeurIPS 2022): weighs every angle and shift of an image before it decides,
    so it finds poses that spatial-VAE gets stuck on. Half an hour to hours on a laptop."""

    kind: Literal["target-vae"] = "target-vae"

    latent_dim: int = setting(2, "Dimensions of the map", ge=1, le=64)
    """Number of content coordinates per particle."""

    rotations: Literal["P4", "P8", "P16"] = setting("P8", "Angles weighed")
    """4, 8 or 16 turns of each kernel; between them the network says the rest of the angle. Time and memory
    grow with it, the number of weights does not."""

    shift_sd_px: float = setting(
        0.0, "Spread of shifts", unit="px", advanced=True, ge=0, le=64, zero="automatic"
    )
    """Standard deviation of the shift prior in pixels of the cached images. 0 takes 0.05 of the box, which is
    the paper's."""

    angle_sd_deg: float = setting(
        0.0, "Spread of angles", unit="°", advanced=True, ge=0, le=180, zero="uniform"
    )
    """Standard deviation of the angle prior, about the images as they are. Choose it for particles that are
    roughly upright already, as in a stack that was written aligned: the paper takes 45° for digits so turned.
    0 is for particles that lie at any angle, as picked ones do; a file's angles do not turn its images."""

    shift_range_px: int = setting(0, "Shift range", unit="px", advanced=True, ge=0, le=128, zero="automatic")
    """Largest shift weighed, in pixels of the cached images. 0 takes three times the spread."""

    kernel_px: int = setting(0, "Kernel", unit="px", advanced=True, ge=0, le=512, zero="the particle")
    """Diameter of the round kernels that look for the particle. 0 takes the particle diameter."""

    kernel_functions: int = setting(192, "Detail of the kernels", advanced=True, ge=8, le=2000)
    """Number of Fourier-Bessel functions that a kernel is a sum of; more draw finer kernels."""

    channels: int = setting(128, "Kernels", advanced=True, ge=4, le=1024)
    """Number of kernels, and width of the encoder."""

    features: int = setting(1024, "Fourier features", advanced=True, ge=16, le=8192)
    """Random waves of the coordinates that the decoder draws with."""

    hidden: int = setting(512, "Width of the decoder", advanced=True, ge=8, le=5000)
    """Units per hidden layer of the decoder."""

    layers: int = setting(2, "Hidden layers of the decoder", advanced=True, ge=1, le=8)
    """The paper takes 2, and 6 for recorded particles."""

    likelihood: Likelihood = setting("gaussian", "Pixel noise", advanced=True)
    """`gaussian` takes noise of variance 1, as prepared images have; `gaussian-learned` draws a variance for
    every pixel too; `bernoulli` is for grey values from 0 to 1, prepared with Background "none"."""

    pixel_fraction: float = setting(0.1, "Share of pixels per step", advanced=True, gt=0.01, le=1)
    """Train each step on this random share of the pixels inside the mask, the sum rescaled (unbiased)."""


class CODAEConfig(Config):
    """CODAE (Cha et al., Nature Machine Intelligence 2025): networks infer shift, angle and content, another
    draws the aligned particle, which is then turned and moved as a whole. For particles that stand out from
    the noise, wherever they lie in the box."""

    kind: Literal["codae"] = "codae"

    latent_dim: int = setting(2, "Dimensions of the map", ge=1, le=64)
    """Number of content coordinates per particle, in turns around a circle each."""

    group_order: Literal[4, 8, 16] = setting(8, "Turns of the kernels", advanced=True)
    """Every kernel is used at this many equally spaced angles. More find angles better and take longer."""

    width: int = setting(8, "Width of the network", advanced=True, ge=2, le=128)
    """Kernels per angle in the first layers of the encoder; later layers have twice as many."""

    moment_weight: float = setting(1.0, "Weight of the moments", advanced=True, ge=0, le=1000, zero="off")
    """The pose is led by the centre of mass and the long axis of the bright pixels at first, with this
    weight beside the reconstruction. 0 leaves it to the reconstruction alone."""

    moment_share: float = setting(1.0, "Share of the training with moments", advanced=True, ge=0, le=1)
    """The weight of the moments falls to nothing over this share of the training."""

    euler_encoding: bool = setting(True, "Content on circles", advanced=True)
    """Stretch every content coordinate over the batch and hand it to the decoder as a point on a circle,
    with noise as large as the distance to the nearest other particle."""

    importance: float = setting(1.0, "Importance of the next coordinate", advanced=True, ge=0.001, le=1)
    """Below 1 each coordinate starts with this share of the span of the one before, so that the first ones
    take up what varies most."""


class RotationAEConfig(Config):
    """Rotation-invariant autoencoder with a discriminator: for particles that a 2D alignment in RELION or
    cryoSPARC has given angles. It learns from those angles to draw every particle upright; without them it
    takes each particle for upright as it lies, so its map also holds how each one lies."""

    kind: Literal["rotation-ae"] = "rotation-ae"

    latent_dim: int = setting(31, "Dimensions of the map", ge=1, le=512)
    """Number of content coordinates per particle; the published network has 31 beside the angle."""

    poses: Literal["auto", "file", "self"] = setting("auto", "Angles to learn from")
    """`file` learns from the angles and shifts that the particles carry after a 2D alignment: every particle
    is drawn upright and the map holds content alone. `self` takes each particle for upright as it lies,
    turns it at random and learns to undo that turn: the map also holds how a particle lay, no angle is
    reported, and of particles that lie at all angles only their mean over all turns is drawn. `auto` takes
    `file` where all particles carry angles, else `self`."""

    pixels: Literal["linear", "sigmoid"] = setting("linear", "Grey values", advanced=True)
    """`sigmoid` keeps drawn pixels from 0 to 1, for images whose pixels are that; particles take `linear`."""

    turn_range_deg: float = setting(180.0, "Largest turn", unit="°", advanced=True, ge=0, le=180)
    """In training each particle is turned further by a random angle up to this, either way."""

    adversarial: Literal["wasserstein", "binary", "none"] = setting(
        "wasserstein", "Discriminator", advanced=True
    )
    """How drawn particles are told from true ones: by a Wasserstein critic whose slope is held at 1, by a
    plain discriminator, or not at all."""

    adversarial_weight: float = setting(0.001, "Weight of the discriminator", advanced=True, ge=0, le=100)
    """Weight of the discriminator's term beside the errors of pixels and angle. The published weight is 1, of
    a critic without any hold on its slope."""

    critic_every: int = setting(4, "Steps per discriminator step", advanced=True, ge=1, le=100)
    """The discriminator takes one step for this many of the autoencoder."""


ModelConfig = Annotated[
    ClassMapConfig | SpatialVAEConfig | TargetVAEConfig | CODAEConfig | RotationAEConfig | VAEConfig,
    Field(discriminator="kind"),
]


class ImportedConfig(Config):
    """Coordinates that another program found; there is no model to draw with."""

    kind: Literal["imported"] = "imported"
    latent_dim: int = Field(ge=1, le=1024)
    file: str = ""
    """Where they came from."""
    columns: tuple[str, ...] = ()


RunModel = Annotated[
    ClassMapConfig
    | SpatialVAEConfig
    | TargetVAEConfig
    | CODAEConfig
    | RotationAEConfig
    | VAEConfig
    | ImportedConfig,
    Field(discriminator="kind"),
]
"""What a run may be of: a model that is fitted here, or coordinates from elsewhere."""


class TrainConfig(Config):
    """How a model is trained."""

    n_epochs: int = setting(0, "Epochs", ge=0, le=100_000, zero="automatic")
    """Passes over the particles. 0 takes the model's own number."""

    seed: int = setting(0, "Seed", advanced=True, ge=0, le=2**31 - 1)
    """The same seed on the same machine gives the same run."""

    learning_rate: float = setting(0.0, "Learning rate", advanced=True, ge=0, le=1, zero="automatic")
    """Step size of Adam. 0 takes the model's own."""

    schedule: Literal["cosine", "constant"] = setting("cosine", "Schedule", advanced=True)
    """`cosine` lets it fall to 0 by the end, so that a short training ends as well as a long one; `constant`
    keeps it, as the papers of spatial-VAE and TARGET-VAE do."""

    batch_size: int = setting(0, "Batch size", advanced=True, ge=0, le=100_000, zero="automatic")
    """Particles per step. 0 takes the model's own."""

    precision: Literal["auto", "float32", "bf16"] = setting("auto", "Precision", advanced=True)
    """`auto` takes bf16 matrix products where the processor has them."""

    devices: int = setting(1, "Devices", advanced=True, ge=1, le=64)
    """Number of devices that take each batch together: GPUs, or processes on the CPU. Without a GPU one is as
    fast. On several computers, start the same command everywhere with torchrun or srun instead. Needs the
    extra `multi`."""

    checkpoint_minutes: float = setting(1.0, "Checkpoint every", unit="min", advanced=True, ge=0, le=600)
    """A checkpoint is written at the end of an epoch when this much time has passed since the last."""


class DataSpec(Config):
    """What a model must know of the images it is built for; stored with every run."""

    box_px: int = Field(ge=8, le=512)
    """Side of the cached images."""
    n_channels: int = Field(1, ge=1, le=3)
    diameter_px: float = Field(gt=0)
    """Particle diameter in pixels of the cached images."""
    n_particles: int = Field(ge=1)
    """Rows of the session, fitted or not."""


class RunConfig(Config):
    """Everything needed to repeat a run; the content of `config.json`."""

    format_version: int = 1
    model: RunModel
    train: TrainConfig = TrainConfig()
    data: DataSpec
    where: str = ""
    """The rows fitted, as `COLUMN OP VALUE [and …]`; empty fits all."""
    selection: str = ""
    """Of these, only the particles of the named selection; empty takes all."""
    device: str = "auto"
    parent: str = ""
    """Name of the run that this one continues, or on whose map its particles were selected, if any."""
    warm_start: bool = False
    """Whether the fit starts from the weights of the parent instead of anew."""
    version: str = ""
    """Version of the package that made the run."""


class EmbedConfig(Config):
    """A 2-D picture of the latent coordinates."""

    method: Literal["umap", "tsne", "pca"] = setting("umap", "Method")
    """`umap` and `tsne` keep neighbours together; `pca` is a plain rotation onto the widest directions."""
    n_neighbours: int = setting(15, "Neighbours", ge=2, le=500)
    """UMAP: how many neighbours of each particle are kept close."""
    perplexity: float = setting(30.0, "Perplexity", advanced=True, ge=2, le=500)
    """t-SNE: about how many neighbours of each particle are kept close."""
    min_distance: float = setting(0.1, "Least distance", advanced=True, ge=0, le=1)
    """UMAP: how tightly points may be packed."""
    fit_at_most: int = setting(0, "Particles fitted", advanced=True, ge=0, le=100_000_000, zero="automatic")
    """Of more particles a random part is laid out and the others take their place between neighbours. 0 fits
    200 000 with UMAP, 10 000 with t-SNE."""
    seed: int = setting(0, "Seed", advanced=True, ge=0, le=2**31 - 1)
    """Random seed."""


class ClusterConfig(Config):
    """Groups of particles by their latent coordinates."""

    method: Literal["kmeans", "gmm", "hdbscan", "ward"] = setting("kmeans", "Method")
    """`kmeans` makes round groups, `gmm` Gaussian ones of any shape, `ward` joins neighbours step by step,
    `hdbscan` finds dense groups of any shape and leaves sparse particles out."""
    n_clusters: int = setting(10, "Clusters", ge=0, le=1000, zero="found by BIC")
    """Number of clusters. With `gmm`, 0 takes the number of least BIC; `hdbscan` finds its own."""
    most_clusters: int = setting(12, "Try up to", advanced=True, ge=1, le=100)
    """`gmm`: the largest number that is tried when the number is sought."""
    min_size: int = setting(50, "Least size", advanced=True, ge=2, le=10_000_000, unit="particles")
    """`hdbscan`: the fewest particles that make a group."""
    seed: int = setting(0, "Seed", advanced=True, ge=0, le=2**31 - 1)
    """Random seed."""


class TraverseConfig(Config):
    """A way through the map, drawn by the model and averaged from real particles."""

    along: Literal["dimension", "component", "straight", "particles", "curve", "grid", "prior"] = setting(
        "component", "Along"
    )
    """`dimension` or `component`: one coordinate of the map or one principal component, through the middle;
    `straight`: between two particles; `particles`: between two particles by way of particles between them;
    `curve`: through given positions; `grid`: a square of the first two coordinates, evenly in probability;
    `prior`: positions the model expects."""
    number: int = setting(1, "Number", ge=1, le=64)
    """Which dimension or component, from 1."""
    n_frames: int = setting(24, "Pictures", ge=2, le=1000)
    """Pictures along the way; of a grid, the nearest square."""
    n_each: int = setting(200, "Particles averaged at each", ge=0, le=1_000_000, zero="none")
    """At most so many particles, those nearest to the position and to no other, are averaged beside each
    picture; 0 averages none."""
    seed: int = setting(0, "Seed", advanced=True, ge=0, le=2**31 - 1)
    """Random seed of `prior`."""


class AverageConfig(Config):
    """Class averages of original images, aligned by inferred poses."""

    ctf: Literal["auto", "none", "phase-flip", "wiener"] = setting("auto", "CTF")
    """`auto` takes `wiener` where the CTF is known and the images are not corrected yet, else `none`."""
    box_px: int = setting(0, "Box", unit="px", advanced=True, ge=0, le=2048, zero="as the original")
    """Side of the averages; 0 keeps the original box."""
    interpolation: Literal["auto", "spline", "shears"] = setting("auto", "Interpolation", advanced=True)
    """How images are moved back: `spline` is exact up to the last ring, `shears` several times as fast and
    exact up to 0.3 of the sampling. `auto` takes splines for what they do in seconds, else shears. A GPU
    always takes splines."""


class RefineConfig(Config):
    """Poses refined against class averages or decoded references."""

    n_iterations: int = setting(3, "Iterations", ge=1, le=50)
    """Averages are made anew before each."""
    angle_range_deg: float = setting(15.0, "Angles searched", unit="°", ge=1, le=180)
    """To either side of the present angle."""
    shift_range_px: float = setting(5.0, "Shifts searched", unit="px", ge=0.5, le=200)
    """To either side of the present shift, in pixels of the originals."""
    box_px: int = setting(0, "Box", unit="px", advanced=True, ge=0, le=512, zero="at most 80")
    """Side of the images in the search; larger originals are cropped in Fourier space. 0 is at
    most 80."""


class SimulateConfig(Config):
    """A simulated stack of one molecule with a hinge, every truth known."""

    n: int = setting(4000, "Particles", ge=1, le=10_000_000)
    """Number of images."""
    box_px: int = setting(64, "Box", unit="px", ge=16, le=512)
    """Side of the images."""
    pixel_size_A: float = setting(4.0, "Pixel size", unit="Å", gt=0, le=50)
    """Pixel size."""
    snr: float = setting(0.1, "Signal to noise", gt=0, le=1000)
    """Variance of the signal over variance of the noise, over all pixels of all images."""
    shift_sd_px: float = setting(1.0, "Spread of shifts", unit="px", ge=0, le=64)
    """Standard deviation of the shifts, per axis."""
    defocus_min_A: float = setting(10_000.0, "Least defocus", unit="Å", ge=0, le=100_000)
    """Smallest defocus. Both at 0 leave the CTF out."""
    defocus_max_A: float = setting(25_000.0, "Largest defocus", unit="Å", ge=0, le=100_000)
    """Largest defocus."""
    astigmatism_A: float = setting(300.0, "Astigmatism", unit="Å", advanced=True, ge=0, le=10_000)
    """Standard deviation of the difference between the two defocus values."""
    noise_colour: float = setting(0.5, "Colour of the noise", advanced=True, ge=0, le=2)
    """0 is white; larger numbers put more of the noise at low frequencies."""
    junk_fraction: float = setting(0.03, "Share of junk", advanced=True, ge=0, le=1)
    """Share of images that are not the molecule."""
    seed: int = setting(0, "Seed", ge=0, le=2**31 - 1)
    """Random seed."""


class AccuracyConfig(Config):
    """How well models find conformation and pose on stacks whose truth is known."""

    stacks: str = setting("all", "Stacks")
    """`all`, or some with commas between: `integrin-0.5` and `integrin-0.1` (simulated integrin at that
    signal-to-noise ratio), `hinge-0.1` and `hinge-0.03` (the package's own simulator, with CTF and junk),
    `mnist-n`, `mnist-u` and `mnist-multi` (turned and shifted digits), `mnist-posed` (turned digits whose
    angles are given to models that learn from poses), `mnist-posed-90` (the same within 90° either way,
    fitted to upright digits that are turned anew in each pass), `xyrcs` and `dsprites` (plain shapes). Only
    `hinge-…` and `xyrcs` need no folder of large data."""
    models: str = setting("all", "Models")
    """`all`, or some kinds with commas between. `KIND-2d` and the like say the dimensions of the map;
    without, it is one for stacks with one motion and two for those with labels. `beta-vae` is the VAE with a
    β of 4 and four dimensions."""
    protocol: Literal["smoke", "quick", "full"] = setting("quick", "Protocol")
    """`quick` takes under half an hour per model and seed on two cores: 12 500 digits or 6 000 shapes, and as
    many epochs as fit into 25 minutes. `full` takes all images and the epochs of the papers. `smoke` says in
    a minute whether everything runs, not how well: 1 500 particles, two epochs, one seed."""
    n_seeds: int = setting(3, "Seeds", ge=1, le=100)
    """Runs of every model, each with a seed of its own."""
    first_seed: int = setting(0, "First seed", ge=0, le=2**31 - 1)
    """Seeds count from this one, to add runs to those measured before."""
    precision: Literal["auto", "float32", "bf16"] = setting("auto", "Precision")
    """Of the training, to see whether bf16 changes anything."""
    n_particles: int = setting(0, "Particles", ge=0, le=10_000_000)
    """Particles used of every stack, a fifth of them to score; 0 leaves it to the protocol."""
    epochs: int = setting(0, "Epochs", ge=0, le=100_000)
    """Passes over the particles; 0 leaves it to the protocol."""
    settings: str = setting("", "Settings")
    """Further settings of the models, as a JSON object: `{"angle_step_deg": 5}`."""
    data: str = setting("", "Folder of large data")
    """Where `5hdb_sim`, `mnist` and `dsprites_regen` lie; empty takes the environment variable
    PARTICLE_EXPLORER_DATA."""


class AveragesConfig(Config):
    """How good averages are on the simulated integrin stacks, beside discrete classes and k-means."""

    snr: Literal["both", "0.5", "0.1"] = setting("both", "Signal to noise")
    """Which of the two stacks."""
    n_particles: int = setting(5000, "Particles", ge=500, le=20_000)
    """Particles used of each."""
    seed: int = setting(0, "Seed", ge=0, le=2**31 - 1)
    """Random seed of the discrete methods."""
    data: str = setting("", "Folder of large data")
    """Where `5hdb_sim` lies; empty takes the environment variable PARTICLE_EXPLORER_DATA."""
    quick: bool = setting(False, "Quick")
    """1000 particles and few iterations: whether everything runs, not how well."""
    baselines: bool = setting(True, "Baselines")
    """Also discrete classes and k-means, which take most of the time."""


class SpeedConfig(Config):
    """Images per second of models, averaging and preprocessing."""

    what: Literal["all", "models", "images"] = setting("all", "What")
    """All of it, only the models, or only averaging and preprocessing a stack of full-size images."""
    models: str = setting("all", "Models")
    """`all`, or some with commas between: `class-map`, `class-map-2d`, `spatial-vae`, `target-vae`, `codae`,
    `rotation-ae`, `vae`. The plain yardsticks go with `spatial-vae` and `target-vae`."""
    boxes_px: tuple[int, ...] = setting((40, 64, 128), "Boxes")
    """Sides of the images that models are timed on."""
    batch_size: int = setting(0, "Batch size", ge=0, le=100_000)
    """Images per step; 0 takes the model's own."""
    seconds: float = setting(4.0, "Seconds per measurement", gt=0, le=600)
    """Least time each measurement takes, after its warm-up."""
    stack_box_px: int = setting(256, "Box of the stack", ge=32, le=2048)
    """Side of the images of the stack that averaging and preprocessing are timed on."""
    stack_n: int = setting(1000, "Images of the stack", ge=8, le=1_000_000)
    """Images of that stack; it is written to the temporary folder."""
    device: str = setting("auto", "Device")
    """Where averaging is timed once more, by torch: auto, on a GPU where there is one; mps or cuda:N; or cpu,
    where torch does what it would do on a GPU."""
    quick: bool = setting(False, "Quick")
    """A small box, a small stack and a fraction of a second each: whether everything runs, not how fast."""
