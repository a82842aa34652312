"""`mdpgrpo evaluate`: scores of a model on held-out prompts, on tasks of lm-eval, and on FollowBench.

`mdpgrpo evaluate --model DIR --file held.jsonl` answers each prompt, prints a table and writes JSON.
"""

from __future__ import annotations

import sys
from dataclasses import fields

from .config import PromptConfig
from .evaluation.settings import EvaluateConfig
from .log import printable

__all__ = ["EvaluateConfig", "main"]


def _settings(argv: list[str] | None) -> EvaluateConfig:
    """Of a command line; without a model the lengths of the embedded demonstration lie under it."""
    from .cli import parse, read_yaml
    from .demo import DEMO_DIR

    (config,) = parse(argv, EvaluateConfig, prog="mdpgrpo evaluate")
    if config.model is None and (config.scores_prompts or config.followbench):
        shared = {f.name for f in fields(PromptConfig)}
        demo = {name: value for name, value in read_yaml(DEMO_DIR / "demo.yaml").items() if name in shared}
        (config,) = parse(argv, EvaluateConfig, prog="mdpgrpo evaluate", layers=[("demo.yaml", demo)])
    return config  # type: ignore[no-any-return]


def main(argv: list[str] | None = None) -> int:
    """The command. Status 2: something cannot be used, in one line; 1: a reward or the suite failed."""
    from .cli import report_errors

    with report_errors():
        config = _settings(argv)

        # Heavy imports only now: `--help` and a wrong flag answer at once.
        from .evaluation.run import run
        from .evaluation.tables import table
        from .rewards import RewardError
        from .training.show.quiet import quiet

        try:
            with quiet():
                result = run(config)
        except RewardError as e:
            print(printable("\n".join(filter(None, [e.trace, f"error: {e}"]))), file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted: nothing is written", file=sys.stderr)
            return 130
    for note in result["notes"]:
        print(printable(f"note: {note}"), file=sys.stderr)
    if text := table(result):
        print(printable(text))
    if "error" in result.get("suite", {}):
        print(printable(f"error: the suite stopped: {result['suite']['error']}"), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
