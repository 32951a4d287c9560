"""Shared by the tests: scenes and a tiny model, made once; real frames, if they are there; command
lines."""

import contextlib
import importlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
import zlib
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network

import pytest  # noqa: E402
import torch  # noqa: E402
from safetensors import SafetensorError  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import actor_sft  # noqa: E402
import geometry  # noqa: E402
import pasta  # noqa: E402
import rewards  # noqa: E402
from scenes import make_scenes  # noqa: E402

torch.set_num_threads(1)  # the same everywhere: sums, and so bits, depend on it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, as the scripts then do


def run(script, root, cwd, *flags, processes=1, env={}, **popen):
    """A script with its flags, run in folder `cwd`: .returncode, .stdout (stderr included).

    In this process, which saves the seconds that importing torch takes; as a user types it for
    several processes, with other environment variables or with keywords for subprocess.run.
    """
    if processes == 1 and not env and not popen:
        return _call(script, cwd, *flags)
    start = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
        "--standalone"]  # at a free port
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})}
    return subprocess.run([*start, str(root / script), *map(str, flags)], cwd=cwd, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300, env=env,
                          **popen)


def _call(script, cwd, *flags):
    main = importlib.import_module(script.removesuffix(".py")).main
    before, numbers = os.getcwd(), (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
            try:
                code = main([str(flag) for flag in flags]) or 0
            except (geometry.DataError, OSError, SafetensorError, torch.OutOfMemoryError) as error:
                code = 1  # as the last lines of the script
                print(f"{script}: {str(error).strip().splitlines()[0]}")
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
    finally:
        os.chdir(before)
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)
    return types.SimpleNamespace(returncode=code, stdout=said.getvalue())


def kills(act):
    """Do `act` until it ends, killed at its first change of files, its second, ...: what was to be
    written is written by half, nothing is moved or deleted. Yields after each kill."""
    def deadly(call, target, countdown):
        def wrapped(*args, **more):
            if next(countdown):
                return call(*args, **more)
            if target is not None:
                call(*args, **more)
                path = args[target]
                path = path.name if hasattr(path, "write") else path  # of an open file
                os.truncate(path, os.path.getsize(path) // 2)
            raise KeyboardInterrupt
        return wrapped

    for number in itertools.count():
        countdown = itertools.count(number, -1)
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            for where, name, target in (
                    (pasta, "save_file", 1), (shutil, "copyfile", 1), (torch, "save", 1), (
                        Path, "unlink", None), (os, "replace", None), (shutil, "copymode", None)):
                patch.setattr(where, name, deadly(getattr(where, name), target, countdown))
            act()
            return
        yield


def python_blocks():
    """(page, the line above, code) of each Python block of README and docs."""
    found = []
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]:
        for block in re.finditer(r"(?ms)^```python\n(.*?)^```$", path.read_text()):
            above = block.string[:block.start()].strip().splitlines()[-1]
            found.append((str(path.relative_to(ROOT)), above, block[1]))
    return found


def run_block(code, folder):
    with contextlib.chdir(folder):
        exec(compile(code, "a block of a page", "exec"), {"__name__": "__main__"})


def block_with(part):
    """The one Python block of README and docs that has this text in it."""
    (code,) = [code for _, _, code in python_blocks() if part in code]
    return code


def pay(text, *_, **__):
    """A reward for GRPO's tests, by a text's checksum: a random model's completions would all score
    0, which would leave every weight where it is."""
    total = zlib.crc32(text.encode()) % 1000 / 500
    return {"total": total, "action": total, "answer": 0.0, "format": 0.0}


def quicken(put=setattr):
    """Made for a random model: it never ends a text, and no text of it would earn anything."""
    write = actor_sft.generate_greedily
    put(actor_sft, "generate_greedily", lambda *its: write(
        *its[:-1], [min(longest, 4) for longest in its[-1]]))
    put(rewards, "total_reward", pay)


def records(out):
    """The lines of a log.jsonl without its first."""
    head, *lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert set(head) == {"script", "args", "versions"}
    return lines


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def rooms(tmp_path_factory):
    """A SPAR-7M-RGBD tree of eight rendered rooms, two of them val."""
    return geometry.render_rooms(tmp_path_factory.mktemp("rooms") / "data", rooms=8, held_out=0.25)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Samples of two and three views, train and val, whatever the rendered rooms show."""
    return make_scenes(tmp_path_factory.mktemp("scenes") / "data")


@pytest.fixture(scope="session")
def tiny_model(scenes, tmp_path_factory):
    """The demo's tiny Qwen2.5-VL as a Hugging Face directory."""
    path = tmp_path_factory.mktemp("model") / "model"
    pasta.make_demo_model(path, scenes, seed=0)
    return path


@pytest.fixture(scope="session")
def shared():
    """Real posed frames in SPAR's layout; not part of this repository."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"{path} is not there: real frames are not part of this repository")
    return path
