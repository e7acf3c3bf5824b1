"""Captions become what the adapter reads: tower, long text and keyword weights are put together as an `Experiment` says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from torch import Tensor

from taco_nb.errors import SettingError
from taco_nb.settings import TextLength, TextPooling
from taco_nb.text.clip import TextTower, to_device
from taco_nb.text.keywords import KeywordWeights, pool
from taco_nb.text.long import tower_windows
from taco_nb.text.tokens import tokenized

CONSTANT_CAPTION = "A photograph."
"""What a codec of the negative control reads in place of every caption."""


class Conditioning:
    """Turn captions into (text (B, T, dim), mask (B, T) or None), the last two arguments of TACO's encoder.

    - `length="truncate"`: all of the tower's positions, padding included, as the reference has it; no mask.
    - `length="windows"`: every token of captions of any length; the mask hides the padding.
    - `length="constant"`: as "truncate", but of `CONSTANT_CAPTION`, whatever the captions say.
    - `pooling="keywords"`: the report's weighted sum over tokens, so T = 1.
    - `pooling="keywords-tokens"`: one weighted vector per token.

    Raises `SettingError` for windows together with keyword weights, since these are weights of truncated captions.
    """

    def __init__(
        self,
        tower: TextTower,
        length: str = "truncate",
        pooling: str = "none",
        keywords: KeywordWeights | None = None,
    ):
        for name, value, allowed in (
            ("text_length", length, (*get_args(TextLength), "constant")),
            ("text_pooling", pooling, get_args(TextPooling)),
        ):
            if value not in allowed:
                raise SettingError(f"{name} is one of {allowed}, not {value!r}.")
        if pooling != "none" and length != "truncate":
            raise SettingError('Keyword weights need text_length="truncate": they weigh one window.')
        if pooling != "none" and keywords is None:
            raise SettingError(f'text_pooling="{pooling}" needs keyword weights, and none were given.')
        self.tower, self.length, self.pooling, self.keywords = tower, length, pooling, keywords

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        constant = self.length == "constant"
        captions = [tokenized(CONSTANT_CAPTION)] * len(captions) if constant else list(captions)
        if self.length == "windows":
            return tower_windows(self.tower, captions)
        hidden = self.tower(captions)
        if self.pooling == "none":
            return hidden, None
        weights = to_device(self.keywords.token_weights(captions, self.tower), hidden.device)
        return pool(hidden, weights, self.pooling), None
