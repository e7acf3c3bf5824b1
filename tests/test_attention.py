"""Linformer's attention against softmax attention, against its formulas, and at sizes it was not trained on."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from taco_nb.errors import SettingError
from taco_nb.inspection import attention_flops, energy
from taco_nb.model import TACO, ModelConfig
from taco_nb.model.adapter import make_attentions
from taco_nb.model.attention import CrossAttention, LengthProjection, LinformerAttention

DIM, HEADS = 16, 4
SMALL = ModelConfig(
    N=16, M=24, groups=(4, 4, 4, 4, 8), text_dim=16, heads=4, context_widths=(16, 16), image_grid=8
)
LINFORMER = dataclasses.replace(SMALL, attention="linformer", linformer_k=6)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(3)


def linformer(k, grid):
    return LinformerAttention(DIM, HEADS, LengthProjection(k, grid), LengthProjection(k, grid))


def test_identity_projections_make_it_softmax_attention():
    softmax, linear = CrossAttention(DIM, HEADS), linformer(12, (3, 4))
    linear.load_state_dict(softmax.state_dict(), strict=False)
    for projection in (linear.project_k, linear.project_v):
        projection.weight.data = torch.eye(12).reshape(12, 3, 4)
    queries, keys = torch.randn(2, 7, DIM), torch.randn(2, 12, DIM)
    torch.testing.assert_close(linear(queries, keys, (3, 4)), softmax(queries, keys, (3, 4)))
    torch.testing.assert_close(linear.weights(queries, keys, (3, 4)), softmax.weights(queries, keys, (3, 4)))


@pytest.mark.parametrize("grid", [(16, 16), (8, 8), (32, 48), (33, 17), (5, 3), (1, 1), (100, 100)])
def test_a_constant_field_is_projected_alike_at_every_size(grid):
    projection = LengthProjection(6, (16, 16))
    torch.testing.assert_close(projection(grid).sum(1), projection.weight.sum((1, 2)), atol=1e-5, rtol=1e-5)
    attention = linformer(6, (16, 16))
    queries, value = torch.randn(1, 5, DIM), torch.randn(DIM)
    trained = attention(queries, value.expand(1, 256, DIM), (16, 16))
    here = attention(queries, value.expand(1, grid[0] * grid[1], DIM), grid)
    torch.testing.assert_close(here, trained, atol=1e-5, rtol=1e-4)


def test_a_smooth_field_is_projected_nearly_alike_at_twice_the_size():
    smooth = torch.nn.functional.interpolate(torch.randn(1, 1, 4, 4), (32, 32), mode="bicubic")
    projection = LengthProjection(6, (32, 32))
    projection.weight.data = torch.nn.functional.interpolate(
        torch.randn(1, 6, 4, 4), (32, 32), mode="bicubic"
    )[0]
    small = projection((32, 32)) @ smooth.flatten()
    large = torch.nn.functional.interpolate(smooth, (64, 64), mode="bilinear").flatten()
    assert (projection((64, 64)) @ large - small).norm() < 0.05 * small.norm()


def test_masked_tokens_leave_no_trace():
    attention = linformer(6, (1, 9))
    queries, keys = torch.randn(1, 5, DIM), torch.randn(1, 9, DIM)
    mask = torch.arange(9)[None] < 6
    changed = torch.where(mask[..., None], keys, torch.randn(1, 9, DIM))
    assert torch.equal(attention(queries, keys, (1, 9), mask), attention(queries, changed, (1, 9), mask))
    assert not attention.weights(queries, keys, (1, 9), mask)[..., 6:].any()
    torch.testing.assert_close(
        attention(queries, keys, (1, 9), mask), attention(queries, keys[:, :6], (1, 6))
    )


def test_weights_times_values_is_the_attention():
    attention = linformer(6, (1, 9))
    queries, keys = torch.randn(2, 5, DIM), torch.randn(2, 9, DIM)
    _, _, values = attention._project(queries, keys)
    expected = attention.out_proj(
        (attention.weights(queries, keys, (1, 9)) @ values).transpose(1, 2).flatten(2)
    )
    torch.testing.assert_close(attention(queries, keys, (1, 9)), expected)


@pytest.mark.parametrize("sharing, projections", [("none", 6), ("key-value", 3), ("layerwise", 2)])
def test_sharing_and_the_number_of_parameters(sharing, projections):
    config = dataclasses.replace(LINFORMER, linformer_sharing=sharing)
    layers = torch.nn.ModuleList(make_attentions(config))
    maps = [m for m in layers.modules() if isinstance(m, LengthProjection)]
    assert len(set(maps)) == projections
    text, image = 6 * config.text_tokens, 6 * config.image_grid**2
    wanted = {"none": 4 * text + 2 * image, "key-value": 2 * text + image, "layerwise": text + image}[sharing]
    extra = sum(p.numel() for p in TACO(config).parameters()) - sum(
        p.numel() for p in TACO(SMALL).parameters()
    )
    assert extra == wanted


@pytest.mark.parametrize("k", [None, 6])
def test_flops_are_those_of_the_formula(k):
    attention = CrossAttention(DIM, HEADS) if k is None else linformer(k, (1, 9))
    q, kk, v = attention._project(torch.randn(1, 50, DIM), torch.randn(1, 9, DIM))
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        attention._attend(q, kk, v, (1, 9), None)
    assert counter.get_total_flops() == attention_flops(50, 9, DIM, k)


@pytest.mark.parametrize("size", [(64, 64), (128, 192), (256, 64)])
def test_a_model_encodes_sizes_and_captions_it_was_not_trained_on(size):
    net = TACO(dataclasses.replace(LINFORMER, linformer_sharing="layerwise")).eval()
    for layer in (8, 15):
        torch.nn.init.normal_(net.g_a.analysis_transform[layer].gamma)
    x = torch.rand(1, 3, *size)
    with torch.no_grad():
        latents = [net.g_a(x, torch.randn(1, tokens, 16)) for tokens in (38, 77, 1)]
    assert all(torch.isfinite(y).all() for y in latents)
    assert not torch.allclose(latents[0], latents[1])


def test_training_reaches_the_projections():
    net = TACO(LINFORMER)
    for layer in (8, 15):
        torch.nn.init.normal_(net.g_a.analysis_transform[layer].gamma)
    net(torch.rand(1, 3, 64, 64), torch.randn(1, 38, 16))["x_hat"].square().mean().backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if ".project_" in name}
    assert len(gradients) == 6 and all(g is not None and g.abs().sum() > 0 for g in gradients.values())


def test_energy_tells_the_rank():
    matrix = torch.randn(3, 40, 4) @ torch.randn(3, 4, 20)
    shares = energy(matrix)
    assert shares.shape == (20,) and shares[3] > 1 - 1e-5 and shares[0] < 0.9
    assert (shares.diff() >= -1e-6).all()


@pytest.mark.parametrize(
    "change", [{"attention": "linear"}, {"linformer_sharing": "all"}, {"linformer_k": 0}]
)
def test_settings_out_of_range(change):
    with pytest.raises(SettingError, match=next(iter(change))):
        dataclasses.replace(LINFORMER, **change)
