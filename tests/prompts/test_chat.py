"""Prompts as the model reads them: the chat template, TRL's rendering, plain and rendered text, limits."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.inputs import make_tokenizer
from helpers.prompts import TOKENS, chat_tokenizer, stops

from mdpgrpo_fast.config import ConfigError, PromptConfig
from mdpgrpo_fast.data import Example, Prompts, read_prompts, rendering, tokenize

SYSTEM, USER = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Say hi."}
PREFILL = {"role": "assistant", "content": "Hi there "}
TOOL = {"type": "function", "function": {"name": "w", "description": "d", "parameters": {"type": "object"}}}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "w", "arguments": {"a": 1}}}],
}
RESULT = {"role": "tool", "content": "sun"}


def run(
    tokenizer: Any, *prompts: Any, eos: Sequence[int] = (), tools: Any = None, context: int | None = None, **knobs: Any
) -> tuple[list[str], list[str]]:
    """What the model reads, and the notes."""
    columns = {} if tools is None else {"tools": tools}
    examples = [Example(p, columns=columns, where=f"f:{n}") for n, p in enumerate(prompts, 1)]
    kept, ids = tokenize(Prompts(examples), tokenizer, PromptConfig(**knobs), context=context, eos=eos)
    assert len(kept.examples) == len(ids)
    return [tokenizer.decode(row) for row in ids], kept.notes


def refused(*args: Any, **knobs: Any) -> str:
    with pytest.raises(ConfigError) as e:
        run(*args, **knobs)
    assert "\n" not in str(e.value)
    return str(e.value)


# ---- messages -------------------------------------------------------------------------------------------------------


DIALOGUES: list[tuple[list[Any], Any]] = [
    ([USER], None),
    ([USER, PREFILL], None),
    ([USER, {"role": "assistant", "content": "Hi."}, USER], None),
    ([USER], []),
]
WITH_TOOLS: list[tuple[list[Any], Any]] = [
    ([USER], [TOOL]),
    ([SYSTEM, USER], [TOOL]),
    ([USER, CALL, RESULT], [TOOL]),
    ([USER, CALL, RESULT, USER, PREFILL], [TOOL]),
]


@pytest.mark.parametrize(
    ("name", "messages", "tools"),
    [(name, *case) for name in TOKENS for case in DIALOGUES + (WITH_TOOLS if "qwen" in name else [])]
    + [("llama3_1", [USER], []), ("llama3_1", [USER], [TOOL])],  # it has a headline for an empty list of tools
)
def test_messages_are_rendered_as_trl_does(peer, name: str, messages: list[Any], tools: Any) -> None:
    trl = peer("trl.data_utils")
    tokenizer = chat_tokenizer(name)
    expected = trl.apply_chat_template({"prompt": messages}, tokenizer, tools=tools)["prompt"]
    assert run(tokenizer, messages, tools=tools)[0] == [expected]


def test_a_last_assistant_message_goes_on() -> None:
    (text,), (note,) = run(chat_tokenizer(), [USER, PREFILL])
    assert text.endswith("<|im_start|>assistant\nHi there ")
    assert note == "prompts that end with an assistant message, which goes on: 1 (the first: f:1)"


def test_bos_is_not_added_to_what_the_template_writes() -> None:
    tokenizer = chat_tokenizer("llama3")
    assert run(tokenizer, [USER])[0][0].count("<|begin_of_text|>") == 1


@pytest.mark.parametrize(
    ("messages", "beginning"),
    [
        ([USER], "<|im_start|>system\nBrief.<|im_end|>\n<|im_start|>user\nSay hi."),
        ([SYSTEM, USER], "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user"),
        ("Say hi.", "<|im_start|>system\nBrief.<|im_end|>\n<|im_start|>user\nSay hi."),
    ],
)
def test_system_prompt_stands_where_there_is_none(messages: Any, beginning: str) -> None:
    (text,), _ = run(chat_tokenizer(), messages, system_prompt="Brief.", chat_template="on")
    assert text.startswith(beginning)


def test_template_args_reach_the_template_as_json_or_text() -> None:
    tokenizer = chat_tokenizer("qwen3")
    assert not run(tokenizer, [USER])[0][0].endswith("</think>\n\n")
    (text,), notes = run(tokenizer, [USER], template_args=["enable_thinking=false"])
    assert text.endswith("<think>\n\n</think>\n\n") and not notes
    tokenizer.chat_template = "{{ messages[0].content }}{{ a }}{{ b.c }}{{ d }}"
    (text,), notes = run(tokenizer, [USER], template_args=["a=x=y", 'b={"c": 2}', "d=true", "enable_thinkng=1"])
    assert text == "Say hi.x=y2True" and notes == ["template_args: the chat template does not use enable_thinkng"]
    assert "template_args: 'tokenize' is no variable of a template" in refused(
        tokenizer, [USER], template_args=["tokenize=1"]
    )


def test_a_call_without_text_reaches_a_template_that_adds_it_to_text(shared_data) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}[assistant]"
    (text,), _ = run(tokenizer, read_prompts(shared_data("reports/d13_toolcall.jsonl")).examples[0].prompt)
    assert "[assistant][tool]" in text


def test_tools_of_a_file_reach_the_template(shared_data) -> None:
    tokenizer = chat_tokenizer("qwen3")
    read = read_prompts(shared_data("reports/d13_toolcall.jsonl"))
    _, ((*ids,),) = tokenize(read, tokenizer, PromptConfig())
    text = tokenizer.decode(ids)
    assert '<tool_call>\n{"name": "w", "arguments": {}}\n</tool_call>' in text and "None" not in text
    read.examples[0].columns["tools"] = [TOOL]
    _, ((*ids,),) = tokenize(read, tokenizer, PromptConfig())
    assert '"description": "d"' in tokenizer.decode(ids)


def test_a_template_from_a_file_becomes_the_tokenizers(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[answer]")
    tokenizer = make_tokenizer()
    texts, notes = run(tokenizer, [SYSTEM, USER], "Plain.", chat_template=str(path))
    assert texts == ["[system]Be kind.[user]Say hi.[answer]", "[user]Plain.[answer]"]
    assert notes == [f"plain text prompts become user messages: chat_template is {path}"]
    assert tokenizer.chat_template == path.read_text(), "and is saved with it"


@pytest.mark.parametrize(
    ("prompt", "knobs", "message"),
    [
        ([USER], {}, "f:1: the prompt is chat messages, but the tokenizer has no chat template; chat_template takes a"),
        ([USER], {"chat_template": "off"}, "f:1: the prompt is chat messages, but chat_template is off; "),
        ("x", {"chat_template": "on"}, "chat_template on needs a tokenizer that has one; this one has none"),
        ("x", {"system_prompt": "S"}, "f:1: system_prompt needs chat messages, but the prompt is plain text, which"),
    ],
)
def test_knobs_that_need_a_template(prompt: Any, knobs: dict[str, Any], message: str) -> None:
    assert refused(make_tokenizer(), prompt, **knobs).startswith(message)


def test_a_template_that_refuses_makes_a_bad_row() -> None:
    tokenizer = chat_tokenizer("gemma")
    message = "the tokenizer's chat template refuses it: System role not supported"
    assert refused(tokenizer, [USER], [SYSTEM, USER]) == f"f:2: {message}: 'Say hi.'"
    texts, notes = run(tokenizer, [USER], [SYSTEM, USER], on_bad_row="drop")
    assert len(texts) == 1 and notes == [f"left out 1 of 2 rows: 1 like f:2: {message}"]


# ---- plain text -----------------------------------------------------------------------------------------------------


def plain(tokenizer: Any, eos: Sequence[int] = (), text: str = "Say hi.", **knobs: Any) -> tuple[bool, str]:
    """Whether a plain prompt was wrapped, and the note."""
    (read,), (note,) = run(tokenizer, text, eos=eos, **knobs)
    assert text in read
    return read != text, note


def test_plain_text_is_wrapped_for_a_chat_model() -> None:
    tokenizer = chat_tokenizer()
    wrapped, note = plain(tokenizer, stops(tokenizer, "<|im_end|>"))
    assert wrapped and note.startswith("plain text prompts become user messages: the tokenizer has a chat template")


def test_plain_text_stays_for_a_base_model_that_ships_a_template() -> None:
    tokenizer = chat_tokenizer()
    wrapped, note = plain(tokenizer)
    assert not wrapped and note == (
        "plain text prompts stay as they are: the tokenizer's chat template ends a turn with <|im_end|>, where this "
        "model does not stop, as a base model that comes with a template; chat_template on uses it"
    )
    assert plain(tokenizer, chat_template="on") == (
        True,
        "plain text prompts become user messages: chat_template is on",
    )
    off = "plain text prompts stay as they are: chat_template is off"
    assert plain(tokenizer, stops(tokenizer, "<|im_end|>"), chat_template="off") == (False, off)


def test_plain_text_stays_without_a_template() -> None:
    wrapped, note = plain(make_tokenizer())
    assert not wrapped and note == "plain text prompts stay as they are: the tokenizer has no chat template"


@pytest.mark.parametrize(
    ("written", "wrapped"),
    [
        ("{{ m.content }}\n", True),  # nothing of the tokenizer's after the content
        ("{{ m.content }}<eos>\n", True),
        ("{{ m.content }}<end>\n", False),
        ("{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}<end>", True),
    ],
)
def test_what_ends_a_turn_tells_a_chat_model(written: str, wrapped: bool) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]" + written + "{% endfor %}"
    assert plain(tokenizer)[0] is wrapped


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen2_5", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        ("qwen2_5", "<|im_start|>system\nAnother one.<|im_end|>\nHi"),
        ("llama3", "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"),
        ("gemma", "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"),
    ],
)
def test_a_rendered_prompt_is_not_rendered_again(name: str, text: str) -> None:
    tokenizer = chat_tokenizer(name)
    eos = stops(tokenizer, TOKENS[name][-1])
    texts, notes = run(tokenizer, text, "Hi", text, eos=eos)
    assert texts[0] == texts[2] == text and texts[1] != "Hi"
    note = "prompts that look rendered by a chat template already: 2 (the first: f:1); "
    assert notes[1] == note + "they stay as they are; chat_template on wraps them too"
    texts, notes = run(tokenizer, text, eos=eos, chat_template="on")
    assert texts[0] != text and text.strip() in texts[0]
    assert notes[1].endswith("already: 1 (the first: f:1); they are wrapped all the same, as chat_template is on")


@pytest.mark.parametrize(("text", "rendered"), [("Q: Hi", True), ("Hi\n A:\n", True), ("Hi. Q: what?", False)])
def test_a_template_of_plain_words_is_known_by_its_ends(text: str, rendered: bool) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}Q: {{ m.content }}\n{% endfor %}A: "
    assert (run(tokenizer, text)[0] == [text]) is rendered


@pytest.mark.parametrize("text", ["What does <|im_end|> mean?", "Explain <|im_start|> and <|im_end|>, please."])
def test_a_quoted_token_is_no_rendering(text: str) -> None:
    tokenizer = chat_tokenizer("qwen2_5")
    texts, notes = run(tokenizer, text, eos=stops(tokenizer, TOKENS["qwen2_5"][-1]))
    assert texts[0] != text and texts[0].startswith("<|im_start|>") and not any("look rendered" in n for n in notes)


def test_system_prompt_does_not_reach_a_rendered_prompt() -> None:
    tokenizer = chat_tokenizer()
    eos = stops(tokenizer, "<|im_end|>")
    (text,), notes = run(tokenizer, "<|im_start|>user\nHi", eos=eos, system_prompt="S", template_args=["a=1"])
    assert text == "<|im_start|>user\nHi" and "; system_prompt does not reach them; they stay as they are" in notes[0]
    assert notes[1] == "template_args have no effect: no prompt goes through a chat template"


@pytest.mark.parametrize(
    ("text", "count"), [("Hi", 1), ("<|begin_of_text|>Hi", 1), ("<|start_header_id|>user<|end_header_id|>\n\nHi", 1)]
)
def test_bos_stands_once_before_text_that_stays(text: str, count: int) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = chat_tokenizer("llama3")
    bos = tokenizer.bos_token
    processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = processor
    eos = stops(tokenizer, "<|eot_id|>")
    for mode in ("off", "auto"):
        (read,), _ = run(tokenizer, text, eos=eos, chat_template=mode)
        assert read.count(bos) == count and read.startswith(bos)


def test_the_reported_rendered_prompt_and_the_prefill(shared_data) -> None:
    from transformers import AutoTokenizer

    from mdpgrpo_fast.demo import SEED_POLICY

    tokenizer = AutoTokenizer.from_pretrained(SEED_POLICY)
    read = read_prompts(shared_data("reports/d15_rendered.jsonl"))
    kept, (ids,) = tokenize(read, tokenizer, PromptConfig())
    assert tokenizer.decode(ids) == read.examples[0].prompt and "look rendered" in kept.notes[0]
    _, (ids,) = tokenize(read_prompts(shared_data("reports/d14_prefill.jsonl")), tokenizer, PromptConfig())
    text = tokenizer.decode(ids)
    assert text.endswith("<|assistant|>Sure here is") and text.count("<|assistant|>") == 1


# ---- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("most", "context", "limit", "knob"),
    [
        (6, None, 6, "max_prompt_length"),
        (6, 100, 6, "max_prompt_length"),
        (10, 26, 6, "the model's 26 positions less max_completion_length 20"),
    ],
)
def test_a_long_prompt_names_the_knob_that_binds(most: int, context: int | None, limit: int, knob: str) -> None:
    knobs = {"max_prompt_length": most, "max_completion_length": 20, "context": context}
    tokenizer, long = make_tokenizer(), "x" * 7
    reason = f"the prompt has 7 tokens, over the limit of {limit} ({knob})"
    assert run(tokenizer, "x" * 6, **knobs)[0] == ["x" * 6]
    assert refused(tokenizer, "x", long, **knobs) == f"f:2: {reason}: 'xxxxxxx'"
    texts, notes = run(tokenizer, long, "x", long + "y", on_bad_row="drop", **knobs)
    assert texts == ["x"] and notes[-1] == f"left out 2 of 3 rows: 2 like f:1: {reason}"
    assert refused(tokenizer, long, on_bad_row="drop", **knobs).startswith("no prompt can be used: left out 1 of 1")


def test_what_is_left_out_is_listed_beside_what_was(shared_data) -> None:
    config = PromptConfig(on_bad_row="drop", max_prompt_length=300)
    read = read_prompts(shared_data("reports/d11_one_long.jsonl"), config)
    kept, ids = tokenize(read, make_tokenizer(), config)
    (row,) = kept.dropped
    assert len(kept.examples) == len(ids) == 3 and row.where.endswith("d11_one_long.jsonl:4")
    assert row.prompt == "word " * 40 and kept.examples == read.examples[:3]


def test_no_room_for_a_completion() -> None:
    message = "max_completion_length must be below the model's 20 positions; got 20"
    assert refused(make_tokenizer(), "x", context=20, max_completion_length=20) == message


def test_no_prompts_are_no_error() -> None:
    assert tokenize(Prompts([]), make_tokenizer(), PromptConfig()) == (Prompts([]), [])


def test_a_prompt_without_tokens_and_one_that_ends_with_eos() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert refused(tokenizer, [{"role": "user", "content": ""}]) == "f:1: the prompt has no tokens: ''"
    _, notes = run(tokenizer, [USER], [{"role": "user", "content": "Bye.<end>"}], eos=[2])
    assert notes == ["prompts that end with an end-of-sequence token, as if they were answered: 1 (the first: f:2)"]


def test_a_prompt_without_a_place_is_counted() -> None:
    with pytest.raises(ConfigError, match="prompt 2: the prompt has 3 tokens"):
        tokenize(Prompts([Example("a"), Example("xyz")]), make_tokenizer(), PromptConfig(max_prompt_length=2))


# ---- templates from anywhere ----------------------------------------------------------------------------------------


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLES = "{% set n = namespace(x='xxxx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOPS, "f:1: the tokenizer's chat template takes over 0.3 s, and 0.1 s more for each prompt"),
        ("{{ 'x' * 10**10 }}", "f:1: the tokenizer's chat template takes over 64 MiB for one prompt"),
        ("{{ 'x'.ljust(10**10) }}", "f:1: the tokenizer's chat template takes over 64 MiB for one prompt"),
        ("{{ (10 ** 9) ** (10 ** 9) }}", "f:1: the tokenizer's chat template takes over 0.3 s"),
        (DOUBLES, "f:1: the tokenizer's chat template takes over 64 MiB for one prompt"),
        ("{{ 'x' * 10**6 }}", "f:1: the tokenizer's chat template makes 1000000 characters of a prompt with 48"),
        ("{{ '\\ud800' }}", "f:1: the tokenizer's chat template refuses it: it writes '\\ud800', half of a surrogate"),
        (
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "f:1: the tokenizer's chat template refuses it: maximum rec",
        ),
        (
            "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
            "f:1: the tokenizer's chat template refuses it: maximum recurs",
        ),
        (
            "{{ ''.__class__.__mro__ }}",
            "f:1: the tokenizer's chat template refuses it: access to attribute '__class__'",
        ),
    ],
)
def test_a_hostile_template_is_one_line(monkeypatch, template: str, message: str) -> None:
    if "over 0.3 s" in message:
        monkeypatch.setattr(rendering, "SECONDS", 0.3)
    monkeypatch.setattr(rendering, "MEMORY", 2**26)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    assert refused(tokenizer, [USER]).startswith(message)


@pytest.mark.parametrize("name", ["messages", "self"])
def test_template_args_by_names_that_are_taken_are_one_line(name: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    said = f"f:1: the tokenizer's chat template refuses it: TypeError: .*multiple values for .*argument '{name}"
    assert re.match(said, refused(tokenizer, [USER], template_args=[f"{name}=1"]))


def test_a_template_is_ended_whatever_its_program_does_with_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.3)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = LOOPS
    said: list[str] = []

    def render() -> None:
        with pytest.raises(ConfigError) as e:
            renderer.render([USER])
        said.append(str(e.value))

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with rendering.Renderer(tokenizer) as renderer:
            thread = threading.Thread(target=render, daemon=True)
            thread.start()
            thread.join(20)
        tokenizer.chat_template = "{{ messages[0].content }}"
        with rendering.Renderer(tokenizer) as renderer:
            assert renderer.render([USER]) == "Say hi."
    finally:
        signal.signal(signal.SIGCHLD, before)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    assert said == ["the tokenizer's chat template ended the process that renders it, or took too long"]


def test_a_template_that_ends_its_process_is_one_line() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.apply_chat_template = lambda **_: os._exit(7)
    message = "f:1: the tokenizer's chat template ended the process that renders it, with status 7"
    assert refused(tokenizer, [USER]) == message
