"""The worker calls of the old interface."""
