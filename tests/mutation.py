"""Mutation testing: how many small faults, of every kind everywhere, the fast tests see.

    python tests/mutation.py [GROUP ...] [--sample N] [--seed N] [--jobs N] [--again] [--kept] [--output FILE]

GROUP: reference, advantages, rules, text, scoring, cpp; default: all. A mutant that makes a test fail, run out of time
or die is killed. Of a group with more mutants than N, N are drawn. Each mutant gets a process of its own, forked after
torch is loaded: one inside a function, after the tests are collected too, and only the tests that run its lines, found
by coverage.py, the fastest first; one that matters at import starts anew; one of C++ is compiled. Outcomes are kept in
build/mutation/ for as long as a source stays as it is, so that a second call runs what is new, with `--again` what had
survived for no known reason too: those are in tests/data/mutation_survivors.json. Exits 1 where less than 90 % of a
group are killed, without those that are equivalent.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import hashlib
import importlib
import inspect
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
from helpers import mutants  # noqa: E402
from helpers.mutants import Mutant  # noqa: E402

KEPT = ROOT / "build" / "mutation"
KNOWN = ROOT / "tests" / "data" / "mutation_survivors.json"
LEAST = 0.9
CHUNK = 200
DEADLOCK = 120  # seconds without any time of the processor


class Group(NamedTuple):
    files: tuple[str, ...]
    tests: tuple[str, ...]
    words: str = ""  # what pytest's -k takes
    calls: bool = False  # whether a method call may go
    loaded: tuple[str, ...] = ("torch", "pytest", "numpy")


REFERENCE = ("tests/test_reference.py", "tests/test_reference_advantages.py", "tests/test_reference_losses.py")
OPS = tuple(f"tests/ops/test_{name}.py" for name in ("advantages", "advantage_rules", "edges", "signs"))
LOSSES = tuple(f"tests/ops/test_{name}.py" for name in ("token_loss", "token_loss_choices"))
VERIFIERS = tuple(
    f"tests/{name}.py"
    for name in (
        "helpers/labels", "verifiers/test_ifbench", "verifiers/test_language", "verifiers/test_punkt",
        "verifiers/test_rules", "verifiers/test_scoring", "verifiers/test_text", "verifiers/test_verify",
        "verifiers/test_words", "peers/test_lm_eval", "peers/test_lm_eval_scores",
    )
)  # fmt: skip
# Not of interest here: compilers and other processes, which are slow; and what helpers/labels has type by type.
SLOW = "not compile and not triton and not opcheck and not instruction_set and not golden_label"
TYPES = ("nltk", "langdetect", "regex", "numpy", "pytest", "yaml", "emoji", "syllapy", "janome.tokenizer", "torch")
GROUPS = {
    "reference": Group(
        ("mdpgrpo_fast/reference/*.py",), (*REFERENCE, *OPS, *LOSSES, "tests/ops/test_logprobs.py"), SLOW, True
    ),
    "advantages": Group(("mdpgrpo_fast/ops/advantages.py",), (*OPS, "tests/ops/test_checks.py"), SLOW, True),
    "rules": Group(("mdpgrpo_fast/verifiers/rules/**/*.py",), VERIFIERS, SLOW, loaded=TYPES),
    "text": Group(
        ("mdpgrpo_fast/verifiers/text/*.py",), (*VERIFIERS, "tests/verifiers/test_hostile.py"), SLOW, loaded=TYPES
    ),
    "scoring": Group(("mdpgrpo_fast/verifiers/scoring.py",), VERIFIERS, SLOW, loaded=TYPES),
    "cpp": Group(("csrc/method.h", "csrc/cpu/objective.h"), (*LOSSES, *OPS), f"cpu and {SLOW}"),
}
TABLES = ("tables.py", "spanish_tables.py")  # words and no code


def of_group(group: Group) -> list[Mutant]:
    found = []
    for path in sorted({p for pattern in group.files for p in ROOT.glob(pattern)}):
        name, source = str(path.relative_to(ROOT)), path.read_bytes()
        if path.suffix == ".h":
            found += mutants.of_cpp(name, source)
        elif path.name not in TABLES:
            found += mutants.of_python(name, source, group.calls)
    return found


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


# ---- processes -----------------------------------------------------------------------------------------------------


def used(pid: int) -> str:
    """The processor's time that a process has had, as the system writes it; "" where it does not."""
    try:
        return " ".join(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:15])
    except OSError:
        return ""


