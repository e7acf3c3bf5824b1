"""The network equals the reference to the bit, and its three walks through the latents are one walk."""

from __future__ import annotations

import copy
import inspect
import json
import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from conftest import TINY, make_net
from safetensors import safe_open
from torch import nn
from torch.testing import assert_close

from taco_nb.errors import CheckpointError, DamagedFileError, SettingError
from taco_nb.model import TACO, ModelConfig, rans, transforms
from taco_nb.model.adapter import Extractor, Injector, to_tokens
from taco_nb.model.attention import CrossAttention
from taco_nb.model.entropy import SCALE_TABLE, squeeze, unsqueeze

TABLES = [
    f"{model}.{table}"
    for model in ("entropy_bottleneck", "gaussian_conditional")
    for table in ("_offset", "_quantized_cdf", "_cdf_length")
]


def inputs(batch: int = 1, height: int = 64, width: int = 64, text_dim: int = 16, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, height, width, generator=generator), torch.randn(
        batch, 8, text_dim, generator=generator
    )


def old_names(state: dict) -> dict:
    """A state dict as the reference's authors saved it: several GPUs, CompressAI's names of 2022, no tables yet."""
    renamed = {}
    for key, value in state.items():
        for new, old in (("matrices.", "_matrix"), ("biases.", "_bias"), ("factors.", "_factor")):
            key = key.replace(f"entropy_bottleneck.{new}", f"entropy_bottleneck.{old}")
        renamed[f"module.{key}"] = value
    return renamed


def bits(likelihoods: torch.Tensor) -> float:
    return -likelihoods.log2().sum().item()


def without_tables(state: dict) -> dict:
    return {key: value for key, value in state.items() if key not in TABLES}


def with_empty_tables(state: dict) -> dict:
    return state | {key: torch.empty(0, dtype=torch.int32) for key in TABLES}


# The reference -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(shared) -> SimpleNamespace:
    """Weights, inputs and outputs of a small model of the reference."""
    path = shared / "golden" / "taco_small.safetensors"
    if not path.is_file():
        pytest.skip("../shared/golden is not on this machine")
    with safe_open(path, "pt") as file:
        sizes = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)

    def part(prefix: str) -> dict:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    return SimpleNamespace(
        config=ModelConfig(
            sizes["N"], sizes["M"], tuple(sizes["slice_ch"]), sizes["text_dim"], sizes["heads"]
        ),
        state=part("state_dict."),
        shape=tuple(sizes["shape"]),
        bits={"y": sizes["y_bits"], "z": sizes["z_bits"]},
        **part("input."),
        **part("expect."),
    )


def load(golden: SimpleNamespace, state: dict | None = None) -> TACO:
    net = TACO(golden.config)
    net.load_state_dict(state or golden.state)
    return net.eval()


