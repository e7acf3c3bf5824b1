"""Claims about the report's keywords are judged here by finding and weighing them in the captions on this machine."""

from __future__ import annotations

from functools import lru_cache
from statistics import mean

import open_clip
import torch
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from taco_nb.audit.material import JOINT_SPACE, Finding, Material, found
from taco_nb.data import datasets
from taco_nb.metrics.interval import interval
from taco_nb.text.clip import text_tower
from taco_nb.text.keyword_sources import Entities, TfIdf, installed_pipelines
from taco_nb.text.keywords import KeywordWeights, pool
from taco_nb.verdicts import NOT_MEASURED

NAMES = ("Eiffel Tower", "Golden Retriever")
"""The report's own examples of what named entity recognition finds."""
ABSENT = Finding(NOT_MEASURED, "spaCy's en_core_web_sm is not on this machine.")


def a_language_model_chooses(material: Material) -> Finding:
    """Count the weights of what chooses the report's keywords, beside those of the text tower that it is to improve."""
    import spacy

    if (model := _spacy_model()) is None:
        return ABSENT
    pipeline = spacy.load(model)
    weights = sum(
        node.get_param(name).size
        for _, part in pipeline.pipeline
        if hasattr(part, "model") and hasattr(part.model, "walk")
        for node in part.model.walk()
        for name in node.param_names
        if node.has_param(name)
    )
    with torch.device("meta"):
        clip = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32-quickgelu"))
    tower = sum(w.numel() for name, w in clip.named_parameters() if not name.startswith("visual"))
    return found(
        weights > tower,
        "The method names TF-IDF, which counts words and has no network, and spaCy's entities. "
        f"{model} has {weights / 1e6:.1f} million weights, where CLIP's text tower has {tower / 1e6:.0f} million: no large "
        "language model takes part, so there is none whose use could be novel.",
    )


def stop_words_are_left_out(material: Material) -> Finding:
    """Fit TF-IDF on the captions here, and look for stop words in its table and for the spread of its weights."""
    idf = TfIdf.fit(material.captions).idf
    stop = sorted(set(idf) & ENGLISH_STOP_WORDS)
    common, rare = min(idf, key=idf.get), max(idf, key=idf.get)
    return found(
        not stop and idf[rare] > idf[common],
        f"Of {len(idf)} words in the table, {len(stop)} are among the {len(ENGLISH_STOP_WORDS)} stop words. Weights run from "
        f"{idf[common]:.1f} ({common}) to {idf[rare]:.1f} ({rare}).",
    )


def named_entities_are_found(material: Material) -> Finding:
    """Have spaCy's model look for the report's examples, in sentences as captions have them, with and without capitals."""
    if (model := _spacy_model()) is None:
        return ABSENT
    entities, sentence = Entities(model), "A photo of the {} on a sunny day."
    caught = {}
    for name in NAMES:
        texts = [sentence.format(name), sentence.format(name.lower())]
        caught[name] = [
            any(name.lower() in text[a:b].lower() for a, b in ranges)
            for text, ranges in zip(texts, entities(texts))
        ]
    some = sum(bool(ranges) for ranges in entities(material.captions))
    listed = "; ".join(
        f"{name} {'is' if capital else 'is not'} found, in lower case it {'is' if lower else 'is not'}"
        for name, (capital, lower) in caught.items()
    )
    return found(
        all(capital for capital, _ in caught.values()),
        f"By {model}: {listed}. It names something in {some} of the {len(material.captions)} captions here.",
    )


def weights_change_the_sum(material: Material) -> Finding:
    """Weigh the tokens of Kodak's captions, and see what share of the sum keywords have, and how far the sum turns."""
    captions = [material.kodak.captions(i)[0] for i in range(len(material.kodak))]
    shares, turns = zip(*(_effect(material, caption) for caption in captions))
    before, after = (mean(share[i] for share in shares) for i in (0, 1))
    return found(
        after > before,
        f"On Kodak's captions the keywords' share of the sum rises from {before:.0%} to {after:.0%}. The summed vector, of "
        f"{JOINT_SPACE}'s states, turns by {mean(turns):.1f} degrees.",
    )


def longer_captions_strengthen_the_weights(material: Material) -> Finding:
    """Compare by how much the weights turn the sums of Kodak's captions and of its bundled paragraphs, by picture."""
    (paragraphs,) = datasets("kodak", data_dir=material.data_dir, captions="context")
    pictures = range(len(material.kodak))
    short = [_effect(material, material.kodak.captions(i)[0])[1] for i in pictures]
    long = [_effect(material, paragraphs.captions(i)[0])[1] for i in pictures]
    low, high = interval([b - a for a, b in zip(short, long)], seed=material.seed)
    return found(
        low > 0,
        f"The weights turn the summed vector by {mean(short):.1f} degrees with Kodak's captions and by {mean(long):.1f} with "
        f"paragraphs of up to 77 tokens; the 95 % interval of the difference is {low:.1f} to {high:.1f}. All weights add up "
        "to 1, so more words leave less to each.",
    )


def _spacy_model() -> str | None:
    return next((name for name in installed_pipelines() if name.startswith("en_core_web_sm")), None)


@lru_cache(maxsize=64)  # two claims ask it of Kodak's captions
def _effect(material: Material, caption: str) -> tuple[tuple[float, float], float]:
    """Return the keywords' share of a caption's sum without and with their weight, and the angle between both sums."""
    tower = text_tower(JOINT_SPACE, length=77)
    weight = material.stated["keywords"]["keyword_weight"]
    weighted = _weights(material, weight).token_weights([caption], tower)
    plain = (weighted > 0).float()
    plain /= plain.sum()
    hidden = tower([caption])
    a, b = (pool(hidden, weights, "keywords").flatten() for weights in (plain, weighted))
    angle = torch.rad2deg(torch.arccos(torch.nn.functional.cosine_similarity(a, b, dim=0).clamp(max=1)))
    matters = weighted > plain
    return (float(plain[matters].sum()), float(weighted[matters].sum())), float(angle)


@lru_cache(maxsize=1)
def _weights(material: Material, weight: float) -> KeywordWeights:
    return KeywordWeights.fit([*material.captions, *material.paragraphs], "tfidf+rules", weight)