def in_a_child(work: Callable[[], Any], cpu: float | None = None, idle: float = DEADLOCK, quiet: bool = True) -> Any:
    """What `work` returns in a forked process, or "timeout" or "crash". cpu, idle: seconds of the processor that it may
    have, and that it may go without; quiet: what it prints goes nowhere."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            os.close(read)
            nowhere = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2) if quiet else ():
                os.dup2(nowhere, fd)
            if cpu is not None:
                resource.setrlimit(resource.RLIMIT_CPU, (int(cpu) + 1, int(cpu) + 3))
                resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
            data = pickle.dumps(work())
            with os.fdopen(write, "wb") as pipe:
                pipe.write(data)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    os.set_blocking(read, False)
    end, data, timed_out, had = time.monotonic() + idle, b"", False, ""
    while True:
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(read, 1 << 20):
                data += piece
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end and had != (had := used(pid)):
            end = time.monotonic() + idle
        if time.monotonic() > end:
            timed_out = True
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            break
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # what it started
    with contextlib.suppress(BlockingIOError):
        while piece := os.read(read, 1 << 20):
            data += piece
    os.close(read)
    if timed_out or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)):
        return "timeout"
    return pickle.loads(data) if status == 0 else "crash"


def pytest_of(group: Group, plugin: object) -> int:
    import pytest

    words = ["-k", group.words] if group.words else []
    command = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "no:xdist", "-s", *words, *group.tests]
    return int(pytest.main(command, plugins=[plugin]))


# ---- in place: functions of modules that are loaded ----------------------------------------------------------------


def codes(code: CodeType, found: dict[str, CodeType], prefix: str = "") -> dict[str, CodeType]:
    """Every code object inside of one, by its qualified name; of equal names the nth has #n."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            name, n = prefix + inner.co_name, 0
            while f"{name}#{n}" in found:
                n += 1
            found[f"{name}#{n}"] = inner
            codes(inner, found, f"{name}.<locals>." if inner.co_flags & inspect.CO_OPTIMIZED else f"{name}.")
    return found


class InPlace:
    """Replaces the code of functions, in everything that holds them."""

    def __init__(self, paths: set[str]) -> None:
        files = {str(ROOT / p): p for p in paths}
        self.functions: dict[tuple[str, CodeType], list[FunctionType]] = {}
        for x in gc.get_objects():
            if isinstance(x, FunctionType) and x.__code__.co_filename in files:
                self.functions.setdefault((files[x.__code__.co_filename], x.__code__), []).append(x)
        self.sources = {p: (ROOT / p).read_bytes() for p in paths}
        self.old = {p: codes(compile(s, str(ROOT / p), "exec"), {}) for p, s in self.sources.items()}

    def apply(self, m: Mutant) -> None:
        new = codes(compile(m.apply(self.sources[m.path]), str(ROOT / m.path), "exec"), {})
        assert m.scope is not None
        for name, code in self.old[m.path].items():
            plain = name.rpartition("#")[0]
            if (plain == m.scope or plain.startswith(f"{m.scope}.<locals>")) and name in new:
                for function in self.functions.get((m.path, code), ()):
                    function.__code__ = new[name]


