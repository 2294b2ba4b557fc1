"""Rows of CUDA engines: operator, tables, kernels, graphs, staging, driver. Worker process."""
