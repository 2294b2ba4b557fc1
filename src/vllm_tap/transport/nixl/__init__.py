"""Rows by NIXL: a client reads them out of a worker's memory, which says over TCP where. Both processes."""
