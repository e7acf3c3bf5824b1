"""Captions in, conditioning out: what TACO's text adapter attends to."""

from taco_nb.text.clip import TextTower, text_tower

__all__ = ["TextTower", "text_tower"]
