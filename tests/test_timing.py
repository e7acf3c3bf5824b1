"""The timing study measures what it says, and its conclusion follows from its measurements."""

from __future__ import annotations

import json
import math
import statistics
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from compressai.models import Elic2022Official
from conftest import TINY, make_net, with_answers
from test_notebooks import FOLDER, code_cells

from taco_nb import Codec, timing
from taco_nb.experiment import baseline
from taco_nb.inspection import attention_flops
from taco_nb.model import ModelConfig
from taco_nb.model.adapter import Injector
from taco_nb.model.attention import CrossAttention
from taco_nb.tools import bench

TINY_EXP = baseline("sample", sizes=TINY, linformer_k=4)
LINUX = pytest.mark.skipif(
    not math.isfinite(timing._peak_memory(lambda: None, "cpu")), reason="needs glibc on Linux"
)


# How things are measured ---------------------------------------------------------------------------------------------


def test_a_machine_that_is_busy_for_a_while_does_not_change_the_ratio(monkeypatch):
    """Runs take turns, so neighbours in time are compared; here the machine works at half its speed in the end."""
    now, order = [0.0], []
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def work(name: str, seconds: float) -> None:
        order.append(name)
        now[0] += seconds * (2 if len(order) > 8 else 1)

    runs = {"slow": lambda: work("slow", 0.004), "fast": lambda: work("fast", 0.001)}
    rows = timing.time_in_turn(runs, "cpu", 5)
    assert order == ["slow", "fast"] * 7, "two unmeasured runs of each, and five measured ones"
    assert rows["slow"]["speedup"] == 1 and rows["fast"]["speedup"] == pytest.approx(4)
    slow = [rows["slow"][f"{what}_ms"] for what in ("q25", "median", "q75", "mean")]
    assert slow == pytest.approx([4, 8, 8, 6.4]) and rows["slow"]["runs"] == 5


@LINUX
def test_peak_memory_is_what_a_run_takes_at_once():
    def peak(run):
        """Of five, since the system now and then takes pages from a process, or gives it some, beside what it runs."""
        return statistics.median(timing._peak_memory(run, "cpu") for _ in range(5))

    held = torch.ones(32 << 20, dtype=torch.uint8)
    one_after_the_other = peak(lambda: [torch.ones(64 << 20, dtype=torch.uint8).any() for _ in range(3)])
    at_once = peak(lambda: sum(len(t) for t in [torch.ones(64 << 20, dtype=torch.uint8) for _ in range(3)]))
    assert held.any() and 60 < one_after_the_other < 100 and 180 < at_once < 220


@LINUX
def test_what_starts_but_once_is_nobodys_memory():
    kept = []

    def run() -> None:
        if not kept:
            kept.append(torch.ones(64 << 20, dtype=torch.uint8))

    rows = timing.time_in_turn({"first": run, "second": run}, "cpu", 1)
    assert kept and rows["first"]["peak_mib"] < 32 and rows["second"]["peak_mib"] < 32


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_timed_step_of_training_reaches_every_weight_and_changes_none(bfloat16):
    net = make_net()
    before = {name: weight.clone() for name, weight in net.named_parameters()}
    timing.training_step(net, torch.rand(2, 3, 64, 64), torch.randn(2, 8, 16), bfloat16=bfloat16)()
    for name, weight in net.named_parameters():
        assert torch.equal(weight, before[name])
        assert weight.grad is not None


# The sweeps ----------------------------------------------------------------------------------------------------------


def test_a_widened_injector_attends_over_concatenated_features():
    torch.manual_seed(0)
    wide = timing.Widened(Injector(24, 16, CrossAttention(24, 2)), 3)
    x, text = torch.randn(2, 8, 3, 5), torch.randn(2, 4, 16)
    torch.nn.init.normal_(wide.injector.gamma)
    assert torch.equal(wide(x, text), wide.injector(torch.cat([x, x, x], 1), text)[:, :8])
    net = timing.widened(ModelConfig(**TINY), 3)
    layers = net.g_a.analysis_transform
    assert [layers[i].injector.text_feature_dim_proj.out_features for i in (8, 15)] == [24, 24]
    assert layers[14].image_feature_dim_proj.in_features == 8
    assert net.eval()(torch.rand(1, 3, 64, 64), torch.randn(1, 8, 16))["x_hat"].shape == (1, 3, 64, 64)


@pytest.fixture(scope="module")
def sweeps() -> tuple[pd.DataFrame, pd.DataFrame]:
    widths = timing.width_sweep(TINY_EXP, (1, 2), 2, side=64)
    return widths, timing.length_sweep(TINY_EXP, (64, 128), (38, 154), 1)


