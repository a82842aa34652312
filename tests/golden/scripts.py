"""Texts that mix scripts, and a fuzz of what is counted in them against lm-eval's IFEval.

`python tests/golden/scripts.py --fuzz 60000` compares sentences, words and words in capitals in 60,000 texts, each at
the threshold that is just met and the one that is just missed, and exits with 1 where one verdict differs. NLTK 3.10.4
reads combining marks, fractions and control characters otherwise than before it; the library follows the one at hand.
"""

from __future__ import annotations

import argparse
import importlib
import random
import sys
import types
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from helpers.inputs import unavailable  # noqa: E402
from helpers.verifiers import nltk_data, punkt_folder  # noqa: E402

from mdpgrpo_fast.verifiers import verify  # noqa: E402
from mdpgrpo_fast.verifiers.text import sentences, words  # noqa: E402

WORDS = """
हिन्दी में शब्द। தமிழ் மொழி. ภาษาไทย ก็ดี العَرَبِيَّة كِتاب؟ עִבְרִית שָׁלוֹם. 日本語。 カタカナ 한국어. 中文！
cafe\u0301 E\u0301TE\u0301. n\u0303 Z\u030a. İSTANBUL ıssız ΑΣ. ЖУК Да. ǅ ﬁn straße
½ 1½ x² ٣ १२. Ⅷ ① 𝐀 3.5 1,000 -5 1990. 👩\u200d👩\u200d👧 😀 🇫🇷 ☺\ufe0f
The NASA he Mr. Dr U.S. e.g. etc. Ph.D. p.m. don't DON'T CANNOT gonna 'TIS JOHN'S we'LL x-y X- a A I i B. Bach However
""".split()
MARKS = [
    *[" "] * 12, *[". "] * 4, *"\n.,!?:;-'\"()*/_&", "\n\n", "\r\n", "\t", "...", ". . .", "--", "''", "``", "?! ",
    ".) ", '." ', "\u00a0", "\u2028", "\x85", "\x1c", "\x1f", "\x0b", "\u200b", "\u200d", "\ufeff", "\x00", "\u0301",
    "\u093e", "\u0e31", "\u05b8", "\u0640", "\ud800", *"—–…‘’“”«»。،।",
]  # fmt: skip

# What is counted: its type, the names of its threshold and its relation, and how this library counts it.
COUNTED = (
    ("length_constraints:number_words", "num_words", "relation", lambda text: len(words.alphanumeric(text))),
    ("length_constraints:number_sentences", "num_sentences", "relation", lambda text: len(list(sentences.spans(text)))),
    ("change_case:capital_word_frequency", "capital_frequency", "capital_relation", words.capitals),
)


def texts(number: int, seed: str = "scripts") -> Iterator[str]:
    """`number` texts of 1 to 12 words, with anything between them."""
    rng = random.Random(seed)
    for _ in range(number):
        pieces = [
            rng.choice(MARKS if rng.random() < 0.2 else WORDS) + rng.choice(MARKS) for _ in range(rng.randint(1, 12))
        ]
        yield "".join(pieces)


@contextmanager
def official() -> Iterator[Any]:
    """lm_eval.tasks.ifeval.utils alone: its package imports far more than the tests install."""
    try:
        files = metadata.files("lm-eval") or []
    except metadata.PackageNotFoundError:
        unavailable("lm-eval is missing: pip install --no-deps lm-eval==0.4.13")
    root = next(Path(str(f.locate())).parent for f in files if str(f) == "lm_eval/__init__.py")
    with nltk_data(punkt_folder()) as patch:
        for name in ("lm_eval", "lm_eval.tasks", "lm_eval.tasks.ifeval"):
            package = types.ModuleType(name)
            package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
            patch.setitem(sys.modules, name, package)
        try:
            import langdetect

            module = importlib.import_module("lm_eval.tasks.ifeval.utils")
        except ImportError as error:
            unavailable(f"lm-eval's IFEval cannot be imported: {error}")
        patch.setattr(langdetect.DetectorFactory, "seed", 0)
        yield module
        for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval.")]:
            del sys.modules[name]


def differences(lm_eval: Any, texts: Iterable[str]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The verdicts that differ: type, arguments, text."""
    classes = lm_eval.instructions_registry.INSTRUCTION_DICT
    for text in filter(str.strip, texts):
        for instruction_id, threshold, relation, count in COUNTED:
            counted = count(text)
            for number in {max(counted, 1), counted + 1}:  # lm-eval replaces 0 by a number of its own
                kwargs = {threshold: number, relation: "at least"}
                theirs = classes[instruction_id](instruction_id)
                theirs.build_description(**kwargs)
                if theirs.check_following(text) != verify(instruction_id, text, kwargs):
                    yield instruction_id, kwargs, text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fuzz", type=int, required=True, metavar="N", help="how many texts to compare")
    parser.add_argument("--seed", default="scripts")
    args = parser.parse_args()
    wrong: Counter[str] = Counter()
    with official() as lm_eval:
        for instruction_id, kwargs, text in differences(lm_eval, texts(args.fuzz, args.seed)):
            wrong[instruction_id] += 1
            if wrong[instruction_id] == 1:
                print(f"{instruction_id}: {kwargs}, {text!r}")
    print(f"{args.fuzz} texts, {len(COUNTED)} types: {sum(wrong.values())} verdicts differ {dict(wrong)}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