class Collected:
    """A plugin of pytest that runs mutants in forks of the process that has collected the tests."""

    def __init__(self, wanted: list[Mutant], paths: set[str], done: Callable[[Mutant, str], None], known: Any) -> None:
        import coverage

        self.wanted, self.paths, self.done = wanted, paths, done
        self.coverage = coverage.Coverage(
            data_file=None, include=[str(ROOT / p) for p in self.paths], config_file=False
        )
        self.coverage.start()
        self.coverage.switch_context("import")
        self.known, self.later = known, list[Mutant]()

    def pytest_runtestloop(self, session: Any) -> bool:
        import pytest
        from _pytest import main

        for path in self.paths:  # what is imported at first use
            importlib.import_module(module_of(path))
        gc.unfreeze()  # or no list has what was there at collection
        items = session.items
        self.known = lines, durations, failed = self.known or self.baseline(session)
        self.coverage.stop()
        by_id = {x.nodeid: x for x in items if x.nodeid not in failed}
        in_place = InPlace(self.paths)
        gc.collect()
        gc.freeze()
        for m in self.wanted:
            contexts = {c for n in range(m.lines[0], m.lines[1] + 1) for c in lines.get(m.path, {}).get(n, ())}
            if m.scope is None or "import" in contexts:
                self.later.append(m)
                continue
            files = {c.removeprefix("setup:") for c in contexts if c.startswith("setup:")}
            chosen = {c for c in contexts if c in by_id} | {i for i in by_id if i.split("::")[0] in files}
            order = sorted(chosen, key=lambda i: durations[i])
            limit = 5 + 4 * sum(durations[i] for i in order)

            def work(m: Mutant = m, order: list[str] = order) -> str:
                in_place.apply(m)
                session.items = [by_id[i] for i in order]
                with contextlib.suppress(session.Failed, pytest.fail.Exception):
                    main.pytest_runtestloop(session)
                return "killed" if session.testsfailed else "survived"

            self.done(m, in_a_child(work, limit) if order else "not run")
        return True

    def baseline(self, session: Any) -> tuple[dict[str, dict[int, list[str]]], dict[str, float], list[str]]:
        """The contexts of every line, the seconds of every test, and what fails without any mutant."""
        seconds: dict[str, float] = {}
        failed: list[str] = []
        caches = [
            x for x in gc.get_objects()
            if isinstance(x, functools._lru_cache_wrapper) and x.__module__.startswith("mdpgrpo_fast.verifiers.")
        ]  # fmt: skip

        class Watch:
            def pytest_runtest_logreport(_, report: Any) -> None:
                if report.failed:
                    failed.append(report.nodeid)
                if report.when == "teardown":
                    seconds[report.nodeid] = 0.01 + time.process_time() - self.begun

            def pytest_runtest_setup(_, item: Any) -> None:
                self.begun = time.process_time()
                for cache in caches:  # or only the first test would run what they hold
                    cache.cache_clear()
                self.coverage.switch_context(f"setup:{item.nodeid.split('::')[0]}")

            def pytest_runtest_call(_, item: Any) -> None:
                self.coverage.switch_context(item.nodeid)

            def pytest_runtest_teardown(_, item: Any) -> None:
                self.coverage.switch_context(f"setup:{item.nodeid.split('::')[0]}")

        def work() -> Any:
            from _pytest import main

            session.config.pluginmanager.register(Watch())
            session.config.option.maxfail = 0  # of the baseline all that fail are to be known
            with contextlib.suppress(session.Failed):
                main.pytest_runtestloop(session)
            self.coverage.stop()
            data = self.coverage.get_data()
            lines = {p: data.contexts_by_lineno(str(ROOT / p)) for p in self.paths}
            return lines, seconds, failed

        found = in_a_child(work)
        if isinstance(found, str):
            raise SystemExit(f"mutation.py: the tests without a mutant ended in a {found}")
        return found  # type: ignore[no-any-return]


# ---- anew: modules that have not been loaded -----------------------------------------------------------------------


