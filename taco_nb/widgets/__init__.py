"""The notebooks' displays. Each also draws itself as a plain picture or plain HTML, without a kernel or a network."""

from taco_nb.widgets.attention import attention_maps, shaded_caption, spectrum, where_the_text_looks
from taco_nb.widgets.captions import caption_lab, caption_presets
from taco_nb.widgets.claims import claims_page
from taco_nb.widgets.compare import compare
from taco_nb.widgets.diagram import encoder_diagram
from taco_nb.widgets.explorer import explorer
from taco_nb.widgets.figures import (
    difference_plot,
    effect_plot,
    listening_bars,
    rate_distortion,
    rate_panels,
    sibling_plot,
    training_curves,
)
from taco_nb.widgets.html_parts import sortable
from taco_nb.widgets.lessons import (
    amdahl_bar,
    decoding_sheet,
    fading_text,
    fewer_keys,
    forest_of_changes,
    graded_figure,
    key_shares,
    latent_figure,
    low_rank_sheet,
    matrices_to_scale,
)
from taco_nb.widgets.monitor import training_monitor
from taco_nb.widgets.pictures import side_by_side
from taco_nb.widgets.shapes import pick_the_word, under_captions
from taco_nb.widgets.upload import upload_box

__all__ = [
    "amdahl_bar", "attention_maps", "caption_lab", "caption_presets", "claims_page", "compare", "decoding_sheet",
    "difference_plot", "effect_plot", "encoder_diagram", "explorer", "fading_text", "fewer_keys",
    "forest_of_changes", "graded_figure", "key_shares", "latent_figure", "listening_bars", "low_rank_sheet",
    "matrices_to_scale", "pick_the_word", "rate_distortion", "rate_panels", "shaded_caption", "sibling_plot",
    "side_by_side", "sortable", "spectrum", "training_curves", "training_monitor", "under_captions", "upload_box",
    "where_the_text_looks",
]  # fmt: skip
