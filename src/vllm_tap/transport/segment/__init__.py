"""Rows in segments of shared memory."""
