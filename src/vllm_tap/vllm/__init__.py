"""Everything that is known of vLLM's inside; `import vllm` stands nowhere else."""
