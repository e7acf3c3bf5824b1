"""The network turns images and text features into latents, likelihoods and bit strings. Nothing here reads a file."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # compressai imports much that is deprecated, none of it used here
    import compressai  # noqa: F401

from taco_nb.model.config import ModelConfig
from taco_nb.model.latents import Encoded
from taco_nb.model.taco import TACO

__all__ = ["TACO", "Encoded", "ModelConfig"]
