"""Shared by the tests: rooms and a tiny model, made once; real frames, if they are there."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import geometry  # noqa: E402
import pasta  # noqa: E402

torch.set_num_threads(2)  # the same everywhere: sums, and so bits, depend on it


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def rooms(tmp_path_factory):
    """A SPAR-7M-RGBD tree of eight rendered rooms, two of them val."""
    return geometry.render_rooms(tmp_path_factory.mktemp("rooms") / "data", rooms=8, held_out=0.25)


@pytest.fixture(scope="session")
def tiny_model(rooms, tmp_path_factory):
    """The demo's tiny Qwen2.5-VL as a Hugging Face directory."""
    path = tmp_path_factory.mktemp("model") / "model"
    pasta.make_demo_model(path, rooms, seed=0)
    return path


@pytest.fixture(scope="session")
def shared():
    """Real posed frames in SPAR's layout; not part of this repository."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"{path} is not there: real frames are not part of this repository")
    return path
