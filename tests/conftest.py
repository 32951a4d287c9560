"""Shared by the tests: rooms and a tiny model, made once; real frames, if they are there; command
lines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import geometry  # noqa: E402
import pasta  # noqa: E402

torch.set_num_threads(2)  # the same everywhere: sums, and so bits, depend on it


def run(script, root, cwd, *flags, processes=1, **popen):
    """The command line, as a user types it. Returns the finished process."""
    start = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
        "--master_port=29417"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*start, str(root / script), *map(str, flags)], cwd=cwd, env=env,
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
                          **popen)


def records(out):
    """The lines of a log.jsonl without its first."""
    head, *lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert set(head) == {"args", "versions"}
    return lines


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
