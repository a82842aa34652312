"""Prompts as the model reads them: rendered by the chat template or left as they are, and tokenised once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from ..config import ConfigError, PromptConfig
from .examples import BadRow, Example, Prompts, sort_out
from .files import read_template
from .rendering import RefusalError, Renderer

# Texts that stand in no template, to tell apart what it puts around them.
_REQUEST, _REPLY = "Where is 7f3a?", "At 9c1b."
# What apply_chat_template is called with here, and no variable of a template.
_OURS = (
    "conversation tools documents chat_template add_generation_prompt continue_final_message tokenize padding "
    "truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs"
).split()


def tokenize(
    prompts: Prompts, tokenizer: Any, config: PromptConfig, *, context: int | None = None, eos: Sequence[int] = ()
) -> tuple[Prompts, list[list[int]]]:
    """The prompts that the model can take, and the token ids of each. A template from a file becomes the tokenizer's.

    context: positions of the model; None: no limit. eos: its end-of-sequence ids; the tokenizer's is one in any case.

    Raises: ConfigError where a knob does not fit the prompts or none is left; and, unless on_bad_row is drop, for the
        first that is too long or that the template refuses; and where the template exceeds a limit of `rendering`.
    """
    limit, knob = prompt_limit(config, context)
    examples = prompts.examples
    if not examples:
        return prompts, []
    texts, bad = {}, {}
    with Renderer(tokenizer) as renderer:
        chat = _Chat(tokenizer, renderer, config, {*eos, tokenizer.eos_token_id})
        for i, example in enumerate(examples):
            try:
                texts[i] = chat.text(example)
            except ConfigError as e:
                raise ConfigError(f"{_where(examples, i)}: {e}") from None
            except RefusalError as e:
                bad[i] = f"the tokenizer's chat template refuses it: {e}"
    ids = _encode(tokenizer, texts)
    bad |= {i: "the prompt has no tokens" for i, row in ids.items() if not row}
    bad |= {
        i: f"the prompt has {len(row)} tokens, over the limit of {limit} ({knob})"
        for i, row in ids.items()
        if len(row) > limit
    }
    if bad and config.on_bad_row == "error":
        raise ConfigError(f"{_where(examples, min(bad))}: {bad[min(bad)]}: {examples[min(bad)].text[:60]!r}")

    kept = [i for i in ids if i not in bad]
    notes = [*prompts.notes, *chat.notes([examples[i] for i in kept if ids[i][-1] in chat.eos])]
    left_out = [BadRow(_where(examples, i), bad[i], examples[i].text[:200]) for i in sorted(bad)]
    prompts = replace(prompts, examples=[examples[i] for i in kept], notes=notes)
    return sort_out(prompts, left_out), [ids[i] for i in kept]


def _where(examples: list[Example], index: int) -> str:
    return examples[index].where or f"prompt {index + 1}"


def _count(examples: list[Example]) -> str:
    first = examples[0].where or repr(examples[0].text[:40])
    return f"{len(examples)} (the first: {first})"


def prompt_limit(config: PromptConfig, context: int | None) -> tuple[int, str]:
    """The longest prompt in tokens, and what sets it. context: positions of the model; None: no limit.

    Raises: ConfigError where the model has no more positions than max_completion_length.
    """
    completion = config.max_completion_length
    if context is not None and completion >= context:
        raise ConfigError(f"max_completion_length must be below the model's {context} positions; got {completion}")
    if context is not None and context - completion < config.max_prompt_length:
        return context - completion, f"the model's {context} positions less max_completion_length {completion}"
    return config.max_prompt_length, "max_prompt_length"


def _encode(tokenizer: Any, texts: dict[int, tuple[str, bool]]) -> dict[int, list[int]]:
    """Token ids in the order of texts, whose second part is whether the tokenizer adds bos and the like."""
    ids: dict[int, list[int]] = {}
    for add in (False, True):
        rows = [i for i in texts if texts[i][1] is add]
        if rows:
            encoded = tokenizer([texts[i][0] for i in rows], add_special_tokens=add).input_ids
            ids |= dict(zip(rows, encoded, strict=True))
    return {i: ids[i] for i in texts}


def _template_args(items: list[str]) -> dict[str, Any]:
    """name=value, the value as JSON where it is JSON, else as text."""
    values: dict[str, Any] = {}
    for item in items:
        name, _, text = item.partition("=")
        if name in _OURS:
            raise ConfigError(f"template_args: {name!r} is no variable of a template; each prompt decides it")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
        except RecursionError:
            raise ConfigError(f"template_args: {name} is nested too deep") from None
    return values


class _Chat:
    """Turns prompts into text, and remembers what a note has to say."""

    def __init__(self, tokenizer: Any, renderer: Renderer, config: PromptConfig, eos: set[int | None]) -> None:
        text = read_template(config.chat_template)
        if text is not None:
            tokenizer.chat_template = text
        self.renderer, self.mode, self.system, self.eos = renderer, config.chat_template, config.system_prompt, eos
        self.arguments = _template_args(config.template_args)
        self.template = None if self.mode == "off" else tokenizer.chat_template
        if self.mode == "on" and not self.template:
            raise ConfigError("chat_template on needs a tokenizer that has one; this one has none, so give a file")
        self.bos = tokenizer.bos_token
        added = {i: str(token.content) for i, token in tokenizer.added_tokens_decoder.items()}
        self.added = {i: token for i, token in added.items() if token.strip()}
        self.plain = self.wrapped = self.templated = 0
        self.rendered: list[Example] = []
        self.continued: list[Example] = []

    def text(self, example: Example) -> tuple[str, bool]:
        """The prompt as the model reads it, and whether the tokenizer has to add bos and the like."""
        messages = example.prompt
        if isinstance(messages, str):
            looks_rendered = self.plain_text[0] and self._is_rendered(messages)
            if looks_rendered:
                self.rendered.append(example)
            if not self.plain_text[0] or (looks_rendered and self.mode != "on"):
                return self._as_it_is(messages, looks_rendered)
            messages = [{"role": "user", "content": messages}]
            self.wrapped += 1
        elif not self.template:
            why = "chat_template is off" if self.mode == "off" else "the tokenizer has no chat template"
            raise ConfigError(f"the prompt is chat messages, but {why}; chat_template takes a file that holds one")
        if self.system is not None and not any(m["role"] in ("system", "developer") for m in messages):
            messages = [{"role": "system", "content": self.system}, *messages]
        if messages[-1]["role"] == "assistant":
            self.continued.append(example)
        self.templated += 1
        return self._render(messages, example.columns.get("tools")), False

    def _as_it_is(self, text: str, rendered: bool) -> tuple[str, bool]:
        if self.system is not None and not rendered:
            raise ConfigError(
                f"system_prompt needs chat messages, but the prompt is plain text, which stays as it is: "
                f"{self.plain_text[1]}"
            )
        self.plain += not rendered
        return text, not (self.bos and text.startswith(self.bos))

    def _render(self, messages: list[dict[str, Any]], tools: Any = None) -> str:
        """As TRL renders: a last assistant message goes on, anything else is answered."""
        goes_on = messages[-1]["role"] == "assistant"
        return self.renderer.render(
            messages,
            tools=tools or None,  # some templates write a headline for an empty list
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            **self.arguments,
        )

    @cached_property
    def plain_text(self) -> tuple[bool, str]:
        """Whether plain text becomes a user message, and why."""
        if self.mode == "off":
            return False, "chat_template is off"
        if not self.template:
            return False, "the tokenizer has no chat template"
        if self.mode != "auto":
            return True, f"chat_template is {self.mode}"
        dialogue = [{"role": "user", "content": _REQUEST}, {"role": "assistant", "content": _REPLY}]
        try:
            text = self.renderer.render(dialogue, **self.arguments)
        except RefusalError:  # a template that refuses the probe tells nothing
            return True, "the tokenizer has a chat template"
        closing = text.rpartition(_REPLY)[2]
        ends = {i: token for i, token in self.added.items() if token in closing}
        if ends and not self.eos & ends.keys():
            return False, (
                f"the tokenizer's chat template ends a turn with {' '.join(ends.values())}, where this model does not "
                "stop, as a base model that comes with a template; chat_template on uses it"
            )
        return True, "the tokenizer has a chat template, and the model is a chat model"

    @cached_property
    def _marks(self) -> tuple[list[str], str, str]:
        """By what a rendered prompt is known: the template's own tokens, how it begins, how it ends."""
        try:
            before, found, after = self._render([{"role": "user", "content": _REQUEST}]).partition(_REQUEST)
        except RefusalError:  # as above
            return [], "", ""
        if not found:
            return [], "", ""
        tokens = [token for token in self.added.values() if len(token) >= 3 and token in before + after]
        return tokens, before.strip(), after.strip()

    def _is_rendered(self, text: str) -> bool:
        tokens, before, after = self._marks
        text = text.strip()
        # A token of the template that stands elsewhere may be quoted.
        return (
            any(text.startswith(token) for token in tokens)
            or bool(before and text.startswith(before))
            or bool(after and text.endswith(after))
        )

    def notes(self, at_eos: list[Example]) -> list[str]:
        """What was decided, one line each. at_eos: prompts that end with an end-of-sequence token."""
        notes = []
        if self.wrapped:
            notes.append(f"plain text prompts become user messages: {self.plain_text[1]}")
        if self.plain:
            notes.append(f"plain text prompts stay as they are: {self.plain_text[1]}")
        if self.rendered:
            end = "they stay as they are; chat_template on wraps them too"
            if self.mode == "on":
                end = "they are wrapped all the same, as chat_template is on"
            elif self.system is not None:
                end = f"system_prompt does not reach them; {end}"
            notes.append(f"prompts that look rendered by a chat template already: {_count(self.rendered)}; {end}")
        if self.continued:
            notes.append(f"prompts that end with an assistant message, which goes on: {_count(self.continued)}")
        if at_eos:
            notes.append(f"prompts that end with an end-of-sequence token, as if they were answered: {_count(at_eos)}")
        if self.arguments and not self.templated:
            notes.append("template_args have no effect: no prompt goes through a chat template")
        elif isinstance(self.template, str):
            unknown = [name for name in self.arguments if name not in self.template]
            if unknown:
                notes.append(f"template_args: the chat template does not use {', '.join(unknown)}")
        return notes
