"""The Dockerfile: what it copies exists, and its versions are those of Cargo.toml and of the lock file.

No image is built here. Its header says so.
"""

from __future__ import annotations

import re
import tomllib

import pytest
from places import ROOT

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
LOCK = (ROOT / "requirements" / "gpu.txt").read_text(encoding="utf-8")
LINES = re.sub(r"\\\n", " ", TEXT).splitlines()
COPIED = [part for line in LINES if line.startswith("COPY ") and "--from" not in line for part in line.split()[1:-1]]
IGNORED = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("path", COPIED)
def test_what_it_copies_is_there_and_is_sent(path: str) -> None:
    assert (ROOT / path).exists()
    assert f"!{path}" in IGNORED


def test_only_that_is_sent() -> None:
    assert IGNORED[1] == "*"
    assert sorted(line[1:] for line in IGNORED if line.startswith("!")) == sorted(COPIED)


def test_rust_is_the_version_of_the_workspace() -> None:
    version = tomllib.loads((ROOT / "Cargo.toml").read_text(encoding="utf-8"))["workspace"]["package"]["rust-version"]
    assert f"FROM rust:{version}-slim-" in TEXT


def test_the_wheel_has_all_that_cargo_needs() -> None:
    """Every member of the workspace is copied: cargo reads the manifests of all."""
    members = tomllib.loads((ROOT / "Cargo.toml").read_text(encoding="utf-8"))["workspace"]["members"]
    assert {member.split("/")[0] for member in members} <= set(COPIED)
    maturin = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["maturin"]
    assert set(maturin["python-packages"]) <= set(COPIED)


def test_cuda_is_the_version_that_torch_brings() -> None:
    (image,) = re.findall(r"^FROM nvidia/cuda:(\d+\.\d+)\.\d+-base-ubuntu24\.04$", TEXT, re.MULTILINE)
    (runtime,) = re.findall(r"^nvidia-cuda-runtime==(\d+\.\d+)\.", LOCK, re.MULTILINE)
    assert image == runtime


def test_packages_are_locked_with_hashes() -> None:
    installs = [line for line in LINES if "pip install" in line]
    assert len(installs) == 3
    for line in installs:
        for install in re.findall(r"pip install [^&]*", line):
            assert "--no-deps" in install
            assert "--require-hashes" in install or install.split()[-1] == "/tmp/wheels/*.whl"
    for lock in (LOCK, (ROOT / "requirements" / "build.txt").read_text(encoding="utf-8")):
        packages = re.split(r"^(?=[a-z])", lock, flags=re.MULTILINE)[1:]
        assert packages
        assert all("--hash=sha256:" in package for package in packages)


def test_it_does_not_run_as_root() -> None:
    assert LINES.index("USER 10001") > max(at for at, line in enumerate(LINES) if line.startswith("RUN "))
    assert "useradd --create-home --uid 10001 dice" in TEXT
    assert LINES[-2:] == ['ENTRYPOINT ["dice"]', 'CMD ["--help"]']
