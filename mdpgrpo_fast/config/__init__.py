"""Every knob of the library: one default, one check, one sentence of help. Presets name the published settings."""

from .knobs import ConfigError, check_choices, knob, knob_of, require, unknown_name
from .method import PAPER_TEMPERATURES, PRESETS, MDPGRPOConfig, preset
from .run import PromptConfig, TrainConfig, check_rewards

__all__ = [
    "PAPER_TEMPERATURES",
    "PRESETS",
    "ConfigError",
    "MDPGRPOConfig",
    "PromptConfig",
    "TrainConfig",
    "check_choices",
    "check_rewards",
    "knob",
    "knob_of",
    "preset",
    "require",
    "unknown_name",
]
