"""Taps of a model, and what is known of the tensors that pass them. Worker process."""
