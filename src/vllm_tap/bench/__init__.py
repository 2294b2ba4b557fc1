"""Benchmarks that write the JSON files from which the documents are rendered.

Run by hand, in processes of their own.
"""
