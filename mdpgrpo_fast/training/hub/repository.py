"""A run's repository on the hub: made before the model is loaded, filled after the last step, by the first rank."""

from __future__ import annotations

import html
import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ...config import ConfigError, TrainConfig
from ...log import reason_of
from ...version import __version__
from .names import hub_id, public

LARGEST_REPORT = 5_000_000  # bytes


class HubError(RuntimeError):
    """The upload of a whole run failed. It says why, where the model is, and the command that uploads it."""


def check_hub(run: TrainConfig) -> None:
    """Raises ConfigError for what is wrong with push_to_hub before the hub is asked."""
    if not run.push_to_hub:
        return
    try:
        validate_repo_id(_wanted_id(run))
    except HFValidationError:
        raise ConfigError(f"hub_model_id must be an id as user/name; got {_wanted_id(run)!r}") from None
    if is_offline_mode():
        raise ConfigError("push_to_hub needs the hub, which HF_HUB_OFFLINE turns off: unset it, or upload later")
    if get_token() is None:
        raise ConfigError("push_to_hub needs a token that may write: `hf auth login`, or HF_TOKEN in the environment")


def make_repository(run: TrainConfig) -> str | None:
    """The full id of the repository, made where there is none; None without push_to_hub and on other ranks.

    Raises: ConfigError where it cannot be made or written to, or is public and was to be private.
    """
    if not run.push_to_hub or os.environ.get("RANK", "0") != "0":
        return None
    api = _api()
    try:
        repo_id = str(api.create_repo(_wanted_id(run), private=run.hub_private_repo or None, exist_ok=True).repo_id)
        api.auth_check(repo_id, write=True)  # one that is there may be another's
        is_public = run.hub_private_repo and not api.model_info(repo_id).private
    except Exception as e:  # of any kind: the network, the hub's answers
        raise ConfigError(f"push_to_hub: {_wanted_id(run)!r} cannot be made or written to: {reason_of(e)}") from None
    if is_public:
        raise ConfigError(f"hub_private_repo needs a new or a private repository; {repo_id!r} is public")
    return repo_id


def upload(run: TrainConfig, lm: Any, repo_id: str) -> str:
    """The model or its adapters with the card, and the report, to the hub; returns the address.

    Raises: HubError.
    """
    api, folder = _api(), uploaded_folder(run, lm)
    try:
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload the model of mdpgrpo_fast")
        report = _report(run)
        if report:
            api.upload_file(
                repo_id=repo_id, path_or_fileobj=report, path_in_repo="report.html",
                commit_message="Upload the report of its training",
            )  # fmt: skip
    except (Exception, KeyboardInterrupt) as e:  # of any kind, as above
        raise HubError(
            f"the upload to {repo_id} failed: {reason_of(e)}; the model is in {folder}, and this uploads it: "
            f"{upload_command(run, lm, repo_id)}"
        ) from None
    return f"{api.endpoint}/{repo_id}"


def uploaded_folder(run: TrainConfig, lm: Any) -> Path:
    """adapters/ of the run where they are of a model on the hub, so that others can load them; else model/."""
    alone = run.lora and not run.merge_adapter and hub_id(lm.name_or_path)
    return Path(run.output_dir) / ("adapters" if alone else "model")


def upload_command(run: TrainConfig, lm: Any, repo_id: str) -> str:
    """What uploads the model of the run later."""
    return shlex.join(["hf", "upload", repo_id, str(uploaded_folder(run, lm)), "."])


def _wanted_id(run: TrainConfig) -> str:
    return run.hub_model_id or Path(run.output_dir).absolute().name


def _api() -> HfApi:
    return HfApi(library_name="mdpgrpo_fast", library_version=__version__)


def _report(run: TrainConfig) -> bytes:
    """The page of the run with the last parts of absolute paths; empty where there is none, or it is large."""
    path = Path(run.output_dir) / "report.html"
    if not path.exists() or path.stat().st_size > LARGEST_REPORT:
        return b""
    page = path.read_text(encoding="utf-8")
    summary = json.loads((path.parent / "summary.json").read_text(encoding="utf-8"))
    words = {*_texts(asdict(run)), *shlex.split(summary["command"]), str(path.parent), str(path.parent.absolute())}
    for word in sorted(words, key=len, reverse=True):
        if public(word) != word:
            page = page.replace(html.escape(word), html.escape(public(word)))
    return page.encode()


def _texts(settings: dict[str, Any]) -> Iterator[str]:
    for value in settings.values():
        yield from (x for x in (value if isinstance(value, list) else [value]) if isinstance(x, str))
