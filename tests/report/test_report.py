"""The report page: what it says is what the files say, and every incomplete run still gets one."""

import json
import math
import random
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from mdpgrpo_fast.config import ConfigError, TrainConfig, preset
from mdpgrpo_fast.report.page import main, write_report

TYPES = [
    "keywords:existence",
    "keywords:frequency",
    "keywords:forbidden_words",
    "length_constraints:number_words",
    "length_constraints:number_sentences",
    "detectable_format:number_bullet_lists",
    "detectable_format:title",
    "punctuation:no_comma",
    "startend:end_checker",
    "change_case:english_lowercase",
]
ATTACK = "<script>alert('pwned')</script><img src=x onerror=alert(1)> & so on"


def training_row(step: int, steps: int, rng: random.Random) -> dict:
    t = step / steps
    ssr = 0.45 + 0.4 * (1 - math.exp(-3 * t)) + rng.gauss(0, 0.05)
    return {
        "step": step,
        "loss": rng.gauss(0, 0.02),
        "reward": ssr,
        "reward_std": 0.3 - 0.1 * t,
        "hsr": min(1.0, max(0.0, ssr - 0.35 + rng.gauss(0, 0.06))),
        "ssr": ssr,
        "kl": 0.03 * t + abs(rng.gauss(0, 0.003)),
        "entropy": 2.6 - 0.9 * t + rng.gauss(0, 0.05),
        "clip_low": abs(rng.gauss(0, 0.004)),
        "clip_high": abs(rng.gauss(0, 0.008)),
        "ratio_mean": 1.0,
        "ratio_max": 1.4,
        "kl_clamped": 0,
        "grad_norm": abs(rng.gauss(0.8, 0.2)),
        "learning_rate": 1e-4 * (1 - t),
        "tokens_per_second": rng.gauss(900, 40),
        "completion_length": 58 - 14 * t + rng.gauss(0, 3),
        "truncated": max(0.0, 0.2 - 0.25 * t + rng.gauss(0, 0.02)),
        "dropped": 0,
        "advantage_mean": -0.1 + 0.1 * t,
        "zero_variance_groups": min(1.0, max(0.0, 0.25 + 0.3 * t + rng.gauss(0, 0.1))),
        "large_z_groups": max(0.0, 0.2 - 0.1 * t + rng.gauss(0, 0.05)),
        "gain_below_goal_groups": max(0.0, 0.3 - 0.35 * t + rng.gauss(0, 0.05)),
        "zero_gradient_groups": 0.0,
        "slots": [
            {"temperature": tau, "reward": ssr + 0.06 - 0.12 * tau, "reward_std": 0.1 + 0.15 * tau, "ess": None}
            for tau in (0.1, 0.4, 0.7, 1.0)
        ],
        "seconds": {
            "generate": rng.gauss(1.4, 0.1),
            "score": 0.1,
            "reference": 0.2,
            "forward": rng.gauss(0.8, 0.05),
            "backward": 0.5,
            "optimizer": 0.1,
            "other": 0.03,
        },
        "memory_mb": 812.0,
        "note": "the gradient is 0: the rewards of every group are all equal" if step % 23 == 0 else None,
    }


def evaluation_row(step: int, hsr: float, ssr: float, rates: dict[str, float]) -> dict:
    types = {name: {"rate": rate, "count": 6 + i} for i, (name, rate) in enumerate(rates.items())}
    return {"step": step, "eval": {"hsr": hsr, "ssr": ssr, "count": 32, "types": types}}


