"""Claims about captions and pictures are judged here by counting: words, tokens, sentences, pixels and bytes."""

from __future__ import annotations

import re
from collections import Counter
from statistics import mean, median

import numpy as np
import open_clip
import torch
from PIL import Image

from taco_nb.audit.material import JOINT_SPACE, Finding, Material, found
from taco_nb.data import datasets, training_pairs
from taco_nb.data.images import to_tensor
from taco_nb.errors import DataError
from taco_nb.experiment import Experiment
from taco_nb.metrics.distortion import psnr
from taco_nb.metrics.interval import interval
from taco_nb.text.clip import text_tower
from taco_nb.text.long import surviving
from taco_nb.text.tokens import clip_tokenizer
from taco_nb.verdicts import NOT_MEASURED, TOLERANCE

ORIGINAL = 38
"""Positions that the original network reads of a caption."""
AROUND = 0.25
"""A number is "around" another if it differs from it by no more than this share."""
SENTENCE = re.compile(r"(?<=[.!?])\s+")
REASONING = re.compile(
    r"\b(suggest|imply|implies|indicat|probabl|likely|perhaps|presumabl|may be|might|seem|appears? to|hint|evok|convey"
    r"|as if|because|so that)",
    re.IGNORECASE,
)
"""Words by which a sentence goes beyond what can be seen."""
EXAMPLE_WORDS, EXAMPLE_REASONS_FROM = 130, 38
"""The report prints one of GPT-4o's paragraphs (Appendix A1). It has so many words, and first says what something suggests
with the 38th of them."""
NO_COCO = Finding(NOT_MEASURED, "MS-COCO is not on this machine.")


def captions_are_sent(material: Material) -> Finding:
    """Encode a picture with two captions that differ only behind what the encoder reads, and compare the files."""
    codec = material.codec
    picture = datasets("kodak-256", data_dir=material.data_dir)[0][0].image
    read = " ".join(["barn"] * codec.text_tokens)
    unread = " and a windmill that nobody mentions" * 20
    short, long = (codec.encode(picture, caption) for caption in (read, read + unread))
    said = [len(caption) for caption in material.captions]
    return found(
        short != long,
        f"A file of {len(short)} bytes {'stays the same, byte for byte,' if short == long else 'changes'} when "
        f"{len(unread.split())} words are added to its caption behind those that the encoder reads. A caption has "
        f"{mean(said):.0f} letters on average, and the file none of them: captions cost no bits, since they are not sent.",
    )


def training_split_is_as_stated(material: Material) -> Finding:
    """Count images and captions of MS-COCO's training split, where it is on this machine."""
    try:
        images = training_pairs("coco", 64, material.data_dir).dataset
    except DataError:
        return NO_COCO
    counts = Counter(len(images.captions(i)) for i in range(len(images)))
    stated = material.stated["protocol"]["train"]
    listed = ", ".join(f"{n} images with {count} captions" for count, n in sorted(counts.items()))
    return found(
        f"{len(images):,} images" in stated and set(counts) == {5}, f"{len(images):,} images: {listed}."
    )


def restval_is_as_stated(material: Material) -> Finding:
    """Count the images of Karpathy's restval, where MS-COCO is on this machine."""
    if not (sets := material.here("coco")):
        return NO_COCO
    images = sets[0]
    count = len(images) + images.skipped
    return found(
        f"{count:,}" in material.stated["protocol"]["eval"][0],
        f"{count:,} images, of which {images.skipped} are too small for a crop of 256x256.",
    )


def crops_keep_the_meaning(material: Material) -> Finding:
    """Compare how well captions fit whole pictures and their centre crops, in the space of the bundled CLIP, on Kodak."""
    crops = datasets("kodak-256", data_dir=material.data_dir)[0]
    captions = material.text_vectors([crops.captions(i)[0] for i in range(len(crops))])
    whole, crop = (
        100 * (vectors * captions).sum(1).clamp(min=0)
        for vectors in (material.kodak_vectors, material.picture_vectors(crops))
    )
    low, high = interval((crop - whole).tolist(), seed=material.seed)
    sizes = [material.kodak[i].image.size for i in range(3)]
    pixels = mean(256 * 256 / (width * height) for width, height in sizes)
    return Finding(
        NOT_MEASURED,
        f"MS-COCO's pictures were not looked at. On Kodak such a crop keeps {pixels:.0%} of the pixels. Captions score "
        f"{float(whole.mean()):.1f} with the whole pictures and {float(crop.mean()):.1f} with the crops, of 100, in the "
        f"space of {JOINT_SPACE}; the 95 % interval of the difference is {low:.1f} to {high:.1f}.",
    )


def whole_pictures_fit_256(material: Material) -> Finding:
    """Look at the sizes of Kodak's pictures (and CLIC's, if here), and at what a resize to 256x256 and back loses."""
    sizes, losses = Counter(), []
    for dataset in material.here("kodak", "clic"):
        for i in range(len(dataset)):
            with Image.open(dataset.path(i)) as picture:
                sizes[picture.size] += 1
        for i in range(min(2, len(dataset))):
            image = dataset[i].image
            small = image.resize((256, 256), Image.Resampling.LANCZOS)
            back = small.resize(image.size, Image.Resampling.LANCZOS)
            losses.append(psnr(to_tensor(image), to_tensor(back)))
    (width, height), most = sizes.most_common(1)[0]
    return found(
        set(sizes) == {(256, 256)} or min(losses) == np.inf,
        f"{sizes[256, 256]} of {sizes.total()} pictures have 256x256 pixels; {most} have {width}x{height}. Resized to "
        f"256x256 and back, they keep {min(losses):.1f} dB of PSNR, which is not lossless.",
    )


