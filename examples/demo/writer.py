"""A writer of short responses that obeys or breaks each constraint as told: teacher and oracle of the demo task."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import words

MAX_PIECES = 46  # words and punctuation marks; with the end token it stays within 48 tokens
TRIES = 40


@dataclass
class _Task:
    """What one response has to do: kwargs by instruction id, and which of them are obeyed."""

    topic: str
    kwargs: dict[str, dict[str, Any]]
    obeyed: dict[str, bool]
    rng: random.Random
    banned: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    planted: str | None = None  # a forbidden adjective that a breaking response uses

    def asks(self, name: str) -> bool:
        return name in self.kwargs

    def obeys(self, name: str) -> bool:
        return self.obeyed.get(name, False)

    def breaks(self, name: str) -> bool:
        return name in self.kwargs and not self.obeyed[name]

    def adjective(self) -> str:
        if self.planted is not None:
            word, self.planted = self.planted, None
            return word
        word = self.rng.choice([word for word in words.ADJECTIVES if word not in self.banned | self.used])
        self.used.add(word)
        return word


def write(
    topic: str,
    instruction_ids: Sequence[str],
    kwargs: Sequence[dict[str, Any]],
    obey: Sequence[bool],
    rng: random.Random,
) -> str | None:
    """A response about `topic` that satisfies exactly the constraints whose flag is set.

    None where no short response was found, as with flags that contradict each other by their thresholds.
    """
    by_id = dict(zip(instruction_ids, kwargs, strict=True))
    obeyed = dict(zip(instruction_ids, obey, strict=True))
    for _ in range(TRIES):
        text = _draft(_Task(topic, by_id, obeyed, rng))
        if text is not None and len(pieces(text)) <= MAX_PIECES:
            return text
    return None


def pieces(text: str) -> list[str]:
    """Words, marks and line breaks: what the tokenizer makes one token of, or less."""
    return re.findall(r"\w+|\n|[^\w\s]", text)


def _draft(task: _Task) -> str | None:
    """One attempt at a response; None where its length breaks what the flags ask for."""
    forbidden = task.kwargs.get("keywords:forbidden_words", {}).get("forbidden_words", [])
    if task.obeys("keywords:forbidden_words"):
        task.banned.update(forbidden)
    elif forbidden and forbidden[0] != task.topic:
        task.planted = forbidden[0]

    body = _body(task)
    if body is None:
        return None
    body = _highlight(task, body)
    if body is None:
        return None
    text = _layout(task, body)
    if task.obeys("detectable_format:title"):
        named = task.topic not in task.banned
        text = f"<<The {task.topic}>>\n{text}" if named else f"<<A short note>>\n{text}"
    if task.obeys("startend:quotation"):
        text = f'"{text}"'
    if task.obeys("change_case:english_lowercase"):
        text = text.lower()
    if task.asks("length_constraints:number_words"):
        limit = task.kwargs["length_constraints:number_words"]
        count = len(re.findall(r"\w+", text))
        enough = count >= limit["num_words"] if limit["relation"] == "at least" else count < limit["num_words"]
        if enough != task.obeys("length_constraints:number_words"):
            return None
    return text


def _body(task: _Task) -> list[str] | None:
    """The sentences before the end phrase or postscript; adjectives stand in braces."""
    rng = task.rng
    content = [_opening(task), *_required(task)]
    count = _sentence_count(task)
    if count is None:
        count = max(len(content), rng.choice((2, 3, 3, 4)))
        if task.asks("length_constraints:number_words"):
            count = max(len(content), rng.choice((1, 2, 3, 4, 5)))
    if len(content) > count:
        return None
    fillers = [_filler(task, comma=False) for _ in range(count - len(content))]
    if task.breaks("punctuation:no_comma") or (not task.asks("punctuation:no_comma") and rng.random() < 0.35):
        if fillers:
            fillers[rng.randrange(len(fillers))] = _filler(task, comma=True)
        elif task.asks("punctuation:no_comma"):
            return None
    return content + fillers if task.planted is None else None


def _opening(task: _Task) -> str:
    subject = "This place" if task.topic in task.banned else f"The {task.topic}"
    return f"{subject} is {{{task.adjective()}}} and {{{task.adjective()}}}."


def _required(task: _Task) -> list[str]:
    """Sentences for keywords and placeholders, obeyed or broken by one too few."""
    rng, sentences = task.rng, list[str]()
    if task.asks("keywords:existence"):
        chosen = list(task.kwargs["keywords:existence"]["keywords"])
        if not task.obeys("keywords:existence"):
            chosen = rng.sample(chosen, len(chosen) - 1) if rng.random() < 0.5 else []
        if chosen:
            sentences.append(f"I saw the {' and '.join(chosen)} there.")
    if task.asks("keywords:frequency"):
        wanted = task.kwargs["keywords:frequency"]
        times = wanted["frequency"] - (0 if task.obeys("keywords:frequency") else rng.choice((1, wanted["frequency"])))
        word = wanted["keyword"]
        forms = ("", "I like the {0}.", "I saw the {0} near the {0}.", "I saw the {0} and the {0} near the {0}.")
        if times:
            sentences.append(forms[times].format(word))
    if task.asks("detectable_content:number_placeholders"):
        times = task.kwargs["detectable_content:number_placeholders"]["num_placeholders"]
        if not task.obeys("detectable_content:number_placeholders"):
            times -= rng.choice((1, times))
        forms = ("", "Ask [name].", "Ask [name] about [place].", "Ask [name] about [place] on [date].")
        if times:
            sentences.append(forms[times])
    return sentences


def _sentence_count(task: _Task) -> int | None:
    """How many body sentences the flags ask for; None where they do not say."""
    rng = task.rng
    if task.asks("length_constraints:number_sentences"):
        limit = task.kwargs["length_constraints:number_sentences"]
        many = (limit["relation"] == "at least") == task.obeys("length_constraints:number_sentences")
        count = limit["num_sentences"] + (rng.choice((0, 1)) if many else -rng.choice((1, 1, 2)))
        return count - task.obeys("startend:end_checker")
    if task.obeys("detectable_format:number_bullet_lists"):
        return task.kwargs["detectable_format:number_bullet_lists"]["num_bullets"]
    return None


def _filler(task: _Task, comma: bool) -> str:
    form = task.rng.choice(words.COMMA_FILLERS if comma else words.FILLERS)
    adjective, time, noun = f"{{{task.adjective()}}}", task.rng.choice(words.TIMES), task.rng.choice(words.NOUNS)
    return form.format(adjective=adjective, time=time, noun=noun)


def _highlight(task: _Task, body: list[str]) -> list[str] | None:
    """Puts stars around as many adjectives as the flag asks for, and drops the braces."""
    name, marked = "detectable_format:number_highlighted_sections", 0
    if task.asks(name):
        least = task.kwargs[name]["num_highlights"]
        marked = least if task.obeys(name) else least - task.rng.choice((1, least))
    text = "\n".join(body)
    if text.count("{") < marked:
        return None
    text = re.sub(r"{(\w+)}", r"*\1*", text, count=marked) if marked else text
    return re.sub(r"{(\w+)}", r"\1", text).split("\n")


def _layout(task: _Task, body: list[str]) -> str:
    """Joins the sentences as a line or as bullets, then the end phrase or postscript."""
    name = "detectable_format:number_bullet_lists"
    bullets = task.obeys(name)
    if task.breaks(name) and len(body) != task.kwargs[name]["num_bullets"]:
        bullets = task.rng.random() < 0.5
    text = "\n".join(f"* {sentence}" for sentence in body) if bullets else " ".join(body)
    if task.obeys("startend:end_checker"):
        text += ("\n" if bullets else " ") + task.kwargs["startend:end_checker"]["end_phrase"]
    if task.obeys("detectable_content:postscript"):
        marker = task.kwargs["detectable_content:postscript"]["postscript_marker"]
        text += f"\n{marker} {_filler(task, comma=False).replace('{', '').replace('}', '')}"
    return text
