"""`mdpgrpo vllm-serve`: vLLM as the server that `--vllm-url` needs, with nothing open that need not be."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys

from ...cli import Parser, report_errors
from ...config import ConfigError, needs_package
from .door import GUARD, KEY, api_key, is_loopback
from .sampler import LOGPROBS_MODE
from .worker import EXTENSION

MODULE = "vllm.entrypoints.launchers.api_server.entry"  # what `vllm serve` runs, without a Rust front end
USAGE = f"""usage: mdpgrpo vllm-serve MODEL [--host HOST] [vLLM's own flags]

Starts vLLM as the server that --vllm-url needs, with the development endpoints through which weights come in: on
127.0.0.1 alone unless --host says otherwise, and on another address only with a key in the environment variable
{KEY}, which every request then has to bring.

The other flags are vLLM's own: --port, --dtype, --max-model-len, --tensor-parallel-size, --ssl-certfile and so on.
docs/vllm.md says more."""
# What the client relies on, whatever the model's own files say.
FIXED = {"--logprobs-mode": LOGPROBS_MODE, "--worker-extension-cls": EXTENSION, "--generation-config": "vllm"}


def command(argv: list[str]) -> list[str]:
    """vLLM's command line for the arguments of `mdpgrpo vllm-serve`; what is fixed comes last, where it counts.

    Raises: ConfigError for a flag that is fixed, a key on the command line, or an open address without a key.
    """
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    known, rest = parser.parse_known_args(argv)
    if not rest or rest[0].startswith("-"):
        raise ConfigError("vllm-serve needs a MODEL, a directory or hub id, before vLLM's flags")
    for word in rest:
        flag = _flag(word)
        if flag in FIXED:
            raise ConfigError(f"{flag} must be left out: vllm-serve sets it to {FIXED[flag]}")
        if flag.startswith("--api-k"):  # vLLM takes the beginning of a flag for the flag
            raise ConfigError(f"--api-key must be left out, where others see it: {KEY} in the environment is the key")
    key = api_key()
    if key is None and not is_loopback(known.host):
        raise ConfigError(
            f"--host must be 127.0.0.1, or {KEY} be set: whoever reaches {known.host!r} could change the weights"
        )
    fixed = [word for pair in FIXED.items() for word in pair]
    guard = ["--middleware", GUARD] if key else []
    # The token service tells which weights drew a completion.
    return [
        sys.executable, "-m", MODULE, "--model", *rest, "--enable-scale-out", *fixed, "--host", known.host, *guard
    ]  # fmt: skip


def _flag(word: str) -> str:
    return word.partition("=")[0].replace("_", "-")


def main(argv: list[str]) -> int:
    """Becomes vLLM's process. Status 2 where it would not start, or not safely."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    with report_errors():
        words = command(argv)
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(f"vllm-serve {needs_package('vllm')}")
    print(shlex.join(words), file=sys.stderr, flush=True)
    adapters = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if "--enable-lora" in map(_flag, words) else {}
    os.execve(sys.executable, words, {**os.environ, "VLLM_SERVER_DEV_MODE": "1", **adapters})
