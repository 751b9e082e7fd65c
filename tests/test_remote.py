"""How storage and the runs in it are named."""

from pathlib import Path

import pytest

from tune_mnist.errors import ConfigError
from tune_mnist.tuning.remote import RemoteRun, storage_uri


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3a://bucket/runs", r"s3a:// is not known \(did you mean 's3'\?\): use s3://, gs://"),
        ("s3:///runs", "names no bucket: s3://BUCKET/FOLDER"),
        ("s3://key:secret@bucket/runs", "must not hold a secret"),
    ],
)
def test_storage_that_cannot_be_meant_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        storage_uri(text)


def test_a_folder_may_be_named_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage_uri("my runs") == f"file://{tmp_path}/my%20runs"
    assert RemoteRun.within(storage_uri("my runs"), "a?").name == "a?"
    assert RemoteRun.within("s3://b/runs?region=x", "a").uri == "s3://b/runs/a?region=x"
    assert RemoteRun.within("s3://b/runs?region=x", "a").storage == "s3://b/runs?region=x"
