"""Captions are cut into CLIP's byte pairs, and each of these tokens knows which characters of the caption it spells.

    caption   a   rhododendron           by   the   dog’s             barn
    tokens    a   rho  dod  end  ron     by   the   dog    's         barn

The tokenizer cleans a caption before it cuts it: ftfy straightens quotes and ligatures, HTML entities are resolved, white
space is collapsed and capitals become lower case. So a token need not be spelled as the caption was (’s became 's above).
Whatever is known of a caption's words, such as that one of them matters, is known of its characters. These functions lead
from there to tokens and back.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate, pairwise

from open_clip import SimpleTokenizer
from open_clip.tokenizer import basic_clean, whitespace_clean

from taco_nb.errors import SettingError

CLIP_LENGTH = 77  # positions that CLIP was trained with


@lru_cache(maxsize=1)
def clip_tokenizer() -> SimpleTokenizer:
    """Return open_clip's tokenizer, which reads its table of byte pairs once per process."""
    return SimpleTokenizer()


class TokenizedCaption(str):
    """This is a caption that knows its tokens: a data loader's worker has cut it, and nobody need cut it again."""

    ids: list[int]


def tokenized(caption: str) -> TokenizedCaption:
    """Return the caption together with its tokens."""
    known = TokenizedCaption(caption)
    known.ids = clip_tokenizer().encode(caption)
    return known


def caption_ids(caption: str) -> list[int]:
    """Return CLIP's tokens of a caption, without those of start and end."""
    return caption.ids if isinstance(caption, TokenizedCaption) else clip_tokenizer().encode(caption)


def caption_list(captions: str | Iterable[str]) -> list[str]:
    """Return captions as a list of at least one string; a single string counts as one caption.

    Raises `SettingError` if there is no caption, or one of them is not a string.
    """
    if isinstance(captions, str):
        return [captions]
    try:
        captions = list(captions)
    except TypeError:
        raise SettingError(f"Captions must be a list of strings, but are {captions!r}.") from None
    if not captions:
        raise SettingError("There is no caption: give at least one. The empty string is a caption too.")
    for index, caption in enumerate(captions):
        if not isinstance(caption, str):
            kind = type(caption).__name__
            raise SettingError(f"Caption {index} must be a string, but is {caption!r} ({kind}).")
    return captions


def clean_text(text: str) -> str:
    """Clean a text as CLIP's tokenizer does, but keep the capitals, by which abbreviations and names are known."""
    return whitespace_clean(basic_clean(text))


def byte_length(cleaned: str) -> int:
    """Return how many bytes of tokens a cleaned text makes: UTF-8 in lower case, without its white space."""
    return len(cleaned.lower().replace(" ", "").encode())


def token_ends(ids: list[int]) -> list[int]:
    """Return where each token ends, counted as `byte_length` counts, after a leading 0.

    CLIP's vocabulary writes a token with one character per byte, and "</w>" after the last token of a word.
    """
    decoder = clip_tokenizer().decoder
    return list(accumulate((len(decoder[token].removesuffix("</w>")) for token in ids), initial=0))


def token_spans(caption: str, ids: list[int]) -> list[tuple[int, int]]:
    """Return for each token the range of the caption that it spells: `caption[start:end]`, the caption as it was given.

    `ids` are the caption's first tokens, as many as wanted. A word that is cut into several tokens has a range for each.
    Tokens that share a character (an emoji or a CJK character takes several bytes) all get the whole of it.
    """
    cleaned = _without_space(caption)
    of_bytes = [span for char, span in zip(cleaned, _origins(caption, cleaned)) for _ in char.encode()]
    return [(of_bytes[start][0], of_bytes[end - 1][1]) for start, end in pairwise(token_ends(ids))]


def _origins(caption: str, cleaned: str) -> list[tuple[int, int]]:
    """Return the range of the caption from which each character of `cleaned` came.

    First it is assumed that each character, or HTML entity, is cleaned by itself. That is so of nearly every caption. In
    others cleaning also looked at neighbours (combining accents, the Greek final sigma, text decoded twice). They are
    aligned with the guess, and characters that differ share the range of the whole stretch in which they differ.
    """
    guess, origins = "", []
    for unit in re.finditer(r"&#?\w+;|\S", caption):
        cleaned_unit = _without_space(unit[0])
        guess += cleaned_unit
        origins += [unit.span()] * len(cleaned_unit)
    if guess == cleaned:
        return origins
    aligned = []
    for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(None, guess, cleaned, autojunk=False).get_opcodes():
        if tag == "equal":
            aligned += origins[i1:i2]
        else:
            # Characters that only cleaning put in belong to the one before them, or to all if there is none.
            stretch = origins[i1:i2] or origins[max(i1 - 1, 0) :][:1] or [(0, len(caption))]
            aligned += [(stretch[0][0], stretch[-1][1])] * (j2 - j1)
    return aligned


@lru_cache(maxsize=4096)  # most calls are for single characters
def _without_space(text: str) -> str:
    """Return what the tokenizer makes byte pairs of: the cleaned text in lower case, without white space."""
    return "".join(clip_tokenizer().clean_fn(text).split())
