"""Every error that a user can cause, each a sentence that says what was wrong, where, and what to do."""


class TacoError(Exception):
    """The base of all errors below; catch it to catch them all."""


class SettingError(TacoError, ValueError):
    """A setting (an `Experiment` field, a notebook parameter, an argument) is unknown, ill-typed or out of range."""


class DataError(TacoError, ValueError):
    """A data set, an image or a captions file is missing, unreadable or inconsistent; the message names the file."""


class DownloadError(TacoError, RuntimeError):
    """A file could not be fetched: no network, no room, or not the file that was expected; the message says which."""


class MissingWeightsError(TacoError, RuntimeError):
    """Pretrained weights are not on this machine and could not be fetched; the message names file, size and command."""


class CheckpointError(TacoError, ValueError):
    """A checkpoint is missing, damaged, or does not fit the model; the message names the file and the keys."""


class ProcessError(TacoError, RuntimeError):
    """One of several processes that work together has died; the message has its last words."""


class BitstreamError(TacoError, ValueError):
    """A `.taco` file cannot be decoded to exactly the picture that was encoded."""


class DamagedFileError(BitstreamError):
    """The bytes are not a whole `.taco` file: foreign, truncated, altered or forged."""


class WrongWeightsError(BitstreamError):
    """The file is whole, but was written with other weights than the decoder's."""