def assert_strings(golden: SimpleNamespace, encoded: dict) -> None:
    ((y,), (z,)) = encoded["strings"]
    assert y == bytes(golden.y_string.tolist())
    assert z == bytes(golden.z_string.tolist())
    assert encoded["shape"] == golden.shape


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-4 of what is expected, relative to its largest value."""
    assert_close(actual, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@torch.inference_mode()
def test_forward_is_the_references(golden):
    net = load(golden)
    y = net.g_a(golden.x, golden.text)
    assert_near(y, golden.y)
    assert_near(net.h_a(y), golden.z)
    out = net(golden.x, golden.text)
    assert_near(out["x_hat"], golden.x_hat)
    for name, expected in (("y", golden.y_likelihoods), ("z", golden.z_likelihoods)):
        assert_close(out["likelihoods"][name], expected, rtol=0, atol=1e-4)
        assert bits(out["likelihoods"][name]) == pytest.approx(golden.bits[name], rel=1e-4)


@pytest.mark.parametrize("net_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("x_format", [torch.contiguous_format, torch.channels_last])
def test_strings_are_the_references_byte_for_byte(golden, net_format, x_format):
    net = load(golden).to(memory_format=net_format)
    x = golden.x.contiguous(memory_format=x_format)
    encoded = net.compress(x, golden.text)
    assert_strings(golden, encoded)
    x_hat = net.decompress(**encoded)["x_hat"]
    assert_near(x_hat, golden.x_hat_decompressed.clamp(0, 1))
    with torch.inference_mode():
        assert_near(x_hat, net(x, golden.text)["x_hat"].clamp(0, 1))


def test_the_references_strings_decode(golden):
    strings = [[bytes(golden.y_string.tolist())], [bytes(golden.z_string.tolist())]]
    assert_near(
        load(golden).decompress(strings, golden.shape)["x_hat"], golden.x_hat_decompressed.clamp(0, 1)
    )


def test_update_makes_the_references_tables(golden):
    net = load(golden, with_empty_tables(golden.state))
    net.update()
    state = net.state_dict()
    for key in TABLES:
        assert torch.equal(state[key], golden.state[key]), key


def test_scale_table_is_the_references(golden):
    assert torch.equal(torch.tensor(SCALE_TABLE), golden.state["gaussian_conditional.scale_table"])


@pytest.mark.parametrize(
    "dialect",
    [old_names, without_tables, with_empty_tables, lambda state: old_names(with_empty_tables(state))],
    ids=["module. and old names", "no tables", "empty tables", "all of it"],
)
def test_other_dialects_of_a_state_dict_give_the_same_strings(golden, dialect):
    state = dialect(golden.state)
    assert ModelConfig.of_state_dict(state) == golden.config
    assert_strings(golden, load(golden, state).compress(golden.x, golden.text))


def test_an_empty_scale_table_is_filled_in(golden):
    state = with_empty_tables(golden.state) | {"gaussian_conditional.scale_table": torch.empty(0)}
    assert_strings(golden, load(golden, state).compress(golden.x, golden.text))


def test_paper_size_is_the_references(shared):
    schema = json.loads((shared / "golden" / "taco_paper_state_dict_schema.json").read_text())
    net = TACO()
    net.update()  # of the tables, only the width of the bottleneck's depends on the weights; here these are as initialised
    state = net.state_dict()
    assert {key: (list(value.shape), str(value.dtype)) for key, value in state.items()} == {
        key: (entry["shape"], entry["dtype"]) for key, entry in schema.items()
    }
    assert len(state) == 441
    assert sum(weight.numel() for weight in net.parameters()) / 1e6 == pytest.approx(38.58, abs=0.005)
    assert ModelConfig.of_state_dict(state) == ModelConfig()


# State dicts and sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s: s.pop("h_s.increase.2.bias"), "h_s.increase.2.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra"),
        (lambda s: s.update({"h_a.reduction.0.weight": torch.zeros(8, 16, 5, 5)}), "h_a.reduction.0.weight"),
        (
            lambda s: s.update({"entropy_bottleneck.quantiles": torch.zeros(9, 1, 3)}),
            "entropy_bottleneck.quantiles",
        ),
    ],
)
def test_keys_that_do_not_fit_are_named(change, said):
    state = make_net().state_dict()
    change(state)
    with pytest.raises(CheckpointError, match=said):
        make_net().load_state_dict(state)


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s["entropy_bottleneck._quantized_cdf"].fill_(7),
        lambda s: s["entropy_bottleneck._quantized_cdf"][0, 2].fill_(0),
        lambda s: s["entropy_bottleneck._cdf_length"].fill_(1000),
        lambda s: s["gaussian_conditional._cdf_length"].fill_(-1),
        lambda s: s.update({"entropy_bottleneck._offset": torch.zeros(3, dtype=torch.int32)}),
        lambda s: s.update({key: s[key][:3] for key in TABLES}),
    ],
)
def test_damaged_tables_never_reach_the_coder(damage):
    net = make_net()
    net.update()
    state = copy.deepcopy(net.state_dict())
    damage(state)
    net.load_state_dict(state)
    with pytest.raises(CheckpointError, match="tables"):
        net.compress(*inputs())


@pytest.mark.parametrize(
    "part",
    ["g_a.analysis_transform.0.weight", "h_a.reduction.4.bias", "h_s.increase.0.weight", "local_context.1.weight",
     "entropy_parameters_nonanchor.0.fusion.4.bias", "entropy_bottleneck.matrices.0", "entropy_bottleneck.quantiles"],
)  # fmt: skip
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(part, value):
    net = make_net()
    net.get_parameter(part).data.view(-1)[0] = value
    with pytest.raises(CheckpointError, match=part):
        net.compress(*inputs())


@pytest.mark.parametrize(
    "part", ["g_a.analysis_transform.16.weight", "h_a.reduction.4.weight", "h_s.increase.4.bias"]
)
def test_latents_are_coded_exactly_or_are_an_error(part):
    refused = 0
    for factor in (1e2, 1e5, 1e6, 1e7, 1e8, 1e9, 1e19, 1e38):
        net = make_net()
        net.get_parameter(part).data.mul_(factor)
        try:
            with torch.inference_mode():
                y = net.g_a(*inputs())
                coded = net.encode_latents(y, net.h_a(y))
        except CheckpointError as error:
            assert "broken" in str(error)
            refused += 1
        else:
            assert torch.equal(net.decode_latents(coded.y_string, coded.z_string, (1, 1)), coded.y_hat)
    assert 0 < refused < 8


SIZES = [
    {},
    {"groups": (16,)},
    {"groups": (1, 1, 2, 4, 8), "context_widths": (12, 5)},
    {"N": 12, "M": 9, "groups": (4, 5), "text_dim": 6, "heads": 3},
]


@pytest.mark.parametrize("sizes", SIZES)
def test_every_size_is_recovered_and_survives_compression(sizes):
    net = make_net(**sizes)
    if len(net.config.groups) > 1:  # as every reference has; else there is no channel context to measure
        assert ModelConfig.of_state_dict(net.state_dict(), heads=net.config.heads) == net.config
    x, text = inputs(1, 128, 64, net.config.text_dim)
    encoded = net.compress(x, text)
    with torch.inference_mode():
        out = net(x, text)
    assert out["x_hat"].shape == x.shape
    assert out["likelihoods"]["y"].shape == (1, net.config.M, 8, 4)
    assert out["likelihoods"]["z"].shape == (1, net.config.N, 2, 1)
    assert_close(net.decompress(**encoded)["x_hat"], out["x_hat"].clamp(0, 1), rtol=0, atol=1e-5)


def test_sizes_are_those_asked_for():
    net = make_net(**SIZES[2])
    assert [layer.out_channels for layer in net.channel_context["3"].fushion[::2]] == [12, 5, 8]
    assert [layer.in_channels for layer in net.local_context] == [1, 1, 2, 4, 8]


@pytest.mark.parametrize(
    "sizes, said",
    [
        ({"N": 0}, "N must be 2 or above, but is 0"),
        ({"N": 1, "heads": 1}, "N must be 2 or above, but is 1"),
        ({"text_dim": -16}, "text_dim must be 1 or above, but is -16"),
        ({"heads": 2.0}, "heads must be a whole number, but is 2.0"),
        ({"context_widths": (8, 0)}, "Each of the context_widths must be 1 or above, but one is 0"),
        ({"context_widths": (8, 8, 8)}, r"context_widths must be 2 whole numbers, but is \(8, 8, 8\)"),
        ({"attention": "sparse"}, 'attention must be "softmax" or "linformer", but is .sparse.'),
        ({"image_grid": 0}, "image_grid must be 1 or above"),
        ({"groups": (4, 4)}, "add up to 8"),
        ({"groups": ()}, "add up to 0"),
        ({"heads": 3}, "N=8 is not a multiple of heads=3"),
        ({"text_dim": 15}, "text_dim=15 is not a multiple of heads=2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, said):
    with pytest.raises(SettingError, match=said):
        ModelConfig(**TINY | sizes)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"weight": torch.zeros(1)},
        make_net().state_dict() | {"g_a.analysis_transform.0.weight": torch.tensor(1.0)},
        make_net().state_dict() | {"local_context.1.weight": torch.zeros(1, 99, 5, 5)},
    ],
)
def test_sizes_of_something_else_are_an_error(state):
    with pytest.raises(CheckpointError, match="not TACO's"):
        ModelConfig.of_state_dict(state)


# The order of coding -------------------------------------------------------------------------------------------------


def test_squeeze_takes_the_anchors():
    row, column = torch.meshgrid(torch.arange(6), torch.arange(8), indexing="ij")
    positions = torch.stack((row, column))[None]
    for anchor in (True, False):
        rows, columns = squeeze(positions, anchor)[0]
        assert rows.shape == (6, 4)
        assert ((rows + columns) % 2 == int(anchor)).all()  # anchors: (even, odd) and (odd, even)
        assert (rows == torch.arange(6)[:, None]).all()
        assert (columns.diff(dim=1) == 2).all()


def test_unsqueeze_undoes_squeeze():
    x = torch.randn(2, 3, 4, 10)
    assert torch.equal(unsqueeze(squeeze(x, True), squeeze(x, False)), x)


@torch.inference_mode()
def walk(net: TACO, change_at: int | None = None) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Scales and means of every step, and y_hat, for arbitrary latents; those of one step can be other ones."""
    generator = torch.Generator().manual_seed(1)
    parameters: list[torch.Tensor] = []

    def visit(step, scales, means):
        values = torch.randn(means.shape, generator=generator) * 4
        values += 5 * (len(parameters) == change_at)
        parameters.append(torch.cat((scales, means)))
        return values

    hyper = torch.randn(1, 2 * net.config.M, 8, 12, generator=generator)
    return parameters, net.walk(hyper, visit)


