"""Ray's private names: in one file, and those of a Ray that they were checked against."""

import ast
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import ray
from ray._private import utils
from ray.air._internal import usage
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError
from ray.train._internal import storage as untyped_storage
from ray.tune import Callback

import tune_mnist
from tune_mnist.tuning import ray_patches

storage: Any = untyped_storage
PACKAGE = Path(tune_mnist.__file__).parent
PATCHES = PACKAGE / "tuning" / "ray_patches.py"
PRIVATE = re.compile(
    r"\bray\.(\w+\.)*_|from ray\S* import .*\b_|ray\.air\.execution|\bmock\b"
    r"|\b(temporary_state|_system_config|RayActorManager|\w+AcquiredResources)\b|(?<![.\w])_remote\b"
    r"|\b(RAY|TUNE)_(?!MNIST_|AUTH_TOKEN)[A-Z]"
)


def source_of(path: Path) -> str:
    """Return a file's source without its comments, each statement on one line."""
    return ast.unparse(ast.parse(path.read_text()))


def test_no_other_file_mentions_what_is_private_to_ray() -> None:
    found = {path: PRIVATE.findall(source_of(path)) for path in PACKAGE.rglob("*.py")}
    assert len(found.pop(PATCHES)) > 20
    assert not {path: names for path, names in found.items() if names}


def test_the_ray_that_is_installed_was_checked() -> None:
    assert ray.__version__ in ray_patches.CHECKED


def test_patches_hold_for_as_long_as_they_are_entered() -> None:
    with ray_patches.without_dashboard(), ray_patches.staging_in("/here"):
        assert isinstance(utils.get_dashboard_dependency_error(), ImportError)
        assert storage._get_ray_train_session_dir() == "/here"
    with (
        ray_patches.callbacks_not_counted(),
        mock.patch.object(usage, "_count_callbacks") as count,
    ):
        usage.tag_callbacks([Callback()])
    assert not count.called
    with pytest.raises(AssertionError, match="Ray must be initialized"):
        storage._get_ray_train_session_dir()


def test_all_local_rays_are_told_of_no_cluster_and_have_one_token(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_REDIS_ADDRESS", "127.0.0.1:1")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setattr(os, "access", lambda *_: False)
    tokens = set()
    for _ in range(2):
        with ray_patches.for_this_user_only(tmp_path) as options:
            assert "RAY_REDIS_ADDRESS" not in os.environ
            tokens.add(os.environ["RAY_AUTH_TOKEN"])
            assert options["_plasma_directory"] == options["_temp_dir"] == str(tmp_path)
        assert "RAY_AUTH_TOKEN" not in os.environ
    assert len(tokens) == 1  # Ray's C++ part reads it once in a process


def test_a_worker_that_ray_ended_for_its_memory_is_one_that_died() -> None:
    errors: list[Any] = []
    actor = SimpleNamespace(actor_id=1, _on_error=lambda _, error: errors.append(error))
    task: Any = SimpleNamespace(_tracked_actor=actor, _on_error=None)
    manager: Any = SimpleNamespace(_failed_actor_ids=set(), _cleanup_actor=lambda **_: None)
    full: Any = OutOfMemoryError("full")  # type: ignore[no-untyped-call]
    with ray_patches.memory_kills_survived():
        RayActorManager._actor_task_failed(manager, task, full)
    assert ray_patches.OUT_OF_MEMORY in str(errors[0])
    with pytest.raises(RuntimeError, match="unexpected exception"):
        RayActorManager._actor_task_failed(manager, task, full)


def test_a_submitted_job_keeps_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_OVERRIDE_JOB_RUNTIME_ENV", "0")
    job = '{"runtime_env": {"py_modules": ["gcs://given.zip"]}}'
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", job)
    modules = ray_patches.runtime_env_with(Path("/package"))["py_modules"]
    assert modules == ["gcs://given.zip", "/package"]
