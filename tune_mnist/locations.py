"""What a user's paths and URIs mean, whether two of them are one place, and what may be shown.

A shell expands `~` only where a word begins with it: not in `--data-dir=~/x`, in a YAML file or in
a job's entrypoint. And a URI is printed, and kept in `search.yaml`, so it may hold no secret.
"""

import contextlib
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from tune_mnist.errors import ConfigError, did_you_mean
from tune_mnist.host import xdg

# Where storage may be, with those of Arrow's options for its URIs that hold no secret.
SCHEMES: Mapping[str, tuple[str, ...]] = {
    "s3": (
        *("region", "endpoint_override", "scheme", "anonymous", "role_arn", "session_name"),
        *("allow_bucket_creation", "background_writes", "force_virtual_addressing"),
        *("check_directory_existence_before_creation", "tls_ca_file_path"),
    ),
    "gs": ("endpoint_override", "scheme", "project_id", "default_bucket_location"),
    "abfs": (
        *("credential_kind", "tenant_id", "client_id", "enable_tls", "background_writes"),
        *("blob_storage_authority", "blob_storage_scheme"),
        *("dfs_storage_authority", "dfs_storage_scheme"),
    ),
    "file": (),
}
_TRUTH = ("search.yaml", "events.jsonl", "epochs.csv")  # of a run: nothing can make it again
NAME_BYTES = 255  # that a file system takes in one name
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(\S+)")
_LIKE_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # with one slash it is mistyped
_NO_SECRETS = {"anonymous", ""}  # what may stand before a bucket and an @
_SECRET = (
    "a storage's URI is printed and kept in search.yaml, and must not hold a secret: give it as "
    "the cloud's own tools take it, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
)


def user_path(text: str) -> Path:
    """Return the path that a user means, with `~` expanded, or raise ConfigError."""
    if not text or "\0" in text:
        raise ConfigError(f"a path was expected, but got {text!r}")
    if text.startswith("file:///"):
        return Path(unquote(text.removeprefix("file://")))
    if _LIKE_URI.match(text):
        raise ConfigError(f"{masked(text)} is no path, and no URI that can be used here")
    expanded = os.path.expanduser(text)  # noqa: PTH111 (Path's raises without a home)
    if expanded.startswith("~"):
        raise ConfigError(
            f"{text}: there is no such home folder; a folder of this name is ./{text}"
        )
    return Path(expanded)


def output_path(text: str) -> Path:
    """Return the file that a user names to be written, or raise ConfigError if a run needs it."""
    path = user_path(text)
    file = Path(os.path.realpath(path))
    if file.name in _TRUTH and file.with_name(_TRUTH[0]).exists():
        raise ConfigError(f"{text} is a run's own {file.name}: name another file")
    return path


def check_run_name(name: str, what: str = "--run") -> None:
    """Raise ConfigError, about the name, unless it can be that of a run's folder."""
    if Path(name).name != name or name in ("", ".."):
        raise ConfigError(f"{what} must be a plain name, without folders, but got {name!r}")
    if not name.isprintable():
        raise ConfigError(f"{what} must be a name of printable characters, but got {name!r}")
    if (length := len(name.encode())) > NAME_BYTES:
        raise ConfigError(
            f"{what} must be a name of at most {NAME_BYTES} bytes, but got one of {length}: "
            f"{name[:20]}..."
        )


def is_uri(text: str) -> bool:
    return "://" in text


def storage_uri(text: str) -> str:
    """Return the URI of a folder of runs, given as a URI or a path, or raise ConfigError."""
    if not is_uri(text):
        return user_path(text).absolute().as_uri()
    scheme, _, rest = text.partition("://")
    if scheme not in SCHEMES:
        known = ", ".join(f"{each}://" for each in SCHEMES)
        raise ConfigError(
            f"storage of the kind {scheme}:// is not known{did_you_mean(scheme, SCHEMES)}: "
            f"use {known} or a folder's path"
        )
    if _user(scheme, rest) or (scheme in ("s3", "gs") and ":" in rest.partition("/")[0]):
        raise ConfigError(_SECRET)
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise ConfigError(f"{masked(text)} is no URI: {error}") from error
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := options.keys() - set(SCHEMES[scheme]):
        near = did_you_mean(min(unknown), SCHEMES[scheme])
        known = ", ".join(SCHEMES[scheme]) or "none"
        raise ConfigError(f"an option of {masked(text)} is not among {known}{near}; {_SECRET}")
    if parts.fragment or not text.isprintable():
        raise ConfigError(f"{masked(text)}: write # as %23, and other special characters likewise")
    if scheme == "file" and (parts.netloc or parts.path.startswith("/~")):
        raise ConfigError(f"{text} must be a whole path: file:///FOLDER")
    if scheme != "file" and not parts.netloc:
        raise ConfigError(f"{text} names no bucket: {scheme}://BUCKET/FOLDER")
    return parts._replace(path=parts.path.rstrip("/")).geturl()


