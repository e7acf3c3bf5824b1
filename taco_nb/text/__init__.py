"""Captions in, conditioning out: what TACO's text adapter attends to."""

from taco_nb.text.clip import TextTower, clip_model, text_tower

__all__ = ["TextTower", "clip_model", "text_tower"]
