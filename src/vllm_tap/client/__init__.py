"""The half of the package that runs in the user's process."""
