"""What is fuzzed: each target takes bytes, and raises for what must not happen."""

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fuzz.draw import Draw
from golden import scripts
from helpers import verifiers as texts
from helpers.inputs import make_tokenizer

from mdpgrpo_fast.cli import parse, read_yaml
from mdpgrpo_fast.config import PRESETS, ConfigError, MDPGRPOConfig, PromptConfig, TrainConfig
from mdpgrpo_fast.data import Example, Prompts, read_prompts, rendering, tokenize
from mdpgrpo_fast.rollout.vllm import server
from mdpgrpo_fast.verifiers import INSTRUCTIONS, InstructionError, MissingRequirementError, validate, verify

SECONDS = 5.0  # that one input may take, far more than any needs
_LANGUAGE = [i for i in INSTRUCTIONS if "language" in i or "_capital" in i or "_lowercase" in i]
_IFEVAL = [i for i in INSTRUCTIONS if INSTRUCTIONS[i].rules[0] == "ifeval" and i not in _LANGUAGE]
_LANGUAGE_OF_IFEVAL = ["language:response_language", "change_case:english_capital", "change_case:english_lowercase"]
_PIECES = [
    *["\n", " "] * 8, "\n\n", "\r\n", "\t", "***", "******", "*", "**", "* a", "- b", "\n* x\n", "<<", ">>", "<<a>>",
    "[", "]",
    "[a]", '"', "'", "```", "```json\n", "{}", "[1]", "1", "P.S.", "p. p. s", "P.P.S", "Section 1", "SECTION 2",
    "zebra",
    "My answer is yes.", "Zebra.", "island", "islands", "Name a zebra.", ",", ".", "!", "?", "a", "q", "NASA", "I'M",
    "Mr. ",
    *scripts.WORDS, *scripts.MARKS,
]  # fmt: skip


class Difference(AssertionError):
    """A verdict that is not the peer's, or a number that is not the exact one's."""


def _threshold(name: str) -> bool:
    return name.startswith(("num_", "nth_", "small_n")) or name.endswith("frequency") or name in ("N", "n", "m")


def _verdict(value: Any) -> bool:
    assert isinstance(value, bool), f"a verdict is {value!r}"
    return value


def _arguments(draw: Draw, instruction_id: str) -> dict[str, Any]:
    kwargs = dict(texts.arguments(instruction_id))
    for name in filter(_threshold, kwargs):
        kwargs[name] = 1 + draw.number(4)
    if "num_paragraphs" in kwargs and "nth_paragraph" in kwargs:
        kwargs["num_paragraphs"] = kwargs["nth_paragraph"] + draw.number(3)
    return kwargs


def verifiers_beside_lm_eval(lm_eval: Any, data: bytes) -> None:
    """A verdict of IFEval's rules against lm-eval's copy of Google's code."""
    draw = Draw(data)
    instruction_id = draw.choice(_LANGUAGE_OF_IFEVAL) if draw.one_in(100) else draw.choice(_IFEVAL)
    kwargs, loose = _arguments(draw, instruction_id), draw.one_in(16)
    text = draw.pieces(_PIECES, 24)
    asked = lm_eval.InputExample(key=0, instruction_id_list=[instruction_id], prompt="", kwargs=[kwargs])
    answer = lm_eval.test_instruction_following_loose if loose else lm_eval.test_instruction_following_strict
    try:
        theirs = answer(asked, text).follow_all_instructions
    except (UnicodeError, RecursionError):  # where the official code ends, ours answers
        theirs = None
    ours = _verdict(verify(instruction_id, text, kwargs, mode="loose" if loose else "strict"))
    if theirs is not None and ours != theirs:
        raise Difference(f"{instruction_id} {kwargs} loose={loose} ours={ours} {text!r}")


def verifiers_of_all_rules(data: bytes) -> None:
    """Every type under every rule set: True or False, loosely too wherever strictly."""
    draw = Draw(data)
    instruction_id = draw.choice(_known())
    if instruction_id in _LANGUAGE and not draw.one_in(20):
        return
    rules, kwargs = draw.choice(INSTRUCTIONS[instruction_id].rules), _arguments(draw, instruction_id)
    text = draw.pieces(_PIECES, 24)
    strict = _verdict(verify(instruction_id, text, kwargs, rules=rules))
    if draw.one_in(8):
        loose = _verdict(verify(instruction_id, text, kwargs, rules=rules, mode="loose"))
        assert loose or not strict, f"{instruction_id} {rules} {text!r} is followed strictly alone"


@functools.cache
def _known() -> list[str]:
    found = []
    for instruction_id in INSTRUCTIONS:
        try:
            validate(instruction_id, texts.arguments(instruction_id), INSTRUCTIONS[instruction_id].rules[0])
        except MissingRequirementError:
            continue
        found.append(instruction_id)
    return found


