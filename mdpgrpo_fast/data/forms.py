"""The forms that public training sets have: where a row's prompt and its constraints stand."""

from __future__ import annotations

import ast
import json
import math
import re
from typing import Any, NamedTuple

from .. import verifiers
from ..config import PromptConfig

MESSAGES = "the prompt is the column messages"
MULTI = "ground_truth holds instruction_id and kwargs (IF multi-constraint)"
RLVR = "ground_truth holds func_name (RLVR-IFeval), checked by the IFEval instruction that asks for the same"
VERL = "reward_model.ground_truth (verl) is the column ground_truth"
ANSWER = "messages ends with the assistant's answer, which is left out of the prompt"

_OPTIONS = {"My answer is yes.", "My answer is no.", "My answer is maybe."}


class Function(NamedTuple):
    """The IFEval instruction that asks for what a function of open-instruct checks."""

    instruction_id: str
    arguments: dict[str, str] = {}  # noqa: RUF012  IFEval's name of an argument: the function's
    relation: str | None = None  # the argument that has the function's quantifier
    exact: bool = False  # the function has no quantifier: it counts exactly N


# verify_paragraph_count is not among them: it divides by "* * *", IFEval's paragraphs by "***".
FUNCTIONS = {
    "verify_keywords": Function("keywords:existence", {"keywords": "keyword_list"}),
    "verify_keyword_frequency": Function(
        "keywords:frequency", {"keyword": "word", "frequency": "N"}, "relation", exact=True
    ),
    "validate_forbidden_words": Function("keywords:forbidden_words", {"forbidden_words": "forbidden_words"}),
    "verify_letter_frequency": Function(
        "keywords:letter_frequency", {"letter": "letter", "let_frequency": "N"}, "let_relation", exact=True
    ),
    "validate_response_language": Function("language:response_language", {"language": "language"}),
    "validate_word_constraint": Function("length_constraints:number_words", {"num_words": "N"}, "relation"),
    "verify_sentence_constraint": Function("length_constraints:number_sentences", {"num_sentences": "N"}, "relation"),
    "validate_paragraphs": Function(
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": "N", "nth_paragraph": "i", "first_word": "first_word"},
    ),
    "verify_postscript": Function("detectable_content:postscript", {"postscript_marker": "postscript_marker"}),
    "validate_placeholders": Function("detectable_content:number_placeholders", {"num_placeholders": "N"}),
    "verify_bullet_points": Function("detectable_format:number_bullet_lists", {"num_bullets": "N"}),
    "validate_title": Function("detectable_format:title"),
    "validate_choice": Function("detectable_format:constrained_response"),
    "validate_highlighted_sections": Function("detectable_format:number_highlighted_sections", {"num_highlights": "N"}),
    "validate_sections": Function(
        "detectable_format:multiple_sections", {"section_spliter": "section_splitter", "num_sections": "N"}
    ),
    "validate_json_format": Function("detectable_format:json_format"),
    "validate_repeat_prompt": Function("combination:repeat_prompt", {"prompt_to_repeat": "original_prompt"}),
    "validate_two_responses": Function("combination:two_responses"),
    "validate_uppercase": Function("change_case:english_capital"),
    "validate_lowercase": Function("change_case:english_lowercase"),
    "validate_frequency_capital_words": Function(
        "change_case:capital_word_frequency", {"capital_frequency": "N"}, "capital_relation"
    ),
    "validate_end": Function("startend:end_checker", {"end_phrase": "end_phrase"}),
    "validate_quotation": Function("startend:quotation"),
    "validate_no_commas": Function("punctuation:no_comma"),
}


class Found(NamedTuple):
    """A row in the library's own columns; `forms` are the sentences on what was recognised."""

    prompt: Any
    column: str  # where the prompt stood
    columns: dict[str, Any]
    forms: list[str]


