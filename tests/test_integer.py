"""What a decoder repeats is exact: the same integers in any order of summation, on any machine, from any of its callers."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
import torch
from conftest import TESTS, make_codec, make_net, precision_put_back
from hypothesis import given, settings
from hypothesis import strategies as st
from make_golden import TINY, all_digests, expected, latents_digest
from PIL import Image
from torch import nn

from taco_nb import Codec, checkpoint, datasets, load
from taco_nb.errors import CheckpointError, SettingError, WrongWeightsError
from taco_nb.inspection import integer_cost
from taco_nb.model import TACO, integer, kernels
from taco_nb.model.entropy import look_at_anchors, squeeze, unsqueeze
from taco_nb.model.integer import ExactLayer, IntegerModel, Kernel
from taco_nb.model.precision import full_float32

CAPTION = "a red barn"


def picture(width: int = 128, height: int = 64, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


# Golden files ----------------------------------------------------------------------------------------------------------


def test_golden_files_decode_to_the_latents_that_were_written():
    assert TINY.stat().st_size < 1_000_000
    assert len(expected()) > 9
    assert all_digests() == expected()


def run_golden(**environment: str) -> dict[str, str]:
    """Decode the golden files in a process of its own, with these variables in its environment."""
    code = "import json, make_golden; print(json.dumps(make_golden.all_digests()))"
    environment = os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"} | environment
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "environment",
    [{"ONEDNN_MAX_CPU_ISA": "SSE41"}, {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "3"},
     {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "2"}],
    ids=lambda environment: ",".join(environment.values()),
)  # fmt: skip
def test_golden_files_decode_alike_with_other_instructions(environment):
    assert run_golden(**environment) == expected()


@pytest.fixture
def threads():
    """`torch.set_num_threads`, put right again afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def demo_latents() -> tuple[TACO, torch.Tensor, torch.Tensor]:
    """The bundled codec's network, and a y and z as large as those of a picture of 320x256 pixels."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(1, 96, 16, 20, generator=generator) * 3
    return load("demo").net, y, torch.randn(1, 48, 4, 5, generator=generator) * 4


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_latents_are_the_same_symbols_however_they_are_computed(threads, count, onednn, layout):
    net, y, z = demo_latents()
    reference = net.integer_model().encode_latents(y, z)
    threads(count)
    with torch.backends.mkldnn.flags(enabled=onednn):
        model = IntegerModel(net.to(memory_format=layout))  # derived in these circumstances too
        coded = model.encode_latents(y.contiguous(memory_format=layout), z.contiguous(memory_format=layout))
        decoded = model.decode_latents(reference.y_string, reference.z_string, (4, 5))
    assert model.state() == net.integer_model().state() and model.digest() == net.integer_model().digest()
    assert coded[:2] == reference[:2]
    assert torch.equal(coded.y_hat, reference.y_hat) and torch.equal(decoded, reference.y_hat)


# Plain integers ----------------------------------------------------------------------------------------------------------


def numpy_layer(layer: ExactLayer, x: torch.Tensor) -> torch.Tensor:
    """One layer by the docstring's formula, in int64, tap by tap."""
    w, b = (integers.numpy().astype(np.int64) for integers in (layer.weight, layer.bias))
    q, r = layer.q.numpy(), layer.r.numpy()
    a = x[0].numpy().astype(np.int64)
    if layer.convolution.kind == "transposed":
        s = numpy_transposed(a, w, layer.convolution.stride)
    elif layer.convolution.kind == "anchors":
        board = unsqueeze(x, torch.zeros_like(x))[0].numpy().astype(np.int64)
        s = squeeze(torch.from_numpy(numpy_plain(board, w))[None], False)[0].numpy()
    else:
        s = numpy_plain(a, w)
    s = s + b[:, None, None]
    shift = (q - r)[:, None, None]
    result = np.clip((s + (np.int64(1) << (shift - 1))) >> shift, layer.low, layer.high)
    return torch.from_numpy(result.astype(np.float32))[None]


def numpy_plain(a: np.ndarray, w: np.ndarray) -> np.ndarray:
    k = w.shape[2] // 2
    padded = np.pad(a, ((0, 0), (k, k), (k, k)))
    height, width = a.shape[1:]
    s = np.zeros((len(w), height, width), np.int64)
    for i in range(w.shape[2]):
        for j in range(w.shape[3]):
            s += np.einsum("oc,chw->ohw", w[:, :, i, j], padded[:, i : i + height, j : j + width])
    return s


