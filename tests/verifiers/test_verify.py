"""The verifiers against the golden tables, and at their door."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
from helpers.verifiers import PROMPTS, RULES, nltk_data, punkt_folder, rows

from mdpgrpo_fast.verifiers import (
    INSTRUCTIONS,
    ArgumentError,
    InstructionError,
    UnknownInstructionError,
    punkt_source,
    validate,
    verify,
    verify_all,
)


@pytest.mark.parametrize("rules", RULES)
def test_every_golden_label_is_met(rules: str) -> None:
    wrong, seen = [], Counter()
    with nltk_data(punkt_folder()):
        assert punkt_source().startswith("NLTK punkt_tab")
        for row in rows(f"{rules}_golden.jsonl.gz"):
            seen[row["instruction_id"]] += 1
            for mode in ("strict", "loose"):
                got = verify(row["instruction_id"], row["response"], row["kwargs"], mode=mode, rules=rules)
                if got != row[mode]:
                    wrong.append((row["key"], row["instruction_id"], row["mutation"], mode))
    assert not wrong
    assert set(seen) == {id for id, entry in INSTRUCTIONS.items() if rules in entry.rules}


def test_built_in_sentences_meet_97_percent_of_the_labels() -> None:
    types = ("length_constraints:number_sentences", "change_case:capital_word_frequency")
    right, asked = Counter(), Counter()
    with nltk_data():
        assert punkt_source().startswith("built-in")
        for rules in RULES:
            for row in rows(f"{rules}_golden.jsonl.gz"):
                for mode in ("strict", "loose") if row["instruction_id"] in types else ():
                    table = (rules, row["instruction_id"])
                    asked[table] += 1
                    right[table] += row[mode] == verify(
                        row["instruction_id"], row["response"], row["kwargs"], mode=mode, rules=rules
                    )
    assert len(asked) == 4
    assert all(right[table] >= 0.97 * asked[table] for table in asked), (right, asked)


@pytest.mark.parametrize("rules", RULES)
def test_every_prompt_of_the_data_sets_is_valid(rules: str) -> None:
    known = set()
    for row in rows(PROMPTS[rules]):
        for instruction_id, kwargs in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            validate(instruction_id, kwargs, rules)
            known.add(instruction_id)
    assert len(known) == {"ifeval": 25, "mdpgrpo": 26}[rules]


@pytest.mark.parametrize(("n_words", "held"), [(3, True), (2**70, False)])
def test_a_count_beyond_64_bits_is_a_count(n_words: int, held: bool) -> None:
    text, kwargs = "One two. *** Three four. *** Five six.", {"n_sent": 1, "n_words": n_words}
    assert verify("count:counting_composition", text, kwargs, rules="iftrain") is held


def test_counts_of_types() -> None:
    known = Counter(rules for entry in INSTRUCTIONS.values() for rules in entry.rules)
    assert (known["ifeval"], known["mdpgrpo"]) == (25, 26)


# ---- the door ------------------------------------------------------------------------------------------------------


def test_unknown_id_names_the_nearest() -> None:
    with pytest.raises(UnknownInstructionError, match="nearest: keywords:existence"):
        validate("keywords:existance", {"keywords": ["a"]})
    with pytest.raises(UnknownInstructionError, match="xml_format"):
        validate("detectable_format:xml_format", {}, "ifeval")
    validate("detectable_format:xml_format", {}, "mdpgrpo")
    with pytest.raises(UnknownInstructionError):
        verify("no_comma", "text", {})
    with pytest.raises(UnknownInstructionError):
        validate(["punctuation:no_comma"], {})  # type: ignore[arg-type]
    for id, rules, said in (
        ("count:word_count_range", "ifeval", "known under rules 'ifbench'"),
        ("keywords:palindrom", "ifeval", "nearest: keywords:palindrome, known under rules 'iftrain'"),
        ("es:length_constraints:number_sentences", "m-ifeval", "left out: its sentences are"),
        ("?", "ifeval", "--list of mdpgrpo_fast.verifiers names them"),
    ):
        with pytest.raises(UnknownInstructionError, match=said):
            validate(id, {}, rules)
    assert issubclass(UnknownInstructionError, InstructionError) and issubclass(InstructionError, ValueError)


WORDS = "length_constraints:number_words"


@pytest.mark.parametrize(
    ("instruction_id", "kwargs", "names"),
    [
        (WORDS, {"relation": "at least"}, "num_words: .*missing"),
        (WORDS, {"relation": "at least", "num_words": None}, "num_words: .*missing"),
        (WORDS, {"relation": "at least", "num_words": -1}, "num_words: .*-1"),
        (WORDS, {"relation": "at least", "num_words": True}, "num_words: .*True"),
        (WORDS, {"relation": "at least", "num_words": "5"}, "num_words: .*'5'"),
        (WORDS, {"relation": "at least", "num_words": 5.5}, "num_words: .*5.5"),
        (WORDS, {"relation": "exactly", "num_words": 5}, "relation: .*'exactly'"),
        (WORDS, {"num_words": 5}, "relation: .*missing"),
        (WORDS, {"relation": ["at least"], "num_words": 5}, "relation"),
        (WORDS, {"relation": "at least", "num_words": 5, "words": 5}, "unexpected argument 'words'"),
        (WORDS, None, "num_words"),
        (WORDS, 5, "kwargs"),
        ("punctuation:no_comma", {"comma": ","}, "unexpected argument 'comma' .*none"),
        ("keywords:existence", {"keywords": "zebra"}, "keywords: .*list"),
        ("keywords:existence", {"keywords": []}, "keywords: .*list"),
        ("keywords:existence", {"keywords": ["zebra", ""]}, "keywords: .*blank"),
        ("keywords:forbidden_words", {"forbidden_words": ["C++"]}, "forbidden_words: .*regular expression"),
        ("keywords:forbidden_words", {"forbidden_words": ["a{2,}"]}, "forbidden_words: .*regular expression"),
        ("keywords:forbidden_words", {"forbidden_words": ["(a"]}, "forbidden_words: .*regular expression"),
        (
            "keywords:letter_frequency",
            {"letter": "ab", "let_frequency": 1, "let_relation": "at least"},
            "letter: .*'ab'",
        ),
        ("language:response_language", {"language": "xx"}, "language: .*'xx'"),
        ("combination:repeat_prompt", {}, "prompt_to_repeat: .*missing"),
        ("startend:end_checker", {"end_phrase": " "}, "end_phrase: .*blank"),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 3, "first_word": "a"},
            "nth_paragraph: .*2.*got 3",
        ),
    ],
)
def test_wrong_arguments_are_named(instruction_id: str, kwargs: dict, names: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{instruction_id}: .*{names}"):
        validate(instruction_id, kwargs)
    with pytest.raises(ArgumentError):
        verify(instruction_id, "some text", kwargs)


def test_none_is_as_if_absent_and_whole_floats_are_numbers() -> None:
    kwargs = {"num_words": 2.0, "relation": "at least", "keyword": None, "letter": None}
    assert verify(WORDS, "two words", kwargs) and not verify(WORDS, "one", kwargs)


def test_escaped_keywords_pass_the_door() -> None:
    assert verify("keywords:existence", "I write C++.", {"keywords": [r"C\+\+", "[+]", "f(x)|I"]})


def test_other_wrong_calls() -> None:
    with pytest.raises(ValueError, match="mode"):
        verify("punctuation:no_comma", "a", {}, mode="lose")
    with pytest.raises(ValueError, match="rules"):
        verify("punctuation:no_comma", "a", {}, rules="google")
    with pytest.raises(TypeError, match="response"):
        verify("punctuation:no_comma", None, {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kwargs_list"):
        verify_all(["punctuation:no_comma"], "a", [])


def test_repeated_ids_are_scored_by_position() -> None:
    asked = [{"keywords": ["ant"]}, {"keywords": ["bee"]}, {"keywords": ["cat"]}]
    assert verify_all(["keywords:existence"] * 3, "A bee.", asked) == [False, True, False]
    assert verify_all([], "A bee.", []) == []


# ---- where the two rule sets differ, and what the golden tables leave out ------------------------------------------


@pytest.mark.parametrize(
    ("relation", "follows"),
    [
        ("less than", [True, False, False]),
        ("at least", [False, True, True]),
        ("more than", [False, False, True]),
        ("up to", [True, True, False]),
        ("exactly", [False, True, False]),
    ],
)
def test_relations(relation: str, follows: list[bool]) -> None:
    three: list[tuple[str, dict, str]] = [
        (WORDS, {"num_words": 2, "relation": relation}, "a "),
        ("length_constraints:number_sentences", {"num_sentences": 2, "relation": relation}, "We go. "),
        ("keywords:frequency", {"keyword": "ant", "frequency": 2, "relation": relation}, "ant "),
        ("keywords:letter_frequency", {"letter": "A", "let_frequency": 2, "let_relation": relation}, "a"),
        ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": relation}, "A "),
    ]
    with nltk_data():
        for rules in RULES if relation in ("less than", "at least") else ("mdpgrpo",):
            for instruction_id, kwargs, unit in three:
                assert [verify(instruction_id, unit * n, kwargs, rules=rules) for n in (1, 2, 3)] == follows


def test_few_letters_follow_under_mdpgrpo_alone() -> None:
    for instruction_id, kwargs in (
        ("change_case:english_capital", {}),
        ("change_case:english_lowercase", {}),
        ("language:response_language", {"language": "fi"}),
    ):
        assert verify(instruction_id, "aB", kwargs, rules="mdpgrpo")
        assert not verify(instruction_id, "aB", kwargs, rules="ifeval")
        assert not verify(instruction_id, " ", kwargs, rules="mdpgrpo")
    assert verify("language:response_language", "123", {"language": "fi"})  # nothing to go by: followed


def test_request_commas_and_postscripts() -> None:
    repeat = {"prompt_to_repeat": "Say hi."}
    assert verify("combination:repeat_prompt", "say HI. Hi!", repeat)
    for quote in "'\"":
        assert not verify("combination:repeat_prompt", f"{quote}Say hi.{quote} Hi!", repeat)
        assert verify("combination:repeat_prompt", f"{quote}Say hi.{quote} Hi!", repeat, rules="mdpgrpo")
    assert verify("combination:repeat_prompt", "x" * 21, {"prompt_to_repeat": ""}, rules="mdpgrpo")
    assert not verify("combination:repeat_prompt", "x" * 20, {}, rules="mdpgrpo")
    assert verify("punctuation:no_comma", "a\u060c b", {}) and not verify("punctuation:no_comma", "a, b", {})
    assert not verify("punctuation:no_comma", "a\u060c b", {}, rules="mdpgrpo")
    persian = {"postscript_marker": "\u067e.\u0646."}
    assert verify("detectable_content:postscript", "hi\n\u067e. \u0646. there", persian, rules="mdpgrpo")
    assert not verify("detectable_content:postscript", "hi\n\u067e. \u0646. there", persian)


def test_a_letter_that_is_none_is_counted_as_it_stands() -> None:
    kwargs = {"letter": "#", "let_frequency": 2, "let_relation": "at least"}
    assert verify("keywords:letter_frequency", "# a #", kwargs) and not verify("keywords:letter_frequency", "#", kwargs)


def test_an_error_within_a_check_is_not_followed() -> None:
    deep = "[" * 100_000 + "]" * 100_000
    for rules in RULES:
        assert not verify("detectable_format:json_format", deep, {}, rules=rules)
    for rules in RULES:  # the second variant would pass; MDP-GRPO's checker never reaches it
        late = verify("detectable_format:json_format", deep[:100_000] + "\n{}", {}, rules=rules, mode="loose")
        assert late == (rules != "mdpgrpo")
    # The same for XML.
    half_a_pair = "\ud800\n<a>b</a>"
    assert not verify("detectable_format:xml_format", half_a_pair, {}, rules="mdpgrpo", mode="loose")
    assert verify("detectable_format:xml_format", "x\n<a>b</a>", {}, rules="mdpgrpo", mode="loose")


def test_loose_variants_are_the_eight() -> None:
    options = {"end_phrase": "end"}
    for response in ("end", "*e*nd", "x\nend", "end\nx", "x\nend\nx", "x\nen*d", "*end*\nx", "x\n*end*\nx"):
        assert verify("startend:end_checker", response, options, mode="loose"), response
        quoted = response.replace("end", '"end"').replace("en*d", '"en*d"').replace("e*nd", '"e*nd"')
        assert verify("startend:quotation", quoted, {}, mode="loose"), quoted  # which both ends of a text decide
    assert not verify("startend:end_checker", "x\nend\nx\nx", options, mode="loose")
    assert not verify("startend:end_checker", "end\rx", options, mode="loose")


def test_language_is_seeded_and_leaves_the_library_alone() -> None:
    import langdetect

    mixed = "Das ist ein guter Tag. This is a good day. C'est une bonne journée. "
    before = langdetect.DetectorFactory.seed
    answers = set()
    for n in range(6):  # other texts of the same content, past the cache
        answers.add(verify("language:response_language", mixed + " " * n, {"language": "de"}))
    assert len(answers) == 1 and langdetect.DetectorFactory.seed == before


def test_language_codes_are_those_of_langdetect() -> None:
    from langdetect import detector_factory

    from mdpgrpo_fast.verifiers.arguments import LANGUAGES

    detector_factory.init_factory()
    assert sorted(LANGUAGES) == sorted(detector_factory._factory.get_lang_list())


def test_long_texts_get_langdetects_own_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    import langdetect

    from mdpgrpo_fast.verifiers.text import language

    monkeypatch.setattr(langdetect.DetectorFactory, "seed", 0)
    link = "see https://example.org/" + "a" * 1900 + " or write to someone.with.a.long.name@example.org now "
    for text in (
        link * 10 + "Dies ist ein langer deutscher Text. " * 4000,
        "Dies ist ein Text. " * 600 + "This is another. " * 9000,
        "\u0627\u0644\u0633\u0644\u0627\u0645 " * 9000,
        "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0" * 9000,
        "e\u0301a\u0300" * 20_000 + " l'été" * 9000,
    ):
        assert len(language._head(text)) < len(text)
        assert language.detect(text) == langdetect.detect(text)


def test_import_is_light() -> None:
    code = (
        "import sys, mdpgrpo_fast.verifiers\n"
        "heavy = {'torch', 'transformers', 'numpy', 'nltk', 'langdetect', 'regex'} & set(sys.modules)\n"
        "sys.exit(str(sorted(heavy)) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
