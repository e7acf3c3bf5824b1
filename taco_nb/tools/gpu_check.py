"""`taco-nb bench --gpu-check` runs on a GPU all that could only be counted without one, and writes down what it finds.

It needs no network. Where trained weights are not on the machine, random ones take their place, which costs as much time.
Each check is a line of the table, and one that fails stops no other. On a processor the same checks run in a small form,
without those that start other programs, and show no more than that the check itself works.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from taco_nb.codec import load
from taco_nb.experiment import DEMO_SIZES, Experiment
from taco_nb.files import REPOSITORY, atomic_write
from taco_nb.inspection import training_flops
from taco_nb.model.precision import peak_flops, quick_training
from taco_nb.pretrained import ALEXNET, CLIP_B32
from taco_nb.processes import check_device
from taco_nb.provenance import provenance
from taco_nb.tools import bench
from taco_nb.tools.bench import CAPTION, photograph
from taco_nb.training.loop import COMPILED_FROM, STATE, Resources, Trainer, compile_mode, make_accelerator

SECONDS = 6 * 60
"""No check begins later than this. The last takes four minutes, most of which compiling takes."""
PROGRAM_SECONDS = 3 * 60
"""No program goes on for longer than this."""
WARM_UP, STEPS = 5, 20

Row = dict[str, Any]


def portable_files(device: str, folder: Path) -> Iterator[Row]:
    """Decode on the processor what the device has encoded, and the other way round, and compare y_hat symbol by symbol."""
    image = photograph(200, 130)
    codecs = {"demo": (load("demo"), load("demo", device=device))}
    codecs["paper size"] = tuple(bench.paper_codecs(where)["exact"] for where in ("cpu", device))
    for name, (here, there) in codecs.items():
        for writer, reader in ((here, there), (there, here)):
            file = writer.encode(image, CAPTION)
            same = torch.equal(writer.decode_latents(file).cpu(), reader.decode_latents(file).cpu())
            apart = (writer.decode_tensor(file).cpu() - reader.decode_tensor(file).cpu()).abs().max().item()
            way = f"{writer.device.type} to {reader.device.type}"
            yield {
                "codec": name,
                "way": way,
                "bytes": len(file),
                "ok": same,
                "largest difference of pixels": apart,
            }


def golden_files(device: str, folder: Path) -> Iterator[Row]:
    """Decode the files that the tests keep, which were written elsewhere: they decode to the right latents or not at all.

    CompressAI's strings of the same pictures, which are not portable, are counted where they come out as on the processor.
    """
    codecs = {}
    for path in sorted((REPOSITORY / "tests" / "golden").glob("demo*.taco")):
        name = path.name.partition("@")[0]
        codecs[name] = codecs.get(name) or load(name, device=device)
        yield {"file": path.name, "ok": codecs[name].decode(path).size == (192, 128)}
    x, text = torch.rand(1, 3, 128, 192), torch.randn(1, 38, DEMO_SIZES.text_dim)
    strings = [
        load("demo", device=where).net.compress(x.to(where), text.to(where))["strings"]
        for where in ("cpu", device)
    ]
    equal = [a == b for kinds in zip(*strings) for a, b in zip(*kinds)]
    yield {"file": "CompressAI's strings", "ok": None, "equal": f"{sum(equal)} of {len(equal)}"}


def training(device: str, folder: Path) -> Iterator[Row]:
    """Time steps of the paper's experiment, in either precision, compiled and not; the losses must agree within one."""
    small = device == "cpu"
    pictures = folder / "pictures"
    pictures.mkdir()
    exp = Experiment(train_data=str(pictures), epochs=1000)
    if small:
        exp = exp.replace(
            sizes=DEMO_SIZES, crop=64, batch_size=2, text_encoder="untrained-128", k_J=0.0, k_P=0.0
        )
    elif CLIP_B32.path is None:
        exp = exp.replace(text_encoder=f"ViT-B-32-quickgelu/{_random_clip(folder)}")
    if ALEXNET.path is None:
        exp = exp.replace(perceptual="mini_distance")
    for i in range(exp.batch_size):
        photograph(exp.crop + i, exp.crop).save(pictures / f"{i}.png")
    (pictures / "captions.json").write_text(json.dumps({f"{i}.png": CAPTION for i in range(exp.batch_size)}))
    for precision in ("float32", "bfloat16"):
        plain = None
        for compile in dict.fromkeys(("off", compile_mode("auto", torch.device(device), 1, COMPILED_FROM))):
            began = time.monotonic()
            try:
                row = _steps(exp.replace(precision=precision), device, compile)
                if compile == "off":
                    plain = row["loss"]
                bound = 1e-3 if precision == "float32" else 1e-2
                row["ok"] = plain is not None and abs(row["loss"] / plain - 1) < bound
            except Exception as error:  # the other ways to train are tried all the same
                row = {"precision": precision, "compile": compile, **_failure(error)}
            yield {**row, "s in all": time.monotonic() - began}