def fake_run(path: Path, steps: int = 60) -> Path:
    """A run directory as the trainer writes it."""
    rng = random.Random(0)
    path.mkdir(parents=True)
    run = TrainConfig(preset="paper", steps=steps, learning_rate=1e-4)
    config = {"run": vars(run), "method": vars(preset("paper", num_generations=4))}
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    before = {name: rng.uniform(0.1, 0.9) for name in TYPES}
    after = {name: min(1.0, max(0.0, rate + rng.uniform(-0.1, 0.4))) for name, rate in before.items()}
    rows = [evaluation_row(0, 0.15625, 0.5139, before)]
    for step in range(1, steps + 1):
        rows.append(training_row(step, steps, rng))
        if step % 20 == 0:
            share = step / steps
            rows.append(evaluation_row(step, 0.15625 + 0.3125 * share, 0.5139 + 0.2708 * share, after))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {
        "hsr_before": 0.15625,
        "hsr_after": 0.46875,
        "ssr_before": 0.5139,
        "ssr_after": 0.7847,
        "steps": steps,
        "train_seconds": 143.21,
        "total_seconds": 171.9,
        "method": "paper",
        "device": "cpu",
        "versions": {"mdpgrpo_fast": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"},
        "peak_memory_mb": 1234.5,
        "dropped_samples": 3,
        "types": {n: {"before": before[n], "after": after[n], "count": 6 + i} for i, n in enumerate(TYPES)},
        "model": "embedded seed policy",
        "train_file": "embedded",
        "eval_file": "embedded",
        "seed": 42,
    }
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in completions(rng)))
    return path


def completions(rng: random.Random) -> list[dict]:
    rows = []
    for phase in ("before", "train", "after"):
        for i in range(16):
            ids = [TYPES[i % 10], TYPES[(i + 3) % 10], TYPES[(i + 6) % 10]]
            satisfied = [rng.random() < (0.75 if phase == "after" else 0.4) for _ in ids]
            prompt = f"Write about subject {i} in two or three sentences, without a comma, and name the <b>river</b>."
            text = " ".join(
                rng.choice(["the river", "runs", "slowly", "past", "old", "mills", "and"]) for _ in range(30)
            )
            rows.append(
                {
                    "step": 60 if phase == "after" else 0,
                    "phase": phase,
                    "prompt": [{"role": "user", "content": prompt}] if i % 2 else prompt,
                    "response": ATTACK if i == 1 and phase == "after" else f"{phase.title()} {i}: {text}.",
                    "temperature": 0.0,
                    "reward": sum(satisfied) / 3,
                    "advantage": None if phase != "train" else 0.4,
                    "instruction_ids": ids,
                    "satisfied": satisfied,
                    "finished": i % 5 > 0,
                }
            )
    return rows


class Page(HTMLParser):
    """Element names, attributes and text as a browser would see them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.hidden = False
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.hidden = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self.hidden = False

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.words.append(data)


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> tuple[Path, Page]:
    run = fake_run(tmp_path_factory.mktemp("report") / "a <run> & more")
    return run, Page(write_report(run))


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Leave the figures out: what is tested is the text."""
    monkeypatch.setattr("mdpgrpo_fast.report.page.svg", lambda panel, run: "<svg></svg>")
    monkeypatch.setattr("mdpgrpo_fast.report.page.write_png", lambda run, stem, panels: bool(run.train))
    monkeypatch.setattr("mdpgrpo_fast.report.page.write_types_png", lambda run, rows: None)


def rewrite(path: Path, change) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in (change(row) for row in rows) if row is not None))


def test_headline_has_the_numbers_of_the_summary(full):
    _, page = full
    assert "15.6% → 46.9% +31.3 points" in page.text
    assert "51.4% → 78.5% +27.1 points" in page.text
    for fact in ("Steps 60", "2 min 23 s", "2 min 51 s", "Device cpu", "preset paper", "embedded seed policy",
                 "embedded (32)", "1,234 MB", "Dropped samples 3", "Seed 42", "torch 2.13.0"):  # fmt: skip
        assert fact in page.text, fact


def test_every_section_and_chart_is_there(full):
    _, page = full
    for heading in ("Learning", "Group health", "Pace", "Instruction types", "Held-out completions", "Configuration"):
        assert f"<h2>{heading}</h2>" in page.source
    for title in ("Held-out HSR and SSR", "Training HSR and SSR", "Training reward", "Loss", "KL to the reference",
                  "Entropy", "Clip share", "Gradient norm", "Groups with equal rewards", "Groups with |z| > 2",
                  "Failing groups rewarded by z", "Reward by temperature", "Reward spread by temperature",
                  "Seconds per step"):  # fmt: skip
        assert f'aria-label="{title.replace(">", "&gt;")}"' in page.source, title
    assert "τ 0.1" in page.text and "τ 0.7" in page.text
    assert "Effective sample size" not in page.text  # no importance weights in this run
    assert "2 of 60 steps: the gradient is 0: the rewards of every group are all equal." in page.text