def arguments_of_verifiers(data: bytes) -> None:
    """Arguments of any kind: taken, or refused in one error."""
    draw = Draw(data)
    instruction_id = draw.choice(_known())
    entry = INSTRUCTIONS[instruction_id]
    names = [*entry.arguments, "relation", "(a|a)" * 9, r"\w?" * 9, "[", "a" * 400, "zebra", "de"]
    kwargs = _arguments(draw, instruction_id)
    for name in entry.arguments:
        if not draw.one_in(3):
            kwargs[name] = draw.value(names)
    try:
        validate(instruction_id, kwargs, rules=entry.rules[0])
    except InstructionError:
        return
    if instruction_id not in _LANGUAGE:
        _verdict(verify(instruction_id, draw.pieces(_PIECES, 12), kwargs, rules=entry.rules[0]))


def _one_line(error: ConfigError) -> None:
    text = str(error)
    assert text and "\n" not in text and len(text) < 5000, f"not one line: {text[:300]!r}"
    text.encode()


_COLUMNS = [
    "prompt", "messages", "role", "content", "user", "assistant", "instruction_id_list", "kwargs", "num_constraints",
    "tools", "ground_truth", "func_name", "N", "quantifier", "reward_model", "tool_calls", "type", "text", "id",
    "punctuation:no_comma", "keywords:existence", "keywords", "Say hi.",
]  # fmt: skip
_ROW = {"prompt": "Say hi.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}], "num_constraints": 1}


def data_reader(folder: Path, data: bytes) -> None:
    """A prompts file of any kind: prompts that can be written again, or one line."""
    draw = Draw(data)
    rows: list[Any] = []
    for _ in range(1 + draw.number(3)):
        row: Any = dict(_ROW)
        for _ in range(draw.number(4)):
            row[draw.choice(_COLUMNS)] = draw.value(_COLUMNS)
        rows.append(draw.value(_COLUMNS) if draw.one_in(10) else row)
    suffix = draw.choice([".jsonl", ".jsonl", ".json", ".csv", ".jsonl.gz"])
    if suffix == ".csv":
        out = io.StringIO()
        table = csv.DictWriter(out, list(_ROW), extrasaction="ignore")
        table.writeheader()
        table.writerows([{k: json.dumps(v) for k, v in row.items()} for row in rows if isinstance(row, dict)])
        text = out.getvalue()
    else:
        text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
    content = draw.mutated(text.encode())
    path = folder / f"p{suffix}"
    path.write_bytes(draw.mutated(gzip.compress(content, 1)) if suffix.endswith("gz") else content)
    config = PromptConfig(
        on_bad_row=draw.choice(["error", "drop"]), rules=draw.choice(["ifeval", "mdpgrpo", "iftrain"])
    )
    try:
        read = read_prompts(path, config)
    except ConfigError as e:
        _one_line(e)
        return
    for example in read.examples:
        json.dumps([example.prompt, example.columns], default=str, ensure_ascii=False).encode()
        assert len(example.instruction_ids) == len(example.kwargs) and example.num_constraints(1) >= 1
    for row in read.dropped:
        assert "\n" not in row.reason
        json.dumps(vars(row), ensure_ascii=False).encode()


_FLAGS = [f.replace("_", "-") for f in (*TrainConfig.__dataclass_fields__, *MDPGRPOConfig.__dataclass_fields__)]
_WORDS = [
    *("1", "0", "-1", "0.5", "1e400", "nan", "inf", "9" * 5000, str(2**63), "auto", "on", "off", "true", "a=1", "a=[",
    "",
      " ", "--", "-x", "--steps", "--no-bf16", "grpo", "\udcff", "\x00", "none", "a=" + "[" * 2000, "x" * 300,
      "[1, 2]"),
    *PRESETS,
]  # fmt: skip


def configuration(folder: Path, data: bytes) -> None:
    """A YAML file of knobs and the flags over it: a configuration, or one line."""
    draw = Draw(data)
    lines = []
    for _ in range(draw.number(5)):
        name = draw.choice(_FLAGS).replace("-", "_")
        value = json.dumps(draw.value(_WORDS, 1)) if draw.one_in(2) else draw.choice(_WORDS[:14])
        lines.append(f"{'  ' * draw.number(2)}{name}: {value}")
    head = draw.choice(["", "", "run:\n", "method:\n", "a: &a [1]\nb: [*a, *a]\n", "--- \n", "%YAML 1.1\n"])
    path = folder / "run.yaml"
    path.write_bytes(draw.mutated((head + "\n".join(lines)).encode("utf-8", "replace")))
    argv = []
    for _ in range(draw.number(3)):
        argv.append(f"--{draw.choice(_FLAGS)}")
        argv += [draw.choice(_WORDS) for _ in range(draw.number(3))]
    try:
        layers = [("run.yaml", read_yaml(path))] if not draw.one_in(3) else []
        run, method = parse(argv, TrainConfig, MDPGRPOConfig, prog="fuzz", layers=layers)
    except ConfigError as e:
        _one_line(e)
        return
    json.dumps([vars(run), vars(method)], ensure_ascii=False, default=str).encode()


_JINJA = [
    "{{", "}}", "{%", "%}", " for m in messages ", " endfor ", " if m.role == 'user' ", " else ", " endif ",
    "m.content", "messages",
    "messages[0]", "'x'", " * 9", " * 10**9", "**9", " ~ ", "range(9)", "range(10**8)", "|upper", "|join", "|tojson",
    "|center(10**9)",
    ".ljust(10**9)", " set x = ", "x", "raise_exception('no')", "m.__class__", "self", "namespace(a=1)", "loop", "\n",
    "<|im_end|>",
    " macro f() ", " endmacro ", "f()", "-", "(", ")", "[", "]", "add_generation_prompt", "{#", "#}", "''.format",
    "'{:>9}'",
]  # fmt: skip
_GOOD = "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}{{ $ }}"


def templates(tokenizer: Any, data: bytes) -> None:
    """A chat template of any kind: prompts, or one line."""
    draw = Draw(data)
    inner = draw.pieces(_JINJA, 12)
    tokenizer.chat_template = _GOOD.replace("$", inner) if draw.one_in(2) else inner
    example = Example([{"role": "user", "content": "Say hi."}], where="f:1")
    try:
        tokenize(Prompts([example]), tokenizer, PromptConfig(max_prompt_length=1000))
    except ConfigError as e:
        _one_line(e)


_ANSWER = {
    "choices": [
        {
            "token_ids": [1, 2], "finish_reason": "stop", "weight_versions": [{"version": "a"}],
            "logprobs": {"content": [{"token_id": 1, "logprob": -0.5}, {"token_id": 2, "logprob": -1.5}]},
        }
    ],
    "vllm_config": {
        "parallel_config": {"data_parallel_size": 1, "worker_extension_cls": ""}, "lora_config": None,
        "model_config": {"logprobs_mode": "raw"},
    },
}  # fmt: skip
_KEYS = ["choices", "token_ids", "finish_reason", "weight_versions", "version", "logprobs", "content", "token_id",
    "stop",
         "logprob", "vllm_config", "parallel_config", "lora_config", "max_lora_rank", "model_config"]  # fmt: skip


def answers_of_vllm(data: bytes) -> None:
    """What a server answers: a completion, or an error that the client takes for one that cannot be used."""
    draw = Draw(data)
    text = json.dumps(_ANSWER)
    for _ in range(draw.number(3)):
        text = text.replace(f'"{draw.choice(_KEYS)}"', json.dumps(draw.value(_KEYS)), 1 + draw.number(2))
    try:
        answer = json.loads(draw.mutated(text.encode()))
    except ValueError:
        return
    try:
        found = server._read_completion(answer)
        server._read_settings(answer)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        return
    assert len(found.tokens) == len(found.logprobs) > 0 and isinstance(found.finished, bool)


Target = Callable[[bytes], None]


@contextmanager
def ready(only: str = "") -> Iterator[dict[str, Target]]:
    """The targets by name, with what they need; what verifiers alone need is not loaded where `only` is another."""
    with ExitStack() as stack:
        memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=memory)))
        checks = not only or "verifiers" in only
        lm_eval = stack.enter_context(scripts.official()) if checks else None
        patch = stack.enter_context(texts.nltk_data(*texts.oracle_data()))
        patch.setattr(rendering, "SECONDS", 2.0)
        patch.setattr(rendering, "MEMORY", 2**27)
        for instruction_id in _known() if checks else ():  # loads what each needs
            verify(
                instruction_id,
                "Hi there.",
                texts.arguments(instruction_id),
                rules=INSTRUCTIONS[instruction_id].rules[0],
            )
        yield {
            "verifiers_beside_lm_eval": functools.partial(verifiers_beside_lm_eval, lm_eval),
            "verifiers_of_all_rules": verifiers_of_all_rules,
            "arguments_of_verifiers": arguments_of_verifiers,
            "data_reader": functools.partial(data_reader, folder),
            "configuration": functools.partial(configuration, folder),
            "templates": functools.partial(templates, make_tokenizer()),
            "answers_of_vllm": answers_of_vllm,
        }


def timed(target: Target, data: bytes) -> None:
    """Raises TimeoutError too where an input takes over `SECONDS` of this process."""
    begun = time.process_time()
    target(data)
    took = time.process_time() - begun
    if took > SECONDS:
        raise TimeoutError(f"an input took {took:.1f} s")