def numpy_transposed(a: np.ndarray, w: np.ndarray, stride: int) -> np.ndarray:
    k = w.shape[2]
    height, width = (stride * n for n in a.shape[1:])
    s = np.zeros((len(w), height + k + stride, width + k + stride), np.int64)
    for i in range(k):
        for j in range(k):
            part = np.einsum("oc,chw->ohw", w[:, :, i, j], a)
            s[:, i : i + height : stride, j : j + width : stride] += part
    return s[:, k // 2 : k // 2 + height, k // 2 : k // 2 + width]


def test_a_codec_in_plain_integers_of_numpy_decodes_the_same(monkeypatch):
    codec = load(TINY)
    file = next(name for name in expected() if name.startswith("tiny@200"))
    monkeypatch.setattr(ExactLayer, "__call__", numpy_layer)
    assert latents_digest(codec, TINY.parent / file) == expected()[file]


def random_layer(
    draw_seed: int, kind: str, inputs: int, outputs: int, k: int, bits: int, spread: float, signed: bool
):
    """A layer of random weights, and integers that are as large as it may be given."""
    generator = torch.Generator().manual_seed(draw_seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    layer = nn.ConvTranspose2d if kind == "transposed" else nn.Conv2d
    module = layer(inputs, outputs, k, padding=k // 2)
    if kind == "transposed":
        module.stride = (2, 2)
    scale = torch.exp2(normal(outputs, inputs) * spread)[:, :, None, None]
    weight = normal(outputs, inputs, k, k) * scale
    module.weight.data = (weight.transpose(0, 1) if kind == "transposed" else weight).float().contiguous()
    module.bias.data = (normal(outputs) * 10).float()
    kernel = Kernel.of(module, "anchors" if kind == "anchors" else "plain")
    p = torch.randint(-3, 12, (inputs,), generator=generator)
    q, chunks = integer.sums_for(kernel, p, bits, signed)
    exact = ExactLayer(kernel, p, q, q - 5, chunks, bits=bits, signed=signed, relu=False, largest=1 << 22)
    return exact, generator


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31), st.sampled_from(["plain", "transposed", "anchors"]), st.integers(1, 40), st.integers(1, 6),
    st.sampled_from([1, 3, 5]), st.integers(10, 14), st.sampled_from([0.0, 1.0, 6.0]), st.booleans(),
)  # fmt: skip
def test_the_bound_holds_at_its_worst_and_so_the_sums_are_exact(
    seed, kind, inputs, outputs, k, bits, spread, signed
):
    """Inputs as large as they may be, of the sign that helps a channel most: partial sums stay within 2^24."""
    k = 5 if kind == "anchors" else 3 if kind == "transposed" and k == 1 else k
    layer, generator = random_layer(seed, kind, inputs, outputs, k, bits, spread, signed)
    largest = (1 << bits) - 1
    weight, half = layer.weight.double(), torch.exp2((layer.q - layer.r - 1).double())
    ends = [i * inputs // layer.chunks for i in range(layer.chunks + 1)]
    for first, last in zip(ends, ends[1:]):
        loads = layer.convolution.loads(weight[:, first:last], signed).sum(1).amax(1) * largest
        assert (loads + layer.bias.abs() + half <= kernels.LIMIT).all()
    # inputs at the bound: of every sign if they may be, towards the first output channel's weights
    favourite = weight[0].sum((1, 2)).sign()
    x = (
        torch.where(favourite == 0, torch.ones(()).double(), favourite)
        .view(1, -1, 1, 1)
        .expand(1, inputs, 4, 6)
    )
    x = (x if signed else (x > 0).double()) * largest
    noise = torch.randint(0 if not signed else -largest, largest + 1, x.shape, generator=generator)
    for values in (x.float().contiguous(), noise.float()):
        assert torch.equal(layer(values), numpy_layer(layer, values))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3, 5]),
    st.integers(10, 14), st.integers(5, 12), st.sampled_from([100, 127, 128, 1000]), st.booleans(),
)  # fmt: skip
def test_bytes_and_float32_give_the_same_integers(seed, inputs, outputs, k, bits, shift, largest, signed):
    """Also where some output channels have weights that take two bytes, and at the ends of the inputs' range."""
    if not kernels.bytes_are_exact():
        pytest.skip("this processor multiplies no bytes exactly")
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-3, 4, (outputs, inputs, k, k), generator=generator).float()
    # some rows and columns hold large weights, in the kernel's middle or anywhere
    reach = seed % (k // 2 + 1)
    middle = weight[:: 2 + outputs // 7, :: 1 + seed % 3, k // 2 - reach : k // 2 + reach + 1]
    middle.copy_(torch.randint(-largest, largest + 1, middle.shape, generator=generator))
    bias = torch.randint(-9999, 9999, (outputs,), generator=generator).double()
    shifts = (shift - torch.randint(0, 4, (outputs,), generator=generator)).clamp(min=1)
    lowest = -(1 << bits) if signed else 0
    x = torch.randint(lowest, (1 << bits) + 1, (1, inputs, 6, 8), generator=generator).float()
    x[:, :, 0], x[:, :, 1] = lowest, 1 << bits
    x = x.contiguous(memory_format=torch.channels_last)
    sums = nn.functional.conv2d(x.double(), weight.double(), bias, padding=k // 2)
    expected = (sums / torch.exp2(shifts.double()).view(1, -1, 1, 1)).floor().clamp(-2000, 2000).float()
    common = (weight, bias, shifts, (-2000, 2000))
    if (weight.abs().sum((1, 2, 3)) * (1 << bits) + bias.abs()).max() <= kernels.LIMIT:
        exact = kernels.FloatKernel(*common, [slice(None)], (1, 1), k // 2, x.device)
        assert torch.equal(exact(x), expected)
    if kernels.ByteKernel.fits(*common[:3], k // 2, bits):
        assert torch.equal(kernels.ByteKernel(*common, (1, 1), k // 2, bits, signed)(x), expected)


def test_bytes_serve_a_network_of_the_papers_widths():
    """The speed rests on it, where the processor has the instructions."""
    if not kernels.bytes_are_exact():
        pytest.skip("this processor multiplies no bytes exactly")
    torch.manual_seed(0)
    kernel = Kernel.of(nn.Conv2d(224, 128, 5, padding=2))
    p = torch.full((224,), 9)
    q, chunks = integer.sums_for(kernel, p, 11, False, 3)
    layer = ExactLayer(kernel, p, q, q - 8, chunks, bits=11, signed=False, relu=True)
    x = torch.randint(0, 1 << 11, (1, 224, 6, 8)).float()
    assert torch.equal(layer(x), numpy_layer(layer, x))
    fits = kernels.ByteKernel.fits(layer.weight.float(), layer.bias.double(), layer.q - layer.r, 2, 11)
    assert fits and chunks == 3


@pytest.mark.parametrize(
    "padding, k, stride", [(2, 5, (1, 1)), (1, 3, (1, 1)), (0, 1, (1, 1)), (0, 5, (2, 1))]
)
def test_a_convolution_by_matrix_product_is_the_convolution(padding, k, stride):
    """What a GPU runs, on a CPU: integers must come out alike to the last bit."""
    x = torch.randint(-2000, 2000, (1, 24, 9, 12)).float()
    weight, bias = torch.randint(-5, 5, (7, 24, k, k)).float(), torch.randint(-9, 9, (7,)).float()
    ours = kernels.conv2d_by_matmul(x, weight, bias, stride, padding)
    assert torch.equal(ours, nn.functional.conv2d(x, weight, bias, stride, padding))


@pytest.mark.parametrize("k, stride", [(5, 2), (3, 1), (3, 2), (5, 1), (5, 3), (1, 1)])
def test_a_transposed_convolution_by_a_plain_one_is_the_convolution(k, stride):
    x = torch.randint(-2000, 2000, (1, 24, 5, 7)).float()
    weight = torch.randint(-5, 5, (24, 7, k, k)).float()
    transposed = integer.Convolution("transposed", stride)
    (kernel,) = transposed.plain(weight.transpose(0, 1))
    ours = transposed.arranged([nn.functional.conv2d(x, kernel, padding=kernel.shape[2] // 2)])
    theirs = nn.functional.conv_transpose2d(x, weight, None, stride, k // 2, output_padding=stride - 1)
    assert torch.equal(ours, theirs)


def test_a_codec_by_matrix_products_decodes_the_same(monkeypatch):
    codec, (file, digest) = (
        load(TINY),
        next((f, d) for f, d in expected().items() if f.startswith("tiny@200")),
    )

    monkeypatch.setattr(integer, "bytes_are_exact", lambda: False)
    monkeypatch.setattr(kernels.F, "conv2d", kernels.conv2d_by_matmul)
    assert latents_digest(codec, TINY.parent / file) == digest


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_golden_files_decode_alike_on_a_gpu():
    codec = load(TINY, device="cuda")
    for file, digest in expected().items():
        if file.startswith("tiny"):
            assert latents_digest(codec, TINY.parent / file) == digest


def test_taps_that_meet_no_anchor_count_for_nothing():
    kernel = Kernel.of(nn.Conv2d(3, 4, 5, padding=2), "anchors")
    assert int((kernel.weight != 0).any(0).any(0).sum()) == 12
    x, ones = torch.randn(1, 3, 6, 4).double(), torch.ones(4, 3, 5, 5).double()
    full = look_at_anchors(x, ones, None)
    assert torch.allclose(full, look_at_anchors(x, ones * (kernel.weight != 0), None))


# Tables ------------------------------------------------------------------------------------------------------------------


def test_no_rounding_of_erfc_or_exp_reaches_the_tables():
    """No probability or scale lies so near a step that a library's last bits, and a hundred times more, move it across."""

    def counts(values):
        return np.round(np.float32(values).astype(np.float64) * 65536)

    for row in map(np.float64, integer.gaussian_pmfs()):
        assert (counts(row * (1 + 1e-13) + 1e-14) == counts(np.maximum(row * (1 - 1e-13) - 1e-14, 0))).all()
    for scale in integer.scale_steps():
        assert abs(scale * 2**integer.SCALE_BITS % 1 - 0.5) > 1e-6
        assert abs(scale * 6.109410204869 - round(scale * 6.109410204869)) > 1e-6


def test_integers_cost_hardly_a_byte():
    codec, sample = load("demo"), datasets("sample")[0][0]
    cost = integer_cost(codec, sample.image, sample.captions[0])
    file = codec.encode(sample.image, sample.captions[0])
    assert 20 <= len(file) - cost["bytes, integers"] <= 24, "the header and the checksums"
    assert abs(cost["difference, %"]) < 1 and cost["bytes, floating point"] > 1000


def test_tables_are_compressais_but_for_rounding():
    net = make_net()
    ours, theirs = net.integer_model().tables(), net.tables()
    for a, b in zip(ours, theirs):
        assert a.offsets == b.offsets and a.lengths == b.lengths
        assert max(abs(m - n) for x, y in zip(a.cdfs, b.cdfs) for m, n in zip(x, y)) <= 32


def test_tables_that_compressai_made_do_not_matter():
    used, fresh = make_net(), make_net()
    used.update()
    used.entropy_bottleneck._quantized_cdf[:, 3] += 1
    assert IntegerModel(used).digest() == IntegerModel(fresh).digest()


# Saved with the weights --------------------------------------------------------------------------------------------------


def test_the_form_that_was_saved_is_kept(tmp_path, monkeypatch):
    """A later change of how grids are derived leaves the decoder of the files that are there."""
    codec = make_codec()
    data = codec.encode(picture(), CAPTION)
    about = {"experiment": {"text_encoder": "untrained-16", "text_tokens": 8}}
    checkpoint.save_weights(tmp_path / "a.safetensors", codec.net, about)
    monkeypatch.setattr(integer, "_MARGIN", 11)
    assert make_codec().fingerprint != codec.fingerprint
    loaded = load(tmp_path / "a.safetensors")
    assert loaded.fingerprint == codec.fingerprint and loaded.decode(data) == codec.decode(data)
    again = pickle.loads(pickle.dumps(loaded.net))
    assert Codec(again).fingerprint == Codec(copy.deepcopy(loaded.net)).fingerprint == codec.fingerprint


def forged(change) -> bytes:
    state = json.loads(zlib.decompress(make_net().integer_model().state()))
    change(state)
    return zlib.compress(json.dumps(state).encode())


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["networks"]["h_s"]["layers"].pop(),
        lambda state: state["networks"].pop("local_context.1"),
        # exponents at which sums could leave float32
        lambda state: state["networks"]["h_s"]["layers"][0].__setitem__(slice(0, 2), [[40] * 16, [39] * 16]),
        lambda state: state["networks"]["local_context.0"].update(input=[-40] * 4),
        lambda state: state["networks"]["h_s"]["layers"][0].__setitem__(2, 0),
        lambda state: state["networks"]["local_context.0"].update(input=[2]),
        lambda state: state["y"][3].__setitem__(0, -1),
        lambda state: state["y"].pop(),
        lambda state: state["z"].pop(),
        lambda state: state.update(medians=[1, 2]),
        lambda state: state.update(thresholds="none"),
    ],
)
def test_a_damaged_integer_form_is_refused(change):
    with pytest.raises(CheckpointError):
        IntegerModel(make_net(), forged(change))


@pytest.mark.parametrize("state", [b"", b"x" * 100, zlib.compress(b"[]"), zlib.compress(bytes(1 << 27))])
def test_what_is_no_integer_form_is_refused(state):
    with pytest.raises(CheckpointError, match="integer form"):
        IntegerModel(make_net(), state)


# Identity follows the values ----------------------------------------------------------------------------------------------


def retrained(net: TACO) -> None:
    optimizer = torch.optim.SGD(net.train().parameters(), 0.5)
    out = net(torch.rand(1, 3, 64, 64), torch.randn(1, 4, net.config.text_dim))
    (out["x_hat"].square().mean() - sum(p.log2().mean() for p in out["likelihoods"].values())).backward()
    optimizer.step()
    net.eval()


CHANGES = {
    "load_state_dict": lambda net: net.load_state_dict(make_net(1).state_dict()),
    "a training step": retrained,
    "through .data": lambda net: net.h_s.increase[0].weight.data.mul_(1.5),
    "the synthesis alone": lambda net: net.g_s.synthesis_transform[1].bias.data.add_(0.1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_files_bear_the_fingerprint_of_the_weights_as_they_are(change):
    codec = make_codec()
    old = codec.encode(picture(), CAPTION)
    change(codec.net)
    data = codec.encode(picture(), CAPTION)
    twin = Codec(make_net())
    twin.net.load_state_dict(codec.net.state_dict())
    assert twin.fingerprint == codec.fingerprint != make_codec().fingerprint
    assert twin.decode(data) == codec.decode(data)
    for reader, file in ((codec, old), (make_codec(), data)):
        with pytest.raises(WrongWeightsError):
            reader.decode(file)


def test_the_encoder_alone_may_change():
    codec = make_codec()
    before = codec.fingerprint
    codec.net.g_a.analysis_transform[0].weight.data.mul_(1.1)
    assert codec.fingerprint == before
    assert make_codec().decode(codec.encode(picture(), CAPTION)).size == (128, 64)


# What surrounds it ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["the network", "its parts"])
def test_a_compiled_network_is_the_same_codec(part):
    plain = make_codec()
    data, codec = plain.encode(picture(), CAPTION), make_codec()
    if part == "the network":
        codec.net = torch.compile(codec.net, backend="eager")
    else:
        for name in ("g_a", "g_s", "h_a", "h_s"):
            setattr(codec.net, name, torch.compile(getattr(codec.net, name), backend="eager"))
    assert codec.fingerprint == plain.fingerprint
    assert torch.equal(codec.decode_latents(data), plain.decode_latents(data))
    assert codec.encode(picture(), CAPTION) == data


def test_a_checkpoint_of_a_compiled_network_is_read(tmp_path):
    net = make_net(heads=8)
    state = {f"_orig_mod.{key}": value for key, value in net.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "compiled.pth.tar")
    assert load(tmp_path / "compiled.pth.tar").fingerprint == Codec(net).fingerprint


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_a_lowered_precision_does_not_reach_in(precision):
    codec = make_codec()
    data = codec.encode(picture(), CAPTION)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert make_codec().encode(picture(), CAPTION) == data
        assert torch.equal(make_codec().decode_tensor(data), codec.decode_tensor(data))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


new_settings = pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="PyTorch before 2.9")


def precisions() -> list[str]:
    backends = torch.backends
    owners = (backends.mkldnn.conv, backends.mkldnn.matmul, backends.cudnn.conv, backends.cuda.matmul)
    return [owner.fp32_precision for owner in owners]


@new_settings
@pytest.mark.parametrize("everywhere", [True, False])
def test_everything_that_lowers_float32_is_off_in_a_codec(everywhere):
    """The settings themselves, since few processors heed them."""
    seen, codec = [], make_codec()
    for part in (codec.net.g_a, codec.net.h_a, codec.net.g_s):
        part.register_forward_hook(lambda *_: seen.append(precisions()))
    start = precisions()
    with precision_put_back():
        if everywhere:
            torch.backends.fp32_precision = "bf16"
        else:
            torch.set_float32_matmul_precision("medium")
        lowered = precisions()
        assert "bf16" in lowered
        codec.decode(codec.encode(picture(), CAPTION))
        assert seen == [["ieee"] * 4] * 3
        assert precisions() == lowered
    assert precisions() == start


@new_settings
def test_precision_is_put_back_after_the_last_thread_and_after_errors():
    start, inside, ends = precisions(), threading.Barrier(2), []

    def first():
        with full_float32("cpu"):
            inside.wait(60)  # both are in
            inside.wait(60)  # the other has left
            ends.append(precisions())

    thread = threading.Thread(target=first)
    thread.start()
    with pytest.raises(KeyError), full_float32("cpu"):
        inside.wait(60)
        raise KeyError
    inside.wait(60)
    thread.join()
    assert ends == [["ieee"] * 4] and precisions() == start


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_somebodys_autocast_does_not_reach_in(kind):
    codec = make_codec()
    data = codec.encode(picture(), CAPTION)
    with torch.autocast("cpu", kind):
        again = make_codec()  # whose integer form is derived here
        assert again.encode(picture(), CAPTION) == data
        assert torch.equal(again.decode_latents(data), codec.decode_latents(data))


# Habits of CompressAI's users ------------------------------------------------------------------------------------------


def test_a_codec_can_be_pickled_and_copied():
    codec = make_codec()
    data = codec.encode(picture(), CAPTION)
    for again in (pickle.loads(pickle.dumps(codec)), copy.deepcopy(codec)):
        assert again.decode(data) == codec.decode(data) and again.encode(picture(), CAPTION) == data
    assert pickle.loads(pickle.dumps(make_net().train())).training


def test_half_precision_is_a_sentence():
    codec = make_codec()
    codec.net.half()
    for use in (
        lambda: codec.encode(picture(), CAPTION),
        lambda: codec.net.compress(torch.zeros(1, 3, 64, 64)),
    ):
        with pytest.raises(SettingError, match="float16.*needs float32.*float()"):
            use()
    assert Codec(make_net().half(), "untrained-16", 8).encode(picture(), CAPTION)


def test_float64_as_default_changes_nothing(tmp_path):
    checkpoint.save_weights(tmp_path / "a.safetensors", make_net(), {})
    plain = make_codec()
    data = plain.encode(picture(), CAPTION)
    torch.set_default_dtype(torch.float64)
    try:
        codec = load(tmp_path / "a.safetensors", text_encoder="untrained-16")
        assert codec.fingerprint == plain.fingerprint and codec.decode(data) == plain.decode(data)
        assert codec.encode(picture(), CAPTION)
    finally:
        torch.set_default_dtype(torch.float32)


def test_update_takes_compressais_arguments():
    net = make_net()
    assert net.update() is net.update(force=True) is net.update(force=True, update_quantiles=True) is True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("estimate", [False, True])
def test_compressais_own_program_evaluates_a_taco(tmp_path, monkeypatch, capsys, estimate):
    from compressai.utils.eval_model import __main__ as program

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    picture(256, 192).save(pictures / "a.png")
    torch.save({"state_dict": make_net(heads=8).state_dict()}, tmp_path / "taco.pth.tar")
    for known in (program.architectures, program.pretrained_models):
        monkeypatch.setitem(known, "taco", TACO)
    arguments = ["checkpoint", str(pictures), "-a", "taco", "-p", str(tmp_path / "taco.pth.tar")]
    program.main(arguments + ["--entropy-estimation"] * estimate)
    results = json.loads(capsys.readouterr().out)["results"]
    assert results["bpp"][0] > 0 and results["psnr-rgb"][0] > 0


def test_images_of_several_sizes_are_coded_at_once():
    from concurrent.futures import ThreadPoolExecutor

    codec = make_codec()
    assert codec.tower is not None and codec.fingerprint
    sizes = [(64, 64), (128, 64), (64, 192)]
    expected = {size: codec.encode(picture(*size), CAPTION) for size in sizes}
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda size: (size, codec.encode(picture(*size), CAPTION)), sizes * 10))
    assert all(data == expected[size] for size, data in done)
