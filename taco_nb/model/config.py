"""The network's settings are declared here, and read off a state dict."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic.dataclasses import dataclass
from torch import Tensor

from taco_nb.errors import CheckpointError, SettingError
from taco_nb.settings import STRICT, Attention, Count, LinformerSharing, Sizes, plain_errors


@plain_errors
@dataclass(frozen=True, config=STRICT)
class ModelConfig(Sizes):
    """Set the sizes and the attention of a TACO, by default the paper's. Raises `SettingError` for what does not fit."""

    attention: Attention = "softmax"
    """The kind of all three attentions in the adapter."""
    linformer_k: Count = 32
    """Linformer projects keys and values to this many positions."""
    linformer_sharing: LinformerSharing = "none"
    """Which projections of Linformer are one: "key-value" (E = F in each layer), or "layerwise" (one for both Injectors)."""
    text_tokens: Count = 38
    """Linformer learns its projections over text on this many tokens; any number can be encoded."""
    image_grid: Count = 32
    """Linformer learns its projections over the image on a square grid with this many positions on a side."""

    @classmethod
    def of_state_dict(cls, state_dict: Mapping[str, Tensor], heads: int = 8) -> ModelConfig:
        """Return the sizes that the shapes in a reference's state dict imply; heads leave no trace in them.

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
                f"This state dict is not TACO's, because its shapes do not fit together: {error}"
            ) from None
