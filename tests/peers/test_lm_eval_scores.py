"""The accuracies of a response file against those of lm-eval's functions, and of the labels of IFEval's own code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.verifiers import nltk_data, punkt_folder, rows

from mdpgrpo_fast.verifiers.__main__ import score

NAMES = ("prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose")


def labelled(origin: str) -> list[dict[str, Any]]:
    """Unchanged responses of one model (any: of the first that the table has), one row a prompt: its labelled
    instructions, and what IFEval's code said of them."""
    found: dict[int, dict[str, Any]] = {}
    for row in rows("ifeval_golden.jsonl.gz"):
        if row["mutation"] != "orig" or row["origin"] != (origin if origin != "any" else row["origin"]):
            continue
        one = found.setdefault(row["key"], {**row, "instruction_id_list": [], "kwargs": [], "strict": [], "loose": []})
        if row["response"] == one["response"]:
            one["instruction_id_list"].append(row["instruction_id"])
            for name in ("kwargs", "strict", "loose"):
                one[name].append(row[name])
    return list(found.values())


def expected(strict: list[list[bool]], loose: list[list[bool]]) -> list[float]:
    """As evaluation_main reports them: the prompt level, then the instruction level, of each mode."""
    shares = []
    for verdicts in (strict, loose):
        flat = [one for row in verdicts for one in row]
        shares += [sum(map(all, verdicts)) / len(verdicts), sum(flat) / len(flat)]
    return shares


@pytest.mark.parametrize(("origin", "count", "types"), [("gpt4", 50, 20), ("any", 200, 25)])
def test_a_response_file_gives_the_same_eight_numbers(
    lm_eval: Any, tmp_path: Path, capsys: pytest.CaptureFixture, origin: str, count: int, types: int
) -> None:
    asked = labelled(origin)
    assert len(asked) >= count and len({id for row in asked for id in row["instruction_id_list"]}) >= types
    fields = {"prompts": ("key", "prompt", "instruction_id_list", "kwargs"), "responses": ("prompt", "response")}
    for name, columns in fields.items():
        lines = [json.dumps({column: row[column] for column in columns}) + "\n" for row in asked]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    with nltk_data(punkt_folder()):
        files = [word for name in fields for word in (f"--{name}", str(tmp_path / f"{name}.jsonl"))]
        assert score([*files, "--json"]) == 0
        ours = json.loads(capsys.readouterr().out)
        theirs = [lm_eval.process_results(row, [row["response"]]) for row in asked]
    by_label = expected([row["strict"] for row in asked], [row["loose"] for row in asked])
    by_lm_eval = [
        sum(row["prompt_level_strict_acc"] for row in theirs) / len(theirs),
        lm_eval.agg_inst_level_acc([row["inst_level_strict_acc"] for row in theirs]),
        sum(row["prompt_level_loose_acc"] for row in theirs) / len(theirs),
        lm_eval.agg_inst_level_acc([row["inst_level_loose_acc"] for row in theirs]),
    ]
    assert [ours[name] for name in NAMES] == pytest.approx(by_label, abs=1e-12)
    assert [ours[name] for name in NAMES] == pytest.approx(by_lm_eval, abs=1e-12)
    for id, one in ours["types"].items():
        labels = [
            (strict, loose)
            for row in asked
            for name, strict, loose in zip(row["instruction_id_list"], row["strict"], row["loose"], strict=True)
            if name == id
        ]
        assert one["count"] == len(labels)
        assert (one["strict"], one["loose"]) == tuple(sum(column) / len(labels) for column in zip(*labels, strict=True))