@pytest.mark.parametrize("change_at", range(6))
def test_the_walk_is_causal(change_at):
    net = make_net(groups=(4, 4, 8))
    before, y_hat = walk(net)
    after, changed_y_hat = walk(net, change_at)
    assert len(before) == len(after) == 6
    assert not torch.equal(y_hat, changed_y_hat)
    for step in range(change_at + 1):
        assert torch.equal(before[step], after[step])
    for step in range(change_at + 1, 6):
        assert not torch.equal(before[step], after[step])


def test_each_step_has_its_half_of_its_channels():
    net, seen = make_net(groups=(4, 4, 8)), []

    def visit(step, scales, means):
        seen.append((step.channels, step.anchor))
        return torch.full_like(means, len(seen))

    with torch.inference_mode():
        y_hat = net.walk(torch.randn(1, 32, 4, 4), visit)
    for index, (channels, anchor) in enumerate(seen):
        assert (squeeze(y_hat, anchor)[:, channels] == index + 1).all()
    assert [anchor for _, anchor in seen] == [True, False] * 3


@torch.inference_mode()
def test_local_context_looks_no_further_than_two_positions():
    net = make_net(groups=(16,))

    def others(spike: float) -> torch.Tensor:
        parameters = {}

        def visit(step, scales, means):
            parameters[step.anchor] = torch.cat((scales, means))
            values = torch.zeros_like(means)
            values[..., 8, 4] = spike  # on row 8 anchors are the odd columns: this is column 9
            return values

        net.walk(torch.zeros(1, 32, 16, 16), visit)
        return unsqueeze(torch.zeros_like(parameters[False]), parameters[False])

    changed = (others(0) != others(9)).any(1).any(0)
    near = torch.zeros(16, 16, dtype=torch.bool)
    near[6:11, 7:12] = True
    others_only = unsqueeze(torch.zeros(1, 1, 16, 8), torch.ones(1, 1, 16, 8))[0, 0].bool()
    assert torch.equal(changed, near & others_only)


