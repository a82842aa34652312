"""Names of models, data sets and files, as others may read them."""

from __future__ import annotations

from pathlib import Path, PurePath

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ...data.files import SUFFIXES


def hub_id(name: str) -> str | None:
    """The name where it is an id of the hub; None for a path, a file and words."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if Path(name).exists() or name.endswith(SUFFIXES) else name


def data_set_id(source: str | None) -> str | None:
    """The same of where prompts come from, as summary.json has it, without the configuration of a data set."""
    return None if source is None or source == "embedded" else hub_id(source.partition(":")[0])


def public(word: str) -> str:
    """A setting, or a word of a command, without what it tells of this machine: of an absolute path the last part."""
    flag, equals, value = word.rpartition("=")
    return f"{flag}{equals}{PurePath(value).name}" if PurePath(value).is_absolute() else word
