"""Chat templates, which come with a model from anywhere, rendered in a process with limits on time and memory.

The process is forked from this one, so that it has the tokenizer, and answers one prompt after the other. It ends
itself by an alarm, whatever its template is at; nothing that it sends is run or unpickled.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import struct
import warnings
from typing import Any, BinaryIO, NoReturn

from ..config import ConfigError
from ..log import reason_of

SECONDS, EACH = 20.0, 0.1  # for all prompts together, and more for each
MEMORY = 2**30  # bytes beyond what the process has when it starts
CHARACTERS, TIMES = 200_000, 10  # of a rendered prompt, and as many more for each character that it is made of
_TEXT, _REFUSED, _TOO_MUCH = b"trm"


class RefusalError(ValueError):
    """What a template raised for a prompt, or went wrong in it."""


class Renderer:
    """`tokenizer.apply_chat_template` of the tokenizer as it is when the first prompt is rendered. Close it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._pid = 0

    def render(self, messages: Any, /, **arguments: Any) -> str:
        """One conversation as text.

        Raises: RefusalError for what the template raises; ConfigError where it exceeds a limit or ends its process.
        """
        arguments |= {"conversation": messages, "tokenize": False}
        if not hasattr(os, "fork"):
            return _checked(*_answer(self._tokenizer, arguments))
        if not self._pid:
            self._start()
        try:
            request = pickle.dumps(arguments)
        except Exception as e:  # rows in memory may hold anything
            raise RefusalError(f"the prompt cannot be sent to the process that renders it: {reason_of(e)}") from None
        try:
            _send(self._requests, request)
            answer = _receive(self._answers)
        except (EOFError, BrokenPipeError):
            raise ConfigError(f"the tokenizer's chat template {self._end()}") from None
        return _checked(answer[0], answer[1:].decode())

    def close(self) -> None:
        """Ends the process."""
        if self._pid:
            with contextlib.suppress(ProcessLookupError):  # it ended, where nobody waits for children
                os.kill(self._pid, signal.SIGKILL)
            self._end()

    def __enter__(self) -> Renderer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        (request, requests), (answers, answer) = os.pipe(), os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads, whose locks the process does not take
            self._pid = os.fork()
        if not self._pid:
            os.close(requests)
            os.close(answers)
            _serve(self._tokenizer, os.fdopen(request, "rb"), os.fdopen(answer, "wb"))
        os.close(request)
        os.close(answer)
        self._requests, self._answers = os.fdopen(requests, "wb"), os.fdopen(answers, "rb")

    def _end(self) -> str:
        """How the process ended, in words."""
        for pipe in (self._requests, self._answers):
            with contextlib.suppress(OSError):
                pipe.close()
        pid, self._pid = self._pid, 0
        try:
            number = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        except ChildProcessError:  # this program was started with SIGCHLD ignored
            return "ended the process that renders it, or took too long"
        if number == -signal.SIGALRM:
            return f"takes over {SECONDS:g} s, and {EACH:g} s more for each prompt"
        return f"ended the process that renders it, with status {number}"


def _serve(tokenizer: Any, requests: BinaryIO, answers: BinaryIO) -> NoReturn:
    """Answers until there are no more requests; the process ends here."""
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
        left = SECONDS
        signal.setitimer(signal.ITIMER_REAL, left)
        _limit_memory()
        left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
        while True:
            arguments = pickle.loads(_receive(requests))  # what its parent sends
            signal.setitimer(signal.ITIMER_REAL, left + EACH)
            kind, text = _answer(tokenizer, arguments)
            left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
            _send(answers, bytes([kind]) + text.encode("utf-8", "replace"))
    except EOFError:
        pass
    finally:
        os._exit(0)


def _limit_memory() -> None:
    import resource

    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            size = int(statm.read().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux: macOS has no such limit
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = size + MEMORY if hard == resource.RLIM_INFINITY else min(size + MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _answer(tokenizer: Any, arguments: dict[str, Any]) -> tuple[int, str]:
    try:
        text = tokenizer.apply_chat_template(**arguments)
        given = len(str((arguments["conversation"], arguments.get("tools"))))
        if len(text) > CHARACTERS + TIMES * given:
            return _TOO_MUCH, f"makes {len(text)} characters of a prompt with {given}"
        text.encode()
    except MemoryError:
        return _TOO_MUCH, f"takes over {MEMORY // 2**20} MiB for one prompt"
    except UnicodeEncodeError as e:
        return _REFUSED, f"it writes {e.object[e.start]!a}, half of a surrogate pair, which is no text"
    except Exception as e:  # templates raise what they like, for a system message for one
        return _REFUSED, reason_of(e)
    return _TEXT, text


def _checked(kind: int, text: str) -> str:
    if kind == _TEXT:
        return text
    raise RefusalError(text) if kind == _REFUSED else ConfigError(f"the tokenizer's chat template {text}")


def _send(pipe: BinaryIO, data: bytes) -> None:
    pipe.write(struct.pack("<Q", len(data)) + data)
    pipe.flush()


def _receive(pipe: BinaryIO) -> bytes:
    header = pipe.read(8)
    data = pipe.read(struct.unpack("<Q", header)[0]) if len(header) == 8 else b""
    if len(header) < 8 or len(data) < struct.unpack("<Q", header)[0]:
        raise EOFError
    return data
