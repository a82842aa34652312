"""Every knob of the library: one default, one check, one sentence of help. Presets name the published settings."""

from .knobs import ConfigError, check_choices, knob, require, unknown_name
from .method import PAPER_TEMPERATURES, PRESETS, MDPGRPOConfig, preset
from .run import PromptConfig, TrainConfig

__all__ = [
    "PAPER_TEMPERATURES",
    "PRESETS",
    "ConfigError",
    "MDPGRPOConfig",
    "PromptConfig",
    "TrainConfig",
    "check_choices",
    "knob",
    "preset",
    "require",
    "unknown_name",
]
