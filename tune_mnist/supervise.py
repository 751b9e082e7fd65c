"""A front door as a process: the signals that stop it, and the parent that watches a search.

SIGINT, SIGTERM and SIGHUP mean the same. The first ends in order what needs that, such as a
search's session, and anything else at once: what is on disk is whole, as after `kill -9`. A second
one ends everything at once, with the first one's exit code.

A search works in a child process. Ray ends it from within C++ when one of Ray's own processes
dies, and Linux does when memory runs out: neither leaves a word. The parent, which imports next to
nothing, then says what happened and has another child resume the run.
"""

import atexit
import contextlib
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

Act = Callable[[int], None]

STOPPING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
ONE_SIGNAL = 0.1  # seconds: `timeout` and others send one to a process and to its group
RESUMES = 3  # in a row without a finished epoch in between
SHOW_CURSOR = b"\x1b[?25h\n"  # the live view had hidden it


def begin() -> None:
    """Make this process a front door's: it heeds signals, and has its three standard streams.

    One that is closed is opened on nothing: the next file would get its number, and what others
    print.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    stops.install()


def say(message: str) -> None:
    """Print a line to stderr past Python's streams, which may be what a signal interrupted."""
    start = SHOW_CURSOR if os.isatty(last_words) else b""
    with contextlib.suppress(OSError):
        os.write(last_words, start + message.encode(errors="backslashreplace") + b"\n")


def end_at_once(number: int) -> None:
    """End this process by a signal, without a look back."""
    say("interrupted")
    has_ended(128 + number)
    os._exit(128 + number)


def interrupt(number: int) -> NoReturn:
    """Unwind this process, which has something to clear up."""
    raise KeyboardInterrupt


class Stops:
    """What is done about the signals that tell this process to stop."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.act: Act = end_at_once  # on the first
        self.again: Act = self._end_by_first  # on a later one
        self._at = 0.0
        self._stay = False

    def install(self) -> None:
        """Heed signals as long as this process lives."""
        self._stay = True
        self._take()

    @contextlib.contextmanager
    def acting(self, act: Act, again: Act | None = None) -> Iterator[None]:
        """Call `act` on the first signal that comes meanwhile, and `again` on a later one."""
        handlers = {number: signal.getsignal(number) for number in STOPPING}
        acts = self.act, self.again
        self.act, self.again = act, again or self.again
        self._take()
        try:
            yield
        finally:
            self.act, self.again = acts
            if not self._stay:
                self.first = None
                for number, handler in handlers.items():
                    signal.signal(number, handler)

    def _take(self) -> None:
        for number in STOPPING:
            # Ignored are those that `nohup` and a shell's background jobs shall survive.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._heed)

    def _heed(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self._at = number, now
            self.act(number)
        elif now - self._at > ONE_SIGNAL:
            self.again(number)

    def _end_by_first(self, number: int) -> None:
        end_at_once(self.first or number)


stops = Stops()
last_words = 2  # the descriptor of stderr
run_to_resume: Path | None = None  # set in a child whose forerunner has ended without a word
_parent: int | None = None  # where a child tells its parent how far it is


def works_on(run: Path) -> None:
    """Tell the parent, if any, which run to resume should this process end without a word."""
    _tell(b"run " + os.fsencode(run))


def has_ended(code: int) -> None:
    """Tell the parent, if any, that this process has said all and ends with an exit code."""
    _tell(b"code %d" % code)


def _tell(message: bytes) -> None:
    if _parent is not None:
        with contextlib.suppress(OSError):
            os.write(_parent, message + b"\0")


def watch(resume: str) -> None:
    """Return in a child process; in this one, watch it, resume what it leaves, and exit.

    `resume` is the command that resumes a run, whose folder stands for {}.
    """
    begin()
    if not hasattr(os, "fork"):
        return
    run: Path | None = None
    resumes, finished = 0, 0
    while (child := _fork(run)) is not None:
        code = child.wait()
        run = child.run or run
        again = resume.format(shlex.quote(str(run))) if run else "the same command"
        if code is None and stops.first is not None:
            say(f"{child.how}; continue with {again}")
            code = 128 + stops.first
        if code is not None:
            os._exit(code)  # at its end Python would no longer heed signals
        before, finished = finished, _size(run)
        resumes = 0 if finished > before else resumes + 1
        if run is None or resumes > RESUMES:
            where = "" if run is None else f" {resumes} times without a finished epoch"
            say(f"error: {child.how}{where}; nothing is lost: continue with {again}")
            os._exit(1)
        say(f"{child.how}; resuming {run}")


def _size(run: Path | None) -> int:
    """Return how much a run's search and its confirmation have finished, in bytes."""
    tables = [] if run is None else [run / "epochs.csv", run / "confirm" / "epochs.csv"]
    return sum(table.stat().st_size for table in tables if table.exists())


class _Child:
    """A process that works, as its parent sees it."""

    def __init__(self, process: int, says: int, lifeline: int) -> None:
        self._process, self._says, self._lifeline = process, says, lifeline
        self.run: Path | None = None
        self.how = ""  # it ended, in words

    def wait(self) -> int | None:
        """Wait for its end and return the exit code that it told, or None."""
        with stops.acting(self._send, again=lambda _: self._send(signal.SIGKILL)):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
            _, status = os.waitpid(self._process, 0)
        self.how = _in_words(os.waitstatus_to_exitcode(status))
        os.set_blocking(self._says, False)
        said = b""
        with contextlib.suppress(BlockingIOError):
            said = os.read(self._says, 1 << 16)
        os.close(self._says)
        os.close(self._lifeline)
        code = None
        for what, _, rest in (message.partition(b" ") for message in said.split(b"\0")):
            if what == b"run":
                self.run = Path(os.fsdecode(rest))
            elif what == b"code" and code is None:
                code = int(rest)
        return code

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process, number)


def _in_words(code: int) -> str:
    """Return how a process ended that had not said anything."""
    if stops.first is not None:
        return "ended at once"
    if code >= 0:  # as Ray does in C++
        return (
            f"Ray ended the search (exit code {code}), as it does when one of its own processes "
            "was killed"
        )
    likely = ", which is likely for want of memory" if code == -signal.SIGKILL else ""
    return f"the search was ended by {signal.Signals(-code).name}{likely}"


def _fork(run: Path | None) -> _Child | None:
    """Begin a child that is to resume a run, if there is one; return None in the child."""
    global run_to_resume, _parent
    heard, says = os.pipe()
    lifeline, held = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    process = os.fork()
    if process:
        os.close(says)
        os.close(lifeline)
        return _Child(process, heard, held)
    os.close(heard)
    os.close(held)
    run_to_resume, _parent = run, says
    stops.again = lambda _: None  # the parent gets them as well, and ends this process
    atexit.register(has_ended, 1)  # as a bug does in an import; Ray's end in C++ does not call it
    # Begun while signals are blocked: they go to the main thread, and interrupt its waiting.
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    return None


def _end_with_parent(lifeline: int) -> None:
    """End this process once its parent has: as an orphan it would keep others from its run."""
    os.read(lifeline, 1)
    os.kill(os.getpid(), signal.SIGKILL)