def each_whole_picture_has_a_caption(material: Material) -> Finding:
    """Count the captions that come with Kodak's pictures, and with CLIC's where they are here."""
    counts = Counter(
        len(dataset.captions(i)) for dataset in material.here("kodak", "clic") for i in range(len(dataset))
    )
    return found(
        set(counts) == {1},
        f"{counts[1]} of {counts.total()} pictures have one caption each, as published with TACO.",
    )


def every_caption_has_38_positions(material: Material) -> Finding:
    """Tokenise all captions and paragraphs here as the original network does."""
    texts = [*material.captions, *material.paragraphs]
    ids, mask = text_tower("untrained-64", material.paper_config.text_tokens).tokenize(texts)
    real, words = mask.sum(1).tolist(), [len(text.split()) for text in texts]
    stated = material.stated["protocol"]["caption_tokens"]
    return found(
        ids.shape[1] == stated,
        f"All {len(texts)} texts here become {ids.shape[1]} positions, whether they have {min(words)} words "
        f"or {max(words)}. {median(real):.0f} of the positions are words, start or end in the "
        "median, and the rest is padding, which is attended to as well.",
    )


def positions_hold_15_words(material: Material) -> Finding:
    """Count the words that 38 positions hold, and those that captions have."""
    held = material.words_within(ORIGINAL)
    words = [len(caption.split()) for caption in material.captions]
    tokens = [len(clip_tokenizer().encode(caption)) for caption in material.captions]
    return found(
        abs(held - 15) <= AROUND * 15,
        f"{ORIGINAL} positions, start and end among them, hold {held:.0f} words of a longer text. The {len(words)} captions "
        f"here have {mean(words):.1f} words on average, of {sum(tokens) / sum(words):.2f} tokens each.",
    )


def paragraphs_reach_the_network(material: Material) -> Finding:
    """Count how much of the paragraphs fits into the original network's 38 positions, and into CLIP's 77."""
    protocol = material.stated["protocol"]
    kept = {}
    for positions in (protocol["caption_tokens"], protocol["clip_max_tokens"]):
        ours = float(surviving(material.paragraphs, positions)["words_kept"].mean())
        kept[positions] = (ours, material.words_within(positions) / EXAMPLE_WORDS)
    listed = "; ".join(
        f"at {n} positions {ours:.0%} of the bundled paragraphs' words and {theirs:.0%} of those of the report's example"
        for n, (ours, theirs) in kept.items()
    )
    return found(
        min(kept[protocol["caption_tokens"]]) >= 1 - TOLERANCE,
        f"What is left: {listed}. The original network reads {protocol['caption_tokens']} positions, whatever the caption's "
        "length, and CLIP no more than 77.",
    )


def paragraphs_have_little_noise(material: Material) -> Finding:
    """Ask the bundled CLIP of each sentence of Kodak's bundled paragraphs whether it fits its own picture best."""
    (kodak,) = datasets("kodak", data_dir=material.data_dir, captions="context")
    sentences = [(i, said) for i in range(len(kodak)) for said in SENTENCE.split(kodak.captions(i)[0])]
    scores = material.text_vectors([said for _, said in sentences]) @ material.kodak_vectors.T
    own = scores[torch.arange(len(sentences)), [i for i, _ in sentences]]
    worse = int((own < scores.median(1).values).sum())
    return Finding(
        NOT_MEASURED,
        f"The report's captions were not published. Of {len(sentences)} sentences in the paragraphs bundled here for Kodak, "
        f"{worse} fit their own picture worse than half of the other pictures, in the space of {JOINT_SPACE}; captions of "
        "random pictures would do so in half of the cases.",
    )


def clip_reads_77(material: Material) -> Finding:
    """Read how many positions the paper's text tower has."""
    model = Experiment().text_encoder.partition("/")[0]
    positions = open_clip.get_model_config(model)["text_cfg"]["context_length"]
    return found(
        positions == material.stated["protocol"]["clip_max_tokens"],
        f"{model} has {positions} positions, and no more can be fed to it. Windows of {positions} read longer texts: "
        'text_length="windows".',
    )


def captions_are_one_sentence(material: Material) -> Finding:
    """Count the sentences of the published captions."""
    counts = Counter(len(SENTENCE.split(caption.strip())) for caption in material.captions)
    words = mean(len(caption.split()) for caption in material.captions)
    return found(
        counts[1] / counts.total() >= 1 - TOLERANCE,
        f"{counts[1]} of {counts.total()} captions here are one sentence, of {words:.1f} words on average.",
    )


def reasoning_reaches_the_network(material: Material) -> Finding:
    """Find where reasoning begins in paragraphs, and whether the original network still reads so far."""
    held = material.words_within(ORIGINAL)
    firsts = ((paragraph, REASONING.search(paragraph)) for paragraph in material.paragraphs)
    begins = [len(paragraph[: first.start()].split()) + 1 for paragraph, first in firsts if first]
    within = sum(word <= held for word in begins)
    return found(
        held >= EXAMPLE_REASONS_FROM,
        f"The network reads about {held:.0f} words of a paragraph. The example that the report prints begins to reason with "
        f"word {EXAMPLE_REASONS_FROM} of {EXAMPLE_WORDS}. Of the {len(material.paragraphs)} bundled paragraphs "
        f"{len(begins)} reason, from word {median(begins) if begins else 0:.0f} on in the median, and {within} of them "
        "within what is read. What is cut off cannot have raised PSNR.",
    )
