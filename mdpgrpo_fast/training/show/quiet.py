"""Other libraries' bars and notes, which say nothing of a run, kept off the terminal while it lasts."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import huggingface_hub.utils as hub
import transformers

# What they say where nothing is wrong. Everything else of theirs is shown.
NOTES = (
    r"Removed shared tensor",  # accelerate: a tied head is saved once
    r"Deleting \d+ checkpoints? to make room",  # accelerate: as --save-every says
    r"Token indices sequence length is longer",  # too long prompts are found here, by the limit of the run
    r"`use_cache=True` is incompatible with gradient checkpointing",
    r"Detected call of `lr_scheduler\.step\(\)` before `optimizer\.step\(\)`",  # float16 skips a step
    r"Online softmax is disabled on the fly",  # torch.compile
    r"Not enough SMs to use max_autotune_gemm mode",
    r"TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled",
    r"No device id is provided via `init_process_group` or `barrier",
)
LIBRARIES = ("transformers", "accelerate", "safetensors", "huggingface_hub", "peft", "torch")
_KNOWN = re.compile("|".join(NOTES))


def _is_news(record: logging.LogRecord) -> bool:
    ours = record.name.partition(".")[0] not in LIBRARIES
    return ours or record.levelno >= logging.ERROR or not _KNOWN.search(record.getMessage())


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers shows no bars, and the known notes of other libraries are dropped; all as before afterwards.

    Bars of downloads are shown: they take their time. Serves as a decorator too.
    """
    logger = transformers.utils.logging
    bars, downloads = logger.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    loggers = [logging.getLogger(name) for name in ("", *LIBRARIES)]
    handlers = [h for x in loggers for h in x.handlers] + ([logging.lastResort] if logging.lastResort else [])
    for handler in handlers:
        handler.addFilter(_is_news)
    if bars:
        logger.disable_progress_bar()
        if downloads:
            hub.enable_progress_bars()  # transformers takes both together
    try:
        with warnings.catch_warnings():
            for note in NOTES:
                warnings.filterwarnings("ignore", message=f"(?s).*{note}")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(_is_news)
        if bars:
            logger.enable_progress_bar()
            if not downloads:
                hub.disable_progress_bars()
