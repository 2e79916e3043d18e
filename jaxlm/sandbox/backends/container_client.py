"""The near end of a box in a container: a program of its own, which carries a box's descriptors over two streams.

    python -S container_client.py JOB INFO docker run ... IMAGE python3 -c "...relay.main()"

It ends as the program in the box ended, and with whoever started it.
"""

from __future__ import annotations

import os
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from inside import frames, wire  # pyright: ignore[reportMissingImports]


def main() -> None:
    """Start the container, send the job, carry what is read until the program has ended."""
    job, info = int(sys.argv[1]), int(sys.argv[2])
    os.lseek(job, 0, os.SEEK_SET)
    text = wire.read_all(job)
    names = wire.decode(text)
    said = wire.memory_file("engine", b"")  # engines warn of much; only what ends a box is of use
    engine = subprocess.Popen(sys.argv[3:], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, bufsize=0)
    assert engine.stdin is not None and engine.stdout is not None
    far = frames.Ends(engine.stdout.fileno(), engine.stdin.fileno())
    far.send(frames.JOB, text)
    far.send(frames.STDIN, wire.read_all(0))
    sockets = {channel: names[name] for channel, name in frames.sockets_of(names)}
    near = {frames.STDOUT: 1, frames.STDERR: 2, frames.USAGE: info, **sockets}
    readers = {number: channel for channel, number in sockets.items()}
    status = frames.carry(far, readers, near, ends=frames.STATUS)
    engine.stdin.close()
    code = engine.wait()
    if status is None:
        os.lseek(said, 0, os.SEEK_SET)
        wire.write_all(2, wire.read_all(said))
    os._exit(status if status is not None else code or 70)


if __name__ == "__main__":
    main()
