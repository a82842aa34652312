"""The embedded demonstration: prompts, a seed policy and the settings of the run. examples/demo/ makes them."""

from pathlib import Path

DEMO_DIR = Path(__file__).parent
SEED_POLICY = DEMO_DIR / "seed_policy"