class Sorted:
    """A plugin of pytest that runs the fastest tests first, without those that fail anyway."""

    def __init__(self, durations: dict[str, float], failed: list[str]) -> None:
        self.durations, self.failed = durations, failed

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [x for x in items if x.nodeid not in self.failed]
        items.sort(key=lambda x: self.durations.get(x.nodeid, 1.0))


class Finder:
    """Loads one module from a mutated source."""

    def __init__(self, m: Mutant) -> None:
        self.path, self.source = str(ROOT / m.path), m.apply((ROOT / m.path).read_bytes())
        self.name = module_of(m.path)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        from importlib.machinery import PathFinder, SourceFileLoader

        spec = PathFinder.find_spec(name, path)
        assert spec is not None
        loader = SourceFileLoader(name, self.path)
        loader.get_code = lambda _: compile(self.source, self.path, "exec")  # type: ignore[method-assign]
        spec.loader = loader
        return spec


def anew(group: Group, m: Mutant | None, durations: dict[str, float], failed: list[str], env: dict[str, str]) -> str:
    def work() -> str:
        os.environ.update(env)
        if m is not None:
            sys.meta_path.insert(0, Finder(m))  # type: ignore[arg-type]
        return "survived" if pytest_of(group, Sorted(durations, failed)) in (0, 5) else "killed"

    return str(in_a_child(work, 60 + 4 * sum(durations.values())))