def tracking_uri(text: str) -> str:
    """Return the URI of MLflow's server or store as MLflow takes it, or raise ConfigError."""
    if not is_uri(text):  # a folder, or a word of MLflow's own such as databricks
        return str(user_path(text)) if text.startswith("~") or not text else text
    scheme, _, rest = text.partition("://")
    if scheme.startswith("http") and (_user(scheme, rest) or "?" in rest):
        raise ConfigError(
            f"--mlflow: {masked(text)} must hold neither a secret nor options: MLflow takes "
            "secrets from MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    if rest.startswith("/~"):
        raise ConfigError(f"--mlflow: {masked(text)}: in a URI, write the home folder in full")
    return text


def masked(text: str) -> str:
    """Return a text whose URIs show no passwords and no values of unknown options."""
    return _URI.sub(_masked_uri, text)


def _masked_uri(found: re.Match[str]) -> str:
    scheme, rest = found.groups()
    if user := _user(scheme, rest):
        rest = f"***{rest.removeprefix(user)}"
    rest, fragment, _ = rest.partition("#")
    address, mark, query = rest.partition("?")
    options = [option.partition("=") for option in query.split("&")]
    shown = [
        f"{name}={value}" if name in SCHEMES.get(scheme, ()) else "***"
        for name, _, value in options
    ]
    after = f"?{'&'.join(shown)}" if mark else ""
    return f"{scheme}://{address}{after}{'#***' if fragment else ''}"


def _user(scheme: str, rest: str) -> str:
    """Return what stands before the last @ of a URI, as far as it may hold a secret.

    A secret key may have slashes in it. Azure names containers before the @.
    """
    user, _, _ = rest.rpartition("@")
    is_name = "/" in user or user in _NO_SECRETS or scheme.startswith("abfs")
    return "" if is_name and ":" not in user else user


def local_path(uri: str) -> Path | None:
    """Return where on this machine a URI's files lie; None: elsewhere."""
    parts = urlsplit(uri)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a folder from all others, whatever it is called; None: it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def overlap(one: Path, other: Path) -> bool:
    """Return True if two folders are one place or one lies in the other, through links and mounts.

    Neither needs to exist.
    """
    places, others = _places(one), _places(other)
    return places[-1] in others or others[-1] in places


def _places(path: Path) -> list[object]:
    """Identify a path and all folders above it, from the root down."""
    whole = Path(os.path.realpath(path))  # Path.resolve raises where links go in a circle
    found: list[object] = []
    there: object = None
    missing: tuple[str, ...] = ()
    for each in (*reversed(whole.parents), whole):
        where = None if missing else identity(each)
        there, missing = (where, ()) if where else (there, (*missing, each.name))
        found.append((there, missing))
    return found


def remember_storage(uri: str) -> None:
    """Note that this user has a run copied there; without a home that can be written, do not."""
    record = _record()
    if record is None or is_remembered(uri):
        return
    with contextlib.suppress(OSError):
        record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(record, "a", opener=partial(os.open, mode=0o600)) as file:
            file.write(f"{uri}\n")


def is_remembered(uri: str) -> bool:
    """Return True if this user has had a run copied there from this machine."""
    record = _record()
    try:
        if record is None or record.stat().st_uid != os.geteuid():
            return False
        return uri in record.read_text(errors="replace").splitlines()
    except OSError:
        return False


def _record() -> Path | None:
    state = xdg("STATE", ".local/state")
    return state and state / "tune_mnist" / "storages"
