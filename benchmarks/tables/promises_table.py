"""What we promise, the command that proves each promise, and its last figure: of result files alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).resolve().parents[1] / "results" / "cpu"
SUITE, CI = "in every run of the tests", "in every run of CI"  # what has no count of its own: it holds, or they fail


class Promise(NamedTuple):
    text: str
    command: str
    file: str = ""  # of RESULTS
    figure: Callable[[dict[str, Any]], str] | None = None
    without: str = ""  # what is said where there is no file


def pytest(*names: str, words: str = "") -> str:
    return " ".join(["pytest", *(f"tests/{name}" for name in names), *([f"-k {words}"] if words else [])])


def count(n: int) -> str:
    return f"{n:,}"


def tests(document: dict[str, Any]) -> str:
    return f"{document['passed']} of {document['tests']} tests pass"


def fuzzed(*words: str) -> Callable[[dict[str, Any]], str]:
    """Inputs of the targets whose name holds one of the words, and what was found."""

    def figure(document: dict[str, Any]) -> str:
        rows = [row for name, row in document["targets"].items() if any(word in name for word in words)]
        found = [sum(row.get(kind, 0) for row in rows) for kind in ("crashes", "differences")]
        inputs = sum(sum(row["inputs"].values()) for row in rows)
        return f"{count(inputs)} inputs, {count(found[0])} crashes, {count(found[1])} differences"

    return figure


def chaos(document: dict[str, Any]) -> str:
    tried = f"{count(document['kills'])} kills, {count(document['faults'])} failing file operations"
    return f"{tried}, {count(document['failed'])} trials fail"


def killed(*groups: str) -> Callable[[dict[str, Any]], str]:
    """Mutants of some groups."""

    def figure(document: dict[str, Any]) -> str:
        rows = [document["groups"][name] for name in groups if name in document["groups"]]
        n, dead, of = (sum(row[key] for row in rows) for key in ("mutants", "killed", "of"))
        same = sum(row["equivalent"] for row in rows)
        drawn = f", drawn from {count(of)}" if of > n else ""
        interval = (
            f" ({rows[0]['interval'][0]:.1%} to {rows[0]['interval'][1]:.1%})" if len(rows) == 1 and drawn else ""
        )
        share = f"{count(dead)} of {count(n)} mutants killed, {dead / n:.1%}{interval}{drawn}"
        return f"{share}; without the {same} that change nothing {dead / (n - same):.1%}"

    return figure


def lowest(document: dict[str, Any]) -> str:
    packages = document["packages"]
    seen = {k: p["percent"] for k, p in packages.items() if "unseen" not in p}
    name = min(seen, key=lambda k: seen[k])
    unseen = "".join(f"; {k} {p['percent']:.1f} % ({p['unseen']})" for k, p in packages.items() if "unseen" in p)
    whole = f"{document['percent']:.1f} % of {count(document['lines'])} lines"
    return f"{whole}; least: {name}, {seen[name]:.1f} %{unseen}"


def slowest(document: dict[str, Any]) -> str:
    rows = [(int(length), row[length]["ms"], row["type"]) for length, row in document["slowest"].items()]
    said = "; ".join(f"{name} {ms:.0f} ms on {count(length)}" for length, ms, name in rows)
    return f"{len(document['types'])} rules, {len(document['over'])} over; slowest: {said}"


PROMISES = {
    "Numbers": [
        Promise(
            "A backend gives the reference's numbers within PyTorch's own rounding, or refuses",
            pytest("ops", "kernels"),
        ),
        Promise("The reference follows the paper's equations, written out as loops", pytest("test_reference*.py")),
        Promise(
            "Rewards that are equal but for rounding are equal: z = 0, and one KL coefficient, on every backend",
            pytest("ops/test_signs.py"),
        ),
        Promise(
            "The order of rows and groups, micro-batches, packing and the backend change no result",
            "make metamorphic",
            "metamorphic.json",
            lambda d: f"{count(d['configurations'])} configurations, {count(len(d['failures']))} differ",
        ),
        Promise(
            "Random calls of the compiled kernels neither crash nor differ from float64, under ASan and UBSan",
            "make fuzz",
            "fuzz.json",
            fuzzed("kernels"),
        ),
        Promise(
            "A non-finite loss, gradient or weight ends no run in silence and is never saved",
            pytest("training", words="finite"),
        ),
        Promise(
            "Small faults in the reference and the advantages make a test fail",
            "make mutation",
            "mutation.json",
            killed("reference", "advantages"),
        ),
        Promise(
            "Small faults in the compiled objective make a test fail", "make mutation", "mutation.json", killed("cpp")
        ),
        Promise("TRL's losses and ours agree; so do Liger's and verl's", pytest("peers")),
        Promise("A real verl trains with our parts as its own tests ask", "make test-verl", "verl_tests.json", tests),
        Promise("A real vLLM samples, scores and takes our weights", "make test-vllm", "vllm_tests.json", tests),
    ],
    "Runs": [
        Promise(
            "A run that is killed at any moment goes on to the same weights, metrics and completions, to the bit",
            "make chaos",
            "chaos.json",
            chaos,
        ),
        Promise(
            "A checkpoint that is damaged is named, and the newest whole one is taken",
            pytest("training", words="damage"),
        ),
        Promise("Nothing that is loaded can run code: no pickle is read", pytest("training", words="pickle")),
        Promise(
            "A directory is locked while it is written to, and only a run's own is renamed or written over",
            pytest("training/test_run_dir.py"),
        ),
        Promise(
            "SIGTERM, SIGHUP and SIGINT end a run with a checkpoint and the line that goes on",
            pytest("training", words="signal"),
        ),
        Promise(
            "A full disk keeps the last whole checkpoint",
            "make chaos",
            "chaos.json",
            lambda d: f"{count(d['faults'])} failing file operations",
        ),
        Promise(
            "Scoring survives what a reward does: raises, exits, hangs, is killed, takes all memory", pytest("rewards")
        ),
        Promise(
            "A lost rank ends the others, with its name",
            pytest("training/test_distributed.py", "training/test_two_hosts.py"),
        ),
        Promise(
            "Memory does not grow with the steps of a run: what is cached by shape is bounded",
            pytest("kernels/test_onednn.py", words="caches_of_kernels"),
        ),
    ],
    "Input": [
        Promise(
            "A verifier says what its official code says",
            pytest("verifiers/test_golden.py", "verifiers/test_verify.py"),
        ),
        Promise("Random texts get lm-eval's verdicts", "make fuzz", "fuzz.json", fuzzed("lm_eval")),
        Promise(
            "Small faults in the verifiers make a test fail",
            "make mutation",
            "mutation.json",
            killed("rules", "text", "scoring"),
        ),
        Promise(
            "With the arguments of data sets, a verifier answers on 200,000 hostile characters within 110 ms, on "
            "2,000,000 within 1.1 s; three that divide words as spaCy's Spanish models do take twice as long",
            "python benchmarks/bench_verifiers.py --bounds",
            "verifier_bounds.json",
            slowest,
        ),
        Promise(
            "Data, configurations, chat templates and a server's answers may be anything: one line, no crash",
            "make fuzz",
            "fuzz.json",
            fuzzed("data", "configuration", "templates", "answers", "arguments"),
        ),
        Promise(
            "A template or a model's output reaches neither the terminal nor all memory",
            pytest("prompts", words="template"),
        ),
    ],
    "Code": [
        Promise(
            "Each planted fault is caught by the test that is named beside it",
            "make faults",
            without="by hand, before a change of what it names",
        ),
        Promise(
            "At least 92 % of the lines of every package are run by the tests, where what runs is counted",
            "make coverage",
            "coverage.json",
            lowest,
        ),
        Promise("The package passes mypy --strict, a user's script against the wheel too", "make check install-check"),
        Promise(
            "It builds and installs in every way that README names, or says why not",
            "make install-check",
            "install.json",
            lambda d: f"{len(d['ways'])} ways",
        ),
        Promise(
            "No run-time dependency is under a licence of the GPL's family ([list](licences.md))",
            pytest("test_promises.py"),
        ),
        Promise(
            "No dependency has a known vulnerability",
            "make audit",
            "audit.json",
            lambda d: f"{count(d['packages'])} packages on {d['date']}, {len(d['vulnerabilities'])} known",
            "none: pip-audit's services were not reached where the others ran",
        ),
        Promise(
            "Every number on these pages comes from a result file with its command and commit",
            "python benchmarks/tables/readme.py --check",
        ),
    ],
}


def figure_of(promise: Promise) -> str:
    if not promise.file:
        return promise.without or (CI if promise.command.startswith("make") else SUITE)
    path = RESULTS / promise.file
    if not path.exists():
        return promise.without
    document = json.loads(path.read_text(encoding="utf-8"))
    assert promise.figure is not None
    return f"{promise.figure(document)} ([{document['commit'][:10]}](../benchmarks/results/cpu/{promise.file}))"


def section() -> str:
    lines = []
    for title, promises in PROMISES.items():
        lines += [f"## {title}", "", "| promise | how to test it | last figure |", "|---|---|---|"]
        lines += [f"| {p.text} | `{p.command}` | {figure_of(p)} |" for p in promises]
        lines.append("")
    return "\n".join(lines[:-1])
