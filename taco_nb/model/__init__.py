"""The network: images and text features in, latents, likelihoods and bit strings out. Nothing here reads a file."""

from taco_nb.model.taco import TACO, Encoded, Latents, ModelConfig

__all__ = ["TACO", "Encoded", "Latents", "ModelConfig"]
