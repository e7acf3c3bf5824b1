"""Text longer than CLIP's 77 positions is encoded in windows here, and what truncation throws away is measured.

A caption with context is a paragraph of two to four times what CLIP (Radford et al. 2021, arXiv:2103.00020) reads. It is
cut at the ends of its sentences into windows that the tower can read:

    window 1   start  The  barn  is  red  .  end
    window 2   start  Two  dogs  run  past  it  .  Snow  falls  .  end
    hidden     the states of window 1, those of window 2, then zeros up to the longest caption of the batch
    mask       True at every state of a window, False at the zeros

The states of a window's start and end tokens are kept. That of the start is the same for any text, as attention is causal.
That of the end has read the whole window; CLIP was trained to sum a text up in it. Windows do not see each other.
"""

from __future__ import annotations

import sys
from bisect import bisect, bisect_left
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from taco_nb.settings import check_count
from taco_nb.text.clip import TextTower, to_device
from taco_nb.text.tokens import (
    CLIP_LENGTH,
    byte_length,
    caption_ids,
    caption_list,
    clean_text,
    clip_tokenizer,
    token_ends,
)

if TYPE_CHECKING:
    import pandas as pd
    from spacy.language import Language

BATCH = 32  # windows that go through the tower at once, however long the captions are


def tower_windows(tower: TextTower, captions: str | Iterable[str]) -> tuple[Tensor, Tensor]:
    """Encode the whole of captions of any length, each independently of the others in the batch.

    Returns hidden (B, T, dim) float32, zero at padding, and mask (B, T) bool, True at real tokens, for the model's `mask`;
    both on the tower's device. T is that of the longest caption. A caption that fits into one window gets the states that
    the tower gives it at its real tokens. `tower.length`, at which the tower itself would cut, plays no part: windows are
    as long as the tower's weights allow. Raises `SettingError` without a caption, or for one that is not a string.
    """
    sot, eot = clip_tokenizer().sot_token_id, clip_tokenizer().eot_token_id
    longest = len(tower.module.positional_embedding)
    by_caption = [split_windows(caption, longest) for caption in caption_list(captions)]
    windows = [torch.tensor([sot, *window, eot]) for windows in by_caption for window in windows]
    states = []
    for first in range(0, len(windows), BATCH):
        batch = windows[first : first + BATCH]
        ids = pad_sequence(batch, batch_first=True, padding_value=eot)
        mask = _length_mask([len(window) for window in batch])
        hidden = tower.hidden_states(ids, mask)
        # By their known lengths: a mask's count is known to a GPU only, which would have to be waited for.
        states += [row[: len(window)] for row, window in zip(hidden, batch)]
    # All states in one row, window after window, are cut up again into those of each caption.
    tokens = [sum(len(window) + 2 for window in windows) for windows in by_caption]
    hidden = pad_sequence(torch.cat(states).split(tokens), batch_first=True)
    return hidden, to_device(_length_mask(tokens), tower.device)


def split_windows(text: str, limit: int = CLIP_LENGTH) -> list[list[int]]:
    """Cut a text into windows of CLIP's token ids that, end to end, are the text's own tokens: none is lost.

    Windows are filled with whole sentences, as spaCy's `sentencizer` sees them: by punctuation, with a list of English
    abbreviations. A sentence that fits into no window is cut between words, and a word that fits into none inside it. A
    text without words makes one empty window. `limit` is the number of a window's positions, including the start and end
    tokens, which are not in the lists. Raises `SettingError` if it is not a whole number of 3 or more.
    """
    check_count(limit, "limit", least=3)
    ids, clean = caption_ids(text), clean_text(text)
    token_at = {end: token for token, end in enumerate(token_ends(ids))}
    # Places to cut at, as numbers of tokens, from the best kind to the worst: ends of sentences, of what stands between
    # white space, and of the tokenizer's own words. An end inside a token, such as in "end.$5", is no place.
    sentences = (sentence.text for sentence in _sentencizer()(clean).sents)
    places = [
        [token_at[end] for end in accumulate(map(byte_length, parts), initial=0) if end in token_at]
        for parts in (sentences, clean.split())
    ]
    pieces = [clip_tokenizer().decoder[token] for token in ids]
    places.append([0, *(token for token, piece in enumerate(pieces, 1) if piece.endswith("</w>"))])

    windows, start = [], 0
    while len(ids) - start > limit - 2:
        full = start + limit - 2
        # The last place of each kind in this window; the best kind that has one decides, else the window is filled up.
        last = (ends[bisect(ends, full) - 1] for ends in places)
        stop = next((end for end in last if end > start), full)
        windows.append(ids[start:stop])
        start = stop
    return [*windows, ids[start:]]


def surviving(
    captions: str | Iterable[str],
    length: int,
    entities: Callable[[str], Iterable[tuple[int, int]]] | None = None,
) -> pd.DataFrame:
    """Measure what is left of captions that are cut at `length` positions: 38 in TACO, up to 77 in CLIP.

    Returns a row per caption: `tokens`, the positions that all of it would take; `words`, the number of words between
    white space; `words_kept`, the share of them all of whose tokens survive; with `entities` also `entities` and
    `entities_kept`, likewise. A share of nothing is NaN.

    `length` counts the start and end tokens too, so it is 2 or more. `entities` gives the named entities in a text as
    (first, one past the last) character; the text is the caption as CLIP's tokenizer cleans it, but with its capitals.
    Raises `SettingError` for another length, without a caption, or for one that is not a string.
    """
    import pandas as pd

    check_count(length, "length", least=2)
    rows = []
    for caption in caption_list(captions):
        ids, clean = clip_tokenizer().encode(caption), clean_text(caption)
        kept = token_ends(ids[: length - 2])[-1]
        words = list(accumulate(map(byte_length, clean.split())))
        row = {"tokens": len(ids) + 2, "words": len(words), "words_kept": _share_within(kept, words)}
        if entities is not None:
            found = [byte_length(clean[:end]) for _, end in entities(clean)]
            row |= {"entities": len(found), "entities_kept": _share_within(kept, found)}
        rows.append(row)
    return pd.DataFrame(rows)


def words_with_ends(text: str) -> list[tuple[str, int]]:
    """Return the words of a text, each with the number of tokens from the text's start to the word's end."""
    clean = clean_text(text)
    ends = token_ends(clip_tokenizer().encode(text))
    words = clean.split()
    return [(word, bisect_left(ends, end)) for word, end in zip(words, accumulate(map(byte_length, words)))]


def _share_within(kept: int, ends: list[int]) -> float:
    """Return the share of the ends that lie within the first `kept` bytes."""
    return sum(end <= kept for end in ends) / len(ends) if ends else float("nan")


@lru_cache(maxsize=1)
def _sentencizer() -> Language:
    import spacy

    language = spacy.blank("en")
    language.add_pipe("sentencizer")
    language.max_length = sys.maxsize  # the limit saves the memory of a parser, and there is none
    return language


def _length_mask(lengths: list[int]) -> Tensor:
    """Return (B, longest) bool, True at the first `lengths[b]` positions of row b."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