# ---- C++ -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def library() -> Iterator[Callable[[Mutant | None], Path | None]]:
    """build(mutant): the folder of the CPU's library with it; None where it does not compile."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        shutil.copytree(ROOT / "csrc", work / "csrc")
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, work)
        (work / "mdpgrpo_fast").mkdir()
        shutil.copy(ROOT / "mdpgrpo_fast/version.py", work / "mdpgrpo_fast")
        (work / "mdpgrpo_fast/__init__.py").write_text("from .version import __version__\n")
        env = {**os.environ, "MDPGRPO_BUILD": "cpu", "MDPGRPO_CXXFLAGS": "-O1"}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "lib", "--build-temp", "temp"]
        subprocess.run(command, cwd=work, env=env, check=True, capture_output=True)
        objects = [str(p) for p in work.glob("temp/csrc/cpu/*.o") if p.stem != "ops"]
        flags = "-std=c++17 -O1 -ffp-contract=fast -fvisibility=hidden -fPIC -w".split()
        folder = work / "mutant"
        folder.mkdir()

        def build(m: Mutant | None) -> Path | None:
            if m is not None:
                (work / m.path).write_bytes(m.apply((ROOT / m.path).read_bytes()))
            link = f"-L{work}/temp/torch -Wl,--no-as-needed -ltorch_cpu -Wl,-s".split()
            compiled = ["g++", *flags, "-c", "csrc/cpu/ops.cpp", "-o", "ops.o"]
            linked = ["g++", "-shared", "ops.o", *objects, "-o", str(folder / "_cpu.abi3.so"), *link]
            done = all(subprocess.run(c, cwd=work, capture_output=True).returncode == 0 for c in (compiled, linked))
            if m is not None:
                shutil.copy(ROOT / m.path, work / m.path)
            return folder if done else None

        yield build


# ---- all of it -----------------------------------------------------------------------------------------------------


def run_group(name: str, chosen: list[Mutant], done: Callable[[Mutant, str], None]) -> None:
    group = GROUPS[name]
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for module in group.loaded:
        with contextlib.suppress(ImportError):
            __import__(module)
    if name == "cpp":
        with library() as build:
            folder = build(None)
            assert folder is not None, "csrc/ does not compile"
            env = {"MDPGRPO_LIBRARIES": str(folder)}
            if anew(group, None, {}, [], env) != "survived":
                raise SystemExit("mutation.py: the tests fail without a mutant")
            for m in chosen:
                done(m, "not compiled" if build(m) is None else anew(group, None, {}, [], env))
        return

    known: Any = None
    for first in range(0, len(chosen), CHUNK):  # so that what is done is a sample at any time

        def collected(first: int = first, known: Any = known) -> Any:
            plugin = Collected(chosen[first : first + CHUNK], {m.path for m in chosen}, done, known)
            status = pytest_of(group, plugin)
            return (plugin.later, plugin.known) if plugin.known else f"pytest ended with {status}"

        found = in_a_child(collected, idle=1e6, quiet=False)
        if isinstance(found, str):
            raise SystemExit(f"mutation.py: {name}: {found}")
        later, known = found
        for test in known[2] if first == 0 else ():
            print(f"left out, as it fails without a mutant: {test}", flush=True)
        for m in later:
            done(m, anew(group, m, *known[1:], {}))


class Kept:
    """Outcomes of a group, a line each, for as long as its source is the same, and the seconds that each took."""

    def __init__(self, name: str) -> None:
        self.file = KEPT / f"{name}.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.found: dict[str, tuple[str, float]] = {}
        self.digests: dict[str, str] = {}
        self.last = time.monotonic()
        for line in self.file.read_text().splitlines() if self.file.exists() else ():
            key, *outcome = json.loads(line)
            self.found[key] = outcome[0], outcome[1]

    def key(self, m: Mutant) -> str:
        if m.path not in self.digests:
            self.digests[m.path] = hashlib.sha256((ROOT / m.path).read_bytes()).hexdigest()[:12]
        return f"{self.digests[m.path]} {m.start} {m.name}"

    def add(self, m: Mutant, outcome: str) -> None:
        now = time.monotonic()
        seconds, self.last = round(now - self.last, 1), now
        self.found[self.key(m)] = outcome, seconds
        with self.file.open("a") as file:
            file.write(json.dumps([self.key(m), outcome, seconds]) + "\n")


def drawn(everything: list[Mutant], number: int, seed: int) -> list[Mutant]:
    """At random, and as many of the same as can be when a source has changed a little."""
    seen: dict[str, int] = {}
    order: list[tuple[str, Mutant]] = []
    for m in everything:
        name = " ".join((str(seed), m.path, m.text, m.old, m.new))
        seen[name] = seen.get(name, 0) + 1
        order.append((hashlib.sha256(f"{name} {seen[name]}".encode()).hexdigest(), m))
    return [m for _, m in sorted(order, key=lambda pair: pair[0])][:number]


def known() -> dict[tuple[str, str, str, str], str]:
    """(path, line, old, new) -> why a mutant survives, whatever the number of its line."""
    entries = json.loads(KNOWN.read_text(encoding="utf-8")) if KNOWN.exists() else []
    return {(e["path"], e["line"], e["old"], e["new"]): e["reason"] for e in entries}


def interval(killed: int, n: int) -> list[float]:
    """Wilson's, 95 %, of a share."""
    z = 1.959964
    share, room = killed / n, z * z / n
    middle, half = share + room / 2, z * (share * (1 - share) / n + room / (4 * n)) ** 0.5
    return [round((middle - half) / (1 + room), 4), round((middle + half) / (1 + room), 4)]


