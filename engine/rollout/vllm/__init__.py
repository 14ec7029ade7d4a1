"""The sampler in vLLM, in this process. ``engine`` is the only module that imports vllm."""
