"""Captions from a server on loopback that speaks OpenAI's API, with every fault that costs money, and from a tiny CoCa."""

import ast
import base64
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import signal
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from conftest import command
from openai import OpenAI
from openai_server import KEY, Fault, OpenAIServer
from PIL import Image

from taco_nb.data import CaptionedFolder, datasets
from taco_nb.errors import CheckpointError, DataError, MissingWeightsError, SettingError
from taco_nb.text.answers import OPEN, Answer, Answers, Question, answer_key
from taco_nb.text.chat_keywords import chat_keywords
from taco_nb.tools.captions import (
    CoCaCaptioner,
    OpenAIBatchCaptioner,
    OpenAICaptioner,
    Price,
    ServiceError,
    batch,
)
from taco_nb.tools.captions import coca as write
from taco_nb.tools.captions.captioner import (
    CaptionCache,
    image_id,
    is_flagged,
    look_at,
    look_up,
    unanswered,
)
from taco_nb.tools.captions.openai_captioner import image_tokens
from taco_nb.tools.captions.service import PRICES, read_answer

ROOT = Path(__file__).resolve().parents[1]
FORK = multiprocessing.get_context("fork")  # a new process would import torch for long


@pytest.fixture(autouse=True)
def said(monkeypatch, tmp_path, capfd, caplog):
    """The key is in the environment, and afterwards in no file, no output and no log; `said()` is what was printed."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    caplog.set_level(logging.DEBUG)
    printed = []

    def read():
        printed.append("".join(capfd.readouterr()))
        return printed[-1]

    yield read
    read()
    assert KEY not in "".join(printed) + caplog.text
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


@pytest.fixture
def server():
    with OpenAIServer() as server:
        yield server


@pytest.fixture
def pictures(tmp_path):
    """Makes data sets of so many small pictures."""
    generator = np.random.default_rng(1)

    def make(count, folder="images", size=(12, 8)):
        root = tmp_path / folder
        root.mkdir()
        for i in range(count):
            pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"{i:02}.png")
        return read_folder(root)

    return make


def read_folder(root):
    names = [path.name for path in root.iterdir() if path.suffix != ".json"]
    (root / "none.json").write_text(json.dumps(dict.fromkeys(names, "")))
    return CaptionedFolder(root, root / "none.json")


@pytest.fixture
def captioner(server, tmp_path):
    """Makes captioners of the server, on one cache."""

    def make(kind=OpenAICaptioner, **settings):
        return kind(tmp_path / "cache.sqlite", base_url=server.url, **settings)

    return make


@pytest.fixture
def pauses(monkeypatch):
    """The seconds that a batch captioner has waited, without waiting."""
    pauses = []
    monkeypatch.setattr(batch, "time", SimpleNamespace(sleep=pauses.append))
    return pauses


@pytest.fixture
def batches(captioner, pauses):
    """Makes captioners that use the Batch API."""
    return partial(captioner, OpenAIBatchCaptioner)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "captions.json"


def captions_of(out):
    return json.loads(out.read_text())


# --- What is asked, and what becomes of the answers -------------------------------------------------------------------


def test_every_image_gets_its_captions_in_the_form_of_a_captioned_folder(server, pictures, captioner, out):
    dataset = pictures(3)
    report = captioner().describe(dataset, out, count=2, confirm=True)
    captions = [caption for captions in captions_of(out).values() for caption in captions]
    assert server.paid.total() == len(set(captions)) == 6 and set(server.paid.values()) == {2}
    assert CaptionedFolder(dataset._entries[0].path.parent, out).names == dataset.names
    assert report.complete and report.new == 6 and "600 + 120 tokens" in str(report)
    assert report.dollars == pytest.approx((600 * 2.5 + 120 * 10) / 1e6)
    assert str(out) in str(report) and "All 6 captions" in str(report)


def test_the_request_is_the_reports(server, pictures, captioner, out):
    reference = json.loads((ROOT / "data" / "reference" / "report.json").read_text())["context"]
    dataset = pictures(1, size=(60, 30))
    captioner(longest_side=40).describe(dataset, out, confirm=True)
    (body,) = server.bodies
    text, image = body["messages"][0]["content"]
    assert (body["model"], body["temperature"], text["text"]) == (
        reference["captioner"], reference["temperature"], reference["prompt"],
    )  # fmt: skip
    kind, data = image["image_url"]["url"].split(",")
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/jpeg;base64" and (picture.format, picture.mode, picture.size) == (
        "JPEG",
        "RGB",
        (40, 20),
    )
    mean = np.asarray(dataset[0].image).mean(axis=(0, 1))
    np.testing.assert_allclose(np.asarray(picture).mean(axis=(0, 1)), mean, atol=4)


def test_nothing_is_sent_without_confirmation_and_the_price_is_said(
    server, pictures, captioner, out, said, monkeypatch
):
    monkeypatch.delenv("OPENAI_API_KEY")
    report = captioner().describe(pictures(2), out, count=3)
    assert server.requests == [] and not out.exists() and not report.complete
    for text in (said(), str(report.estimate)):
        assert "6 to be paid for" in text and "$0.0" in text and "estimate" in text and "April 2026" in text
    assert "confirm=True" in str(report) and "0 of 6" in str(report)


def test_what_is_cached_needs_neither_network_nor_key_nor_confirmation(
    server, pictures, captioner, out, monkeypatch
):
    dataset = pictures(2)
    captioner().describe(dataset, out, confirm=True)
    first, made = out.read_text(), len(server.requests)
    out.unlink()
    monkeypatch.delenv("OPENAI_API_KEY")
    report = captioner().describe(dataset, out)
    assert report.complete and report.new == 0 and report.estimate is None
    assert out.read_text() == first and len(server.requests) == made


def test_more_captions_more_images_and_other_settings_cost_only_what_is_new(
    server, pictures, captioner, out, said
):
    few, more = pictures(2), pictures(2, "more")
    captioner().describe(few, out, confirm=True)
    captioner().describe(few, out, count=3, confirm=True)
    assert server.paid.total() == 6
    assert "6 captions wanted, 2 cached, 4 to be paid for" in said()
    captioner().describe(more, out, confirm=True)
    assert server.paid.total() == 8
    captioner(longest_side=4, workers=1, max_tokens=50).describe(few, out, count=3, confirm=True)
    assert server.paid.total() == 8
    for total, other in enumerate([{"model": "another"}, {"prompt": "Another."}, {"temperature": 0.5}], 1):
        captioner(**other).describe(few, out, confirm=True)
        assert server.paid.total() == 8 + 2 * total


def test_a_picture_under_two_names_is_asked_once(server, pictures, captioner, out):
    dataset = pictures(2)
    root = dataset._entries[0].path.parent
    dataset[0].image.save(root / "again.bmp")
    report = captioner().describe(read_folder(root), out, count=2, confirm=True)
    assert server.paid.total() == 4 and report.complete
    assert captions_of(out)["again.bmp"] == captions_of(out)["00.png"] != captions_of(out)["01.png"]


def test_what_a_batch_that_is_still_open_has_answered_is_not_asked_again(pictures, captioner, tmp_path):
    """A crash can come between the answers of a batch and its end."""
    asked = captioner().question
    (picture,) = look_at(pictures(1), asked, 1)
    with CaptionCache(tmp_path / "answers.sqlite") as cache:
        cache.add([(picture.keys[0], Answer("As an AI language model, I see nothing."))])
        assert unanswered([picture], cache, retry_flagged=True).keys() == set(picture.keys)
        cache.open_job("job", picture.keys)
        assert not unanswered([picture], cache, retry_flagged=True)
        assert [wanted.state for wanted in look_up([picture], cache)] == ["submitted"]


def test_the_bound_on_requests_at_a_time_is_used_and_kept(server, pictures, captioner, out):
    server.chat_faults += [Fault(delay=0.1)] * 9
    captioner(workers=3).describe(pictures(9), out, confirm=True)
    assert server.most_at_once == 3


# --- The estimate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, detail, tokens",
    [
        ((1024, 1024), "high", 765),  # the first three are the examples of OpenAI's guide
        ((2048, 4096), "high", 1105),
        ((4096, 8192), "low", 85),
        ((640, 480), "auto", 85 + 2 * 170),
        ((512, 512), "high", 85 + 170),
        ((513, 512), "high", 85 + 2 * 170),
        ((1, 1), "high", 85 + 170),
        ((5000, 3), "high", 85 + 4 * 170),
    ],
)
def test_tokens_of_an_image(size, detail, tokens):
    assert image_tokens(size, detail, PRICES["gpt-4o-2024-11-20"]) == tokens


def test_the_estimate_against_a_computation_by_hand(pictures, captioner, batches, out, said):
    dataset = pictures(3, size=(640, 480))
    estimate = captioner().describe(dataset, out, count=5).estimate
    assert (estimate.requests, estimate.input_tokens, estimate.output_tokens) == (
        15,
        15 * (425 + 33),
        15 * 200,
    )
    assert estimate.dollars == pytest.approx((6870 * 2.50 + 3000 * 10.00) / 1e6)
    halved = batches().describe(dataset, out, count=5).estimate
    assert halved.dollars == pytest.approx(estimate.dollars / 2) and "halved" in str(halved)
    small = captioner(detail="low", longest_side=300, expected_tokens=10).describe(dataset, out).estimate
    assert (small.input_tokens, small.output_tokens) == (3 * (85 + 33), 30)
    fitted = captioner(longest_side=512).describe(dataset, out).estimate
    assert fitted.input_tokens == 3 * (85 + 170 + 33)
    said()


def test_an_unknown_price_is_said_to_be_unknown_and_can_be_given(pictures, captioner, out):
    dataset = pictures(1)
    unknown = captioner(model="llava").describe(dataset, out).estimate
    assert unknown.dollars is None and "unknown" in str(unknown) and "price=" in str(unknown)
    given = (
        captioner(model="llava", price=Price(1.0, 0.0, "a price list of 2030", 7, 0))
        .describe(dataset, out)
        .estimate
    )
    assert given.dollars == pytest.approx((7 + 33) / 1e6) and "2030" in str(given)


# --- Faults of the service --------------------------------------------------------------------------------------------


def test_a_rate_limit_is_waited_out_as_long_as_the_service_says(server, pictures, captioner, out):
    server.chat_faults.append(Fault(429, headers={"retry-after": "1"}))
    assert captioner().describe(pictures(1), out, confirm=True).complete
    first, second = [when for _, when in server.requests]
    assert 1 <= second - first < 2  # the client's own first pause is half a second
    assert server.paid.total() == 1


@pytest.mark.parametrize(
    "faults",
    [[Fault(500), Fault(503)], [Fault(cut=True)], [Fault(delay=2)]],
    ids=["500 and 503", "cut", "time-out"],
)
def test_passing_faults_are_tried_again(server, pictures, captioner, out, faults):
    server.chat_faults += faults
    report = captioner(timeout=0.5).describe(pictures(1), out, confirm=True)
    assert report.complete and report.new == 1
    assert server.count("POST /v1/chat/completions") == 1 + len(faults)


@pytest.mark.parametrize(
    "fault, reason",
    [
        (Fault(change={"content": None, "refusal": "No, thank you."}), "refused: No, thank you."),
        (Fault(change={"content": "<think>\nA barn?\n</think>\n"}), "empty"),
        (Fault(change={"content": "<think>\nA barn, or perhaps", "finish_reason": "length"}), "cut off"),
        (Fault(change={"content": None, "reasoning_content": "A barn?"}), "empty"),
        (Fault(change={"content": "A half", "finish_reason": "content_filter"}), "content filter"),
        (Fault(change={"content": "A half", "finish_reason": "length"}), "cut off"),
        (Fault(change={"content": " \n "}), "empty"),
        (Fault(raw=b'{"choices": [{"message"'), "malformed"),
        (Fault(raw=b"<html>a proxy's page</html>"), "malformed"),
        (Fault(raw=b'{"choices": []}'), "malformed"),
        (Fault(raw=b"[" * 100_000), "malformed"),
        (Fault(change={"content": ["a", "list"]}), "malformed"),
        (Fault(change={"content": "half of a pair \ud83d"}), "malformed"),
        (Fault(change={"refusal": "half of a pair \ud83d"}), "malformed"),
        (Fault(422, {"message": "half of a pair \ud83d"}), "(422): half of a pair ?"),
        (Fault(raw=b'{"error": "' + KEY.encode() + b'"}'), "malformed"),
        (
            Fault(change={"content": None, "refusal": f"Not with {KEY}."}),
            "refused: Not with [OPENAI_API_KEY]",
        ),
        (
            Fault(400, {"message": f"Bad image from {KEY}."}),
            "rejected by the service (400): Bad image from [OPENAI",
        ),
    ],
)
def test_an_answer_that_is_no_caption_is_recorded_and_never_becomes_one(
    server, pictures, captioner, out, fault, reason
):
    dataset = pictures(2)
    server.chat_faults += [None, fault]
    report = captioner(workers=1).describe(dataset, out, confirm=True)
    assert report.missing.keys() == {"01.png"} and reason in report.missing["01.png"][0]
    assert not report.complete and not out.exists()
    assert "01.png" in str(report) and reason in str(report) and "retry_failed=True" in str(report)

    made = len(server.requests)
    again = captioner().describe(dataset, out, confirm=True)
    assert again.missing == report.missing and len(server.requests) == made  # not asked again unasked
    assert captioner().describe(dataset, out, confirm=True, retry_failed=True).complete
    assert len(server.requests) == made + 1 and captions_of(out).keys() == set(dataset.names)


def read(text, **message):
    return read_answer({"choices": [{"message": {"content": text, **message}, "finish_reason": "stop"}]})


@pytest.mark.parametrize(
    "text",
    [
        "I apologize, but I cannot help with this picture.",
        "I'm really sorry, but I can't describe people.",
        "I’m sorry.",
        "As an AI language model, I have no access to the picture.",
        "Unfortunately, I'm unable to view images.",
        "The user wants a caption of a barn.",
        "Here is a detailed description of your image: a barn.",
        "The sign says: I'm sorry.",
    ],
)
def test_texts_about_the_asker_or_the_task_are_kept_and_flagged(text):
    answer = read(text)
    assert answer == Answer(text) and is_flagged(answer)


@pytest.mark.parametrize(
    "text",
    [
        "I see a dog.",
        "I canvas the scene: a barn.",
        "Unfortunately for the dog, the ball is on the roof.",
        "Sorrel horses graze.",
        "Sorry sheep stand in the rain.",
        "I love New York, says the shirt of a man who cannot swim.",
        "A user interface with three buttons, and workers at their task.",
        "This image shows an air conditioner, which helps the picture of a tidy room.",
    ],
)
def test_true_captions_that_begin_or_sound_alike_are_not_flagged(text):
    answer = read(text)
    assert answer == Answer(text) and not is_flagged(answer)


@pytest.mark.parametrize(
    "text",
    [
        "<think>\nThe user wants a caption.\n</think>\n\nA red barn.",
        "A sentence, I think.\n</think>\nA red barn.",
        "<THINK>one</THINK> <think>two</think>A red barn.",
        "<thinking>I cannot tell.</thinking>A red barn.",
    ],
)
def test_the_thoughts_of_a_reasoning_model_are_no_part_of_a_caption(text):
    answer = read(text, reasoning_content="The user wants a caption.", reasoning="Also this.")
    assert answer == Answer("A red barn.") and not is_flagged(answer)


def test_flagged_captions_are_written_counted_and_asked_again_only_when_told(
    server, pictures, captioner, out, said
):
    dataset = pictures(3)
    refusal = "I'm sorry, but I can't help with that."
    server.chat_faults += [None, Fault(change={"content": refusal})]
    report = captioner(workers=1).describe(dataset, out, confirm=True)
    assert report.complete and captions_of(out)["01.png"] == [refusal]
    assert report.flagged == {"01.png": [refusal]} and "the asker or the task: 1, of 01.png" in str(report)
    again = captioner().describe(dataset, out, confirm=True, retry_failed=True)
    assert again.flagged == report.flagged and server.paid.total() == 3
    assert "1 to be paid for" in str(captioner().describe(dataset, out, retry_flagged=True).estimate)
    assert captions_of(out)["01.png"] == [refusal] and server.paid.total() == 3

    server.chat_faults += [Fault(500)] * 2  # nothing is lost, and the next call goes on
    report = captioner(max_retries=1).describe(dataset, out, confirm=True, retry_flagged=True)
    assert report.missing == {"01.png": ["HTTP 500: no"]}
    with CaptionCache(out.parent / "cache.sqlite") as cache:
        assert refusal in [text for (text,) in cache._read("SELECT text FROM answers")]
    report = captioner().describe(dataset, out, confirm=True)
    assert report.complete and not report.flagged and server.paid.total() == 4


def test_a_structured_answer_is_asked_for_where_the_server_takes_it(server, pictures, captioner, out):
    dataset = pictures(2)
    captioner().describe(dataset, out, confirm=True)
    assert all("response_format" not in body for body in server.bodies)  # the report's model was not asked so
    captioner(structured=True, prompt="Once more.").describe(dataset, out, confirm=True)
    assert server.bodies[-1]["response_format"]["json_schema"]["strict"] is True
    assert all(caption.startswith("A picture") for (caption,) in captions_of(out).values())
    server.takes_structure = False
    report = captioner(structured=True, prompt="And again.").describe(dataset, out, confirm=True)
    assert report.complete and server.paid.total() == 6 and "response_format" not in server.bodies[-1]


def test_the_report_counts_what_is_missing_by_its_reason(server, pictures, captioner, out):
    server.chat_faults += [
        Fault(change={"content": None, "refusal": "No."}),
        Fault(change={"content": ""}),
        Fault(change={"content": None, "refusal": "Never."}),
    ]
    report = captioner(workers=1).describe(pictures(4), out, confirm=True)
    assert "Missing: 3 (2 refused, 1 empty)" in str(report)


def test_what_got_no_answer_is_reported_and_asked_again(server, pictures, captioner, out):
    dataset = pictures(3)
    server.chat_faults += [Fault(500), None, Fault(429)]
    report = captioner(workers=1, max_retries=0).describe(dataset, out, confirm=True)
    assert report.missing == {"00.png": ["HTTP 500: no"], "02.png": ["HTTP 429: no"]}
    assert "Calling again" in str(report) and "retry_failed" not in str(report)
    assert captioner().describe(dataset, out, confirm=True).complete and server.paid.total() == 3


@pytest.mark.parametrize(
    "fault", [Fault(503), Fault(400, {"message": "Unsupported parameter"})], ids=["503", "400"]
)
def test_a_service_that_answers_nothing_is_left_alone(server, pictures, captioner, out, fault):
    server.chat_faults += [None] + [fault] * 40
    with pytest.raises(ServiceError, match="10 requests in a row"):
        captioner(workers=1, max_retries=0).describe(pictures(30), out, confirm=True)
    assert len(server.requests) <= 12 and server.paid.total() == 1
    server.chat_faults.clear()
    report = captioner().describe(read_folder(out.parent / "images"), out, confirm=True)
    assert report.complete and report.new == 29


def test_a_wrong_key_stops_at_once_and_is_not_shown(server, pictures, captioner, batches, out, monkeypatch):
    wrong = "sk-test-a-wrong-key"  # the server repeats it in its error
    monkeypatch.setenv("OPENAI_API_KEY", wrong)
    dataset = pictures(9)
    for asking, most in ((captioner(workers=2), 2), (batches(), 1)):
        before = len(server.requests)
        with pytest.raises(ServiceError, match="OPENAI_API_KEY.*401") as caught:
            asking.describe(dataset, out, confirm=True)
        assert wrong not in "".join(traceback.format_exception(caught.value)) + repr(asking) + repr(
            vars(asking)
        )
        assert len(server.requests) - before <= most
    assert server.paid.total() == 0


@pytest.mark.parametrize("key", ["", "  ", "sk-two words", "sk-ключ", "sk-line\nbreak"])
def test_a_key_that_cannot_be_sent_is_missed_in_words(server, pictures, captioner, out, key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(SettingError, match="OPENAI_API_KEY") as caught:
        captioner().describe(pictures(1), out, confirm=True)
    assert not key.strip() or key not in "".join(traceback.format_exception(caught.value))
    assert server.requests == []


@pytest.mark.parametrize(
    "fault, words",
    [
        (
            Fault(429, {"code": "insufficient_quota", "message": "You exceeded your quota."}),
            "no credit.*quota",
        ),
        (Fault(404, {"message": "The model does not exist."}), "does not know gpt-4o.*does not exist"),
        (Fault(403), "refuses the key"),
    ],
)
def test_what_no_repetition_mends_stops_and_keeps_the_answers(server, pictures, captioner, out, fault, words):
    dataset = pictures(5)
    server.chat_faults += [None, None] + [fault] * 20
    with pytest.raises(ServiceError, match=words):
        captioner(workers=1, max_retries=1).describe(dataset, out, confirm=True)
    server.chat_faults.clear()
    assert captioner().describe(dataset, out, confirm=True).new == 3 and server.paid.total() == 5


@pytest.mark.parametrize(
    "setting",
    [
        {"detail": "fine"}, {"base_url": "localhost:8000"}, {"workers": 0}, {"temperature": 3},
        {"max_retries": -1}, {"timeout": 0}, {"longest_side": True}, {"temperature": math.nan},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(setting):
    with pytest.raises(SettingError, match=next(iter(setting))):
        OpenAICaptioner("cache.sqlite", **setting)
    with pytest.raises(SettingError, match="open_batches"):
        OpenAIBatchCaptioner("cache.sqlite", open_batches=0)


# --- The file of answers ----------------------------------------------------------------------------------------------

ASKED = Question("model", "prompt", 1.0)


def write_answers(path, done):
    """Add answers one by one, and say after each how many are on disk."""
    with CaptionCache(path) as cache:
        while True:
            cache.add([(f"key {done.value}", Answer(f"caption {done.value} " * 50, None, 1, 2))])
            done.value += 1


def test_an_answer_is_never_lost_whenever_the_process_is_killed(tmp_path):
    path, done = tmp_path / "cache.sqlite", FORK.Value("q", 0, lock=False)
    for pause in np.random.default_rng(0).uniform(0, 0.2, 15):
        process, before = FORK.Process(target=write_answers, args=(path, done)), done.value
        process.start()
        while done.value == before:  # on a busy machine it may take a while to begin
            time.sleep(0.001)
        process.join(pause)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with CaptionCache(path) as cache:
            assert len(cache.get(f"key {number}" for number in range(done.value))) == done.value
            assert cache._read("PRAGMA integrity_check") == [("ok",)]
    assert done.value >= 15


def add_and_read(path, name, slowest):
    for number in range(100):
        start = time.monotonic()
        with CaptionCache(path) as cache:
            cache.add([(f"{name} {number}", Answer("a caption"))])
            assert len(cache.get(f"{name} {n}" for n in range(number + 1))) == number + 1
        slowest.value = max(slowest.value, time.monotonic() - start)


def test_several_processes_write_and_read_one_file(tmp_path):
    path = tmp_path / "cache.sqlite"
    slowest = [FORK.Value("d", 0.0) for _ in range(4)]
    processes = [
        FORK.Process(target=add_and_read, args=(path, name, value)) for name, value in enumerate(slowest)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
        assert process.exitcode == 0
    with CaptionCache(path) as cache:
        assert len(cache.get(f"{name} {number}" for name in range(4) for number in range(100))) == 400
    assert max(value.value for value in slowest) < 30  # the file is written in milliseconds


@pytest.mark.parametrize("kind", [OpenAICaptioner, OpenAIBatchCaptioner])
def test_two_processes_that_ask_the_same_pay_once(server, pictures, captioner, batches, out, kind):
    dataset = pictures(8)
    describe = partial(captioner(kind, workers=2).describe, dataset, out, confirm=True)
    server.hook = lambda event, server: time.sleep(0.05)
    processes = [FORK.Process(target=lambda: os._exit(not describe().complete)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
        assert process.exitcode == 0
    assert server.paid.total() == 8 and set(server.paid.values()) == {1}
    assert captions_of(out).keys() == set(dataset.names)


@pytest.mark.parametrize("damage", ["cut", "overwritten", "no SQLite", "JSON lines"])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, damage, pictures, captioner, out, server):
    path = tmp_path / "cache.sqlite"
    with CaptionCache(path) as cache:
        cache.add((f"{number:040}", Answer("a caption " * 20)) for number in range(500))
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut": whole[: len(whole) // 2],
            "overwritten": whole[:4096] + b"\0" * (len(whole) - 8192) + whole[-4096:],
            "no SQLite": b"no database" * 100,
            "JSON lines": b'{"key": "k", "text": "t", "failure": null, "tokens": [0, 0]}\n' * 9,
        }[damage]
    )
    with pytest.raises(DataError, match="cache.sqlite is damaged.*copy.*recover"):
        captioner().describe(pictures(1), out, confirm=True)
    assert server.requests == []


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path):
    with pytest.raises(DataError, match="cannot be read or written.*unable to open"), CaptionCache(tmp_path):
        pass
    (tmp_path / "file").touch()
    with (
        pytest.raises(DataError, match="cannot be read or written"),
        CaptionCache(tmp_path / "file" / "cache"),
    ):
        pass


def test_a_caption_is_never_replaced_and_a_failure_is(tmp_path):
    path = tmp_path / "cache.sqlite"
    with CaptionCache(path) as cache:
        for answer in (Answer("", "empty"), Answer("first"), Answer("", "empty"), Answer("second")):
            cache.add([("key", answer)])
        assert cache.get(["key", "none"]) == {"key": Answer("first")} and len(cache.added) == 2
        cache.reopen({"key": Answer("second")})  # another answer than the one that is there
        assert cache.get(["key"]) == {"key": Answer("first")}
        cache.reopen({"key": Answer("first")})
        assert cache.get(["key"]) == {"key": Answer("first", OPEN)}
        cache.add([("key", Answer("third"))])
    with CaptionCache(path) as cache:
        assert cache.get(["key"]) == {"key": Answer("third")}


def test_the_file_says_what_was_asked_and_its_keys_follow_the_pixels(tmp_path):
    with CaptionCache(tmp_path / "cache.sqlite") as cache:
        cache.note(ASKED)
        cache.note(ASKED)
        assert cache._read("SELECT * FROM questions") == [(ASKED.id, "model", "prompt", 1.0)]
    image = Image.new("RGB", (6, 4), "red")
    others = [Image.new("RGB", (4, 6), "red"), Image.new("RGB", (6, 4), (254, 0, 0))]
    assert image_id(image) == image_id(image.copy()) and image_id(image) not in map(image_id, others)
    assert Question("model", "prompt", 1).id == ASKED.id
    assert len(answer_key(image_id(image), ASKED, 99_999)) <= 64  # the most that a custom_id can be


def test_answers_are_looked_up_by_an_index(tmp_path):
    with CaptionCache(tmp_path / "cache.sqlite") as cache:
        queries = []
        cache._connection.set_trace_callback(queries.append)
        cache.get(["one", "two"])
        cache.submitted(["one"])
        plans = [cache._read(f"EXPLAIN QUERY PLAN {query}") for query in list(queries)]
    searched = {step.split()[1] for plan in plans for *_, step in plan if step.startswith("SEARCH")}
    assert searched == {"answers", "submitted"}


def test_no_number_is_made_of_bytes_in_an_order_that_python_3_10_wants_to_be_told():
    for path in (ROOT / "taco_nb").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("from_bytes", "to_bytes"):
                assert len(node.args) + len(node.keywords) >= 2, f"{path}, line {node.lineno}"


# --- The Batch API ----------------------------------------------------------------------------------------------------


def test_a_large_set_is_cut_into_files_within_the_limits(server, pictures, batches, out, monkeypatch, pauses):
    monkeypatch.setattr(batch, "MAX_REQUESTS", 4)
    server.polls = 3
    report = batches(open_batches=2).describe(pictures(5), out, count=2, confirm=True)
    assert report.complete and set(server.paid.values()) == {1} and server.paid.total() == 10
    assert len(set(itertools.chain(*captions_of(out).values()))) == 10
    files = [data.splitlines() for name, data in server.files.items() if "put" not in name]
    assert [len(lines) for lines in files] == [4, 4, 2]
    assert pauses[:3] == [30, 45, 67.5]
    assert all(len(json.loads(line)["custom_id"]) <= 64 for lines in files for line in lines)
    assert report.dollars == pytest.approx((1000 * 2.5 + 200 * 10) / 2e6)

    monkeypatch.setattr(batch, "MAX_BYTES", 3000)
    dataset = pictures(5, "more")
    server.files.clear()
    assert batches().describe(dataset, out, confirm=True).complete
    sizes = [len(data) for name, data in server.files.items() if "put" not in name]
    assert max(sizes) <= 3000 and len(sizes) > 1
    with CaptionCache(out.parent / "cache.sqlite") as cache:
        assert not cache.jobs()


def test_without_waiting_each_call_takes_what_is_there(
    server, pictures, batches, captioner, out, said, monkeypatch, pauses
):
    dataset = pictures(3)
    server.polls = 2
    describe = partial(batches(wait=False).describe, dataset, out)
    assert "confirm=True" in str(describe()) and server.requests == []
    report = describe(confirm=True)
    assert list(itertools.chain(*report.missing.values())) == ["in batch_1"] * 3
    assert "called again" in str(report)
    said()
    describe(confirm=True)
    printed = said()
    assert len(server.batches) == 1 and "3 submitted before" in printed and "1 in_progress" in printed
    assert "in batch_1" in str(captioner().describe(dataset, out, confirm=True)) and server.paid.total() == 0
    assert not describe(confirm=True).complete and describe(confirm=True).complete and pauses == []
    monkeypatch.delenv("OPENAI_API_KEY")
    assert batches().describe(dataset, out).complete and set(server.paid.values()) == {1}


def test_without_waiting_the_second_call_finishes_the_first(server, pictures, batches, out):
    dataset = pictures(3)
    server.polls = 0
    assert not batches(wait=False).describe(dataset, out, confirm=True).complete
    assert batches(wait=False).describe(dataset, out, confirm=True).complete and server.paid.total() == 3


@pytest.mark.parametrize("outcome", ["expired", "failed", "cancelled"])
def test_what_a_batch_left_unfinished_is_submitted_again_and_nothing_else(
    server, pictures, batches, out, outcome, monkeypatch
):
    monkeypatch.setattr(batch, "MAX_REQUESTS", 4)
    server.outcomes += ["completed", outcome]
    report = batches().describe(pictures(8), out, confirm=True)
    assert report.complete and set(server.paid.values()) == {1} and server.paid.total() == 8
    assert len(server.batches) == 3


def test_a_batch_that_its_owner_cancels(server, pictures, batches, out):
    dataset = pictures(4)
    batches(wait=False).describe(dataset, out, confirm=True)
    with OpenAI(base_url=server.url) as client:
        assert client.batches.cancel("batch_1").status == "cancelled"
    assert batches().describe(dataset, out, confirm=True).complete
    assert set(server.paid.values()) == {1} and server.paid.total() == 4


def test_batches_that_bring_nothing_are_not_submitted_for_ever(server, pictures, batches, out, monkeypatch):
    monkeypatch.setattr(batch, "MAX_REQUESTS", 1)
    server.outcomes += ["failed"] * 9
    report = batches(open_batches=2).describe(pictures(4), out, confirm=True)
    assert "batch_1 failed: Enqueued token limit" in str(report) and len(server.batches) == 2


def test_answers_and_errors_line_by_line(server, pictures, batches, out):
    dataset = pictures(6)
    server.line_faults = {
        1: Fault(change={"content": None, "refusal": "No."}),
        2: Fault(400, {"message": "Bad image."}),
        3: Fault(500, {"message": "Overloaded."}),
        4: Fault(change={"content": "Text\u2028with a line separator\x85."}),
        5: Fault(change={"content": "A half", "finish_reason": "length"}),
    }
    server.outcomes += ["completed", "failed"]  # of the second, which repeats what met a 500
    report = batches().describe(dataset, out, confirm=True)
    reasons = {name[1]: why[0] for name, why in report.missing.items()}
    assert (
        reasons["1"] == "refused: No."
        and "(400): Bad image" in reasons["2"]
        and "batch_2 failed" in reasons["3"]
    )
    assert reasons["5"].startswith("cut off") and reasons.keys() == {"1", "2", "3", "5"}
    server.line_faults.clear()
    report = batches().describe(dataset, out, confirm=True)
    assert report.missing.keys() == {"01.png", "02.png", "05.png"} and len(server.batches) == 3
    assert batches().describe(dataset, out, confirm=True, retry_failed=True).complete
    assert captions_of(out)["04.png"] == ["Text\u2028with a line separator\x85."]
    assert sorted(server.paid.values()) == [
        1,
        1,
        1,
        1,
        2,
        2,
    ]  # what was refused or cut off has been paid for twice


@pytest.mark.parametrize("outcome", ["lines broken", "files gone"])
def test_answers_that_cannot_be_read_are_not_paid_for_again_unasked(server, pictures, batches, out, outcome):
    dataset = pictures(3)
    server.outcomes.append(outcome)
    report = batches().describe(dataset, out, confirm=True)
    lost = {"lines broken": 1, "files gone": 3}[outcome]
    assert len(report.missing) == lost and "malformed: batch_1 holds no readable answer" in str(report)
    batches().describe(dataset, out, confirm=True)
    assert server.paid.total() == 3
    assert batches().describe(dataset, out, confirm=True, retry_failed=True).complete
    assert server.paid.total() == 3 + lost


@pytest.mark.parametrize("fault, creations", [(Fault(cut=True), 1), (Fault(500), 2), (Fault(429), 2)])
def test_a_batch_is_created_once_even_if_the_reply_is_lost(server, pictures, batches, out, fault, creations):
    for _ in range(3):  # older batches, so that the list has several pages
        server.create({"input_file_id": "file-0", "metadata": {"taco_nb_job": "another"}})
    server.create_faults.append(fault)
    assert batches().describe(pictures(2), out, confirm=True).complete
    assert len(server.batches) == 4 and server.count("POST /v1/batches") == creations
    assert set(server.paid.values()) == {1}


def test_a_batch_that_is_not_accepted(server, pictures, batches, out):
    server.create_faults.append(Fault(400, {"message": "Billing hard limit has been reached"}))
    with pytest.raises(ServiceError, match="Billing hard limit"):
        batches().describe(pictures(2), out, confirm=True)
    assert batches().describe(read_folder(out.parent / "images"), out, confirm=True).complete
    assert set(server.paid.values()) == {1}


def test_a_batch_that_the_service_does_not_know(server, pictures, batches, out):
    dataset = pictures(1)
    batches(wait=False).describe(dataset, out, confirm=True)
    server.batches.clear()
    with pytest.raises(ServiceError, match="batch_1.*give_up") as caught:
        batches().describe(dataset, out, confirm=True)
    assert f"OpenAIBatchCaptioner({str(out.parent / 'cache.sqlite')!r}).give_up('batch_1')" in str(
        caught.value
    )
    with pytest.raises(SettingError, match="knows of no batch 'batch_2'"):
        batches().give_up("batch_2")
    batches().give_up("batch_1")
    assert batches().describe(dataset, out, confirm=True).complete


# --- Sudden ends ------------------------------------------------------------------------------------------------------


def run_until(server, describe, ends, number):
    """Call describe() in a process of its own, and send that the signal as soon as ends(event, server) is true."""
    ended = []

    def hook(event, server):
        if not ended and ends(event, server):
            ended.append(event)
            os.kill(process.pid, number)
            if number == signal.SIGKILL:
                process.join()

    server.hook = hook
    process = FORK.Process(target=describe)
    process.start()
    process.join(600)
    assert process.exitcode != 0 and ended
    server.hook = lambda event, server: None


def test_kill_in_the_middle_loses_only_the_answers_in_flight(server, tmp_path, pictures, captioner, out):
    dataset = pictures(12)
    describe = partial(captioner(workers=3).describe, dataset, out, confirm=True)
    run_until(server, describe, lambda event, server: server.paid.total() == 7, signal.SIGKILL)
    with CaptionCache(tmp_path / "cache.sqlite") as cache:
        kept = [text.split()[2].rstrip(",") for (text,) in cache._read("SELECT text FROM answers")]
    assert 7 - 3 <= len(kept) <= 7 and not out.exists()
    paid = server.paid.total()
    report = captioner().describe(dataset, out, confirm=True)
    assert report.complete and report.new == 12 - len(kept) == server.paid.total() - paid
    assert {server.paid[picture] for picture in kept} == {1} and max(server.paid.values()) <= 2


def test_interrupt_waits_for_what_is_paid_for(server, pictures, captioner, out):
    dataset = pictures(12)
    describe = partial(captioner(workers=3).describe, dataset, out, confirm=True)
    run_until(server, describe, lambda event, server: server.paid.total() == 5, signal.SIGINT)
    paid = server.paid.total()
    assert 5 <= paid < 12
    report = captioner().describe(dataset, out, confirm=True)
    assert report.complete and report.new == 12 - paid and set(server.paid.values()) == {1}


@pytest.mark.parametrize(
    "where, name, at, done_before",
    [
        (ThreadPoolExecutor, "submit", 12 + 5, True),  # 12 read pictures; the fifth request is on its way
        (Answers, "add", 3, False),  # an answer has come, but is not saved
        (Answers, "add", 3, True),
    ],
)
def test_no_moment_is_bad_for_an_interrupt(
    server, pictures, captioner, out, monkeypatch, where, name, at, done_before
):
    real, calls = getattr(where, name), itertools.count(1)

    def interrupted(*arguments):
        """Ctrl-C reaches the main thread just before or just after this call."""
        now = next(calls) == at
        result = real(*arguments) if done_before or not now else None
        if now:
            raise KeyboardInterrupt
        return result

    dataset = pictures(12)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(where, name, interrupted)
        captioner(workers=3).describe(dataset, out, confirm=True)
    paid = server.paid.total()
    assert 0 < paid < 12
    report = captioner().describe(dataset, out, confirm=True)
    assert report.complete and report.new == 12 - paid and set(server.paid.values()) == {1}


@pytest.mark.parametrize("moment", ["upload", "created", "content"])
def test_kill_around_a_batch_pays_for_it_once(server, pictures, batches, out, moment):
    dataset = pictures(4)
    describe = partial(batches().describe, dataset, out, confirm=True)
    run_until(server, describe, lambda event, server: event == moment, signal.SIGKILL)
    assert not out.exists()
    report = batches().describe(dataset, out, confirm=True)
    assert report.complete and len(server.batches) == 1
    assert set(server.paid.values()) == {1} and server.paid.total() == 4


# --- CoCa -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coca(tmp_path_factory):
    """A tiny CoCa with random weights, large enough that the image matters, in which a caption ends after some 20 words."""
    folder = tmp_path_factory.mktemp("coca")
    tower = {"context_length": 76, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16,
            "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True,
        },
        "text_cfg": tower | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": tower | {"attn_pooler_heads": 2},
        "custom_text": True,
    }  # fmt: skip
    (folder / "coca_tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "coca_tiny.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model("coca_tiny", pretrained=None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5)
        decoder = model.text_decoder
        decoder.text_projection.mul_(0.5 * 49408**0.5)
        decoder.ln_final.bias.fill_(1.0)
        decoder.text_projection[:, open_clip.SimpleTokenizer().eot_token_id] = 15 / 32
    torch.save(model.state_dict(), folder / "weights.pt")
    return f"coca_tiny/{folder / 'weights.pt'}"


def test_coca_writes_captions_that_depend_on_image_and_index_only(coca, tmp_path, pictures, out, said):
    dataset = pictures(3)
    report = CoCaCaptioner(tmp_path / "coca.sqlite", model=coca).describe(dataset, out, count=2)
    assert report.new == 6 and report.dollars is None and "6 to be written here" in said()
    with CaptionCache(tmp_path / "coca.sqlite") as cache:
        together = cache.get(key for (key,) in cache._read("SELECT key FROM answers"))
    texts = [answer.text for answer in together.values() if answer.text]
    assert len(texts) == len(set(texts)) > 3
    assert {answer.failure for answer in together.values()} <= {None, "empty", "cut off after 75 tokens"}
    assert all(0 < answer.output_tokens < 75 for answer in together.values() if answer.failure is None)
    assert report.complete == out.exists() == all(answer.failure is None for answer in together.values())

    CoCaCaptioner(tmp_path / "alone.sqlite", model=coca, batch_size=1).describe(dataset, out, count=2)
    with CaptionCache(tmp_path / "alone.sqlite") as cache:
        assert cache.get(together) == together


def test_coca_at_temperature_0_is_what_open_clip_generates(coca, tmp_path, pictures, out):
    if not open_clip.coca_model._has_transformers:
        pytest.skip("open_clip's own CoCa.generate needs transformers below 4.57")
    dataset = pictures(2)
    CoCaCaptioner(tmp_path / "coca.sqlite", model=coca, temperature=0).describe(dataset, out)
    name, weights = coca.split("/", 1)
    model, preprocess = open_clip.create_model_from_pretrained(name, pretrained=weights)
    with CaptionCache(tmp_path / "coca.sqlite") as cache:
        texts = [text for (text,) in cache._read("SELECT text FROM answers")]
    for i, text in enumerate(texts):
        image = preprocess(dataset[i].image)[None]
        ids = model.generate(image, generation_type="top_k", top_k=1, seq_len=77, min_seq_len=0)[0].tolist()
        assert (
            open_clip.decode(torch.tensor(ids))
            .split("<end_of_text>")[0]
            .removeprefix("<start_of_text>")
            .strip()
            == text
        )


def test_words_are_drawn_from_the_likeliest_in_proportion(monkeypatch):
    monkeypatch.setattr(write, "TOP_K", 3)
    logits = torch.tensor([0.1, 0.5, 0.02, 0.38]).log().expand(2000, -1)
    drawn = write.draw(logits, 1.0, torch.linspace(0, 1, 2001)[:-1])
    counts = torch.bincount(drawn, minlength=4) / 2000
    torch.testing.assert_close(counts, torch.tensor([0.1, 0.5, 0.0, 0.38]) / 0.98, atol=2e-3, rtol=0)
    assert (write.draw(logits, 0, torch.rand(2000)) == 1).all()
    assert (write.draw(logits, 0.01, torch.rand(2000)) == 1).all()


def test_coca_settings_and_weights_that_will_not_do(coca, tmp_path, pictures, out):
    dataset = pictures(1)

    def describe(**settings):
        CoCaCaptioner(tmp_path / "coca.sqlite", **settings).describe(dataset, out, count=2)

    with pytest.raises(SettingError, match="would be the same"):
        describe(model=coca, temperature=0)
    with pytest.raises(SettingError, match="no CoCa model.*coca_ViT-L-14/mscoco"):
        describe(model="ViT-B-32/openai")
    with pytest.raises(SettingError, match="neither a pretrained tag.*nor a file"):
        describe(model="coca_ViT-L-14/nothing")
    with pytest.raises(SettingError, match='device must be "auto", "cpu" or "cuda"'):
        describe(model=coca, device="cuda:99")
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="bad.pt"):
        describe(model=f"coca_tiny/{tmp_path / 'bad.pt'}")


def test_missing_weights_are_said_with_size_and_command(tmp_path, pictures, out, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    name = "coca_ViT-L-14/mscoco_finetuned_laion2b_s13b_b90k"
    with pytest.raises(
        MissingWeightsError, match=rf"{name} \(2.6 GB\).*open_clip_model.safetensors.*fetch {name}$"
    ):
        CoCaCaptioner(tmp_path / "coca.sqlite").describe(pictures(1), out)


# --- From a shell -----------------------------------------------------------------------------------------------------


def test_a_command_captions_a_folder(server, tmp_path, pictures, out, said, monkeypatch):
    pictures(3)
    (tmp_path / "images" / "none.json").unlink()
    words = ["caption", tmp_path / "images", "--out", out, "--base-url", server.url, "--count", "2"]
    assert command(*words) == 0 and server.requests == []
    printed = said()
    assert "6 to be paid for" in printed and "(--confirm) sends it" in printed and not out.exists()

    server.chat_faults += [Fault(change={"content": ""})]
    assert command(*words, "--confirm") == 1
    assert "Missing: 1 (1 empty)" in said() and (tmp_path / "captions.sqlite").is_file()
    assert command(*words, "--confirm", "--retry-failed") == 0
    assert "All 6 captions of images" in said() and server.paid.total() == 7
    assert {len(captions) for captions in captions_of(out).values()} == {2}
    assert server.bodies[0]["model"] == "gpt-4o-2024-11-20" and server.bodies[0]["temperature"] == 1.0

    monkeypatch.delenv("OPENAI_API_KEY")
    assert command(*words, "--confirm", "--cache", tmp_path / "other.sqlite") == 1
    assert "OPENAI_API_KEY is not set" in said()


def test_a_command_captions_a_data_set_in_batches_and_with_coca(server, tmp_path, out, said, coca):
    server.polls = 0
    words = ["caption", "sample", "--out", out, "--limit", "2"]
    batch = [*words, "--captioner", "batch", "--no-wait", "--base-url", server.url, "--confirm"]
    assert command(*batch) == 1 and "Missing: 2 (2 in batch_1)" in said()
    assert command(*batch) == 0 and len(captions_of(out)) == 2 and server.count("POST /v1/batches") == 1
    said()
    arguments = [*words, "--captioner", "coca", "--model", coca, "--cache", tmp_path / "coca.sqlite"]
    command(*arguments)
    assert "2 to be written here" in said()
    assert command(*arguments, "--no-wait") == 2 and "--no-wait for batch" in said()
    assert command("caption", "samplle", "--out", out) == 1 and "Is 'sample' meant?" in said()
    (tmp_path / "empty").mkdir()
    assert command("caption", tmp_path / "empty", "--out", out) == 1 and "holds no image" in said()


def test_a_command_asks_for_keywords(server, tmp_path, said):
    (sample,) = datasets("sample")
    captions = [caption for row in range(2) for caption in sample.captions(row)]
    server.replies = {caption: caption.split()[-1].strip(".") for caption in captions}
    words = ["keywords", "sample", "--limit", "2", "--data-dir", tmp_path, "--base-url", server.url]
    assert command(*words) == 0 and server.requests == [] and "(--confirm)" in said()
    assert command(*words, "--confirm") == 0
    assert server.paid.total() == len(set(captions)) and "0 of them without words" in said()
    assert all(chat_keywords(tmp_path)(captions))
    assert command(*words, "--captions", "context") == 0 and "2 captions, 0 of them answered" in said()
