"""IFBench's checks on counts, ratios, words and sentences, beside their golden table."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
from golden.tagger import tagger_folder
from helpers.verifiers import nltk_data, punkt_folder

from mdpgrpo_fast.verifiers import INSTRUCTIONS, ArgumentError, MissingRequirementError, validate, verify
from mdpgrpo_fast.verifiers.rules.ifbench import tables, words

GROUPS = ("count:", "ratio:", "words:", "sentence:")
MINE = [id for id, entry in INSTRUCTIONS.items() if entry.rules == ("ifbench",) and id.startswith(GROUPS)]


@pytest.fixture(scope="module", autouse=True)
def data() -> Iterator[None]:
    with nltk_data(punkt_folder(), tagger_folder()):
        yield


def follows(instruction_id: str, text: str, **kwargs: Any) -> bool:
    return verify(instruction_id, text, kwargs, rules="ifbench")


def test_there_are_30_types_with_arguments_that_they_take() -> None:
    assert len(MINE) == 30
    for instruction_id in MINE:
        entry = INSTRUCTIONS[instruction_id]
        validate(instruction_id, entry.example, "ifbench")
        assert not entry.optional and entry.description.endswith((".", "?", "!"))


# What IFBench's own prompts pass, numbers as floats and each argument of any type as None where it is not this type's.
AS_IN_THE_DATA = {
    "count:word_count_range": {"max_words": 73.0, "min_words": 71.0},
    "count:unique_word_count": {"N": 36.0},
    "count:conjunctions": {"small_n": 5.0},
    "count:person_names": {"N": 39.0},
    "count:numbers": {"N": 13.0},
    "count:pronouns": {"N": 22.0},
    "count:words_japanese": {"N": 29.0},
    "count:keywords_multiple": {f"keyword{n}": word for n, word in enumerate("door bread blue lamp river".split(), 1)},
    "ratio:stop_words": {"percentage": 27.0},
    "ratio:overlap": {"percentage": 72.0, "reference_text": "Name the rivers of this valley:\n\n..."},
    "words:repeats": {"small_n": 2.0},
    "words:keywords_specific_position": {"keyword": "lantern", "m": 33, "n": 22},
    "words:words_position": {"keyword": "copper"},
    "sentence:keyword": {"N": 8.0, "word": "harbour"},
    "sentence:increment": {"small_n": 4.0},
}
ALL_ARGUMENTS = sorted({name for kwargs in AS_IN_THE_DATA.values() for name in kwargs} | {"options", "num_words"})


@pytest.mark.parametrize("instruction_id", MINE)
def test_arguments_are_taken_as_they_come_in_the_data(instruction_id: str) -> None:
    kwargs = dict.fromkeys(ALL_ARGUMENTS) | AS_IN_THE_DATA.get(instruction_id, {})
    validate(instruction_id, kwargs, "ifbench")
    assert isinstance(verify(instruction_id, "One, two. Three?", kwargs, rules="ifbench"), bool)


RANGE = "count:word_count_range"


@pytest.mark.parametrize(
    ("instruction_id", "kwargs", "names"),
    [
        (RANGE, {"min_words": 5}, "max_words: .*missing"),
        (RANGE, {"min_words": 5, "max_words": 4}, r"max_words: .*at least min_words \(5\), got 4"),
        ("count:numbers", {"N": -1}, "N: .*-1"),
        ("count:words_japanese", {"N": 0}, "N: .*from 1, got 0"),
        ("sentence:keyword", {"N": 0.0, "word": "a"}, "N: .*from 1, got 0.0"),
        ("sentence:keyword", {"N": 1, "word": " "}, "word: .*blank"),
        ("words:keywords_specific_position", {"keyword": "a", "n": 1}, "m: .*from 1, missing"),
        ("words:keywords_specific_position", {"keyword": "a", "n": True, "m": 1}, "n: .*True"),
        ("count:keywords_multiple", {"keyword1": "a"}, "keyword2: .*missing"),
        ("ratio:overlap", {"percentage": 5}, "reference_text: .*missing"),
        *[("ratio:stop_words", {"percentage": bad}, "percentage: .*0 to 100") for bad in (None, -1, 101, "5", True)],
        ("ratio:stop_words", {"percentage": math.nan}, "percentage: .*nan"),
    ],
)
def test_wrong_arguments_are_named(instruction_id: str, kwargs: dict[str, Any], names: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{instruction_id}: {names}"):
        validate(instruction_id, kwargs, "ifbench")


# ---- what the rules are defined by ---------------------------------------------------------------------------------


def test_stop_words_are_those_of_nltk() -> None:
    listed = (punkt_folder() / "corpora/stopwords/english").read_text(encoding="utf-8").split()
    assert sorted(tables.STOP_WORDS) == sorted(listed) and len(listed) == 198


def test_word_lists_have_their_size() -> None:
    assert (len(tables.NAMES), len(tables.PRONOUNS), len(tables.CONJUNCTIONS)) == (50, 63, 7)


def test_a_name_is_a_whole_word_in_its_own_case() -> None:
    for text in ("Emma", "(Emma's)", "Emma-Leo", "Emma\u0301"):
        assert follows("count:person_names", text, N=1), text
    for text in ("emma", "EMMA", "Emmas", "Emma_1", "Emmaé"):
        assert not follows("count:person_names", text, N=1), text
    assert not follows("count:person_names", "Emma Emma", N=2)


def test_conjunctions_differ_as_they_are_written() -> None:
    assert follows("count:conjunctions", 'and And and, "and', small_n=4)
    assert not follows("count:conjunctions", "and and sofa", small_n=2)


def test_punctuation_is_dropped_before_numbers_are_counted() -> None:
    assert follows("count:numbers", "It cost 1,000.50-2 or 3 4", N=3)
    assert follows("count:numbers", "٣ and ½, x²", N=1)
    assert not follows("count:numbers", "1 2", N=1)


def test_the_interrobang_stands_beside_the_other_marks() -> None:
    assert follows("count:punctuation", ". , ; : ?! ! ?") and follows("count:punctuation", ". , ; : \u203d ?!!?")
    assert not follows("count:punctuation", ". , ; : ?!") and not follows("count:punctuation", ". , ; : ! ?")


def test_words_without_letters() -> None:
    assert follows("count:unique_word_count", "-- ... a", N=2)  # all that is punctuation alone is one word
    assert not follows("ratio:stop_words", "... !", percentage=100)
    assert follows("words:prime_lengths", "...") and not follows("words:alphabet", "...")
    assert follows("words:repeats", "...", small_n=0) and not follows("words:repeats", "a", small_n=0)


def test_japanese_words_come_at_their_places_or_are_numbers() -> None:
    assert follows("count:words_japanese", "a 川 b 12 c ...", N=2)
    assert not follows("count:words_japanese", "a 川 b c", N=2) and not follows("count:words_japanese", "½", N=1)


def test_overlap_is_met_within_two_percent() -> None:
    given = {"reference_text": "abcdef", "text": "abcxyz"}  # 1 of its 4 runs of 3 characters
    for percentage in (23, 25, 27):
        assert follows("ratio:overlap", percentage=percentage, **given)
    assert not follows("ratio:overlap", percentage=22.9, **given)
    assert not follows("ratio:overlap", percentage=27.1, **given)
    assert not follows("ratio:overlap", "ab", reference_text="abc", percentage=0)


def test_the_last_mark_is_no_word() -> None:
    for text in ("The river runs the river home.", "The river runs the river home", "The river runs the river home ./"):
        assert follows("words:words_position", text, keyword="River"), text
    assert not follows("words:words_position", "The river runs the river home...", keyword="river")
    assert not follows("words:words_position", "a.", keyword="a")


def test_a_word_of_the_nth_sentence() -> None:
    text = "We row. The (river) can't wait. C++ it is."
    assert follows("words:keywords_specific_position", text, keyword=" River ", n=2, m=2)
    assert follows("words:keywords_specific_position", text, keyword="n't", n=2, m=4)
    assert not follows("words:keywords_specific_position", text, keyword="row", n=4, m=2)
    assert not follows("words:keywords_specific_position", text, keyword="row", n=1, m=3)
    assert follows("sentence:keyword", text, word="RIVER", N=2)
    assert not follows("sentence:keyword", text, word="riv", N=2) and not follows(
        "sentence:keyword", text, word="it", N=2
    )
    assert not follows("sentence:keyword", text, word="C++", N=3)  # no word ends behind a +


# ---- the tagger and the syllables ----------------------------------------------------------------------------------


def test_the_first_tag_needs_three_words() -> None:
    from nltk import pos_tag

    rng = random.Random(3)
    text = "Write Run Walk the a left boats river , . : is to home n't -- 12 Is Built Answer slowly answer".split()
    for _ in range(2000):
        tokens = rng.choices(text, k=rng.randint(1, 7))
        assert pos_tag(tokens)[0] == pos_tag(tokens[:3])[0], tokens


def test_a_verb_is_what_the_tagger_says() -> None:
    assert follows("words:start_verb", "Write a letter.") and follows("words:start_verb", "Running is good for you.")
    assert not follows("words:start_verb", "The boats left.") and not follows("words:start_verb", "* Write soon")


def test_without_the_tagger_the_command_that_fetches_it_is_named() -> None:
    words.tagger_data.cache_clear()
    with nltk_data(punkt_folder()), pytest.raises(MissingRequirementError, match=r"^words:start_verb: .* --get-data"):
        validate("words:start_verb", {}, "ifbench")
    validate("words:start_verb", {}, "ifbench")  # an absence is not remembered


def test_syllables_are_those_of_syllapy() -> None:
    import syllapy

    rng = random.Random(5)
    for _ in range(3000):
        word = "".join(rng.choices("aeioubcdlstyé1", k=rng.choice((1, 3, 5, 9, 60))))
        assert words._is_odd(word) == syllapy.count(word) % 2
    assert follows("words:odd_even_syllables", "Cats water trees -- quickly, well.")
    assert not follows("words:odd_even_syllables", "Cats, dogs.")
    assert follows("words:odd_even_syllables", "z" * 50_000)


# ---- order and sentences -------------------------------------------------------------------------------------------


def test_words_that_follow_each_other() -> None:
    assert follows("words:alphabet", "Yes, (zebras) ate Big c's") and follows("words:alphabet", "j \u212a l")
    assert not follows("words:alphabet", "a b d") and not follows("words:alphabet", "1 a")
    assert follows("words:no_consecutive", "a-b c a") and not follows("words:no_consecutive", "Tide - tale")
    assert follows("words:last_first", 'We go home. "Home is far." Far it is')
    assert not follows("words:last_first", "We go home. A home!") and not follows("words:last_first", "Go! ... Go!")
    assert follows("words:paragraph_last_first", "Tide is a tide.\n\n***\n \nSo-so") and follows(
        "words:vowel", "a e\u2028i"
    )
    assert not follows("words:paragraph_last_first", "Tide is a tide\nNo yes") and not follows("words:vowel", "a\nb")


def test_sentences_that_grow() -> None:
    assert follows("sentence:increment", "One. One two -- three. Four five six seven it's!", small_n=2)
    assert not follows("sentence:increment", "One. One two three. Four.", small_n=2)
    assert follows("sentence:alliteration_increment", "We go. Tall trees sway. Tall trees sway so slowly.")
    assert not follows("sentence:alliteration_increment", "Tall trees sway. Tall trees sway.")
    assert follows("ratio:sentence_words", "Abc. Def! Ghi?") and not follows("ratio:sentence_words", "Abc. Def! Gh?")


def test_palindromes_count_as_often_as_they_stand() -> None:
    assert follows("words:palindrome", "level, " * 9 + "RA-DAR") and not follows(
        "words:palindrome", "level " * 9 + "noon"
    )
