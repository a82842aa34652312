"""Pages from the templates beside this module."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .. import durable
from ..config import ConfigError


def _number(value: float, spec: str) -> str:
    return "–" if math.isnan(value) else format(value, spec)


def write_page(path: Path, template: str, **content: Any) -> None:
    """Prompts, responses and names are hostile text: the template escapes whatever it is given.

    Raises ConfigError where the file cannot be written.
    """
    environment = Environment(loader=PackageLoader(__package__, ""), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)  # fmt: skip
    environment.filters["number"] = _number
    environment.tests["nan"] = math.isnan
    page = environment.get_template(template).render(content)
    try:
        durable.write_text(path, page.encode("utf-8", "replace").decode())
    except durable.StorageError as e:
        raise ConfigError(f"the page {e}") from None