def missing(value: Any) -> bool:
    """Whether a cell is empty: null, NaN as pandas writes it, or a CSV field without text."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def literal(value: Any) -> Any:
    """A list or object that is written as text, in JSON or as Python prints it; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            return read(value.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return value


def recognise(row: dict[str, Any], config: PromptConfig) -> Found:
    """Renames the columns of a row and takes its prompt and constraints from where its form has them.

    Raises: ValueError where there is no prompt, or a constraint has no equal under the rules.
    """
    renamed = dict(item.split("=", 1) for item in config.columns)
    columns = {k: v for k, v in row.items() if k not in renamed.values()}
    columns |= {new: row[old] for new, old in renamed.items() if old in row}
    forms = []

    column = config.prompt_column
    if column == "prompt" and column not in columns and "messages" in columns:
        column = "messages"
        forms.append(MESSAGES)
    if column not in columns:
        have = ", ".join(map(repr, columns)) or "no columns"
        raise ValueError(f"column {column!r} is missing; the row has {have} (prompt_column names another)")
    prompt = columns[column]
    if column == "messages":
        prompt = literal(prompt)
        if (
            isinstance(prompt, list)
            and prompt
            and isinstance(prompt[-1], dict)
            and prompt[-1].get("role") == "assistant"
        ):
            prompt = prompt[:-1]
            forms.append(ANSWER)

    reward_model = columns.get("reward_model")
    if "ground_truth" not in columns and isinstance(reward_model, dict) and "ground_truth" in reward_model:
        columns["ground_truth"] = reward_model["ground_truth"]
        forms.append(VERL)
    if missing(columns.get("instruction_id_list")):
        form, ids, kwargs = _constraints(columns.get("ground_truth"), config.rules)
        if form:
            columns |= {"instruction_id_list": ids, "kwargs": kwargs}
            forms.append(form)
    return Found(prompt, column, columns, forms)


def _constraints(ground_truth: Any, rules: str) -> tuple[str | None, list[Any], list[Any]]:
    value = literal(ground_truth)
    if isinstance(value, list) and len(value) == 1:  # open-instruct's later sets keep one text in a list
        value = literal(value[0])
    if isinstance(value, dict) and "func_name" in value:
        instruction_id, kwargs = _of_function(value, rules)
        return RLVR, [instruction_id], [kwargs]
    items = value if isinstance(value, list) else [value]
    if not items or not all(isinstance(item, dict) and {"instruction_id", "kwargs"} <= item.keys() for item in items):
        return None, [], []
    ids, kwargs_list = [], []
    for item in items:
        if not isinstance(item["instruction_id"], list) or not isinstance(item["kwargs"], list):
            raise ValueError("instruction_id and kwargs of 'ground_truth' must be lists")
        ids += item["instruction_id"]
        kwargs_list += item["kwargs"]
    return MULTI, ids, kwargs_list


def _of_function(ground_truth: dict[str, Any], rules: str) -> tuple[str, dict[str, Any]]:
    function = str(ground_truth["func_name"])
    entry = FUNCTIONS.get(function)
    if entry is None:
        raise ValueError(f"ground_truth (RLVR-IFeval): no IFEval instruction asks for what {function} checks")
    options = literal(ground_truth.get("options"))
    if function == "validate_choice" and not (isinstance(options, list) and set(map(str, options)) == _OPTIONS):
        raise ValueError(
            f"ground_truth (RLVR-IFeval): {function} among {options!r} has no equal: IFEval's choice is among "
            f"{', '.join(sorted(_OPTIONS))}"
        )
    kwargs = {ours: _as_pattern(ours, ground_truth.get(theirs)) for ours, theirs in entry.arguments.items()}
    if entry.relation:
        quantifier, n = "exactly" if entry.exact else ground_truth.get("quantifier"), ground_truth.get("N")
        function = f"{function} with quantifier {quantifier!r}"
        if quantifier == "at most" and isinstance(n, int):
            count = next(ours for ours, theirs in entry.arguments.items() if theirs == "N")
            quantifier, kwargs[count] = "less than", n + 1  # the same, and every set of rules knows it
        kwargs[entry.relation] = quantifier
    try:
        verifiers.validate(entry.instruction_id, kwargs, rules=rules)
    except ValueError as e:
        raise ValueError(f"ground_truth (RLVR-IFeval): {function} has no equal under rules {rules!r}: {e}") from None
    return entry.instruction_id, kwargs


def _as_pattern(name: str, value: Any) -> Any:
    """The functions take text where IFEval has regular expressions; a keyword is counted where it stands alone."""
    value = literal(value)
    if name in ("keywords", "forbidden_words") and isinstance(value, list):
        return [re.escape(word.strip()) if isinstance(word, str) else word for word in value]
    if name in ("keyword", "section_spliter") and isinstance(value, str) and value.strip():
        text = re.escape(value.strip())
        return rf"(?<!\w){text}(?!\w)" if name == "keyword" else text
    return value
