"""Keywords that a language model chose: asked for through a server on loopback, and read by training and by codecs."""

import multiprocessing
import os
import time

import pytest
import torch
from conftest import PLAIN
from openai_server import KEY, Fault, OpenAIServer

from taco_nb import baseline, datasets, evaluate, fit, load
from taco_nb.errors import DataError, SettingError
from taco_nb.text import text_tower
from taco_nb.text.answers import Answer, Answers
from taco_nb.text.chat_keywords import ChatKeywords, chat_keywords
from taco_nb.text.keywords import KeywordWeights
from taco_nb.tools.captions import ask_keywords
from taco_nb.tools.captions.captioner import CaptionCache

REPLIES = {
    "a red barn in the snow": "red, Barn.",
    "a dog’s snow-covered kennel": '"snow-covered", kennel, winter, dog’s',
    "a stop sign; a STOP  sign": "<think>Signs say what to do.</think>stop sign",
    "a barnacle": "barn",
    "a secret": "",
    "a broken dog": "dog",
    "rejected dog": "",
}
FAULTS = {
    "a secret": [Fault(change={"content": None, "refusal": "I would rather not."})],
    "a broken dog": [Fault(500)],
    "rejected dog": [Fault(400)],
}
TRAINING = ["a red barn in the snow", "a dog on a couch", "two dogs play in the snow"]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with OpenAIServer() as server:
        server.replies = REPLIES
        server.faults_of = {caption: list(faults) for caption, faults in FAULTS.items()}
        yield server


@pytest.fixture
def chat(tmp_path):
    return ChatKeywords(tmp_path / "keywords.sqlite", model="tiny")


def why(keywords, caption):
    return {word.text: word.why for word in keywords.words(caption) if word.why}


def answer(chat, captions, word=lambda caption: caption.split()[1]):
    """Put answers into the file, as if the model had been asked."""
    with Answers(chat.path) as answers:
        answers.add((chat.key(caption), Answer(word(caption))) for caption in captions)


def test_keywords_by_a_language_model(server, chat, capfd):
    captions = list(REPLIES)
    tower = text_tower("untrained-16", length=38)
    ask_keywords(chat, [*captions, *captions, "", " "], base_url=server.url)
    printed = capfd.readouterr().out
    assert f"{len(captions)} captions, 0 of them answered" in printed and "Nothing was sent" in printed
    assert not server.requests and not chat.path.exists()

    ask_keywords(chat, captions, confirm=True, base_url=server.url)
    printed = capfd.readouterr().out
    assert f"{len(captions)} answers, 2 of them without words; 2 words ignored" in printed
    assert sorted(chat.ignored(captions)) == ["barn", "winter"]
    assert len(server.requests) == len(captions) + 1  # one was repeated
    assert {body["temperature"] for body in server.bodies} == {0}

    keywords = KeywordWeights([chat])
    named = {caption: " ".join(why(keywords, caption)) for caption in captions}
    assert named == {
        "a red barn in the snow": "red barn",
        "a dog’s snow-covered kennel": "dog ’ s snow - covered kennel",
        "a stop sign; a STOP  sign": "stop sign STOP",
        "a barnacle": "",
        "a secret": "",
        "a broken dog": "dog",
        "rejected dog": "",
    }
    assert {reason for caption in captions for reason in why(keywords, caption).values()} == {"llm"}
    assert chat(["", captions[0], " "]) == [[], [(2, 5), (6, 10)], []] and chat([]) == []
    with pytest.raises(
        DataError, match=r"no keywords by tiny for 1 of 1 captions, such as 'new'.*confirm=True"
    ):
        keywords.token_weights([captions[0], "new"], tower)
    assert KEY not in printed + keywords.to_json() and KEY.encode() not in chat.path.read_bytes()


def test_nothing_is_asked_twice(server, chat, monkeypatch):
    captions = list(REPLIES)
    ask_keywords(chat, captions[:2], confirm=True, base_url=server.url)
    ask_keywords(chat, captions, confirm=True, base_url=server.url)
    assert max(server.paid.values()) == 1 and server.paid.keys() == REPLIES.keys() - {"rejected dog"}
    monkeypatch.delenv("OPENAI_API_KEY")
    count = len(server.requests)
    ask_keywords(chat, captions, confirm=True, base_url="http://127.0.0.1:9")
    assert len(server.requests) == count
    for other in ({"model": "other"}, {"model": "tiny", "prompt": "Which nouns?"}):
        with pytest.raises(DataError, match="no keywords"):
            ChatKeywords(chat.path, **other)(captions)