def test_sweeps_measure_every_combination(sweeps):
    widths, lengths = sweeps
    assert list(widths.groupby(["width", "pass", "attention"]).size()) == [1] * 8
    assert set(widths["width"]) == {8, 16} and set(widths["runs"]) == {2}
    assert list(lengths.groupby(["side", "tokens", "part", "attention"]).size()) == [1] * 16
    for table in sweeps:
        assert (table[["median_ms", "mean_ms", "gflop", "gflop_per_s"]] > 0).all(axis=None)
    flops = widths.pivot(index="width", columns=["pass", "attention"], values="gflop")
    assert (flops["training"] > 2 * flops["inference"]).all(axis=None)
    assert (flops.loc[16] > flops.loc[8]).all()


def test_counted_operations_of_the_attention_are_the_formulas(sweeps):
    """Attention itself grows with the tokens as counted by hand; the linear layers around it grow with them alike."""
    _, lengths = sweeps
    alone = lengths[(lengths["part"] == "attention") & (lengths["side"] == 128)]
    flops = {name: table.set_index("tokens")["gflop"] * 1e9 for name, table in alone.groupby("attention")}
    quarter, eighth, N, wide = 32 * 32, 16 * 16, TINY["N"], TINY["text_dim"]

    def by_hand(tokens: int, k: int | None) -> int:
        return (attention_flops(quarter, tokens, N, k) + attention_flops(eighth, tokens, N, k)
                + attention_flops(tokens, eighth, wide, k))  # fmt: skip

    for tokens in (38, 154):
        difference = flops["softmax"][tokens] - flops["linformer"][tokens]
        assert difference == pytest.approx(by_hand(tokens, None) - by_hand(tokens, 4))


# What follows --------------------------------------------------------------------------------------------------------


def test_exponents_are_the_slopes():
    sizes = np.array([1, 2, 5, 10])
    assert timing.exponent(sizes, 3 * sizes**1.7) == pytest.approx(1.7)


@pytest.mark.parametrize(
    "ratio, tokens",
    [
        ([2, 1, 0.5], 20),
        ([2, 0.5, 0.25], 10 * 2**0.5),
        ([0.9, 0.8, 0.7], 10),
        ([0.9, 1.1, 1.2], None),
        ([2, 2, 1], None),
    ],
)
def test_linformer_pays_from_where_it_is_quicker_for_good(ratio, tokens):
    found = timing.break_even([10, 20, 40], ratio)
    assert found == (tokens if tokens is None else pytest.approx(tokens))


