"""The one error a user is meant to see."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right: what is wrong, where (file, key or row), and how to fix it.

    The command line prints it as one last line, `error: what, where, fix`, and exits with code 2.
    """

    def __init__(self, what: str, where: object = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, str(where), fix
        super().__init__(", ".join(" ".join(part.split()) for part in (what, self.where, fix) if part))
