"""Tests in bash: `candidate ARGUMENTS` there starts the program in the other box and prints what it printed."""

import os

from .tests import Link, Verdict
from .wire import write_all

CANDIDATE = """candidate() {{
  local IFS= status= output=
  printf '%s\\0' "$#" "$@" >&{asks}
  read -r -d '' -u {hears} output
  read -r -d '' -u {hears} status
  printf '%s' "$output"
  return "$status"
}}
"""


def _until_zero(number: int) -> bytes | None:
    data = bytearray()
    while True:
        byte = os.read(number, 1)
        if not byte:
            return None
        if byte == b"\0":
            return bytes(data)
        data += byte


def _serve(asks: int, answers: int, link: Link, name: str) -> None:
    """Pass each call of the script on, and the output back, until the script has ended."""
    while (count := _until_zero(asks)) is not None:
        arguments = [(_until_zero(asks) or b"").decode("utf-8", "surrogateescape") for _ in range(int(count))]
        result = link.ask("call", name, arguments, {})
        if type(result) is not list or len(result) != 2 or type(result[0]) is not bytes or type(result[1]) is not int:
            raise link.end("not_plain", text="the program wrote into its channel")
        output, status = result
        ended = str(status % 256 or 128 * (status < 0)).encode()
        write_all(answers, output.replace(b"\0", b"") + b"\0" + ended + b"\0")


def run(job: dict, link: Link) -> None:
    """Run the tests' script. Raises: Verdict."""
    if not os.path.exists(job["shell"]):
        raise Verdict("harness_error", text=f"{job['shell']} is missing in the box")
    asks, asks_in = os.pipe()
    hears, answers = os.pipe()
    file = os.path.join(job["work"], "tests.sh")
    with open(file, "wb") as stream:
        stream.write((CANDIDATE.format(asks=asks_in, hears=hears) + job["tests"]).encode())
    child = os.fork()
    if child == 0:
        os.set_inheritable(asks_in, True)
        os.set_inheritable(hears, True)
        os.execve(job["shell"], [job["shell"], file], job["environment"])
    os.close(asks_in)
    os.close(hears)
    _serve(asks, answers, link, job["names"][0])
    _, state = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(state) != 0 and link.calls:
        raise Verdict("failed", call=link.last_call, got=link.last_result, assertion="", wanted="", text="")