def summary(found: list[tuple[Mutant, str]], of: int) -> dict[str, Any]:
    """Counts of a group, its modules, and those that survive with their reasons."""
    reasons = known()
    counted = [(m, o) for m, o in found if o != "not compiled"]
    lost = [m for m, o in counted if o in ("survived", "not run")]
    modules: dict[str, dict[str, int]] = {}
    for m, o in counted:
        row = modules.setdefault(m.path, {"mutants": 0, "killed": 0})
        row["mutants"] += 1
        row["killed"] += o not in ("survived", "not run")
    survivors = [
        {"path": m.path, "line": m.text, "old": m.old, "new": m.new,
         "reason": reasons.get((m.path, m.text, m.old, m.new), "")}
        for m in lost
    ]  # fmt: skip
    killed = len(counted) - len(lost)
    equivalent = sum(s["reason"].startswith("equivalent") for s in survivors)
    return {
        "of": of,
        "mutants": len(counted),
        "killed": killed,
        "timeouts": sum(o == "timeout" for _, o in counted),
        "share": round(killed / max(1, len(counted)), 4),
        "score": round(killed / max(1, len(counted) - equivalent), 4),  # without those that change nothing
        **({"interval": interval(killed, len(counted))} if of > len(found) and counted else {}),
        "equivalent": equivalent,
        "modules": dict(sorted(modules.items())),
        "survivors": survivors,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(GROUPS)}; default: all")
    parser.add_argument("--sample", type=int, default=400, help="most mutants of a group (400)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (0)")
    parser.add_argument("--jobs", type=int, default=1, help="groups at once (1)")
    parser.add_argument("--again", action="store_true", help="run those again that had survived for no known reason")
    parser.add_argument("--kept", action="store_true", help="run nothing: what has been found so far")
    parser.add_argument("--only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="a result file for benchmarks/results/")
    options = parser.parse_args()
    wrong = [g for g in options.groups if g not in GROUPS]
    if wrong:
        parser.error(f"GROUP must be of {', '.join(GROUPS)}; got {', '.join(wrong)}")
    os.chdir(ROOT)
    if options.only:
        return only(*options.groups, options.sample, options.seed, options.again)
    names = options.groups or list(GROUPS)
    if not options.kept:
        # A process for each: what a group loads is not there for the next.
        command = [sys.executable, "-W", "ignore", __file__, f"--sample={options.sample}", f"--seed={options.seed}"]
        command += ["--again"] * options.again

        def alone(name: str) -> int:
            return subprocess.run([*command, name, "--only"]).returncode

        with ThreadPoolExecutor(options.jobs) as pool:
            if any(pool.map(alone, names)):
                return 2
    groups, seconds = {}, 0.0
    for name in names:
        everything, kept, found = of_group(GROUPS[name]), Kept(name), []
        for m in drawn(everything, options.sample, options.seed):
            if kept.key(m) not in kept.found:  # those before it are a smaller sample
                break
            outcome, took = kept.found[kept.key(m)]
            found.append((m, outcome))
            seconds += took
        groups[name] = summary(found, len(everything))
        row = groups[name]
        print(
            f"{name}: {row['killed']} of {row['mutants']} killed, {row['share']:.1%}, or {row['score']:.1%} without ",
            end="",
        )
        print(f"the {row['equivalent']} that change nothing")
        for row in groups[name]["survivors"]:
            why = row["reason"] or "no reason is known"
            print(f"    {row['path']}: {row['line']}\n        {row['old']}  ->  {row['new']}    ({why})")
    if options.output is not None:
        from harness import provenance, write_json

        document = provenance(f"python tests/mutation.py --sample {options.sample} --seed {options.seed}")
        document["versions"]["coverage"] = metadata.version("coverage")
        write_json(options.output, document | {"seconds": round(seconds), "groups": groups})
    return int(any(g["score"] < LEAST for g in groups.values()))


def only(name: str, sample: int, seed: int, again: bool) -> int:
    """Runs what of a group has not been run."""
    everything, kept, reasons = of_group(GROUPS[name]), Kept(name), known()

    def is_left(m: Mutant) -> bool:
        outcome = kept.found.get(kept.key(m), (None,))[0]
        survived = outcome in ("survived", "not run") and (m.path, m.text, m.old, m.new) not in reasons
        return outcome is None or (again and survived)

    left = list(filter(is_left, drawn(everything, sample, seed)))
    if left:
        print(f"{name}: {len(left)} of {len(everything)} mutants", flush=True)
        run_group(name, left, kept.add)
    return 0


if __name__ == "__main__":
    sys.exit(main())
