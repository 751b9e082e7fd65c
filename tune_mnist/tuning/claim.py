"""A driver's right to write to a run's copy, for as long as it gives signs of life.

A bucket knows no lock that ends with a process. So a driver leaves a file there that says who it
is, and writes it again and again. One that has not for a minute is taken for dead; should it live
after all, it sees that it was taken over and writes there no more.

What this does not rule out: two that begin within the same fraction of a second, until the first
to give its next sign of life sees the other's and leaves the copy to it; and files that were under
way when a machine was suspended, which arrive when it wakes up.
"""

import json
import platform
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tune_mnist.errors import RunFolderError
from tune_mnist.tuning.remote import RemoteRun, reaching

LEASE = 60.0  # seconds without a sign of life after which a driver is taken for dead
SIGN_EVERY = 15.0  # seconds between two signs of life
LOOK_EVERY = 1.0  # seconds between two looks at whether another gives one
_DRIVER = ".driver"


class TakenOverError(Exception):
    """Another driver has written to the copy; this one was taken for dead."""


class Claim:
    """The right of one driver to write to one run's copy."""

    def __init__(self, remote: RemoteRun, folder: Path) -> None:
        self._remote = remote
        self._place = {"host": platform.node(), "folder": str(folder.resolve())}
        self._me = {**self._place, "claim": uuid.uuid4().hex}
        self._next_sign = 0.0

    def take(self, tell: Callable[[str], None]) -> None:
        """Begin to be the only writer; where another may have died, see first whether it has.

        Only for who alone writes to the local folder: a driver that worked there before is gone.

        Raises:
            RunFolderError: another writes to the copy, or nobody can.
        """
        with reaching(self._remote):
            self._wait_for_other(tell)
            self._sign()

    def keep(self) -> None:
        """Give a sign of life, where it is time to.

        Raises:
            TakenOverError: another driver has taken its place.
            OSError, ArrowException: the storage did not answer.
        """
        if time.time() >= self._next_sign:  # not a clock that stands still in a machine's sleep
            if self._driver() != self._me:  # nor gone: the other may have come to its end
                raise TakenOverError
            self._sign()

    def release(self) -> None:
        """Let others write there at once."""
        if self._driver() == self._me:
            self._remote.delete(_DRIVER)

    def _wait_for_other(self, tell: Callable[[str], None]) -> None:
        now, last, other = self._remote.now(), self._remote.time_of(_DRIVER), self._driver()
        if last is None or self._place.items() <= other.items():
            return
        left = LEASE - (now - last).total_seconds()
        if left <= 0:
            return
        host = other.get("host", "another machine")
        tell(f"{self._remote.uri}: seeing for {left:.0f} s whether its driver on {host} is alive")
        deadline = time.monotonic() + left
        while time.monotonic() < deadline:
            time.sleep(LOOK_EVERY)
            sign = self._remote.time_of(_DRIVER)
            if sign is None:
                return
            if sign != last:
                raise RunFolderError(
                    f"{self._remote.uri} is in use: a search on {host} is writing to it; wait "
                    "for it or stop it"
                )

    def _sign(self) -> None:
        self._remote.write(_DRIVER, json.dumps(self._me).encode())
        self._next_sign = time.time() + SIGN_EVERY

    def _driver(self) -> dict[str, Any]:
        content = self._remote.read(_DRIVER)
        driver: dict[str, Any] = json.loads(content) if content else {}
        return driver
