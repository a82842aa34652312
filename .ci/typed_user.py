"""A user's script: mypy --strict passes it where the package is installed with its types, a wheel or editable."""

import torch

from mdpgrpo_fast import TrainConfig, TrainResult, preset, token_loss, train, verify

config = preset("paper")
config.num_generations.bit_length()
run = TrainConfig(reward_workers=2)
wrong: str = run.reward_workers  # type: ignore[assignment]  # which strict finds useless where nothing is typed
holds: bool = verify("punctuation:no_comma", "No comma.")
out = token_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long), None, config, advantage=1.0, kl_beta=0.0)
print(out.loss, holds, wrong)


def run_of(prompts: list[str]) -> TrainResult:
    verify("punctuation:no_comma", "No comma.", mode="lose")  # type: ignore[arg-type]
    return train(prompts=prompts, rewards=lambda completions, **_: [1.0] * len(completions), config=config)
