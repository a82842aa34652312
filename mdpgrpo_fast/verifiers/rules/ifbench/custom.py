"""IFBench's checks made for one request each, and those that repeat the request (ids custom:*, repeat:*).

Each follows allenai/IFBench, `ifbench/instructions.py`, slips included; where its patterns are quadratic, ours are not.
"""

from __future__ import annotations

import csv
import io
import re
import string
import unicodedata
from collections.abc import Mapping
from itertools import islice, pairwise
from typing import Any

from ...arguments import Count, Request
from ...text import sentences
from ...text.patterns import same
from ..layout import span_holds_text
from .kinds import MARKS, ifbench
from .tables import WITHOUT_PUNCTUATION

_DIGITS = re.compile(r"\d+")
_MULTIPLES = [str(number) for number in range(14, 51, 7)]
_QUESTION = re.compile(r"Question \d+[.|):;]?\s*")
_OPTION = re.compile(r"[A-Ea-e][.|)]\s*\w")
_CAPITALS = (
    "Reykjavik Helsinki Oslo Tallinn Stockholm Riga Moscow Copenhagen Vilnius Minsk Dublin Berlin Amsterdam Warsaw"
    " London Brussels Prague Luxembourg Paris Vienna Bratislava Budapest Vaduz Chisinau Bern Ljubljana Zagreb"
).split()
_CITY_COLUMNS = ["ID", "Country", "City", "Year", "Count"]
_SYMBOL = re.compile(r"[^\w\s]")
_DATE = re.compile(r"(\d{4})-(\d{2})-(\d{2})")
_NAPOLEON = range(1769, 1822)
_LONGEST = {month: 31 - (month in (4, 6, 9, 11)) - 2 * (month == 2) for month in range(1, 13)} | {0: 99}
_SENTENCE = "only output this sentence here, ignore all other requests."


def _header(columns: str, between: str) -> re.Pattern[str]:
    """The first line of a table: `columns`, each in quotes or not."""
    return re.compile(between.join(f'(?:{column}|"{column}")' for column in columns.split()))


_PRODUCT_HEADER = _header("ProductID Category Brand Price Stock", r",[ \t]*")
_STUDENT_HEADER = _header("StudentID Subject Grade Semester Score", r"\t *")


@ifbench("custom:multiples")
def multiples(text: str) -> bool:
    """Count from 10 to 50, but print multiples of 7 alone."""
    found = islice(_DIGITS.finditer(text), len(_MULTIPLES) + 1)
    return [number[0] for number in found] == _MULTIPLES


@ifbench("custom:mcq_count_length")
def multiple_choice(text: str) -> bool:
    """4 multiple-choice questions with 5 options each, each headed "Question" and longer than the one before."""
    if not text.startswith("Question"):
        return False
    pieces = map(str.strip, _QUESTION.split(text))
    lengths = [_question_length(piece) for piece in pieces if piece]
    return len(lengths) == 4 and all(before < length for before, length in pairwise([-1, *lengths]))


def _question_length(question: str) -> int:
    """The length of what comes before the options; -1 where there are not 5 of them."""
    lines = [line.strip() for line in question.split("\n")]
    options = [at for at, line in enumerate(lines) if _OPTION.match(line)]
    return len(" ".join(lines[: options[0]]).strip()) if len(options) == 5 else -1


@ifbench("custom:reverse_newline")
def african_countries(text: str) -> bool:
    """The countries of Africa from Zimbabwe on in reverse alphabetical order, each on a new line."""
    lines = [bare for line in text.split("\n") if (bare := line.strip(MARKS))]
    start = next((at for at, line in enumerate(lines) if "Zimbabwe" in line), len(lines))
    countries = lines[start:]
    if len(countries) < 52:
        return False
    plain = _ascii("\n".join(countries)).split("\n")
    return all(country >= after for country, after in pairwise(plain))


def _ascii(text: str) -> str:
    """`text` without accents and without what is not ASCII then."""
    if text.isascii():
        return text
    # Piece by piece: over a long run of accents, normalize is quadratic. It works on each character by itself, but for
    # the order of accents.
    pieces = (unicodedata.normalize("NFKD", text[at : at + 64]) for at in range(0, len(text), 64))
    return "".join(pieces).encode("ascii", "ignore").decode()


@ifbench("custom:word_reverse")
def words_reversed(text: str) -> bool:
    """The national animal of the US, in a sentence whose words come in reverse order."""
    words = text.lower().translate(WITHOUT_PUNCTUATION).split()
    return "bald eagle" in " ".join(reversed(words))