def test_a_language_model_beside_the_other_sources(server, chat):
    caption, tower = "a red barn in the snow", text_tower("untrained-16", length=38)
    ask_keywords(chat, caption, confirm=True, base_url=server.url)
    keywords = KeywordWeights.fit(TRAINING, ["tfidf", "rules", chat])
    assert why(keywords, caption) == {"red": "tfidf+llm", "barn": "tfidf+llm"}
    loaded = KeywordWeights.from_json(keywords.to_json(), sources=[chat])
    assert torch.equal(loaded.token_weights(caption, tower), keywords.token_weights(caption, tower))
    with pytest.raises(SettingError, match="tiny"):
        KeywordWeights.from_json(keywords.to_json())


def test_no_key_no_address_and_no_captions(chat, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(SettingError, match="OPENAI_API_KEY"):
        ask_keywords(chat, ["a barn"], confirm=True, base_url="http://127.0.0.1:9/v1")
    with pytest.raises(SettingError, match="base_url"):
        ask_keywords(chat, ["a barn"], base_url="nowhere")
    with pytest.raises(SettingError, match="Caption 1 must be a string, but is 7"):
        ask_keywords(chat, ["a barn", 7])


def test_reading_creates_no_file_and_waits_for_nobody_who_asks(chat):
    """Several processes train, and one asks, at a time."""
    with pytest.raises(DataError, match="no keywords"):
        chat(["a barn"])
    assert not chat.path.exists()
    answer(chat, TRAINING)
    keys = [chat.key(caption) for caption in TRAINING]
    with CaptionCache(chat.path) as cache, cache.asking():
        fork = multiprocessing.get_context("fork")
        readers = [fork.Process(target=lambda: os._exit(chat(TRAINING) == [])) for _ in range(3)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(600)
            assert reader.exitcode == 0
        cache.add([(chat.key("new"), Answer("new"))])
        assert cache.get(keys).keys() == set(keys)
    assert chat(["new"]) == [[(0, 3)]]


def test_a_batch_costs_as_much_however_many_answers_there_are(chat):
    """414,113 captions are looked up in batches: reading the file each time would take hours."""

    def seconds():
        start = time.process_time()
        for _ in range(20):
            chat(TRAINING)
        return time.process_time() - start

    answer(chat, TRAINING)
    few = min(seconds() for _ in range(3))
    with Answers(chat.path) as answers:
        answers.add((f"{number:040}-other-0", Answer("word " * 20)) for number in range(100_000))
    assert min(seconds() for _ in range(3)) < 4 * few + 0.02


def test_a_run_and_its_codec_read_the_answers_of_the_data_folder_that_they_were_given(tmp_path):
    """In the default data folder there are none."""
    sizes = {
        "N": 16,
        "M": 24,
        "groups": (4, 4, 4, 4, 8),
        "text_dim": 64,
        "heads": 8,
        "context_widths": (16, 16),
    }
    exp = baseline("sample", init="", sizes=sizes, crop=64, epochs=1, batch_size=6, **PLAIN).replace(
        text_pooling="keywords", keyword_sources="tfidf+llm"
    )
    with pytest.raises(DataError, match="chat_keywords.sqlite has no keywords"):
        fit(exp, tmp_path / "run", data_dir=tmp_path)
    sets = datasets("sample", "sample-train")
    captions = [caption for dataset in sets for i in range(len(dataset)) for caption in dataset.captions(i)]
    answer(chat_keywords(tmp_path), captions)
    run = fit(exp, tmp_path / "run", data_dir=tmp_path)
    finished = fit(exp, tmp_path / "run", data_dir=tmp_path)
    loaded = load(run.dir, data_dir=tmp_path)
    image = sets[0][0].image
    for codec in (run.codec, finished.codec, loaded):
        assert any("llm" in word.why for word in codec.conditioning.keywords.words(captions[0]))
        assert codec.encode(image, captions[0]) == loaded.encode(image, captions[0])
    with pytest.raises(DataError, match="no keywords"):
        load(run.dir).encode(image, captions[0])
    evaluated = evaluate(loaded, [sets[0].head(2)], tmp_path / "out", networks={}, num_processes=2)
    assert len(evaluated) == 2
