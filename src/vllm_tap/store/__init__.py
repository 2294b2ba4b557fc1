"""Datasets: captured rows in a folder of immutable parts. Neither vLLM nor a GPU is needed to read them."""
