"""The errors that a user can cause. Each message is a sentence that says what was wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class TacoError(Exception):
    """The base of all errors below. Catch it to catch them all."""


class SettingError(TacoError, ValueError):
    """A setting (an `Experiment` field, a notebook parameter, an argument) is unknown, ill-typed or out of range."""


class DataError(TacoError, ValueError):
    """A data set, an image or a file of captions is missing, unreadable or inconsistent. The message names the file."""


class DownloadError(TacoError, RuntimeError):
    """A file could not be fetched. The message says why: no network, no room, or another file than expected came."""


class MissingWeightsError(TacoError, RuntimeError):
    """Pretrained weights are not on this machine. The message names their file, their size and the command that gets them."""


class StorageError(TacoError, OSError):
    """A file cannot be written: the disk is full, the folder read-only; the message names the file and the reason."""


class CheckpointError(TacoError, ValueError):
    """A checkpoint is missing, damaged, or does not fit the model. The message names the file and the keys."""


class ProcessError(TacoError, RuntimeError):
    """One of several processes that work together has died. The message holds the last lines that it printed."""


class StoppedError(TacoError, RuntimeError):
    """A signal has asked for a stop before the work was done; what is done is kept, and the same call goes on."""


class BitstreamError(TacoError, ValueError):
    """A `.taco` file cannot be decoded to exactly the picture that was encoded."""


class DamagedFileError(BitstreamError):
    """The bytes are no whole `.taco` file: they are of another format, cut short, altered or forged."""


class WrongWeightsError(BitstreamError):
    """The file is whole, but the weights that wrote it are not the decoder's."""


def check_known(given: Iterable[str], known: Sequence[str], complaint: str) -> None:
    """Raise `SettingError` for the first of the given names that is not known.

    The message is the complaint, such as "There is no data set", then the name, and then the most similar known name, or
    all of them where none is similar.
    """
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."
            raise SettingError(f"{complaint} {name!r}. {hint}")
