"""The half of the package that runs inside vLLM's processes. `host` alone knows what vLLM looks like inside."""