@torch.inference_mode()
def test_local_context_is_the_convolution_of_the_board_with_its_others_zero():
    net = make_net()
    for layer in net.local_context:
        anchors = torch.randn(2, layer.in_channels, 6, 5)
        board = nn.functional.conv2d(
            unsqueeze(anchors, torch.zeros_like(anchors)), layer.weight, layer.bias, padding=2
        )
        assert_close(layer(anchors), squeeze(board, False), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_the_last_layer_is_a_transposed_convolution():
    layer, x = transforms.ToPixels(6), torch.randn(2, 6, 5, 7)
    expected = nn.ConvTranspose2d(6, 3, 5, 2, 2, 1)
    expected.load_state_dict(layer.state_dict())
    assert_close(layer(x), expected(x), rtol=0, atol=1e-5)


def test_somebodys_autocast_changes_no_string():
    x, text = inputs(1, 128, 64)
    with torch.inference_mode():
        y = make_net().g_a(x, text)
    nets = [make_net() for _ in range(3)]
    for net in nets:
        net.g_a.register_forward_hook(lambda *_: y)  # g_a itself does follow an autocast
    expected = nets[0].compress(x, text)
    with torch.autocast("cpu", torch.bfloat16):
        assert nets[1].compress(x, text) == expected  # whose tables are made here too
        assert nets[2].decompress(**expected)["x_hat"].dtype == torch.float32


# Strips ---------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("size", [(512, 64), (448, 192), (64, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strips_give_what_the_whole_gives(monkeypatch, size, dtype):
    net, (x, text) = make_net(), inputs(2, *size)
    y_hat = torch.randn(2, 16, size[0] // 16, size[1] // 16, generator=torch.Generator().manual_seed(1))

    def run() -> tuple[list[torch.Tensor], int]:
        seen = []
        hooks = [layer.register_forward_hook(lambda *args: seen.append(args[2].nbytes))
                 for layer in (*net.g_a.analysis_transform[:14], *net.g_s.synthesis_transform[6:])]  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            results = [net.g_a(x, text), net.g_s(y_hat)]
        for hook in hooks:
            hook.remove()
        return results, max(seen)

    whole, largest = run()
    monkeypatch.setitem(transforms.STRIP, "cpu", largest // 6)
    strips, narrow = run()
    for a, b in zip(whole, strips):
        assert_close(b, a, rtol=0, atol=1e-5 * a.abs().max().item() if dtype == torch.float32 else 0.1)
        assert b.shape == a.shape and b.dtype == a.dtype
    if size[0] > 256:
        assert narrow < largest / 2


@torch.inference_mode()
@pytest.mark.parametrize(
    "batch, height, width, most", [(12, 64, 64, 1), (3, 256, 64, 1.5), (1, 256, 1024, 1.5)]
)
def test_parts_repeat_little_work(monkeypatch, batch, height, width, most):
    """A strip of few rows consists of its overlap; a batch has whole images to be cut into."""
    net, (x, text) = make_net(), inputs(batch, height, width)
    rows: Counter = Counter()
    for i, layer in enumerate((*net.g_a.analysis_transform, *net.g_s.synthesis_transform)):
        layer.register_forward_hook(lambda _, x, out, i=i: rows.update({i: out.shape[0] * out.shape[2]}))

    def work() -> Counter:
        rows.clear()
        net.g_s(net.g_a(x, text))
        return rows.copy()

    whole = work()
    monkeypatch.setitem(transforms.STRIP, "cpu", 8 * 64 * 64 * 2)
    in_parts = work()
    assert all(whole[i] <= in_parts[i] <= most * whole[i] for i in whole)
    assert sum(in_parts.values()) > sum(whole.values()) or most == 1


def test_training_is_not_cut_into_strips(monkeypatch):
    net, (x, text) = make_net(), inputs(1, 128)
    monkeypatch.setitem(transforms.STRIP, "cpu", 1)
    calls = []
    net.g_a.analysis_transform[0].register_forward_hook(lambda *args: calls.append(1))
    net.g_a(x, text).sum().backward()
    assert len(calls) == 1


# Rate, batches, training, precision ----------------------------------------------------------------------------------------


@torch.inference_mode()
def test_estimated_bits_are_the_length_of_the_strings():
    net = make_net()
    for network in (*net.entropy_parameters_anchor, *net.entropy_parameters_nonanchor):
        network.fusion[4].bias.data.chunk(2)[0].fill_(
            8
        )  # few outliers: those cost other than the estimate has it
    net.entropy_bottleneck.quantiles *= 5
    x, text = inputs(1, 512, 512)
    estimated = net(x, text)["likelihoods"]
    for name, (string,) in zip("yz", net.compress(x, text)["strings"]):
        assert 8 * len(string) == pytest.approx(bits(estimated[name]), rel=0.02, abs=64), name


def test_every_image_of_a_batch_has_its_own_strings():
    net = make_net()
    x, text = inputs(batch=3)
    encoded = net.compress(x, text)
    assert [len(strings) for strings in encoded["strings"]] == [3, 3]
    assert len(set(encoded["strings"][0])) == 3
    together = net.decompress(**encoded)["x_hat"]
    for i in range(3):
        alone = net.decompress([strings[i : i + 1] for strings in encoded["strings"]], encoded["shape"])[
            "x_hat"
        ]
        assert_close(alone, together[i : i + 1], rtol=0, atol=1e-5)
        with torch.inference_mode():
            expected = net(x[i : i + 1], text[i : i + 1])["x_hat"].clamp(0, 1)
        assert_close(alone, expected, rtol=0, atol=1e-4)


def gradients(net: TACO, loss: torch.Tensor) -> dict[str, bool]:
    """Whether each parameter has a gradient that is not zero."""
    net.zero_grad()
    loss.backward()
    return {
        name: weight.grad is not None and bool(weight.grad.any()) for name, weight in net.named_parameters()
    }


def rate_distortion(net: TACO, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    out = net(x, text)
    return ((out["x_hat"] - x) ** 2).mean() - sum(p.log2().mean() for p in out["likelihoods"].values())


def test_training_reaches_every_weight_but_the_quantiles():
    net = make_net().train()
    reached = gradients(net, rate_distortion(net, *inputs(2, 128, 128)))
    assert [name for name, yes in reached.items() if not yes] == ["entropy_bottleneck.quantiles"]


def test_a_new_adapter_learns_its_gamma_first():
    net = make_net().train()
    for layer in (8, 15):
        nn.init.zeros_(net.g_a.analysis_transform[layer].gamma)
    reached = gradients(net, rate_distortion(net, *inputs()))
    transform = "g_a.analysis_transform"
    waiting = {
        name
        for name in reached
        if name.startswith((f"{transform}.8.", f"{transform}.14.", f"{transform}.15."))
    }
    waiting -= {
        f"{transform}.{i}.{name}"
        for i in (8, 15)
        for name in ("gamma", "image_norm.weight", "image_norm.bias")
    }
    assert {name for name, yes in reached.items() if not yes} == waiting | {"entropy_bottleneck.quantiles"}


def test_the_auxiliary_loss_reaches_the_quantiles_alone():
    net = make_net().train()
    reached = gradients(net, net.aux_loss())
    assert [name for name, yes in reached.items() if yes] == ["entropy_bottleneck.quantiles"]


def test_likelihoods_are_noisy_in_training_only():
    net = make_net()
    x, text = inputs()
    with torch.inference_mode():
        assert torch.equal(net(x, text)["likelihoods"]["y"], net(x, text)["likelihoods"]["y"])
        net.train()
        first, second = net(x, text), net(x, text)
    for name in "yz":
        assert not torch.equal(first["likelihoods"][name], second["likelihoods"][name])
    assert torch.equal(first["x_hat"], second["x_hat"])


def test_tables_follow_the_weights_through_training():
    net = make_net()
    x, text = inputs()
    stale = net.compress(x, text)
    old = net.entropy_bottleneck.quantized_cdf.clone()
    net.train()
    assert all(net.state_dict()[key].numel() == 0 for key in TABLES)
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        (rate_distortion(net, x, text) + net.aux_loss()).backward()
        optimizer.step()
    net.eval()
    fresh = net.compress(x, text)
    assert fresh["strings"] != stale["strings"]
    assert not torch.equal(old, net.entropy_bottleneck.quantized_cdf)
    with torch.inference_mode():
        assert_close(net.decompress(**fresh)["x_hat"], net(x, text)["x_hat"].clamp(0, 1), rtol=0, atol=1e-4)
    reloaded = TACO(net.config)
    reloaded.load_state_dict(net.state_dict())
    assert reloaded.eval().compress(x, text) == fresh


def test_weights_loaded_over_used_ones_bring_their_own_tables():
    first, second = make_net(0), make_net(1)
    x, text = inputs()
    first.compress(x, text)
    expected = second.compress(x, text)
    first.load_state_dict(second.state_dict())
    assert first.compress(x, text) == expected
    assert copy.deepcopy(first).compress(x, text) == expected


def test_autocast_keeps_the_entropy_model_in_float32():
    net = make_net()
    x, text = inputs(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net.train()(x, text)
    for tensor in (out["x_hat"], *out["likelihoods"].values()):
        assert tensor.dtype == torch.float32 and tensor.isfinite().all()
    assert all((p > 0).all() and (p <= 1).all() for p in out["likelihoods"].values())
    exact = net(x, text)["x_hat"]
    assert not torch.equal(out["x_hat"], exact)
    assert (out["x_hat"] - exact).std() < 0.2 * exact.std()

    y = net.eval().g_a(x, text)
    net.g_a.register_forward_hook(lambda *_: y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        likelihoods = net(x, text)["likelihoods"]
    assert all(torch.equal(likelihoods[name], p) for name, p in net(x, text)["likelihoods"].items())


# The text adapter ----------------------------------------------------------------------------------------------------


def test_cross_attention_is_multihead_attention():
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(24, 4, batch_first=True).eval()
    for bias in (theirs.in_proj_bias, theirs.out_proj.bias):
        nn.init.normal_(bias)
    ours = CrossAttention(24, 4)
    ours.load_state_dict(theirs.state_dict())
    queries, keys_values = torch.randn(2, 7, 24), torch.randn(2, 5, 24)
    expected, weights = theirs(queries, keys_values, keys_values, average_attn_weights=False)
    assert_close(ours(queries, keys_values, (1, 5)), expected, rtol=0, atol=1e-6)
    assert_close(ours.weights(queries, keys_values, (1, 5)), weights, rtol=0, atol=1e-6)
    assert_close(ours.weights(queries, keys_values, (1, 5)).sum(-1), torch.ones(2, 4, 7))


def test_cross_attention_starts_as_multihead_attention_does():
    def start(kind):
        torch.manual_seed(0)
        return kind(24, 4).state_dict()

    ours, theirs = start(CrossAttention), start(nn.MultiheadAttention)
    assert {key: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in theirs.items()
    }
    assert not ours["in_proj_bias"].any() and not ours["out_proj.bias"].any()
    assert_close(ours["in_proj_weight"].std(), theirs["in_proj_weight"].std(), rtol=0.1, atol=0)


def test_a_new_injector_is_the_layer_norm_of_the_image():
    injector = Injector(8, 16, CrossAttention(8, 2))
    x, text = torch.randn(2, 8, 3, 5), torch.randn(2, 4, 16)
    assert torch.equal(to_tokens(injector(x, text)), nn.LayerNorm(8)(to_tokens(x)))


def test_extractor_gives_text_of_the_same_shape():
    extractor = Extractor(8, 16, CrossAttention(16, 2))
    x, text = torch.randn(2, 8, 3, 5), torch.randn(2, 4, 16)
    new = extractor(x, text)
    assert new.shape == text.shape
    shuffled = x.flatten(2)[..., torch.randperm(15)].unflatten(2, (3, 5))
    assert_close(extractor(shuffled, text), new)  # attention has no positions
    assert not torch.allclose(extractor(x + torch.randn(8, 1, 1), text), new)


@torch.inference_mode()
@pytest.mark.parametrize("listening", [8, 15, None])
def test_the_caption_matters_where_gamma_is_not_zero(listening):
    net = make_net()
    for layer in {8, 15} - {listening}:
        nn.init.zeros_(net.g_a.analysis_transform[layer].gamma)
    x, text = inputs()
    assert torch.equal(net.g_a(x, text), net.g_a(x, -text)) == (listening is None)


def test_the_decoder_has_no_text():
    for part in (TACO.decompress, TACO.decode_latents, TACO.walk, TACO().g_s.forward, TACO().h_s.forward):
        assert not {"text", "caption"} & set(inspect.signature(part).parameters)
    net = make_net()
    encoded = net.compress(*inputs())
    x_hat = net.decompress(**encoded)["x_hat"]
    del net.g_a, net.h_a
    assert torch.equal(net.decompress(**encoded)["x_hat"], x_hat)


# The entropy coder ---------------------------------------------------------------------------------------------------


def gaussian_tables() -> rans.CodingTables:
    model = GaussianConditional(SCALE_TABLE)
    model.update()
    return rans.CodingTables.of_model(model, len(SCALE_TABLE))


def bottleneck(spread: float = 10) -> EntropyBottleneck:
    """Of 5 channels; with a small spread of the quantiles nearly every symbol is an escape."""
    torch.manual_seed(0)
    model = EntropyBottleneck(5)
    model.quantiles.data *= spread / 10
    model.update()
    return model


@pytest.mark.parametrize("count", [2, 3, 1000, rans.CHUNK + 3])
def test_symbols_survive_outliers_included(count):
    generator = torch.Generator().manual_seed(count)
    tables = gaussian_tables()
    indexes = torch.randint(64, (count,), generator=generator, dtype=torch.int32)
    symbols = (torch.randn(count, generator=generator) * torch.tensor(SCALE_TABLE)[indexes]).round().int()
    outliers = torch.rand(count, generator=generator) < 0.02
    symbols[outliers] = torch.randint(-(1 << 20), 1 << 20, (int(outliers.sum()),), generator=generator).int()
    symbols[:2] = torch.tensor([1 << 20, -(1 << 20)])
    stream = rans.encode(symbols, indexes, tables)
    decoder = rans.Decoder(stream, tables, count)
    parts = [decoder.read(part) for part in indexes.split(count // 3 + 1)]
    assert torch.equal(torch.cat(parts), symbols)


@pytest.mark.parametrize("spread", [0, 1, 10])
def test_streams_are_compressais(spread):
    model = bottleneck(spread)
    z = torch.randn(1, 5, 30, 40, generator=torch.Generator().manual_seed(0)) * 8
    symbols = (z - model.quantiles[:, 0, 1].reshape(1, 5, 1, 1)).round().int().flatten()
    indexes = torch.arange(5, dtype=torch.int32).repeat_interleave(1200)
    tables = rans.CodingTables.of_model(model, 5)
    stream = rans.encode(symbols, indexes, tables)
    assert [stream] == model.compress(z)
    assert torch.equal(rans.Decoder(stream, tables, 6000).read(indexes), symbols)


@pytest.mark.parametrize("spread", [0, 10])
def test_the_shortest_escapes_are_not_taken_for_damage(spread):
    model = bottleneck(spread)
    tables = rans.CodingTables.of_model(model, 5)
    indexes = torch.zeros(5000, dtype=torch.int32)
    symbols = torch.full((5000,), tables.offsets[0] + tables.lengths[0] - 2, dtype=torch.int32)
    stream = rans.encode(symbols, indexes, tables)
    assert tables.escapes(symbols, indexes) == 5000
    assert torch.equal(rans.Decoder(stream, tables, 5000).read(indexes), symbols)


def test_least_bits_bound_every_stream():
    model = bottleneck()
    tables = rans.CodingTables.of_model(model, 5)
    for channel in range(5):
        shortest = 1 << 30
        for symbol in range(-12, 13):
            symbols = torch.full((1000,), symbol, dtype=torch.int32)
            shortest = min(shortest, 8 * len(rans.encode(symbols, torch.full((1000,), channel), tables)))
        bound = 1000 * tables.least_bits[channel].item()
        assert (
            bound - 64 < shortest < bound + 4000 + 64
        )  # the likeliest of these is an escape, of 4 bits more


def test_symbols_too_large_for_the_coder_are_an_error():
    tables, indexes = gaussian_tables(), torch.zeros(2, dtype=torch.int32)
    largest = torch.tensor([rans.LARGEST_SYMBOL, -rans.LARGEST_SYMBOL], dtype=torch.int32)
    assert torch.equal(rans.Decoder(rans.encode(largest, indexes, tables), tables, 2).read(indexes), largest)
    for symbol in (rans.LARGEST_SYMBOL + 1, -rans.LARGEST_SYMBOL - 1, 2**31 - 1, -(2**31)):
        with pytest.raises(CheckpointError, match="too large"):
            rans.encode(torch.tensor([0, symbol], dtype=torch.int32), indexes, tables)


def read_garbage() -> None:
    """Any bytes give symbols or `DamagedFileError`."""
    rng, models = (
        random.Random(0),
        [gaussian_tables(), *(rans.CodingTables.of_model(bottleneck(s), 5) for s in (0, 1, 10))],
    )
    valid = (1 << 31).to_bytes(8, "little")  # the lowest state of the coder
    streams = [b"", b"\0", b"\xff", valid, valid[:-1], valid + bytes(1000), valid + b"\xff" * 100_000]
    streams += [bytes(n) for n in (7, 8, 9, 400, 100_000)] + [b"\xff" * n for n in (7, 8, 400, 100_000)]
    # a single escape that fills the stream announces 15 nibbles for each of its own
    streams += [b"\xff" * 7 + b"\x7f" + b"\xff" * n for n in (0, 1, 400, 100_000, 4_000_000)]
    streams += [rng.randbytes(300_000)[:-k] for k in range(1, 4)]
    for _ in range(3000):
        stream = rng.randbytes(rng.choice((8, 9, 12, 40, 200)))
        streams.append(stream if rng.random() < 0.3 else stream[:7] + bytes([stream[7] & 127]) + stream[8:])
    outcomes = {"symbols": 0, "damaged": 0}
    for stream in streams:
        tables = rng.choice(models)
        count = rng.choice((2, 100, 500)) if len(stream) < 1000 else 200_000
        indexes = torch.randint(len(tables.lengths), (count,), dtype=torch.int32)
        try:
            assert rans.Decoder(stream, tables, count).read(indexes).shape == (count,)
            outcomes["symbols"] += 1
        except DamagedFileError:
            outcomes["damaged"] += 1
    assert min(outcomes.values()) > 300, outcomes

    # Where every symbol is an escape, so many cannot have been in so short a stream.
    stream, indexes = rng.randbytes(7) + b"\x01" + rng.randbytes(200), torch.zeros(200_000, dtype=torch.int32)
    with pytest.raises(DamagedFileError):
        rans.Decoder(stream, models[1], len(indexes)).read(indexes)

    # Given a state of zero, CompressAI's decoder takes four bytes for every symbol, and soon none of its own.
    indexes = torch.zeros(20_000_000, dtype=torch.int32)
    for state in (0, 1, (1 << 31) - 1):
        with pytest.raises(DamagedFileError):
            rans.Decoder(state.to_bytes(8, "little"), models[0], len(indexes)).read(indexes)


def test_garbage_never_crashes_the_coder(apart):
    apart(read_garbage)


def decode_huge_shape() -> None:
    net = make_net()
    ((y,), (z,)) = net.compress(*inputs())["strings"]
    for shape in ((1 << 14, 1 << 14), (1, 1 << 28), (1 << 28, 1), (1 << 20, 1 << 20)):
        with pytest.raises(DamagedFileError, match="forged"):
            net.decode_latents(y, z, shape)


def test_a_forged_shape_costs_no_memory(apart):
    apart(decode_huge_shape)