def test_stage_shares_are_those_of_the_metrics(full):
    run, page = full
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    total = sum(sum(s.values()) for s in seconds)
    for stage in seconds[0]:
        assert f"{stage} {sum(s[stage] for s in seconds) / total:.0%}" in page.text


def test_types_with_rates_and_counts_the_largest_gain_first(full):
    run, page = full
    types = json.loads((run / "summary.json").read_text())["types"]
    for name, row in types.items():
        assert f"{name} {row['before']:.1%} {row['after']:.1%} {row['count']}" in page.text
    order = sorted(types, key=lambda t: types[t]["before"] - types[t]["after"])
    places = [page.source.index(f'<th scope="row">{name}</th>') for name in order]
    assert places == sorted(places)


def test_completions_side_by_side_changed_first(full):
    run, page = full
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    count = {phase: [sum(r["satisfied"]) for r in rows if r["phase"] == phase] for phase in ("before", "after")}
    changes = [b - a for a, b in zip(count["before"], count["after"], strict=True)]
    better, worse = sum(c > 0 for c in changes), sum(c < 0 for c in changes)
    assert f"{better} of 16 satisfy more than before, {worse} fewer; the largest changes first, 12 shown." in page.text
    shown = [int(m) for m in re.findall(r"Write about subject (\d+) in", page.text)]
    sizes = [abs(changes[i]) for i in shown]
    assert len(shown) == 12 and sizes == sorted(sizes, reverse=True)
    first = [r for r in rows if r["phase"] == "before"][shown[0]]
    for name, ok in zip(first["instruction_ids"], first["satisfied"], strict=True):
        assert f"{'✓' if ok else '✗'} {name}" in page.text
    assert "stopped by the length limit" in page.text
    assert "Train 3:" not in page.text


def test_untrusted_text_stays_text(full):
    _, page = full
    assert ATTACK in page.text  # the parser has unescaped it: it is text, not markup
    assert not {"script", "img", "iframe", "link", "b>river"} & set(page.tags)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "<b>river</b>" in page.text
    assert "<h1>a &lt;run&gt; &amp; more</h1>" in page.source


def test_page_loads_nothing(full):
    _, page = full
    assert not re.search(r"https?://|//www|@import|url\((?!#)", page.source)
    references = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert references and all(value.startswith("#") for value in references)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in references} <= set(ids)


def test_images_are_png_files(full):
    run, _ = full
    for name in ("curves", "group_health", "pace", "types"):
        data = (run / f"{name}.png").read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND" and width > 1000 and height > 300


def test_configuration_marks_what_is_not_the_default(full):
    _, page = full
    assert '<tr class="set"><th scope="row">learning_rate</th><td>0.0001</td>' in page.source
    assert '<tr class=""><th scope="row">prospect_gain</th><td>1.25</td>' in page.source
    assert page.tags.count("details") == 2


def test_matplotlib_state_is_left_alone_and_torch_unneeded(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    code = (
        "import sys, mdpgrpo_fast.report.page; assert 'matplotlib' not in sys.modules\n"
        "import matplotlib; before = matplotlib.rcParams.copy()\n"
        f"mdpgrpo_fast.report.page.write_report({str(tmp_path)!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules\n"
        "assert matplotlib.rcParams.copy() == before\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").is_file()


def test_run_stopped_halfway(tmp_path, undrawn):
    run = fake_run(tmp_path / "run")
    (run / "summary.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()[:30]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 30, "lo']))
    rewrite(run / "completions.jsonl", lambda row: None if row["phase"] == "after" else row)
    text = Page(write_report(run)).text
    assert "stopped after step 28 of 60" in text
    assert "metrics.jsonl: 1 unreadable line left out, the last one: writing it was probably cut short." in text
    assert f"15.6% → {0.15625 + 0.3125 / 3:.1%}" in text
    assert "not recorded" in text


def test_interrupted_run_says_so(tmp_path, undrawn):
    run = fake_run(tmp_path / "run", steps=3)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "interrupted": True, "hsr_after": None, "types": {}}))
    page = Page(write_report(run))
    assert "The run was interrupted after step 3" in page.text and "No instruction types" not in page.text