def _random_clip(folder: Path) -> Path:
    """Write a CLIP ViT-B/32 with random weights, and return its file."""
    import open_clip

    path = folder / "clip.pt"
    torch.save(open_clip.create_model("ViT-B-32-quickgelu").state_dict(), path)
    return path


def _steps(exp: Experiment, device: str, compile: str) -> Row:
    """Return what steps of `exp` take, all on one batch: the loader is timed elsewhere."""
    accelerator = make_accelerator(device, exp.precision)
    on_gpu = device == "cuda"
    warm_up, steps = (WARM_UP, STEPS) if on_gpu else (1, 1)
    with quick_training(accelerator.device):
        trainer = Trainer(
            exp, Path(os.devnull), Resources(device=device, num_workers=0, compile=compile), accelerator
        )
        batch = next(trainer.batches_to_come())
        for step in range(warm_up + steps):
            if step == warm_up:
                if on_gpu:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                began = time.perf_counter()
            trainer.train_step(*batch)
        loss = trainer._log_row()["loss"]  # which waits for the GPU
        seconds = (time.perf_counter() - began) / steps
    peak, rate = peak_flops(trainer.device, exp.precision), exp.batch_size / seconds
    row = {"arithmetic": trainer.arithmetic, "ms per step": 1e3 * seconds, "images/s": rate}
    row["MFU"] = rate * training_flops(exp) / peak if peak else None
    row["GiB"] = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    accelerator.free_memory()
    return {**row, "loss": loss}


def beside_elic(device: str, folder: Path) -> Iterator[Row]:
    """Time both modes beside CompressAI's ELIC: a picture of 768x512, crops of 256x256, and a plain training step."""
    for row in bench.speed(device, 3, 5).to_dict("records"):
        yield {
            "task": row["task"],
            "codec": row["codec"],
            "ms": row["median_ms"],
            "speedup": row["speedup"],
            "ok": None,
        }


def _run(*words: str) -> Row:
    """Run a program of Python's, and return whether it went well, with the last line that it wrote if it did not."""
    words, pipe = (sys.executable, "-m", *words), subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            error = process.communicate(timeout=PROGRAM_SECONDS)[1]
        except subprocess.TimeoutExpired:
            # With it goes what it has started, such as a notebook's kernel, which is in a group of its own.
            for started in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    started.kill()
            process.kill()
            error = process.communicate()[1] + f"\nnot over after {PROGRAM_SECONDS} seconds"
    if process.returncode == 0:
        return {"ok": True}
    print(error, file=sys.stderr)
    return {"ok": False, "error": (error.strip().splitlines() or ["nothing was said"])[-1]}


def _training(folder: Path, device: str) -> list[str]:
    words = ["taco_nb.training", "--profile", "sample", "--set", "epochs=2", "--out", str(folder)]
    return [*words, "--device", device]


