"""Reads rows of a server, as a consumer of them does, in a process of its own: a path a line, its bytes a line.

python bench/row_reader.py HOST:PORT KEY END   (END: the last bytes of rows that are complete, as hexadecimal digits)
"""

from __future__ import annotations

import http.client
import sys

PIECE_BYTES = 1 << 20


def read(connection: http.client.HTTPConnection, path: str, headers: dict[str, str], end: bytes) -> int:
    """Return the bytes of a body, which has rows to the end."""
    connection.request("GET", path, headers=headers)
    reply = connection.getresponse()
    buffer, last, num_bytes = memoryview(bytearray(PIECE_BYTES)), b"", 0
    while num := reply.readinto(buffer):
        num_bytes += num
        last = (last + bytes(buffer[max(0, num - len(end)) : num]))[-len(end) :]
    if reply.status != 200 or last != end:
        raise SystemExit(f"{path}: status {reply.status}, no rows: {bytes(buffer[:1000])!r}")
    return num_bytes


def main() -> None:
    """Read until there are no more lines."""
    address, key, end = sys.argv[1:]
    connection = http.client.HTTPConnection(address, timeout=300)
    headers = {"Authorization": f"Bearer {key}"}
    for line in sys.stdin:
        print(read(connection, line.strip(), headers, bytes.fromhex(end)), flush=True)


if __name__ == "__main__":
    main()
