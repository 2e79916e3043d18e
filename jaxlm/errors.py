"""What a user can mend. The command line prints it as one line and leaves with the exit code of the exception."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend: `message` names the file, key or tensor, `hint` says what to do."""

    exit_code = 2
    """Launchers do not start a command again that ended with it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message if not hint else f"{message} ({hint})")
        self.message = message
        self.hint = hint


class DamagedCheckpointError(UserError):
    """A checkpoint that cannot be read. A caller that only needs a model may take the one before."""


class MissingPeersError(UserError):
    """Other processes did not come in time. They may the next time, so launchers try again."""

    exit_code = 1


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """A hint that names the nearest valid word, or all of them when none is near."""
    valid = sorted(valid)
    near = difflib.get_close_matches(word, valid, n=1)
    return f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(valid)}"