def resumed(device: str, folder: Path) -> Iterator[Row]:
    """Kill a run once it has saved its state, and go on with it."""
    run, end = folder / "killed", time.monotonic() + 120
    words = [sys.executable, "-m", *_training(run, device), "--save-minutes", "0"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (run / STATE).is_file() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    yield {"killed": process.returncode == -signal.SIGKILL, **_run(*_training(run, device))}


def two_at_once(device: str, folder: Path) -> Iterator[Row]:
    """Train two runs on one GPU at the same time."""
    with ThreadPoolExecutor() as pool:
        yield from pool.map(lambda name: _run(*_training(folder / name, device)), ("one", "other"))


def notebooks(device: str, folder: Path) -> Iterator[Row]:
    """Run notebooks 03 and 05 with papermill, for two epochs of the bundled pictures."""
    for name, parameters in (("03_linformer", ["epochs", "2"]), ("05_timing", ["n_pairs", "5"])):
        words = ["papermill", str(REPOSITORY / "notebooks" / f"{name}.ipynb"), str(folder / f"{name}.ipynb")]
        words += ["-p", "profile", "sample", "-p", "device", device, "-p", "out_dir", str(folder / "runs")]
        began = time.monotonic()
        yield {"notebook": name, **_run(*words, "-p", *parameters), "s": time.monotonic() - began}


Check = Callable[[str, Path], Iterator[Row]]
FILES: dict[str, Check] = {"golden files": golden_files, "portable files": portable_files}
PROGRAMS: dict[str, Check] = {
    "resume after a kill": resumed,
    "two runs at once": two_at_once,
    "notebooks": notebooks,
}
"""These start other programs, all at the same time. On a processor the tests do all of it, and take minutes."""
TIMED: dict[str, Check] = {"beside ELIC": beside_elic, "training": training}
"""These have the machine to themselves. Compiling makes the last the longest."""


def gpu_check(device: str, out: Path) -> bool:
    """Run all checks, print their table, and say whether all went well.

    gpu_check.json and gpu_check.md in the folder `out` are written after each check, so that what was found stays if the
    rest is stopped.
    """
    check_device(device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    about = provenance()
    about = {"device": device, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), **about}
    results: dict[str, Row] = {}

    def keep(name: str, result: Row) -> None:
        results[name] = result
        with atomic_write(out / "gpu_check.json", "w") as file:
            json.dump({**about, "checks": results}, file, indent=1)
        with atomic_write(out / "gpu_check.md", "w") as file:
            file.write(as_markdown(about, results))

    with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng(), ThreadPoolExecutor() as pool:
        torch.manual_seed(0)
        arguments = device, scratch, time.monotonic() + SECONDS
        programs = PROGRAMS if device == "cuda" else {}
        elsewhere = {name: pool.submit(_outcome, name, run, *arguments) for name, run in programs.items()}
        for name, run in FILES.items():
            keep(name, _outcome(name, run, *arguments))
        for name, future in elsewhere.items():
            keep(name, future.result())
        for name, run in TIMED.items():
            keep(name, _outcome(name, run, *arguments))
    print(as_markdown(about, results))
    return not any(row["ok"] is False for result in results.values() for row in result["rows"])


def _outcome(name: str, check: Check, device: str, scratch: str, end: float) -> Row:
    """Return the rows of a check, and how long it took. An error is a row too: it is the finding, and the others go on."""
    began, rows = time.monotonic(), []
    try:
        if began > end:
            raise TimeoutError(f"not begun after {SECONDS} seconds")
        for row in check(device, Path(scratch)):
            rows.append(row)
    except Exception as error:
        rows.append(_failure(error))
    seconds = time.monotonic() - began
    print(f"{name}: {seconds:.1f} s", flush=True)
    return {"seconds": seconds, "rows": rows}


def _failure(error: Exception) -> Row:
    traceback.print_exception(error)
    return {"ok": False, "error": f"{type(error).__name__}: {error}".splitlines()[0]}


def as_markdown(about: dict[str, Any], results: dict[str, Row]) -> str:
    """Return the results as one Markdown table, under a line that says on what they were found."""
    hardware = about["hardware"]
    lines = [
        f"{', '.join(hardware['gpus']) or hardware['cpu']}; PyTorch {about['packages']['torch']}, CUDA {about['cuda']}, "
        f"commit {about['commit']}",
        "",
        "| check | result | figures |",
        "| --- | --- | --- |",
    ]
    said = {True: "ok", False: "FAILED", None: "–"}
    for name, result in results.items():
        for row in result["rows"]:
            figures = [
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in row.items()
                if key != "ok" and value is not None
            ]
            lines.append(f"| {name} | {said[row['ok']]} | {', '.join(figures)} |")
    return "\n".join(lines) + "\n"
