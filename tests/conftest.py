"""What every test stands on: compiled code kept apart, clean Dynamo state, and the package as users install it."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Before torch is imported: no test may pass because of what an earlier run has left on this machine.
_cache = tempfile.mkdtemp(prefix="fa3_inductor_tests_")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _cache
os.environ.pop("FA3_INDUCTOR", None)

import torch  # noqa: E402


def pytest_configure(config):
    # A bare checkout (the GPU machine) has no entry points, so the backend has no name there.
    from torch._dynamo.backends.registry import list_backends, register_backend

    if "fa3_inductor" not in list_backends():
        from fa3_inductor.backend import fa3_inductor

        register_backend(fa3_inductor, name="fa3_inductor")


def pytest_unconfigure(config):
    shutil.rmtree(_cache, ignore_errors=True)


@pytest.fixture(autouse=True)
def clean_state():
    import fa3_inductor

    torch.manual_seed(0)
    torch._dynamo.reset()
    fa3_inductor.clear_reports()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def root():
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A copy of what is packaged, so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("fa3_inductor", "kernels", "patterns", "tests", "examples"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="session")
def installed(source, tmp_path_factory):
    """A folder with the package installed from its wheel, to be put on a child's PYTHONPATH."""
    return pip_install(tmp_path_factory.mktemp("site"), str(source))


def pip_install(target, *what):
    pip = [sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), *what], check=True)
    return target


@pytest.fixture(scope="session")
def installed_editable(source, tmp_path_factory):
    """As ``installed``, but editable: the folder's .pth file has to be processed by ``site.addsitedir``."""
    return pip_install(tmp_path_factory.mktemp("site"), "-e", str(source))


@pytest.fixture
def python(tmp_path):
    """``python(code, path, *flags, **env)`` runs code in a fresh interpreter outside the checkout; returns what it
    printed."""

    def run(code, path, *flags, **env):
        done = subprocess.run(
            [sys.executable, *flags, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(path), **env},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run
