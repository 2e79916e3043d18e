"""Several channels over one pair of streams: a byte of channel, four of length, the data; no data closes a channel."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Callable

from . import wire

JOB, STDIN, STDOUT, STDERR, STATUS, CALLS, USAGE, ENDED = range(8)
LARGEST = 512 << 20


def sockets_of(job: dict) -> list[tuple[int, str]]:
    """The sockets of a job: the channel of each, and its name in the job."""
    return [(STATUS, "status"), *([(CALLS, "channel")] if job["channel"] >= 0 else [])]


class Ends:
    """The two streams."""

    def __init__(self, reads: int, writes: int) -> None:
        self.reads, self.writes = reads, writes
        self.open = True

    def send(self, channel: int, data: bytes) -> None:
        """Send data of a channel; none of it closes the channel."""
        head = bytes([channel]) + len(data).to_bytes(4, "little")
        try:
            wire.write_all(self.writes, head + data)
        except ConnectionError:
            self.open = False

    def receive(self) -> tuple[int, bytes]:
        """Wait for a whole frame. Raises: EOFError, ValueError for one that is too long."""
        head = wire.read_exactly(self.reads, 5)
        size = int.from_bytes(head[1:], "little")
        if size > LARGEST:
            raise ValueError("a frame longer than allowed")
        return head[0], wire.read_exactly(self.reads, size)


def carry(
    far: Ends,
    readers: dict[int, int],
    near: dict[int, int],
    ends: int = -1,
    tick: Callable[[], bool] = lambda: False,
    wait: float | None = None,
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
        ready, _, _ = select.select([far.reads, *readers], [], [], wait)
        for number in ready:
            if number != far.reads:
                part = b""
                with contextlib.suppress(ConnectionError):
                    part = os.read(number, 1 << 16)
                far.send(readers[number], part)
                if not part and readers.pop(number) == ends:
                    return status
        if far.reads in ready:
            try:
                channel, data = far.receive()
            except EOFError:
                return status
            if channel == ENDED:
                status = int(data)
            elif data:
                with contextlib.suppress(ConnectionError):
                    wire.write_all(near[channel], data)
            elif channel in (STATUS, CALLS):  # they are read too
                # A Mac refuses it (ENOTCONN) where the other end is gone.
                with socket.socket(fileno=os.dup(near[channel])) as both, contextlib.suppress(OSError):
                    both.shutdown(socket.SHUT_WR)
            else:
                os.close(near.pop(channel))
        if tick():
            break
    return status
