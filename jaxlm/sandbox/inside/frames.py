"""Several channels over one pair of streams: a byte of channel, four of length, the data; no data closes a channel."""

from __future__ import annotations

import contextlib
import os
import select
import socket

from . import wire

JOB, STDIN, STDOUT, STDERR, STATUS, REQUESTS, REPLIES, USAGE, ENDED = range(9)
LARGEST = 64 << 20


class Ends:
    """The two streams, with what has come so far."""

    def __init__(self, reads: int, writes: int) -> None:
        self.reads, self.writes = reads, writes
        self.come = bytearray()
        self.open = True

    def send(self, channel: int, data: bytes) -> None:
        """Send data of a channel; none of it closes the channel."""
        head = bytes([channel]) + len(data).to_bytes(4, "little")
        try:
            wire.write_all(self.writes, head + data)
        except ConnectionError:
            self.open = False

    def first(self) -> tuple[int, bytes]:
        """Wait for one frame, and leave those behind it. Raises: EOFError."""
        head = wire.read_exactly(self.reads, 5)
        return head[0], wire.read_exactly(self.reads, int.from_bytes(head[1:], "little"))

    def receive(self) -> list[tuple[int, bytes]]:
        """Read what is there. Returns the frames that are whole; `open` is false at the end."""
        part = os.read(self.reads, 1 << 20)
        self.open = bool(part) and self.open
        self.come += part
        whole = []
        while len(self.come) >= 5:
            size = int.from_bytes(self.come[1:5], "little")
            if size > LARGEST:
                raise ValueError("a frame longer than allowed")
            if len(self.come) < 5 + size:
                break
            whole.append((self.come[0], bytes(self.come[5 : 5 + size])))
            del self.come[: 5 + size]
        return whole


def carry(
    far: Ends, readers: dict[int, int], near: dict[int, int], ends: int = -1, tick: object = None, wait: float = -1
) -> int | None:
    """Carry data both ways until the far side has ended.

    Args:
        far: the streams.
        readers: descriptors to read, and the channel of each.
        near: the descriptor that takes the data of each channel; empty data closes it.
        ends: a channel of `readers` whose end is the end of all.
        tick: called after each wait; it returns true to stop.
        wait: seconds of the longest wait.

    Returns: the exit status that the far side has sent.
    """
    status, readers = None, dict(readers)
    while far.open:
        ready, _, _ = select.select([far.reads, *readers], [], [], None if wait < 0 else wait)
        for number in ready:
            if number != far.reads:
                part = b""
                with contextlib.suppress(ConnectionError):
                    part = os.read(number, 1 << 16)
                far.send(readers[number], part)
                if not part and readers.pop(number) == ends:
                    return status
        for channel, data in far.receive() if far.reads in ready else ():
            if channel == ENDED:
                status = int(data)
            elif channel in near:
                if data:
                    with contextlib.suppress(ConnectionError):
                        wire.write_all(near[channel], data)
                elif channel == STATUS:  # it is read too
                    with socket.socket(fileno=os.dup(near[channel])) as both:
                        both.shutdown(socket.SHUT_WR)
                else:
                    os.close(near.pop(channel))
        if callable(tick) and tick():
            break
    return status
