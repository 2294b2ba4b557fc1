"""Captures: their requests, rows and blocks. Worker process."""