def made_up(
    share: float, ratio: float, over_widths: tuple[float, float] = (1, 1), spread: float = 0.01
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Sweeps of a machine on which attention is this share of the encoder, half of that of the whole network, and Linformer
    this much slower or quicker.

    `over_widths` is by how much over the width sweep, where the quartiles lie off the median by the share `spread`.
    """
    rows = [
        {"side": 256, "tokens": tokens, "attention": name, "part": part, "gflop": value, "median_ms": value}
        for tokens in (38, 380)
        for name, factor in (("softmax", 1), ("linformer", ratio))
        for part, value in (
            ("attention", 10 * share * factor),
            ("encoder", 10 * (1 - share) + 10 * share * factor),
        )
    ]
    widths = [
        {"width": width, "attention": name, "pass": kind, "median_ms": value,
         "q25_ms": value * (1 - spread), "q75_ms": value * (1 + spread)}
        for width, factor in zip((8, 16), over_widths) for kind in ("inference", "training")
        for name, value in (("softmax", 20), ("linformer", 20 * factor))
    ]  # fmt: skip
    return pd.DataFrame(widths), pd.DataFrame(rows)


NULL = "So a null result is what these figures predict."


def test_the_conclusion_is_what_was_measured():
    small = timing.conclusion(*made_up(0.1, 1.2, (1.02, 0.98)))
    assert "and width 8, the three" in small and "take 10% of the encoder's time" in small
    assert "5% of the whole network's time" in small
    assert "make the network 1.05 times as fast. Over widths up to 16" in small
    assert "0.98 to 1.02 times softmax's in training" in small
    assert "at no length measured" in small and small.endswith(NULL)
    large = timing.conclusion(*made_up(0.6, 0.5))
    assert "take 60%" in large and large.endswith(
        "shows no difference, though the share would have let one show."
    )
    assert "is quicker at 256 x 256 from 38 tokens on, the fewest measured. So" in large
    widths, lengths = made_up(0.6, 0.5)
    lengths.loc[(lengths["tokens"] == 38) & (lengths["attention"] == "linformer"), "median_ms"] *= 4
    assert "is quicker at 256 x 256 from about 120 tokens on" in timing.conclusion(widths, lengths)


@pytest.mark.parametrize(
    "over_widths, spread, differ",
    [((1, 0.32), 0.01, 2), ((1.5, 1.5), 0.1, 4), ((1, 0.8), 0.2, 0), ((1.08, 1), 0, 0)],
)
def test_a_null_result_needs_widths_without_a_difference(over_widths, spread, differ):
    said = timing.conclusion(*made_up(0.1, 0.9, over_widths, spread))
    assert said.endswith(NULL) == (not differ)
    assert (
        differ == 0 or f"So in {differ} of 4 cases of the width sweep the two differ by 10% or more" in said
    )


def test_shares_are_ratios_of_times():
    table = timing.attention_shares(made_up(0.6, 0.5)[1])
    assert table["time_share"].tolist() == pytest.approx([0.6, 0.6])
    assert table["attention_ratio"].tolist() == pytest.approx([0.5, 0.5])
    assert table["encoder_ratio"].tolist() == pytest.approx([0.7, 0.7])


def test_results_are_kept_with_where_they_came_from(sweeps, tmp_path):
    timing.save_timing(tmp_path / "run", widths=sweeps[0], lengths=sweeps[1])
    kept = pd.read_csv(tmp_path / "run" / "widths.csv")
    assert kept.columns.tolist() == sweeps[0].columns.tolist() and len(kept) == 8
    said = json.loads((tmp_path / "run" / "timing.json").read_text())
    assert {"hardware", "packages", "commit"} <= said.keys()


# The notebook and the benchmark --------------------------------------------------------------------------------------


def test_the_notebook_runs_and_ends_in_its_conclusion(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    small = {"profile": "sample", "out_dir": str(tmp_path / "runs"), "n_pairs": 1}
    path = with_answers("05_timing", tmp_path)
    source = path.read_text(encoding="utf-8")
    for all_of_them, few in (
        ("factors=(1, 2, 4, 8)", "factors=(1, 2)"),
        ("(38, 154, 616, 2464)", "(38, 616)"),
    ):
        assert source.count(all_of_them) == 1
        source = source.replace(all_of_them, few)
    path.write_text(source, encoding="utf-8")
    papermill.execute_notebook(str(path), str(tmp_path / "out.ipynb"), small, progress_bar=False)
    cells = code_cells(nbformat.read(tmp_path / "out.ipynb", 4))
    assert all(output.output_type != "error" for cell in cells for output in cell.outputs)
    (folder,) = (tmp_path / "runs").iterdir()
    widths, lengths = (pd.read_csv(folder / f"{name}.csv") for name in ("widths", "lengths"))
    (last,) = (cell for cell in cells if "conclusion(widths" in cell.source)
    assert last.outputs[-1].text.strip() == timing.conclusion(widths, lengths)


def test_the_benchmark_compares_like_with_like(tmp_path, monkeypatch, capsys):
    """The real networks at a small size: three codecs in turn, a training step, and where the time goes."""
    elic = bench.Elic.__new__(bench.Elic)
    elic.net, elic.device = Elic2022Official(N=16, M=144).eval(), "cpu"
    elic.net.update()
    codecs = {mode: Codec(make_net(), "untrained-16", mode=mode) for mode in ("exact", "fast")}
    monkeypatch.setattr(bench, "SIZE", (64, 64))
    monkeypatch.setattr(bench, "Elic", lambda device: elic)
    monkeypatch.setattr(bench, "paper_codecs", lambda device: codecs)
    monkeypatch.setattr(bench, "peak_memory", lambda name, width, height: 100.0)  # tested below
    bench.bench("cpu", 2, tmp_path, large=False)
    said = capsys.readouterr()
    assert bench.REFERENCE in said.out and "entropy networks" in said.out and "9/9" in said.err
    table, where, memory = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("speed", "parts", "memory"))
    assert list(table["codec"]) == [bench.REFERENCE, "exact", "fast"] * 3
    assert list(table["task"].unique()) == ["encode", "decode", "training step"]
    assert (table["median_ms"] > 0).all() and (table[table["task"] == "encode"]["bytes"] > 20).all()
    assert set(where[where["task"] == "both"]["part"]) == {"entropy networks", "fingerprint"}
    assert set(where[where["task"] == "decode"]["part"]) == {
        "coder, decoding",
        "entropy part, decoding",
        "g_s",
    }
    assert {"text", "g_a", "h_a", "entropy part, encoding"} < set(where[where["task"] == "encode"]["part"])
    assert (where["median_ms"] > 0).all()
    assert list(memory["codec"]) == [bench.REFERENCE, *("exact", "fast") * 2]
    assert json.loads((tmp_path / "bench.json").read_text())["device"] == "cpu"


def test_memory_is_that_of_a_process_of_its_own_alone():
    held = torch.ones(1 << 31, dtype=torch.uint8)  # by the process that starts it
    assert 200 < bench.peak_memory("exact", 64, 64) < 1900 < held.numel() / timing.MIB
