"""This subpackage turns captions into what TACO's text adapter attends to."""

from taco_nb.text.clip import TextTower, clip_model, text_tower
from taco_nb.text.conditioning import Conditioning
from taco_nb.text.keywords import KeywordWeights

__all__ = ["Conditioning", "KeywordWeights", "TextTower", "clip_model", "text_tower"]
