"""The half of the package that runs inside vLLM's processes. `host` and `experts` alone know vLLM's inside."""
