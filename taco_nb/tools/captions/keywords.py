"""A language model is asked here for the keywords of captions; `ChatKeywords` then reads its answers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from taco_nb.text.chat_keywords import ChatKeywords
from taco_nb.text.tokens import caption_list
from taco_nb.tools.captions.captioner import CaptionCache
from taco_nb.tools.captions.service import ChatService


def ask_keywords(
    chat: ChatKeywords, captions: str | Iterable[str], confirm: bool = False, **settings: Any
) -> None:
    """Ask for the keywords of captions that have none yet; print how many these are, and stop there unless told.

    Answers are on disk as they come in, so that asking again after a crash goes on from there. Refusals and other
    answers without words are kept and counted, and not asked for again: their captions have no keywords.

    Args:
        chat: says what is asked, and where the answers are kept.
        captions: as many as there are; those that occur twice are asked about once, and blank ones never.
        confirm: True to send the requests, which may cost money. The key is taken from OPENAI_API_KEY.
        settings: of `ChatService`, such as `base_url`.

    Raises `SettingError` for what is no caption or where there is no key, `ServiceError` where the server
    cannot be reached or refuses to work, `DataError` for a file of answers that is damaged.
    """
    model, prompt, temperature = chat.question
    service = ChatService(
        model=model, temperature=temperature, **{"max_tokens": 256, "expected_tokens": 20} | settings
    )
    by_key = {chat.key(caption): caption for caption in caption_list(captions) if caption.strip()}
    # To say the price, nothing need be written: a shared data folder may be read-only.
    with CaptionCache(chat.path if confirm or chat.path.exists() else ":memory:") as cache:
        new = by_key.keys() - cache.get(by_key).keys()
        # A token is about four characters, and the messages around the text about ten tokens.
        tokens = sum(10 + math.ceil((len(prompt) + len(by_key[key])) / 4) for key in new)
        cost = service.estimate(len(new), tokens) if new else "nothing to ask"
        print(
            f"{len(by_key):,} captions, {len(by_key) - len(new):,} of them answered in {chat.path}; {cost}."
        )
        if new and not confirm:
            print("Nothing was sent: confirm=True (--confirm) sends the requests, and pays.")
            return
        reasons: dict[str, str] = {}
        if new:
            with cache.asking():
                answered = cache.get(by_key)  # also by another process in the meantime
                new = [key for key in by_key if key not in answered]
                cache.note(chat.question)
                system = {"role": "system", "content": prompt}
                asked = ([system, {"role": "user", "content": by_key[key]}] for key in new)
                requests = zip(new, map(service.request, asked))
                reasons = service.send(requests, len(new), "Keywords", cache)
        answers = cache.get(by_key)
    failed = sum(answer.failure is not None for answer in answers.values())
    ignored = chat.ignored([by_key[key] for key in by_key if key in answers])
    print(
        f"{len(answers):,} answers, {failed:,} of them without words; {len(ignored):,} words ignored that are not in "
        "their caption."
    )
    if reasons:
        last = list(reasons.values())[-1]
        print(f"{len(reasons):,} captions got no answer; ask again. The last reason: {last}.")
