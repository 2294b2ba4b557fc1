"""The old interface over the new path, for code written against the fork.

Runs in the client; importing it loads nothing.
"""
