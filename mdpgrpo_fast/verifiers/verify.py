"""Answering whether a response follows its instructions, strictly or loosely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args

from . import rules as _rules  # noqa: F401  enters every type in INSTRUCTIONS
from .registry import CheckError, Instruction, clean, lookup, said

Mode = Literal["strict", "loose"]
MODES = get_args(Mode)
Kwargs = Mapping[str, Any] | None
Response = str | Sequence[Mapping[str, Any]]  # text, or chat messages
# What opens and what closes a think block: Qwen, DeepSeek; Mistral; Seed; Cohere; gpt-oss.
THINK_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)


def validate(instruction_id: str, kwargs: Kwargs = None, rules: str = "ifeval") -> None:
    """Check one instruction of a data line, without a response.

    Raises UnknownInstructionError (naming the rule sets that know the id, or the nearest id), ArgumentError (naming the
    argument) or MissingRequirementError (naming the package or data), all ValueErrors. None values in `kwargs` are as
    if absent.
    """
    clean(lookup(instruction_id, rules), kwargs, rules)


def verify(
    instruction_id: str, response: Response, kwargs: Kwargs = None, *, prompt: str = "", mode: Mode = "strict",
    rules: str = "ifeval", strip_thinking: bool = False,
) -> bool:  # fmt: skip
    """Whether `response` follows one instruction; see `verify_all`. `kwargs` may be left out where it takes none."""
    options: dict[str, Any] = {"prompt": prompt, "mode": mode, "rules": rules, "strip_thinking": strip_thinking}
    return verify_all([instruction_id], response, [kwargs], **options)[0]


def verify_all(
    instruction_ids: Sequence[str],
    response: Response,
    kwargs_list: Sequence[Kwargs],
    *,
    prompt: str = "",
    mode: Mode = "strict",
    rules: str = "ifeval",
    strip_thinking: bool = False,
) -> list[bool]:
    """Whether `response` follows each instruction, by position: an id that comes twice is answered twice.

    `response` is text, or a chat as a list of messages, of which the last assistant message alone is looked at.
    `mode` "loose" accepts if any of IFEval's eight variants of the response does (first line, last line, stars
    removed, in all combinations). A blank text follows nothing. `rules` are those of google-research
    `instruction_following_eval` ("ifeval"), m-salmani78/MDP-GRPO ("mdpgrpo"), allenai/open-instruct's IF-Train
    ("iftrain"), allenai/IFBench ("ifbench") or lightblue-tech/M-IFEval ("m-ifeval"). `prompt` is IFEval's interface; no
    instruction here reads it. `strip_thinking` looks at what follows the last closing think tag alone.

    Raises InstructionError, a ValueError, as `validate` does, ValueError for an unknown mode or rule set or lists
    of unequal length, TypeError for a response that is neither text nor messages, CheckError where a check of one's own
    raises. Nothing in a response raises.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    response = last_answer(response)
    if len(instruction_ids) != len(kwargs_list):
        raise ValueError(f"kwargs_list: expected {len(instruction_ids)} items, one per id, got {len(kwargs_list)}")
    response = answer_of(response) if strip_thinking else response
    texts = _loose_variants(response) if mode == "loose" else [response]
    texts = [text for text in texts if text and not text.isspace()]
    return [_follows(id, texts, kwargs, rules) for id, kwargs in zip(instruction_ids, kwargs_list, strict=True)]


def _follows(instruction_id: str, texts: list[str], kwargs: Kwargs, rules: str) -> bool:
    entry = lookup(instruction_id, rules)
    arguments = clean(entry, kwargs, rules)
    if entry.own:
        return any(_own(entry, text, arguments) for text in texts)
    for text in texts:
        try:
            if entry.check(text, **arguments):
                return True
        except (RecursionError, UnicodeError):  # JSON nested too deep, XML with half a surrogate pair
            # To MDP-GRPO's code the error is the answer, whatever the variants left; to other codes it is the end of a
            # run, which a response must not be.
            if rules == "mdpgrpo":
                return False
    return False


def _own(entry: Instruction, text: str, arguments: dict[str, Any]) -> bool:
    try:
        follows = entry.check(text, **arguments)
    except (Exception, SystemExit) as error:
        raise CheckError(f"{entry.id}: the check raised {said(error)}") from error
    if not isinstance(follows, bool):
        raise CheckError(f"{entry.id}: the check returned {follows!r}; expected True or False")
    return follows


def last_answer(response: Response) -> str:
    """The text itself, or that of the last assistant message of a chat, "" where that has none.

    Raises TypeError where it is neither, ValueError for a chat without an assistant message.
    """
    if isinstance(response, str):
        return response
    if not isinstance(response, Sequence) or not all(isinstance(message, Mapping) for message in response):
        raise TypeError(f"response: expected text or chat messages, got {type(response).__name__}")
    messages = cast(Sequence[Mapping[str, Any]], response)
    answers = [message.get("content") for message in messages if message.get("role") == "assistant"]
    if not answers:
        raise ValueError("response: the chat has no assistant message")
    content = answers[-1]
    if isinstance(content, list):  # parts, as multi-modal chats have them
        content = [part.get("text") or "" if isinstance(part, Mapping) else part for part in content]
        if all(isinstance(part, str) for part in content):
            content = "".join(content)
    if content is not None and not isinstance(content, str):
        raise TypeError(f"response: the content of a message must be text, got {type(content).__name__}")
    return content or ""


def opening_of(prompt: Any) -> str:
    """How the answer to `prompt` begins already: the last message of a chat that ends with the assistant's, which goes
    on, without think blocks; "" for any other prompt."""
    last = prompt[-1] if isinstance(prompt, list) and prompt else None
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        return ""
    return answer_of(last_answer([last]))


def answer_of(response: str, opened: bool = False) -> str:
    """What follows the last closing think tag, without the white space between; "" where a block is not closed.

    opened: the prompt itself opened one, as templates of models that always think do.
    """
    ends = [at + len(close) for _, close in THINK_TAGS if (at := response.rfind(close)) >= 0]
    if ends:
        return response[max(ends) :].lstrip()
    return "" if opened or any(tag in response for tag, _ in THINK_TAGS) else response


def _loose_variants(response: str) -> list[str]:
    """IFEval's eight variants in its order, each once."""
    lines = response.split("\n")
    cuts = [response] + ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    bare = [cut.replace("*", "") for cut in cuts]
    return list(dict.fromkeys([cuts[0], bare[0], *cuts[1:], *bare[1:]]))
