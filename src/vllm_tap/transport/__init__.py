"""Memory and sockets between an engine worker and a client: rows cross by mapping, not by copying.

Used by both processes: `pool` and `handover` run in the worker, `reader` and `link` in the client.
"""