def test_reward_of_ones_own_has_no_hsr(tmp_path, undrawn):
    run = fake_run(tmp_path / "run", steps=3)
    none = dict.fromkeys(("hsr_before", "hsr_after", "ssr_before", "ssr_after"))
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, **none, "types": {}}))
    rows = [{"step": s, "eval": {"hsr": None, "ssr": None, "count": 0, "types": {}, "reward": s / 8}} for s in (0, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewrite(run / "completions.jsonl", lambda row: {**row, "satisfied": None, "instruction_ids": []})
    text = Page(write_report(run)).text
    assert "0.000 → 0.375" in text and "No instruction types" in text and "HSR, responses" not in text


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", "summary.json", "completions.jsonl"])
def test_one_file_missing(tmp_path, undrawn, missing):
    run = fake_run(tmp_path / "run", steps=2)
    (run / missing).unlink()
    text = Page(write_report(run)).text
    expected = {
        "config.yaml": "No configuration has been recorded.",
        "metrics.jsonl": "No training step has been recorded",
        "summary.json": "The run has no summary",
        "completions.jsonl": "No held-out completions have been recorded.",
    }[missing]
    assert expected in text
    assert missing == "summary.json" or f"{missing} is missing." in text


def test_only_an_empty_metrics_file(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    text = Page(write_report(tmp_path)).text
    assert "No training step has been recorded" in text and "No held-out evaluation has been recorded" in text
    assert not list(tmp_path.glob("*.png"))


def test_odd_values_do_not_stop_the_page(tmp_path):
    rows = [
        {
            "step": 1,
            "loss": math.nan,
            "reward": "much",
            "kl": 10**400,
            "slots": [None, {"temperature": "hot"}],
            "hsr": [],
        },
        {"step": 2, "loss": 0.5, "slots": 7, "seconds": {"generate": 1.0, "train": None}, "note": {"a": 1}},
        {"step": None, "loss": 1.0, "slots": None, "seconds": 3},
        {"step": 2, "eval": {"hsr": 0.5, "ssr": 0.5, "types": {"a$b$_\ud800": {"rate": 0.5}, "c": None}}},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "[1]\nnot json\n")
    odd = {"phase": "after", "prompt": None, "response": "\ud800 \x00", "instruction_ids": 3, "satisfied": True}
    (tmp_path / "completions.jsonl").write_text(json.dumps(odd) + "\n")
    (tmp_path / "config.yaml").write_text("run: [1, 2\n")
    (tmp_path / "summary.json").write_text("[]")
    text = Page(write_report(tmp_path)).text
    assert "The loss is not a finite number in 1 of 3 steps, first 1." in text
    assert "metrics.jsonl: 2 unreadable lines left out" in text
    assert "config.yaml could not be read." in text and "summary.json could not be read." in text
    assert "a$b$_?" in text


def test_long_response_is_cut_and_says_so(tmp_path, undrawn):
    run = fake_run(tmp_path / "run", steps=1)
    rewrite(run / "completions.jsonl", lambda row: {**row, "response": "x" * 5000})
    assert "… (3400 more characters)" in Page(write_report(run)).text


def test_command_line(tmp_path, undrawn, capsys):
    run = fake_run(tmp_path / "run", steps=1)
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")


@pytest.mark.parametrize("case", ["absent", "empty", "file"])
def test_not_a_run_directory(tmp_path, capsys, case):
    path = tmp_path / case
    if case == "empty":
        path.mkdir()
    elif case == "file":
        path.write_text("text")
    with pytest.raises(ConfigError):
        write_report(path)
    with pytest.raises(SystemExit) as stop:
        main([str(path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and str(path) in error


@pytest.mark.parametrize("argv", [[], ["a", "b"], ["--nothing"]])
def test_wrong_arguments(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
