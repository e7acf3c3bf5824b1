"""The hidden states of a frozen CLIP text tower condition TACO (Lee et al., ICML 2024); it is made of open_clip's modules.

The sequence of a caption is start-of-text, its words, end-of-text, then padding up to `length` positions:

    position   0      1    2    3     4      5      6    ...
    id         49406  a    red  barn  49407  49407  49407
    mask       True   True True True  True   False  False      True = a real token

Attention is causal, and padding is hidden from every position. The states of the padded positions are returned all the
same, since TACO's adapter attends to them too.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import QuickGELU, TextTransformer
from safetensors.torch import load_file
from torch import Tensor, nn

from taco_nb.errors import CheckpointError, SettingError
from taco_nb.model.precision import full_float32
from taco_nb.pretrained import MINI, OpenClip
from taco_nb.text.tokens import CLIP_LENGTH, caption_ids, caption_list, clip_tokenizer, token_spans

UNTRAINED_SEED = 100
UNSEEN_SEED = 2026

open_clip.add_model_config(MINI.sizes)


class TextTower:
    """A frozen CLIP text transformer turns captions into one hidden state per position, as TACO conditions on them.

    The states are those after the final LayerNorm and before any projection: the `last_hidden_state` of transformers'
    `CLIPTextModel` when it is given the attention mask. The class is no `nn.Module` on purpose: as one, the tower would
    slip into the checkpoint and the optimizer of any codec that holds it.

    Args:
        module: an open_clip `CLIP` or `TextTransformer`, of which only the text half is used. It is frozen in place.
        name: what to call the tower where it is shown.
        length: positions per caption, from 2 up to the tower's own limit (77 for CLIP). Longer captions are cut, and
            end-of-text stays the last token. Raises `SettingError` for another length.
        trained: False for random weights; `repr` then says so.

    `dim` is the width of a hidden state.
    """

    def __init__(self, module: nn.Module, name: str, length: int, trained: bool) -> None:
        _check_length(length, name, longest=len(module.positional_embedding))
        self.module = module.requires_grad_(False).eval()
        self.name = name
        self.length = length
        self.trained = trained
        self.dim: int = module.token_embedding.embedding_dim

    def __repr__(self) -> str:
        weights = "trained" if self.trained else "untrained, fixed random weights"
        return f"TextTower({self.name}: {weights}, {self.length} positions of {self.dim})"

    @property
    def device(self) -> torch.device:
        """Return the device of the weights, on which hidden states are computed and returned."""
        return self.module.token_embedding.weight.device

    def tokenize(self, captions: str | Iterable[str]) -> tuple[Tensor, Tensor]:
        """Cut captions into CLIP's byte pairs, padded with the end-of-text id as the reference's tokenizer pads.

        Returns ids (B, length) int64 and mask (B, length) bool, True at start-of-text, words and end-of-text; on the CPU.
        A single string counts as one caption. Raises `SettingError` without a caption, or for one that is not a string.

        The text is cleaned as OpenAI cleaned CLIP's training captions (see `taco_nb.text.tokens`). transformers'
        `CLIPTokenizer` uses neither ftfy nor HTML entities; for captions that need neither, both give the same ids.
        """
        sequences = _sequences(captions, self.length)
        mask = torch.arange(self.length) < torch.tensor([len(sequence) for sequence in sequences])[:, None]
        return _filled(sequences, self.length, clip_tokenizer().eot_token_id), mask

    def spans(self, caption: str) -> list[tuple[int, int] | None]:
        """Return which characters each position spells: `caption[start:end]`, in the caption as it was given.

        Start-of-text and end-of-text spell nothing: they are (0, 0) and (n, n). Padding is None. See `token_spans` for
        the rest. Raises `SettingError` if the caption is not a string.
        """
        (caption,) = caption_list([caption])
        words = token_spans(caption, caption_ids(caption)[: self.length - 2])
        spans = [(0, 0), *words, (len(caption), len(caption))]
        return spans + [None] * (self.length - len(spans))

    def __call__(self, captions: str | Iterable[str]) -> Tensor:
        """Encode captions into hidden states (B, length, dim), float32, on the tower's device.

        Each is encoded independently of the others in the batch. Takes and raises what `tokenize` does.
        """
        return self.hidden_states(*self.tokenize(captions))

    @torch.no_grad()
    def hidden_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode token sequences into hidden states (B, T, dim), for callers that cut text into tokens themselves.

        ids (B, T) int64 and mask (B, T) bool are as `tokenize` gives them, for any T up to the tower's own limit.
        """
        ids, mask = to_device(ids, self.device), to_device(mask, self.device)
        # Training runs under bfloat16 autocast, and in TF32; the conditioning must not depend on who asks for it.
        with full_float32(self.device.type):
            x = self.module.token_embedding(ids) + self.module.positional_embedding[: ids.shape[1]]
            return self.module.ln_final(self.module.transformer(x, attn_mask=self._attention_mask(mask)))

    def _attention_mask(self, mask: Tensor) -> Tensor:
        """Return (B * heads, T, T): 0 where a position (row) may attend to another (column), -inf elsewhere.

        open_clip's own mask is causal only. Without the padding hidden as well, states would depend on `length`.
        """
        length = mask.shape[1]
        visible = mask[:, None, :] & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        additive = torch.zeros(visible.shape, device=mask.device).masked_fill(~visible, float("-inf"))
        return additive.repeat_interleave(self.module.transformer.resblocks[0].attn.num_heads, dim=0)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the processor's on `device`. A GPU goes on with its work meanwhile: nobody waits for the copy."""
    if device.type == "cuda":
        # From memory that is not pinned the copy would be made at once, after all work before it.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def text_tower(name: str, length: int = 38, device: str | torch.device = "cpu") -> TextTower:
    """Return a frozen text tower by name. Its weights are loaded once per process and shared between lengths.

    Args:
        name: "model/pretrained" as open_clip lists them; the reference's is "ViT-B-32-quickgelu/openai". The part after
            the slash may also be a file of weights. "mini/flickr8k" comes with the code. "untrained-64" is a tower of that
            width (a multiple of 16 up to 1024) with CLIP's tokenizer and random weights, the same on every machine.
        length: positions per caption; TACO uses 38, CLIP was trained with 77.
        device: where to encode.

    Raises:
        SettingError: an unknown name, a model that reads text otherwise than CLIP, a bad `length` or `device`.
        MissingWeightsError: the weights are not on this machine; the message has the command that fetches them.
        CheckpointError: the file of weights is damaged or belongs to another model.
    """
    config, device = _text_config(name), usable_device(device)
    _check_length(length, name, config["context_length"])  # before weights are loaded, which may take long
    trained = not name.startswith("untrained-")
    module = _text_half(name, device) if trained else _untrained_module(config["width"], device)
    return TextTower(module, name, length, trained)


