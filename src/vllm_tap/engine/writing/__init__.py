"""Datasets written by workers, out of their own memory."""
