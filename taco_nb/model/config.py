"""The settings of the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from taco_nb.errors import CheckpointError, SettingError

ATTENTIONS = ("softmax", "linformer")
SHARINGS = ("none", "key-value", "layerwise")


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and the attention of a TACO, by default the paper's. Raises `SettingError` for what does not fit together."""

    N: int = 192
    M: int = 320
    groups: tuple[int, ...] = (16, 16, 32, 64, 192)
    text_dim: int = 512
    heads: int = 8
    context_widths: tuple[int, int] = (224, 128)
    attention: str = "softmax"
    """"softmax" or "linformer", in all three attentions of the adapter."""
    linformer_k: int = 32
    """To how many positions Linformer projects keys and values."""
    linformer_sharing: str = "none"
    """What shares a projection: "none", "key-value" (E = F in each layer), or "layerwise" (one for both Injectors)."""
    text_tokens: int = 38
    """Tokens on which Linformer's projections over text are learned; any number can be encoded."""
    image_grid: int = 32
    """Side, in positions, of the square grid on which Linformer's projections over the image are learned."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        object.__setattr__(self, "context_widths", tuple(self.context_widths))
        sizes = (self.N, self.M, self.text_dim, self.heads, *self.groups, *self.context_widths)
        sizes += (self.linformer_k, self.text_tokens, self.image_grid)
        if not all(isinstance(size, int) and size > 0 for size in sizes) or self.N < 2:
            raise SettingError(
                f"Every size of a model is a positive whole number, N 2 at least, but this is {self}."
            )
        if sum(self.groups) != self.M:
            raise SettingError(
                f"groups={self.groups} add up to {sum(self.groups)}, but must add up to M={self.M}."
            )
        if len(self.context_widths) != 2:
            raise SettingError(f"context_widths are two numbers, not {self.context_widths}.")
        for name, known in (("attention", ATTENTIONS), ("linformer_sharing", SHARINGS)):
            if getattr(self, name) not in known:
                raise SettingError(f"{name} is one of {known}, not {getattr(self, name)!r}.")
        for name in ("N", "text_dim"):
            if getattr(self, name) % self.heads:
                raise SettingError(f"{name}={getattr(self, name)} is not a multiple of heads={self.heads}.")

    @classmethod
    def of_state_dict(cls, state_dict: Mapping[str, Tensor], heads: int = 8) -> ModelConfig:
        """The sizes that the shapes of a reference's state dict imply; heads leave no trace in them.

        Raises `CheckpointError` for a state dict that is not TACO's.
        """
        shape = {key.removeprefix("module."): tuple(value.shape) for key, value in state_dict.items()}
        try:
            groups = []
            while f"local_context.{len(groups)}.weight" in shape:
                groups.append(shape[f"local_context.{len(groups)}.weight"][1])
            return cls(
                N=shape["g_a.analysis_transform.0.weight"][0],
                M=shape["g_a.analysis_transform.16.weight"][0],
                groups=tuple(groups),
                text_dim=shape["g_a.analysis_transform.8.text_feature_dim_proj.weight"][1],
                heads=heads,
                context_widths=tuple(shape[f"channel_context.1.fushion.{i}.weight"][0] for i in (0, 2)),
            )
        except KeyError as missing:
            raise CheckpointError(f"This state dict is not TACO's: it has no {missing}.") from None
        except (IndexError, SettingError) as error:
            raise CheckpointError(
                f"This state dict is not TACO's, its shapes do not fit together: {error}"
            ) from None
