"""Orthrus inside vLLM: it serves, schedules and verifies; the diffusion view drafts from its paged cache.

`plugin.register` is the entry point that vLLM calls in each of its processes. Folders come from
`orthrus export vllm`; those of the released Orthrus-Qwen3 layout load as they are.
"""
