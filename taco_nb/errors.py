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
    """Pretrained weights are not on this machine; the message says where they belong and which command fetches them."""


class StorageError(TacoError, OSError):
    """A file cannot be written: the disk is full, the folder read-only; the message names the file and the reason."""


class CheckpointError(TacoError, ValueError):
    """A checkpoint is missing, damaged, or does not fit the model; the message names the file and the keys."""


class ProcessError(TacoError, RuntimeError):
    """One of several processes that work together has died; the message has its last words."""


class StoppedError(TacoError, RuntimeError):
    """A signal has asked for a stop before the work was done; what is done is kept, and the same call goes on."""


class BitstreamError(TacoError, ValueError):
    """A `.taco` file cannot be decoded to exactly the picture that was encoded."""


class DamagedFileError(BitstreamError):
    """The bytes are not a whole `.taco` file: foreign, truncated, altered or forged."""


class WrongWeightsError(BitstreamError):
    """The file is whole, but was written with other weights than the decoder's."""


class DriftError(BitstreamError):
    """File and weights are right, but this machine's arithmetic gave other latents than the encoder's."""
