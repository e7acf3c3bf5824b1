"""Every setting is declared here, with what it may be. Experiments, networks, notebooks and command lines use these checks.

The types below say what is allowed: `Count` is a whole number from 1, `Attention` one of two words. A class that is
declared with them, such as `Sizes`, is a frozen pydantic dataclass, so nothing else has to be checked by hand. What does
not fit is refused with a `SettingError` of one sentence, which `plain_errors` makes from the declaration.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, StrictFloat, StrictInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from taco_nb.errors import SettingError, check_known

# The strict types take no text for a number, no True for 1 and no 2.0 for 2; but a whole number passes for a float.
Count = Annotated[StrictInt, Field(ge=1)]
Positive = Annotated[StrictFloat, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[StrictInt, Field(ge=0, le=(1 << 32) - 1)]

Attention = Literal["softmax", "linformer"]
LinformerSharing = Literal["none", "key-value", "layerwise"]
TextLength = Literal["truncate", "windows"]
TextPooling = Literal["none", "keywords", "keywords-tokens"]
Precision = Literal["float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]
CaptionChoice = Literal["first", "last", "best"]

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
"""How pydantic is to treat a class of settings: it refuses unknown names, and takes a docstring below a field for its
description."""

Class = TypeVar("Class", bound=type)


def plain_errors(cls: Class) -> Class:
    """Make a pydantic dataclass raise `SettingError`, with one sentence, where it would raise a `ValidationError`."""
    validate = cls.__init__

    @functools.wraps(validate)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            validate(self, *args, **kwargs)
        except ValidationError as error:
            raise _in_a_sentence(cls, error) from None

    cls.__init__ = __init__
    return cls


@plain_errors
@dataclass(frozen=True, config=STRICT)
class Sizes:
    """These are the widths of a TACO, by default the paper's. Raises `SettingError` for widths that do not fit together."""

    N: Annotated[StrictInt, Field(ge=2)] = 192
    """Channels of the transforms g_a, g_s, h_a and h_s."""
    M: Count = 320
    """Channels of the latents y."""
    groups: tuple[Count, ...] = (16, 16, 32, 64, 192)
    """How many channels of y are coded at a time; they add up to M."""
    text_dim: Count = 512
    """Width of the text features, a multiple of `heads`."""
    heads: Count = 8
    """Heads of each attention in the adapter."""
    context_widths: tuple[Count, Count] = (224, 128)
    """Widths of the two hidden layers in the entropy model's channel context."""

    def __post_init__(self) -> None:
        if sum(self.groups) != self.M:
            raise SettingError(
                f"groups={self.groups} add up to {sum(self.groups)}, but must add up to M={self.M}."
            )
        for name in ("N", "text_dim"):
            if getattr(self, name) % self.heads:
                raise SettingError(f"{name}={getattr(self, name)} is not a multiple of heads={self.heads}.")


def check_count(value: Any, what: str, least: int = 1) -> None:
    """Raise `SettingError` unless an argument is a whole number of at least `least`; `what` says which one it is."""
    if type(value) is not int or value < least:  # isinstance would let True pass
        raise SettingError(f"{what} must be a whole number of at least {least}, not {value!r}.")


# From pydantic's errors to sentences ----------------------------------------------------------------------------------


def _in_a_sentence(cls: type, error: ValidationError) -> SettingError:
    """Say the first thing that is wrong: which setting, what it must be by its declaration, and what it is."""
    first = error.errors(include_url=False)[0]
    kind, value, place = first["type"], first["input"], first["loc"]
    if kind == "value_error":  # a __post_init__ has said it in a sentence
        return SettingError(str(first["ctx"]["error"]))
    schema = TypeAdapter(cls).json_schema()
    in_sizes = place[0] == "sizes" and len(place) > 1  # one of the sizes in an experiment
    if in_sizes:
        schema, place = schema["$defs"]["Sizes"], place[1:]
    name, *index = place
    if kind == "unexpected_keyword_argument":
        article = "An" if cls.__name__[0] in "AEIOU" else "A"
        owner = "The sizes have" if in_sizes or cls is Sizes else f"{article} {cls.__name__} has"
        try:
            check_known([name], list(schema["properties"]), f"{owner} no setting")
        except SettingError as refusal:
            return refusal
    allowed = schema["properties"][name]
    if index and kind != "missing":  # one of the numbers in a tuple
        allowed = allowed.get("items") or allowed["prefixItems"][index[0]]
        return SettingError(f"Each of the {name} must be {_in_words(allowed, kind)}, but one is {value!r}.")
    label = f"sizes: {name}" if in_sizes else name
    return SettingError(f"{label} must be {_in_words(allowed, kind)}, but is {value!r}.")


def _in_words(schema: dict[str, Any], error: str) -> str:
    """Say what a JSON schema allows: the choices, the type if the error is about the type, and otherwise the range."""
    optional = "anyOf" in schema  # of the setting's own schema and that of None
    schema = schema["anyOf"][0] if optional else schema
    if choices := schema.get("enum"):
        *others, last = [f'"{choice}"' for choice in choices]
        return f"{', '.join(others)} or {last}"
    least, most = schema.get("minimum"), schema.get("maximum")
    if not error.endswith("_type"):
        if "multipleOf" in schema:
            return f"a multiple of {schema['multipleOf']}"
        if "exclusiveMinimum" in schema:
            return f"above {schema['exclusiveMinimum']:g}"
        if most is not None:
            return f"from {least} to {most}"
        if least is not None:
            return f"{least:g} or above"
    count = f"{schema['minItems']} " if "minItems" in schema else ""
    kinds = {
        "integer": "a whole number",
        "number": "a number",
        "string": "text",
        "array": f"{count}whole numbers",
    }
    return kinds.get(schema.get("type"), "a dictionary") + (" or None" if optional else "")