def text_width(name: str) -> int:
    """Return how many numbers per token the tower of this name gives, without loading it.

    Raises `SettingError` as `text_tower` does.
    """
    return _text_config(name)["width"]


def clip_model(
    name: str, device: str | torch.device = "cpu"
) -> tuple[nn.Module, Callable[[list[str]], Tensor]]:
    """Return a frozen CLIP with both its halves, and its tokenizer, for work in the joint space of text and images.

    `name` is "model/pretrained" as for `text_tower`; the weights are loaded once per process. The tokenizer returns what
    the model's `encode_text` takes: ids (B, 77), on the CPU. Raises what `text_tower` does, and `SettingError` for
    "untrained-64".
    """
    config = _text_config(name)
    if name.startswith("untrained-"):
        raise SettingError(
            f"{name!r} has no image half, and a loss in an untrained space would mean nothing. Choose a CLIP model, such "
            "as 'ViT-B-32-quickgelu/openai', or leave that loss out (k_J=0)."
        )
    return both_halves(name, usable_device(device)), partial(clip_ids, length=config["context_length"])


def clip_ids(captions: str | Iterable[str], length: int = CLIP_LENGTH) -> Tensor:
    """Return captions as CLIP's `encode_text` takes them: ids (B, length) int64, zero after the end of the text.

    They are those of open_clip's tokenizer, which would cut captions that are cut already anew.
    """
    return _filled(_sequences(captions, length), length, 0)


def _sequences(captions: str | Iterable[str], length: int) -> list[list[int]]:
    """Return the tokens of each caption, those of start and end included, cut at `length` so that end stays the last."""
    start, end = clip_tokenizer().sot_token_id, clip_tokenizer().eot_token_id
    return [[start, *caption_ids(caption)[: length - 2], end] for caption in caption_list(captions)]


def _filled(sequences: list[list[int]], length: int, padding: int) -> Tensor:
    return torch.tensor([sequence + [padding] * (length - len(sequence)) for sequence in sequences])


@lru_cache(maxsize=4)
def _text_half(name: str, device: str) -> nn.Module:
    clip = _load_clip(name)
    text = getattr(clip, "text", clip)  # some of open_clip's models keep the text half in a module of its own
    if text is clip:
        del clip.visual  # more than half of the weights
    return text.to(device)


@lru_cache(maxsize=1)
def both_halves(name: str, device: str) -> nn.Module:
    """Return the whole CLIP model that `clip_model` gives, loaded at the first call."""
    return _load_clip(name).requires_grad_(False).eval().to(device)


def _load_clip(name: str) -> nn.Module:
    if name == MINI.name:
        return _load_mini()
    model, pretrained = name.split("/", 1)
    tag = open_clip.get_pretrained_cfg(model, pretrained)
    path = OpenClip(name).require() if tag else Path(pretrained).expanduser()
    # Some configurations have the other GELU than the weights were trained with: ViT-B-32/openai is one.
    overrides = {"quick_gelu": tag.get("quick_gelu", False)} if tag else {}
    try:
        # open_clip draws random weights before it loads others; the caller's random numbers must not depend on it.
        with torch.random.fork_rng(devices=[]):
            return open_clip.create_model(model, pretrained=str(path), **overrides)
    except Exception as error:  # torch, pickle and safetensors each have errors of their own for a bad file
        raise CheckpointError(
            f"The weights {path} cannot be loaded into {model}: the file is damaged or belongs to another model. "
            "Delete it and fetch it again, or name the model that it was made for."
        ) from error


