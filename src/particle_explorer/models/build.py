"""From a config to a model; each model's file is imported only when it is wanted."""

from __future__ import annotations

from particle_explorer.configs import (
    MOST_DIMS_OF_A_GRID,
    ClassMapConfig,
    CODAEConfig,
    DataSpec,
    ImportedConfig,
    RotationAEConfig,
    RunModel,
    TargetVAEConfig,
    VAEConfig,
)
from particle_explorer.files import UserError
from particle_explorer.models.base import ParticleModel


def build_model(config: RunModel, data: DataSpec) -> ParticleModel:
    """An untrained model."""
    if isinstance(config, ImportedConfig):
        raise UserError(f"the coordinates come from {config.file}: there is no model to draw or encode with")
    if isinstance(config, ClassMapConfig) and config.latent_dim == 0:
        raise UserError("--model.latent-dim 0 leaves the dimensions to be chosen, and a model has some")
    if isinstance(config, ClassMapConfig) and config.latent_dim > MOST_DIMS_OF_A_GRID:
        from particle_explorer.models.hybrid_map import HybridMap

        return HybridMap(config, data)
    if isinstance(config, ClassMapConfig):
        from particle_explorer.models.class_map import ClassMap

        return ClassMap(config, data)
    if isinstance(config, TargetVAEConfig):
        from particle_explorer.models.target_vae import TargetVAE

        return TargetVAE(config, data)
    if isinstance(config, VAEConfig):
        from particle_explorer.models.vae import VAE

        return VAE(config, data)
    if isinstance(config, CODAEConfig):
        from particle_explorer.models.codae import CODAE

        return CODAE(config, data)
    if isinstance(config, RotationAEConfig):
        from particle_explorer.models.rotation_ae import RotationAE

        return RotationAE(config, data)
    from particle_explorer.models.spatial_vae import SpatialVAE

    return SpatialVAE(config, data)
