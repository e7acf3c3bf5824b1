"""Text longer than CLIP's 77 positions: the whole of it in windows, and what truncation would throw away.

A caption with context is a paragraph of two to four times what CLIP (Radford et al. 2021, arXiv:2103.00020) reads. Cut at
the ends of its sentences into windows that the tower can read, it is encoded whole:

    window 1   start  The  barn  is  red  .  end
    window 2   start  Two  dogs  run  past  it  .  Snow  falls  .  end
    hidden     the states of window 1, those of window 2, then zeros up to the longest caption of the batch
    mask       True at every state of a window, False at the zeros

A window keeps the states of its start and end tokens. The start's is the same for any text, as attention is causal; the
end's has read the whole window, and is the one that CLIP was trained to sum a text up in. Windows do not see each other.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from open_clip.tokenizer import basic_clean, whitespace_clean
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from taco_nb.errors import SettingError
from taco_nb.text.clip import CLIP_LENGTH, TextTower, _check_captions, _tokenizer

if TYPE_CHECKING:
    import pandas as pd
    from spacy.language import Language

BATCH = 32  # windows that go through the tower at once, whatever the length of the captions


def tower_windows(tower: TextTower, captions: str | Iterable[str]) -> tuple[Tensor, Tensor]:
    """Encode captions of any length whole, each independently of the others in the batch.

    A caption that fits into one window gets the states that the tower gives it at its real tokens. `tower.length`, which
    is where the tower itself would cut, plays no part: windows are as long as the tower's weights allow.

    Returns:
        hidden (B, T, dim) float32, zero at padding, and mask (B, T) bool, True at real tokens, for the model's `mask`;
        both on the tower's device. T is the longest caption's.

    Raises:
        SettingError: there is no caption, or one is not a string.
    """
    sot, eot = _tokenizer().sot_token_id, _tokenizer().eot_token_id
    longest = len(tower.module.positional_embedding)
    by_caption = [split_windows(caption, longest) for caption in _check_captions(captions)]
    windows = [torch.tensor([sot, *window, eot]) for windows in by_caption for window in windows]
    states = []
    for first in range(0, len(windows), BATCH):
        batch = windows[first : first + BATCH]
        ids = pad_sequence(batch, batch_first=True, padding_value=eot)
        mask = _mask([len(window) for window in batch])
        states.append(tower.hidden_states(ids, mask)[mask.to(tower.device)])
    tokens = [sum(len(window) + 2 for window in windows) for windows in by_caption]
    hidden = pad_sequence(torch.cat(states).split(tokens), batch_first=True)
    return hidden, _mask(tokens).to(tower.device)


def split_windows(text: str, limit: int = CLIP_LENGTH) -> list[list[int]]:
    """Cut a text into windows of CLIP's token ids, none of which is lost: end to end they are the text's own tokens.

    Windows are filled with whole sentences (as spaCy's `sentencizer` sees them: by punctuation, knowing abbreviations of
    English). A sentence that fits into no window is cut between words, a word that fits into none inside the word.

    Args:
        text: of any length; without a word in it, it makes one empty window.
        limit: positions of a window, 3 or more, the start and end tokens among them, which are not in the lists.

    Raises:
        SettingError: `limit` is no such number.
    """
    _check_positions("limit", limit, least=3)
    ids, clean = _tokenizer().encode(text), _clean(text)
    pieces = [_tokenizer().decoder[token] for token in ids]
    token_at = {end: token for token, end in enumerate(_token_ends(ids))}
    sentences = (sentence.text for sentence in _sentencizer()(clean).sents)
    # From the best places to cut to the worst; a place inside a token, such as in "end.$5", is none.
    places = [
        [token_at[end] for end in accumulate(map(_size, parts), initial=0) if end in token_at]
        for parts in (sentences, clean.split())
    ]
    places.append([0, *(token for token, piece in enumerate(pieces, 1) if piece.endswith("</w>"))])

    windows, start = [], 0
    while len(ids) - start > limit - 2:
        stop = start + limit - 2
        last = (ends[bisect(ends, stop) - 1] for ends in places)
        stop = next((end for end in last if end > start), stop)
        windows.append(ids[start:stop])
        start = stop
    return [*windows, ids[start:]]


def surviving(
    captions: str | Iterable[str],
    length: int,
    entities: Callable[[str], Iterable[tuple[int, int]]] | None = None,
) -> pd.DataFrame:
    """What is left of captions that are cut at `length` positions, 38 and 77 in TACO and the report.

    Args:
        captions: several captions, or a single string, which counts as one caption.
        length: positions, the start and end tokens among them; 2 or more.
        entities: gives the named entities in a text as (first, one past the last) character. The text is the caption as
            CLIP's tokenizer cleans it, with its capitals.

    Returns:
        A row per caption: `tokens`, the positions that all of it would take; `words`, those between white space;
        `words_kept`, the share of them whose every token survives; with `entities` also `entities` and `entities_kept`
        alike. A share of nothing is NaN.

    Raises:
        SettingError: `length` is no such number, there is no caption, or one is not a string.
    """
    import pandas as pd

    _check_positions("length", length, least=2)
    rows = []
    for caption in _check_captions(captions):
        ids, clean = _tokenizer().encode(caption), _clean(caption)
        kept = _token_ends(ids[: length - 2])[-1]
        words = list(accumulate(map(_size, clean.split())))
        row = {"tokens": len(ids) + 2, "words": len(words), "words_kept": _share(words, kept)}
        if entities is not None:
            found = [_size(clean[:end]) for _, end in entities(clean)]
            row |= {"entities": len(found), "entities_kept": _share(found, kept)}
        rows.append(row)
    return pd.DataFrame(rows)


def _share(ends: list[int], kept: int) -> float:
    return sum(end <= kept for end in ends) / len(ends) if ends else float("nan")


def _clean(text: str) -> str:
    """The text as CLIP's tokenizer cleans it, but with the capitals by which abbreviations and names are known."""
    return whitespace_clean(basic_clean(text))


def _size(clean: str) -> int:
    """What places in a text and in its tokens are counted in: bytes of UTF-8, white space left out, in lower case."""
    return len(clean.lower().replace(" ", "").encode())


def _token_ends(ids: list[int]) -> list[int]:
    """Where each token ends, in units of `_size`, after a leading 0: CLIP's pieces have a character per byte."""
    decoder = _tokenizer().decoder
    return list(accumulate((len(decoder[token].removesuffix("</w>")) for token in ids), initial=0))


@lru_cache(maxsize=1)
def _sentencizer() -> Language:
    import sys

    import spacy

    language = spacy.blank("en")
    language.add_pipe("sentencizer")
    language.max_length = sys.maxsize  # the default spares the memory of a parser, and there is none
    return language


def _mask(lengths: list[int]) -> Tensor:
    """(B, longest) bool, True at the first `lengths[b]` positions of row b."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def _check_positions(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SettingError(f"{name}={value!r}: it takes a whole number of positions, {least} or more.")
