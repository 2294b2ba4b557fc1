"""Rows over HTTP: routes of vLLM's OpenAI-compatible server, in its API processes."""
