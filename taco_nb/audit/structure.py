"""Claims about how the network is built are judged here by the network itself: its layers, and what passes through them."""

from __future__ import annotations

import inspect
from collections import Counter

import torch
from torch import nn

from taco_nb.audit.material import Finding, Material, found
from taco_nb.codec import Codec
from taco_nb.model import TACO
from taco_nb.model.adapter import Extractor, Injector, make_attentions

ADAPTER = (Injector, Extractor)


def transforms_are_elics(material: Material) -> Finding:
    """Compare g_a and g_s, less the text adapter, with those of CompressAI's ELIC, weight by weight."""
    from compressai.models import Elic2022Official

    elic, same, counted = Elic2022Official(), True, {}
    for name in ("g_a", "g_s"):
        own = getattr(material.paper_net, name)
        of_text = {id(w) for layer in own.modules() if isinstance(layer, ADAPTER) for w in layer.parameters()}
        shapes = Counter(tuple(w.shape) for w in own.parameters() if id(w) not in of_text)
        same &= shapes == Counter(tuple(w.shape) for w in getattr(elic, name).parameters())
        counted[name] = (shapes.total(), len(of_text))
    added = sum(w.numel() for layer in _adapter(material.paper_net) for w in layer.parameters())
    total = sum(w.numel() for w in material.paper_net.parameters())
    return found(
        same,
        f"g_a has {counted['g_a'][0]} weights and g_s {counted['g_s'][0]} that {'all have' if same else 'do not all have'} "
        f"the shapes of ELIC's in CompressAI; the text adapter adds {counted['g_a'][1]} more to g_a, with "
        f"{added / 1e6:.2f} of the {total / 1e6:.2f} million parameters.",
    )


def text_stays_in_the_encoder(material: Material) -> Finding:
    """Look for layers that read text in each part of the network, and for a caption among `decode`'s arguments."""
    readers = {name: len(_adapter(part)) for name, part in material.paper_net.named_children()}
    elsewhere = sum(count for name, count in readers.items() if name != "g_a")
    asks = "caption" in inspect.signature(Codec.decode).parameters
    return found(
        readers["g_a"] > 0 and not elsewhere and not asks,
        f"{readers['g_a']} layers of g_a read text, and {elsewhere} of all other parts. `Codec.decode` takes "
        f"{'a caption' if asks else 'no caption'}.",
    )


def image_and_text_are_concatenated(material: Material) -> Finding:
    """See whether anything that the encoder reads or attends over is as long, or as wide, as image and text together."""
    net, tokens = material.paper_net, material.paper_config.text_tokens
    first, inputs = net.g_a.analysis_transform[0], _attention_inputs(net, tokens)
    lengths = sorted({x.shape[1] for pair in inputs for x in pair})
    widths = sorted({x.shape[2] for pair in inputs for x in pair})
    images = [length for length in lengths if length != tokens]
    joined = any(image + tokens in lengths for image in images)
    joined |= net.config.N + net.config.text_dim in widths or first.in_channels > 3
    return found(
        joined,
        f"The first layer reads {first.in_channels} channels, those of the picture. The three cross-attentions take "
        f"sequences of {' or '.join(map(str, images))} image positions on one side and of {tokens} tokens on the other "
        "(at 64x64 pixels); none of them holds both.",
    )


def attention_inputs_are_192_wide(material: Material) -> Finding:
    """Run the paper-size encoder, and see how wide the queries and keys of its three cross-attentions are."""
    widths = _widths(material.paper_net, material.paper_config.text_tokens)
    listed = ", ".join(f"{name} {width}" for name, width in widths)
    return found(
        {width for _, width in widths} == {192},
        f"In the order in which they run: {listed}. An Extractor attends in the width of the text, which is CLIP's.",
    )


def attention_width_is_fixed(material: Material) -> Finding:
    """Run the paper-size encoder on texts of several lengths, and compare the widths."""
    lengths = (1, 38, 77, 300)
    widths = {length: _widths(material.paper_net, length) for length in lengths}
    same = len(set(widths.values())) == 1
    return found(
        same,
        f"With {', '.join(map(str, lengths))} tokens the widths are {'the same' if same else 'different'}. What grows with "
        "the text is the number of keys.",
    )


def one_key_lets_attention_choose(material: Material) -> Finding:
    """Give the first Injector's attention one key, as the sum over tokens does, and as many as there are tokens."""
    tokens = material.paper_config.text_tokens
    with torch.random.fork_rng(devices=[]):  # the same weights in each run
        torch.manual_seed(material.seed)
        attention = make_attentions(material.paper_config)[0].eval()
    generator = torch.Generator().manual_seed(material.seed)
    queries = torch.randn(1, 1024, material.paper_config.N, generator=generator)
    spread, weights = {}, {}
    with torch.inference_mode():
        for keys in (1, tokens):
            text = torch.randn(1, keys, material.paper_config.N, generator=generator)
            weights[keys] = attention.weights(queries, text, (1, keys))
            answer = attention(queries, text, (1, keys))[0]
            spread[keys] = float(answer.std(0).norm() / answer.mean(0).norm())
    chooses = not torch.all(weights[1] == 1) or spread[1] > 1e-4
    return found(
        chooses,
        f"After the sum there is one key, whose weight is {float(weights[1].min()):g} for each of {len(queries[0])} "
        f"different queries. The answers differ over positions by {spread[1]:.2g} of their mean, where with {tokens} keys "
        f"they differ by {spread[tokens]:.2g}: every position gets the same text, and attention chooses nothing.",
    )


def _adapter(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, ADAPTER)]


def _widths(net: TACO, tokens: int) -> tuple[tuple[str, int], ...]:
    """Return each cross-attention's kind of layer and the width of its inputs, in the order in which they run."""
    return tuple(
        (type(layer).__name__, max(queries.shape[2], keys.shape[2]))
        for layer, (queries, keys) in zip(_adapter(net), _attention_inputs(net, tokens))
    )


@torch.inference_mode()
def _attention_inputs(net: TACO, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return queries and keys of the encoder's cross-attentions on a picture of 64x64 pixels and a text of so many tokens."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        layer.cross_attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[:2]))
        for layer in _adapter(net)
    ]
    try:
        net.g_a(torch.zeros(1, 3, 64, 64), torch.zeros(1, tokens, net.config.text_dim))
    finally:
        for hook in hooks:
            hook.remove()
    return seen
