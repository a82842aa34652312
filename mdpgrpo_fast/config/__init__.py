"""Every knob of the library: one default, one check, one sentence of help. Presets name the published settings."""

from .effects import with_correction, without_effect
from .extras import EXTRA_OF, how_to_install, needs_package
from .groups import ADVANCED, GROUPS
from .knobs import Backend, ConfigError, check_values, knob, knob_of, nearest, require, unknown_name
from .method import PAPER_TEMPERATURES, MDPGRPOConfig
from .presets import PRESETS, nearest_preset, preset
from .run import PromptConfig, TrainConfig, check_rewards

__all__ = [
    "ADVANCED",
    "EXTRA_OF",
    "GROUPS",
    "PAPER_TEMPERATURES",
    "PRESETS",
    "Backend",
    "ConfigError",
    "MDPGRPOConfig",
    "PromptConfig",
    "TrainConfig",
    "check_rewards",
    "check_values",
    "how_to_install",
    "knob",
    "knob_of",
    "nearest",
    "nearest_preset",
    "needs_package",
    "preset",
    "require",
    "unknown_name",
    "with_correction",
    "without_effect",
]
