"""vLLM as the sampler: in this process (`local`), or a server (`server`), whose workers run `worker`."""