def _load_mini() -> nn.Module:
    """Return the bundled CLIP, from its file of halves (float16).

    Most of CLIP's 49,408 tokens never occurred in its training. The file has the vectors of those that did; the others
    have the random ones that they had in training, the same on every machine, and so a meaning no network knows.
    """
    path = MINI.require()
    state = load_file(path)
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    with torch.random.fork_rng(devices=[]):
        clip = open_clip.CLIP(**open_clip.get_model_config(MINI.name.split("/")[0]))
    tokens = clip.token_embedding.weight.detach()
    generator = torch.Generator().manual_seed(UNSEEN_SEED)
    tokens.copy_((torch.rand(tokens.shape, generator=generator) - 0.5) * (0.02 * 12**0.5))
    tokens[state.pop("seen_tokens").long()] = state.pop("seen_token_embedding")
    clip.load_state_dict(state | {"token_embedding.weight": tokens})
    return clip


@lru_cache(maxsize=4)
def _untrained_module(width: int, device: str) -> nn.Module:
    """Return a small text transformer with random weights that are the same on every machine."""
    with torch.random.fork_rng(devices=[]):  # open_clip initialises from the global generator
        sizes = {"width": width, "heads": width // 16, "layers": 2}
        module = TextTransformer(**sizes, output_dim=None, act_layer=QuickGELU)
    generator = torch.Generator().manual_seed(UNTRAINED_SEED)
    # Words weigh more than positions, and every layer adds about as much as it is given: states tell captions apart.
    std = {"token_embedding.weight": 1.0, "positional_embedding": 0.25}
    with torch.no_grad():
        for name, weight in sorted(module.named_parameters()):
            if weight.ndim > 1:
                # Uniform: a normal draw goes through log and cos, which round differently from machine to machine.
                noise = torch.rand(weight.shape, generator=generator) - 0.5
                weight.copy_(noise * (12**0.5 * std.get(name, weight.shape[1] ** -0.5)))
            elif name.endswith("bias"):
                weight.zero_()
    return module.to(device)


def _text_config(name: str) -> dict[str, Any]:
    """Return at least `width` and `context_length` of a tower. Raises `SettingError` for a name that is not one."""
    if not isinstance(name, str):
        raise SettingError(f"A text tower is named by a string such as 'mini/flickr8k', not {name!r}.")
    if untrained := re.fullmatch(r"untrained-([0-9]+)", name):
        width = int(untrained[1])
        if width % 16 or not 16 <= width <= 1024:
            raise SettingError(f"{name}: the width must be a multiple of 16, from 16 to 1024.")
        return {"width": width, "context_length": CLIP_LENGTH}
    model, slash, pretrained = name.partition("/")
    if not slash:
        raise SettingError(
            f"{name!r} is not a text tower: write model/pretrained, such as 'ViT-B-32-quickgelu/openai', "
            "or 'untrained-64' for random weights."
        )
    if model not in open_clip.list_models():
        hint = _did_you_mean(model, open_clip.list_models())
        raise SettingError(f"open_clip has no model {model!r} ({name!r}).{hint}")
    tagged = name == MINI.name or open_clip.get_pretrained_cfg(model, pretrained)
    if not tagged and not Path(pretrained).expanduser().is_file():
        hint = _did_you_mean(pretrained, open_clip.list_pretrained_tags_by_model(model))
        raise SettingError(f"{pretrained!r} is neither a pretrained tag of {model} nor a file.{hint}")
    text = open_clip.get_model_config(model)["text_cfg"]
    if text.get("hf_tokenizer_name") or text.get("no_causal_mask") or text.get("embed_cls"):
        raise SettingError(
            f"{model} does not read text as CLIP does: it has another tokenizer, attention that is not causal, or an "
            "added class token. Choose a CLIP model, such as 'ViT-B-32-quickgelu/openai'."
        )
    return {"context_length": CLIP_LENGTH, **text}


def _did_you_mean(word: str, known: list[str]) -> str:
    """Return a hint at the known names that resemble `word`, or at all of them if none does and they are few."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=4, cutoff=0.5)
    close = close or (list(by_lower) if len(known) <= 20 else [])
    return f" Did you mean {', '.join(by_lower[name] for name in close)}?" if close else ""


def _check_length(length: int, name: str, longest: int) -> None:
    if not isinstance(length, int) or isinstance(length, bool) or not 2 <= length <= longest:
        raise SettingError(
            f"length={length!r}: {name} takes a whole number of positions from 2 (start and end of text) to {longest}."
        )


def usable_device(device: str | torch.device) -> str:
    """Return the device's full name, such as "cuda:0". Raises `SettingError` if it cannot be used on this machine."""
    try:
        return str(torch.empty(0, device=device).device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        message = f"device={device!r} cannot be used here ({reason}). Choose 'cpu' or 'cuda'."
        raise SettingError(message) from None
