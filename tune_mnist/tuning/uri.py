"""How storage is named: as Arrow's file systems, and so Ray's, have it."""

from pathlib import Path
from urllib.parse import urlsplit

from tune_mnist.errors import ConfigError, did_you_mean

SCHEMES = ("s3", "gs", "abfs", "file")


def is_uri(text: str) -> bool:
    """Say whether a text is a URI rather than a path."""
    return "://" in text


def storage_uri(text: str) -> str:
    """Return the URI of a folder elsewhere, which may be given as a path.

    Raises:
        ConfigError: it is none that can be used.
    """
    if not is_uri(text):
        return Path(text).absolute().as_uri()
    scheme, _, _ = text.partition("://")
    if scheme not in SCHEMES:
        known = ", ".join(f"{each}://" for each in SCHEMES)
        raise ConfigError(
            f"storage of the kind {scheme}:// is not known{did_you_mean(scheme, SCHEMES)}: "
            f"use {known} or a folder's path"
        )
    parts = urlsplit(text)
    if parts.password is not None:
        raise ConfigError(
            "a storage's URI is kept in search.yaml and must not hold a secret: give it as the "
            "cloud's own tools take it, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if scheme != "file" and not parts.netloc:
        raise ConfigError(f"{text} names no bucket: {scheme}://BUCKET/FOLDER")
    return text
