"""Containers of prompts: what is read from each, where a row stands, and the one line where it cannot be read."""

from __future__ import annotations

import builtins
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.inputs import needed
from helpers.prompts import GOOD, write

from mdpgrpo_fast.config import ConfigError, PromptConfig
from mdpgrpo_fast.data import files, read_prompts
from mdpgrpo_fast.data.files import read_rows
from mdpgrpo_fast.verifiers import packed
from mdpgrpo_fast.verifiers.scoring import score_files

ROWS = [{"prompt": "one", "n": 1}, {"prompt": "two\u2028still two", "n": 2}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def parquet(rows: list[dict[str, Any]]) -> bytes:
    pa, written = needed("pyarrow"), needed("pyarrow.parquet")
    out = pa.BufferOutputStream()
    written.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue().to_pybytes()


CONTAINERS: dict[str, Callable[[], bytes]] = {
    "p.jsonl": LINES.encode,
    "p.json": json.dumps(ROWS, indent=1).encode,
    "p.txt": ("\ufeff" + LINES.replace("\n", "\r\n\r\n")).encode,
    "p.parquet": lambda: parquet(ROWS),
    "p.jsonl.gz": lambda: gzip.compress(LINES.encode()),
    "p.parquet.gz": lambda: gzip.compress(parquet(ROWS)),
    "none": ("  " + json.dumps(ROWS)).encode,
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(CONTAINERS[name]())
    assert [row for _, row in read_rows(str(path))] == ROWS


def test_where_a_row_stands(tmp_path: Path) -> None:
    lines = write(tmp_path / "p.jsonl", "", GOOD, "", GOOD)
    assert [where for where, _ in read_rows(str(lines))] == [f"{lines}:2", f"{lines}:4"]
    array = write(tmp_path / "p.json", json.dumps([GOOD, GOOD]))
    assert [e.where for e in read_prompts(array).examples] == [f"{array} row 1", f"{array} row 2"]


def test_csv_is_text_with_lines_and_long_fields(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    long = "word " * 40_000
    rows = f'\ufeffprompt,answer,num_constraints\n"a\nb, ""c""",007,2\n\n{long},,\n'
    path.write_text(rows, encoding="utf-8")
    first, second = read_prompts(path).examples
    assert first.prompt == 'a\nb, "c"' and first.columns["answer"] == "007" and first.where == f"{path}:2"
    assert first.num_constraints(9) == 2, "a number of ours is read from text"
    assert second.prompt == long and second.num_constraints(9) == 9 and second.where == f"{path}:5"


def test_csv_of_pandas_has_lists_as_python_prints_them(tmp_path: Path) -> None:
    pandas = needed("pandas")
    kwargs = [{"num_words": 5, "relation": "at least", "end_phrase": None}]
    ids = ["length_constraints:number_words"]
    frame = pandas.DataFrame({"prompt": ["x"], "instruction_id_list": [ids], "kwargs": [kwargs]})
    frame.to_csv(tmp_path / "p.csv", index=False)
    (example,) = read_prompts(tmp_path / "p.csv").examples
    assert example.instruction_ids == ids and example.kwargs == [{"num_words": 5, "relation": "at least"}]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("e.jsonl", b"\n\n", "prompt file '.*e.jsonl' holds no prompts"),
        ("e.json", b"[]", "holds no prompts"),
        ("u.jsonl", b'{"prompt": "\xff"}', "cannot be read: 'utf-8' codec"),
        ("a.json", b'[{"prompt": "x"},\n {"prompt" "y"}]', r"a\.json:2: not a JSON array: Expecting ':' delimiter"),
        ("c.csv", b"prompt,a,prompt\nx,y,z\n", "c.csv:1: the header has two columns 'prompt'"),
        ("p.pkl", b"\x80\x04cos\nsystem\n(X\x02\x00\x00\x00idtR.", "cannot be read: 'utf-8' codec can't decode"),
        ("g.jsonl.gz", b"plain", "cannot be read: Not a gzipped file"),
        ("g.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], "cannot be read: Compressed file ended"),
        ("p.parquet", b"PAR1 no", "cannot be read: .*[Pp]arquet"),
        ("c.csv", b'prompt,a\n"x,1\n', r"c\.csv:\d: not CSV: unexpected end"),
        ("c.csv", b"prompt,a\nx,1\nx,1,2\n", r"c\.csv:3: 3 fields; the header has 2"),
        ("l.jsonl", b"{not json", r"l\.jsonl:1: not JSON: Expecting .* at column 2"),
        ("l.jsonl", b"[" * 100_000, "cannot be read: .*recursion"),
        ("l.jsonl", b'{"a": ' * 100_000, r"l\.jsonl:1: is nested more levels deep than"),
        ("l.jsonl", b'{"a": ' + b"1" * 5000 + b"}", r"l\.jsonl:1: not JSON that can be read: Exceeds the limit"),
        ("l.jsonl", b'"text"', r"l\.jsonl:1: a row must be a JSON object; got str"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message) as e:
        read_prompts(tmp_path / name)
    assert "\n" not in str(e.value)


def test_what_unpacks_to_far_more_than_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "UNPACKED", 1000)
    path = tmp_path / "g.jsonl.gz"
    path.write_bytes(gzip.compress(LINES.encode() + b" " * 1_000_000))
    with pytest.raises(ConfigError, match=r"g\.jsonl\.gz' cannot be read: its \d+ bytes unpack to more than \d+"):
        read_prompts(path)
    with pytest.raises(ConfigError, match=r"g\.jsonl\.gz' cannot be read: its \d+ bytes unpack to more than \d+"):
        score_files(path, path)


def test_unpacking_asks_for_no_more_memory_than_it_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "TIMES", 2**40)
    assert packed.unpacked(gzip.compress(LINES.encode())) == LINES.encode()


def test_a_header_has_many_columns_and_some_without_a_name(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("prompt,,," + ",".join(f"c{i}" for i in range(100_000)) + "\nx,1,2" + ",y" * 100_000 + "\n")
    (example,) = read_prompts(path).examples
    assert example.text == "x" and len(example.columns) > 100_000


def test_a_field_of_a_table_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FIELD", 200_000)
    path = tmp_path / "c.csv"
    path.write_text("prompt\n" + "x" * 199_999 + "\n")
    assert len(read_prompts(path).examples[0].text) == 199_999
    path.write_text("prompt\nx\n" + "x" * 200_001 + "\n")
    with pytest.raises(ConfigError, match=r"c\.csv:\d: not CSV: field larger than field limit"):
        read_prompts(path)


@pytest.mark.parametrize("name", ["none.jsonl", "none.json.gz", "/nowhere/none", "../none", "a/b/c", "~/x y"])
def test_a_missing_file_is_no_hub_id(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ConfigError, match=f"prompt file {re.escape(repr(name))} does not exist"):
        read_prompts(name)


# ---- data sets ------------------------------------------------------------------------------------------------------


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peer: Any) -> Any:
    """The package, with its cache out of the way."""
    module = peer("datasets")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return module


def saved(datasets: Any, path: Path, *splits: str) -> str:
    table = datasets.Dataset.from_list([{"prompt": "x", "answer": 4}])
    (datasets.DatasetDict(dict.fromkeys(splits, table)) if splits else table).save_to_disk(path)
    return str(path)


@pytest.mark.parametrize(
    ("splits", "wanted", "error"),
    [
        ((), None, None),
        (("train", "test"), None, None),
        (("test",), None, None),
        (("train", "test"), "test", None),
        (("test", "dev"), None, "has several splits and none is named train: choose one by split; it has test, dev"),
        (("train", "test"), "tests", "has no split 'tests'; it has train, test"),
    ],
)
def test_folders_of_datasets(
    datasets: Any, tmp_path: Path, splits: tuple[str, ...], wanted: str | None, error: str | None
) -> None:
    path = saved(datasets, tmp_path / "set", *splits)
    if error:
        with pytest.raises(ConfigError, match=error):
            read_prompts(path, PromptConfig(split=wanted))
    else:
        (example,) = read_prompts(path, PromptConfig(split=wanted)).examples
        assert example.columns == {"prompt": "x", "answer": 4} and example.where == f"{path} row 1"


def test_a_folder_of_files_and_one_without(datasets: Any, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(ConfigError, match=r"data set '.*set' cannot be loaded: .*") as e:
        read_prompts(tmp_path / "set")
    assert "\n" not in str(e.value)
    write(tmp_path / "set" / "train.jsonl", {"prompt": "a"}, {"prompt": "b"})
    assert [e.prompt for e in read_prompts(tmp_path / "set").examples] == ["a", "b"]
    assert len(read_prompts(tmp_path / "set", PromptConfig(split="train[:1]")).examples) == 1


@pytest.mark.parametrize(
    ("path", "config", "expected"),
    [
        ("openai/gsm8k:main", PromptConfig(prompt_column="q"), ("openai/gsm8k", {"name": "main"})),
        ("imdb", PromptConfig(prompt_column="q", split="test"), ("imdb", {"split": "test"})),
        ("a/b.c", PromptConfig(prompt_column="q", trust_remote_code=True), ("a/b.c", {"trust_remote_code": True})),
    ],
)
def test_hub_ids(
    datasets: Any, monkeypatch: pytest.MonkeyPatch, path: str, config: PromptConfig, expected: tuple[str, Any]
) -> None:
    asked = []

    def load(path: str, trust_remote_code: bool = False, **keywords: Any) -> Any:
        asked.append((path, keywords | ({"trust_remote_code": True} if trust_remote_code else {})))
        table = datasets.Dataset.from_list([{"q": "x"}])
        return table if "split" in keywords else datasets.DatasetDict({"train": table})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [e.prompt for e in read_prompts(path, config).examples] == ["x"] and asked == [expected]


def test_a_hub_id_that_fails_is_one_line(datasets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, **keywords: Any) -> Any:
        assert not keywords, "datasets 4 and above take no trust_remote_code"
        raise RuntimeError("Config name is missing.\nPick one of: ['main']") from OSError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ConfigError) as e:
        read_prompts("openai/gsm8k", PromptConfig(trust_remote_code=True))
    assert str(e.value) == (
        "'openai/gsm8k' is no file or folder here, and as a data set of the hub it cannot be loaded: "
        "Config name is missing. Pick one of: ['main'] offline"
    )


@pytest.mark.parametrize(("path", "package"), [("p.parquet", "pyarrow"), ("a/b", "datasets")])
def test_a_missing_package_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, package: str
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    if package == "pyarrow":
        (tmp_path / path).write_bytes(b"")
        path = str(tmp_path / path)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=rf"needs the package {package}: pip install 'mdpgrpo-fast\[data\]'"):
        read_rows(path)
