#!/usr/bin/env python3
"""The little web that trials fetch from, on port 8080: pictures, pages and nothing, each after a pause. Needs Python alone."""

import random
import struct
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CLASSES = 4
# So long it thinks about each request, so that it is the number of connections that bounds a worker.
PAUSE = 3.0
SIDE, TILES = 200, 8


def picture(number):
    """A PNG of its own: tiles of random colours, of which most are its class's, under noise."""
    rng = random.Random(number)
    own = [(200, 60, 60), (60, 180, 60), (60, 60, 200), (190, 180, 50)][number % CLASSES]
    tile, rows = SIDE // TILES, []
    for _ in range(TILES):
        row = [own if rng.random() < 0.5 else tuple(rng.randrange(240) for _ in own) for _ in range(TILES)]
        rows += [b"".join(bytes(colour) * tile for colour in row)] * tile
    plain = int.from_bytes(b"".join(rows), "big")
    noise = int.from_bytes(rng.randbytes(SIDE * SIDE * 3), "big") & int.from_bytes(b"\x0f" * (SIDE * SIDE * 3), "big")
    pixels = (plain ^ noise).to_bytes(SIDE * SIDE * 3, "big")
    lines = b"".join(b"\0" + pixels[at:at + SIDE * 3] for at in range(0, len(pixels), SIDE * 3))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines, 0)) + chunk(b"IEND", b"")


class Web(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        time.sleep(PAUSE)
        kind, number = self.path.strip("/").split("/")
        body = {"picture": lambda: picture(int(number)), "page": lambda: b"<html>" + b"sold " * 2000}.get(kind, lambda: b"gone")()
        self.send_response(200 if kind in ("picture", "page") else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class WebServer(ThreadingHTTPServer):
    request_queue_size = 1024

    def handle_error(self, *_):
        """A killed worker leaves its connections open."""


if __name__ == "__main__":
    WebServer(("0.0.0.0", 8080), Web).serve_forever()
