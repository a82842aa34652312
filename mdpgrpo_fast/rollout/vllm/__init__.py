"""vLLM as the rollout engine: in this process (`local`) or as a server (`server`); its workers run `worker`."""