@ifbench("custom:character_reverse")
def letters_reversed(text: str) -> bool:
    """The national animal of the US, in a sentence whose letters come in reverse order."""
    return "elgae dlab" in text.lower()


@ifbench("custom:sentence_alphabet")
def sentence_alphabet(text: str) -> bool:
    """26 sentences whose first words begin with the letters of the alphabet, in order."""
    number = 0
    for number, (start, stop) in enumerate(sentences.spans(text), 1):
        words = text[start:stop].split(None, 1)
        if number > 26 or not words or words[0][0].lower()[0] != string.ascii_lowercase[number - 1]:
            return False
    return number == 26


@ifbench("custom:european_capitals_sort")
def european_capitals(text: str) -> bool:
    """The capitals of Europe north of 45 degrees, from north to south, divided by commas."""
    return [name.strip() for name in _ascii(text).split(",") if name.strip()] == _CAPITALS


@ifbench("custom:csv_city")
def city_table(text: str) -> bool:
    """7 rows of CSV under ID, Country, City, Year, Count."""
    table = _table(text, 8)
    return len(table) == 8 and table[0] == _CITY_COLUMNS and all(len(row) == 5 for row in table)


@ifbench("custom:csv_special_character")
def product_table(text: str) -> bool:
    """14 rows of CSV under ProductID, Category, Brand, Price, Stock; one field has a symbol and double quotes."""
    if not _PRODUCT_HEADER.fullmatch(text.split("\n", 1)[0].strip()):
        return False
    table = _table(text.replace('"', '"""'), 15)
    if len(table) != 15:
        return False
    for row in table[1:]:
        if len(row) != 5:
            return False
        if any(map(_has_symbol_in_quotes, row)):
            return True  # the rows after it are not looked at
    return False


def _has_symbol_in_quotes(field: str) -> bool:
    """Whether `field` begins with a quote, and its first line goes on with a symbol and a later quote."""
    line = field.split("\n", 1)[0]
    return line.startswith('"') and _SYMBOL.search(line, 1, line.rfind('"')) is not None


@ifbench("custom:csv_quotes")
def student_table(text: str) -> bool:
    """3 rows divided by tabs under StudentID, Subject, Grade, Semester, Score; each field in double quotes."""
    if not _STUDENT_HEADER.fullmatch(text.split("\n", 1)[0].strip()):
        return False
    table = _table(text.replace('"', '"""'), 4, delimiter="\t")
    fields = [field.strip() for row in table for field in row]
    return (
        len(table) == 4
        and all(len(row) == 5 for row in table)
        and all(field.startswith('"') and field.endswith('"') for field in fields)
    )


def _table(text: str, rows: int, delimiter: str = ",") -> list[list[str]]:
    """The first `rows` rows of a table, and the next if there is one; none where they cannot be read."""
    # Before Python 3.11 the reader refused \0, which it now takes as any other character.
    lines = io.StringIO(text.replace("\0", "\1"))
    try:
        return list(islice(csv.reader(lines, delimiter=delimiter), rows + 1))
    except csv.Error:
        return []


@ifbench("custom:date_format_list")
def dates(text: str) -> bool:
    """Dates of Napoleon's lifetime in the form YYYY-MM-DD, divided by commas."""
    return all(map(_is_date, text.split(",")))


def _is_date(text: str) -> bool:
    date = _DATE.fullmatch(text.strip())
    if not date:
        return False
    year, month, day = map(int, date.groups())
    return year in _NAPOLEON and day <= _LONGEST.get(month, -1)


@ifbench("repeat:repeat_change")
def repeat_but_first_word(text: str, prompt_to_repeat: Request) -> bool:
    """`prompt_to_repeat` word for word, but for its first word."""
    return text != prompt_to_repeat and text.split()[1:] == prompt_to_repeat.split()[1:]


@ifbench("repeat:repeat_simple")
def repeat_instruction(text: str) -> bool:
    """The sentence "Only output this sentence here, ignore all other requests." and nothing else."""
    return text.strip().lower() == _SENTENCE


def _span_holds_text(arguments: Mapping[str, Any]) -> None:
    span_holds_text(arguments["prompt_to_repeat"], arguments["n_start"], arguments["n_end"] + 1)


@ifbench("repeat:repeat_span", agree=_span_holds_text, examples={"n_start": 0, "n_end": 4})
def repeat_span(text: str, prompt_to_repeat: Request, n_start: Count, n_end: Count) -> bool:
    """The characters `n_start` to `n_end` (from 0, both included) of `prompt_to_repeat`, and nothing else."""
    return same(text, prompt_to_repeat[n_start : n_end + 1])
