"""Whether a text is XML as `xml.etree.ElementTree` sees it, within limits.

The parser beneath it, expat, is asked alone: ElementTree spells out the namespace of every name, which takes seconds
where a text of 200 kB has a long one. What multiplies a text within expat is reckoned beforehand, and what comes to
more than the limits is taken for no XML: such a text could hold a process for seconds, fill its memory or end it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn
from xml.parsers import expat

SPELT_OUT = 2 * 2**20  # bytes of entities, and of namespaces of attributes; expat has a limit of its own from 8 MiB
DEEP = 100  # entities within entities: before version 2.7 expat calls itself for each, and the stack ends
DECLARED = 1_000_000  # declared attributes, times those and the elements that may have them

_IN_DOCTYPE = re.compile(
    r"""<!--.*?(?:-->|\Z)|<\?.*?(?:\?>|\Z)|\]\s*>|(?:<!ENTITY\s+([^\s"'<>%&;]+)\s+)?("[^"]*"?|'[^']*'?)""", re.DOTALL
)
_ATTRIBUTE = re.compile(r"""(?<=\s)([^\s"'<>=]+)\s*=\s*("[^"<]*"|'[^'<]*')""")
_PREDEFINED = ("lt", "gt", "amp", "quot", "apos")  # which no declaration changes
_REFERENCE = re.compile(r"&([^\s\"'<>&;#]+);")
_CHARACTER = re.compile(r"&#(?:0*([0-9]{1,7})|x0*([0-9a-fA-F]{1,6}));")


def well_formed(text: str) -> bool:
    """Whether `xml.etree.ElementTree.fromstring` takes `text`, which is within the limits.

    Raises UnicodeError for half a surrogate pair.
    """
    if text[:1] not in "<\ufeff \t\r\n":
        text.encode()  # raises UnicodeError
        return False
    if ("<!DOCTYPE" in text or "xmlns" in text) and _exceeds(text):
        return False
    parser = expat.ParserCreate(namespace_separator="}")
    parser.SkippedEntityHandler = parser.ExternalEntityRefHandler = _undefined
    try:
        parser.Parse(text)
        parser.Parse("", True)
    except (expat.ExpatError, _UndefinedError):
        return False
    return True


class _UndefinedError(Exception):
    """A text refers to an entity whose value it does not hold."""


def _undefined(*_: Any) -> NoReturn:
    raise _UndefinedError


def _exceeds(text: str) -> bool:
    """Whether `text` may exceed one of the limits; never less is reckoned than what the parser could come to."""
    text.encode()  # raises UnicodeError
    doctype, body = _doctype(text) if "<!DOCTYPE" in text else (_Doctype({}, [], []), text)
    sizes, references = _Sizes(doctype.entities), Counter(doctype.references + _REFERENCE.findall(body))
    spelt_out = sum(times * sizes.of(name) for name, times in references.items())
    elements = body.count("<") + spelt_out // len("<a/>")
    # An attribute has a default value, or #IMPLIED, or #REQUIRED.
    declared = len(doctype.values) + text.count("#") - body.count("#") if "<!ATTLIST" in text else 0
    if spelt_out > SPELT_OUT or declared * (declared + elements) > DECLARED:
        return True
    within = "".join(doctype.entities.values())
    prefixed, namespaces = declared * elements, list(doctype.values)
    for name, value in _ATTRIBUTE.findall(text):
        if name.startswith("xmlns"):
            namespaces.append(value)
        elif ":" in name:
            prefixed += 1
    prefixed += spelt_out // len(" a:b=''") if ":" in within else 0
    longest = max((len(value.encode()) for value in namespaces), default=0)
    longest += spelt_out if "xmlns" in within or any("&" in value for value in namespaces) else 0
    return prefixed * longest > SPELT_OUT


class _Doctype(NamedTuple):
    """What a document type holds: entities by name, all other quoted values, and what those refer to."""

    entities: dict[str, str]
    values: list[str]
    references: list[str]


def _doctype(text: str) -> tuple[_Doctype, str]:
    """The document type, and the text behind it."""
    entities, values, references = held = _Doctype({}, [], [])
    for found in _IN_DOCTYPE.finditer(text):
        name, value = found.groups()
        if name in _PREDEFINED:
            continue
        if name is not None:
            # What &#38; stands for is read again as a reference. The first declaration of a name holds.
            entities.setdefault(name, _CHARACTER.sub(_character, value[1:-1]))
        elif value is not None:
            values.append(value)
            references += [name for name in _REFERENCE.findall(value) if name in entities]  # those to come do not count
        elif found[0][0] == "]":
            return held, text[found.end() :]
    return held, ""


def _character(reference: re.Match[str]) -> str:
    decimal, hexadecimal = reference.groups()
    code = int(decimal) if decimal else int(hexadecimal, 16)
    return chr(code) if code < 0x110000 and not 0xD800 <= code < 0xE000 else ""


class _Sizes:
    """The bytes that references to entities come to."""

    def __init__(self, entities: Mapping[str, str]) -> None:
        self._entities = entities
        self._known: dict[str, tuple[int, int]] = {}  # bytes, and how many levels they take

    def of(self, name: str) -> int:
        """The bytes of one reference, more than SPELT_OUT where it leads in a circle or too deep."""
        return self._measure(name, 1)[0]

    def _measure(self, name: str, level: int) -> tuple[int, int]:
        value, too_much = self._entities.get(name), (SPELT_OUT + 1, DEEP)
        if value is None or level > DEEP:
            return too_much if value is not None else (0, 0)
        if name not in self._known:
            self._known[name] = too_much  # what a circle meets
            size, levels = len(value.encode()), 0
            for inner, times in Counter(_REFERENCE.findall(value)).items():
                inner_size, inner_levels = self._measure(inner, level + 1)
                size, levels = size + times * inner_size, max(levels, inner_levels)
            self._known[name] = too_much if levels >= DEEP else (min(size, too_much[0]), levels + 1)
        return self._known[name]
