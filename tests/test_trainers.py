"""What every trainer promises: precision by hand, models in and out, resuming, processes, and one
line for bad input. Each test runs once for each trainer."""

import argparse
import contextlib
import copy
import importlib
import io
import itertools
import json
import math
import os
import resource
import runpy
import shutil
import signal
import sys
import types
import weakref
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2_5_VLForConditionalGeneration

import conftest
import geometry
from conftest import ROOT, records
from scenes import render, write_question, write_view


class Trainer(NamedTuple):
    """A script: its module, the flags of a short run, how the names of what it trains begin."""

    module: types.ModuleType
    flags: list
    trains: str

    def run(self, cwd, *flags, **more):
        return self.script(cwd, *self.flags, *flags, **more)

    def script(self, cwd, *flags, **more):
        return conftest.run(f"{self.module.__name__}.py", ROOT, cwd, *flags, **more)


@pytest.fixture(scope="module", params=["pasta", "actor_sft"])
def trainer(request, scenes, tiny_model):
    module = importlib.import_module(request.param)
    flags = ["--data", scenes, "--model", tiny_model, "--heldout", 3, "--lr", 1e-3, "--save-every",
             2, "--workers", 1]
    with pytest.MonkeyPatch.context() as patch:
        if write := getattr(module, "generate_greedily", None):  # a random model never ends
            patch.setattr(module, "generate_greedily",
                          lambda *inputs: write(*inputs[:-1], min(inputs[-1], 4)))
        yield Trainer(module, flags, "visual." if request.param == "pasta" else "")


# --- precision by hand


def small():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


def optimizer_of(trainer, model, dtype=torch.float32, **changes):
    return trainer.module.Optimizer(model, argparse.Namespace(**{
        "lr": 1e-2, "warmup": 0, "clip": 0.5, "betas": [0.9, 0.95], "offload": False} | changes),
        dtype, torch.device("cpu"))


def masters_of(optimizer):
    return torch.cat([its.detach().flatten() for _, its, _ in optimizer.tensors.values()])


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_optimizer_equals_the_library(trainer, warmup):
    """AdamW, clipping, warm-up; losses of a step add up; norms of gradient and update; frozen."""
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    ours, theirs = small(), small()
    for model in (ours, theirs):
        model[2].bias.requires_grad_(False)
    optimizer, clipped = optimizer_of(trainer, ours, warmup=warmup), set()
    trained = [p for p in theirs.parameters() if p.requires_grad]
    library = torch.optim.AdamW(trained, 1e-2, (0.9, 0.95), weight_decay=0.0)
    for step in range(20):
        size = 1e-4 if step % 3 == 2 else 1.0
        for half in x.split(16):
            optimizer.backward(size * ours(half).square().sum())
        before, norm = masters_of(optimizer).clone(), optimizer.reduce()
        change = optimizer.step(norm)
        library.zero_grad()
        (size * theirs(x).square().sum()).backward()
        wanted = float(torch.nn.utils.clip_grad_norm_(trained, 0.5))
        library.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / warmup if warmup else 1)
        library.step()
        clipped.add(wanted > 0.5)
        assert abs(norm - wanted) < 1e-4 * wanted
        assert abs(change - float((masters_of(optimizer) - before).norm())) < 1e-6
    assert clipped == {True, False}
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights_move_where_working_weights_cannot(trainer, dtype, offload):
    """At lr 1e-5 one step rounds away in 16 bits; a hundred of them, kept in fp32, do not."""
    model = small()
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer = optimizer_of(trainer, model, dtype, lr=1e-5, offload=offload)
    assert torch.equal(start, masters_of(optimizer))
    working, x = model[0].weight.detach().clone(), torch.ones(4, 6, dtype=dtype)
    for step in range(100):
        optimizer.backward(model(x).float().mean() / 100)
        optimizer.step(optimizer.reduce())
        if step == 0:
            assert float((model[0].weight == working).float().mean()) > 0.5
    assert abs(float((masters_of(optimizer) - start).abs().median()) - 1e-3) < 1e-4
    for p, master, _ in optimizer.tensors.values():
        assert p.dtype == dtype and torch.equal(p, master.to(dtype))


def test_16_bit_gradients_never_exist_all_at_once(trainer):
    """Each is added to its fp32 one, and gone, as soon as it is there, within the backward pass."""
    model, alive, wanted, x = small(), [], 0.0, torch.ones(3, 6, dtype=torch.bfloat16)
    optimizer = optimizer_of(trainer, model, torch.bfloat16)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in model.parameters())))
    for size in (1.0, 1e-3):  # in bf16 the second would be lost beside the first
        twin = copy.deepcopy(model)
        (twin(x).float().sum() * size).backward()
        wanted = wanted + torch.cat([p.grad.float().flatten() for p in twin.parameters()])
        optimizer.backward(model(x).float().sum() * size)
    got = torch.cat([master.grad.flatten() for _, master, _ in optimizer.tensors.values()])
    assert got.dtype == torch.float32 and torch.equal(got, wanted) and alive == [0] * 8
    optimizer.step(optimizer.reduce())
    assert all(p.grad is master.grad is None for p, master, _ in optimizer.tensors.values())


def test_fp16_loss_scale(trainer):
    """Gradients that fp16 cannot hold survive by the scale. Overflow moves no weight and halves it,
    which is no fault of the run; where there is no scale, it is. 1,000 good steps double it."""
    model, x = small(), torch.ones(4, 6, dtype=torch.float16)
    optimizer = optimizer_of(trainer, model, torch.float16)
    optimizer.backward(model(x).float().sum() * 1e-7)
    norm = optimizer.reduce()
    assert optimizer.scale == 2**16 and 1e-8 < norm < 1e-5
    optimizer.step(norm)
    before = masters_of(optimizer).clone()
    for scale in (2.0**15, 2.0**14):
        optimizer.backward(model(x).float().sum() * 1e5)
        assert optimizer.step(optimizer.reduce()) is None
        assert (optimizer.scale, optimizer.bad, optimizer.t) == (scale, 0, 1)
    assert torch.equal(masters_of(optimizer), before)
    for good in range(1, 1001):
        optimizer.step(optimizer.reduce())
        assert optimizer.scale == 2.0**14 * (1 + (good == 1000))
    optimizer = optimizer_of(trainer, small())
    for norm, bad in ((math.nan, 1), (math.inf, 2), (1.0, 0), (math.nan, 1)):
        optimizer.reduce()
        assert (optimizer.step(norm) is None) == (bad > 0) and optimizer.bad == bad


def test_recompute_equals_autograd(trainer):
    """Several inputs and outputs, some without use; weights that the function holds."""
    weight = torch.randn(5, 5, requires_grad=True)
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)

    def function(a, b):
        return (a @ weight).tanh() * b, a * 2, b.sum()

    wanted = torch.autograd.grad(sum(its.square().sum() for its in function(a, b)[:2]), (a, weight))
    first, second, _ = trainer.module.Recompute.apply(function, a, b)
    (first.square().sum() + second.square().sum()).backward()
    assert torch.allclose(a.grad, wanted[0]) and torch.allclose(weight.grad, wanted[1])
    a.grad = weight.grad = None
    trainer.module.Recompute.apply(function, a, b)[1].sum().backward()
    assert torch.equal(a.grad, torch.full((3, 5), 2.0)) and weight.grad is None


class Live(TorchDispatchMode):
    """Counts the bytes of `tensors` and of all that are made: alive now, and at most."""

    def __init__(self, tensors):
        super().__init__()
        self.now, self.most, self.alive = 0, 0, weakref.WeakSet()
        for its in tensors:
            self.count(its)

    def count(self, tensor):
        storage = tensor.untyped_storage()
        if storage not in self.alive:
            self.alive.add(storage)
            self.change(storage.nbytes())
            weakref.finalize(storage, self.change, -storage.nbytes())
        return tensor

    def change(self, size):
        self.now += size
        self.most = max(self.most, self.now)

    def __torch_dispatch__(self, function, _, args=(), kwargs=None):
        return torch.utils._pytree.tree_map_only(
            torch.Tensor, self.count, function(*args, **(kwargs or {})))


@pytest.mark.parametrize("start", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype, made, stepped", [(torch.bfloat16, 6, 18), (torch.float32, 4, 16)])
def test_peak_memory(trainer, dtype, start, made, stepped):
    """Bytes a parameter when the optimiser is made and in its steps: at most 5 % above weights,
    masters, gradients and moments, and the update of the largest tensor, wherever in between."""
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(40)]).to(start)
    size, slack = sum(p.numel() for p in model.parameters()), 2 * 4 * 64 * 64
    with Live(model.parameters()) as live:
        optimizer = optimizer_of(trainer, model, dtype)
        assert abs(live.now / size - made) < 0.01
        assert live.most < 1.05 * size * max(made, start.itemsize) + slack
        for _ in range(2):
            for _, master, _ in optimizer.tensors.values():
                master.grad = torch.ones_like(master)
            optimizer.step(optimizer.reduce())
        assert size * stepped < live.most < 1.05 * size * stepped + slack
        assert abs(live.now / size - (stepped - 4)) < 0.01  # the gradients are gone


# --- models in and out


def change_weights(model, change, file="model.safetensors"):
    """Rewrite a file of weights: {name: tensor} -> the same."""
    tensors = change(load_file(model / "model.safetensors"))
    save_file(tensors, model / file, {"format": "pt"})
    return tensors


def change_json(path, **changes):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def as_published(model):
    """Two shards with an index, and one more that it does not name; config.json of version 4."""
    tensors = load_file(model / "model.safetensors")
    names = {f"model-0000{k + 1}-of-00002.safetensors": sorted(tensors)[k::2] for k in range(2)}
    for file, its in names.items():
        change_weights(model, lambda tensors: {key: tensors[key] for key in its}, file)
    change_weights(model, lambda tensors: {key: its + 1 for key, its in tensors.items()},
                   "model-00003-of-00002.safetensors")
    (model / "model.safetensors").unlink()
    change_json(model / "model.safetensors.index.json", metadata={}, weight_map={
        key: file for file, its in names.items() for key in its})
    config = json.loads((model / "config.json").read_text())
    config = config.pop("text_config") | config
    rope, _ = config.pop("rope_parameters"), config.pop("dtype")
    (model / "config.json").write_text(json.dumps(config | {
        "torch_dtype": "bfloat16", "rope_theta": rope["rope_theta"], "rope_scaling": {
            "type": "mrope", "mrope_section": rope["mrope_section"]}}, indent=1) + "\n \n")


@pytest.mark.parametrize("dtypes, change", [
    ([torch.bfloat16], as_published),
    ([torch.float32], lambda model: change_json(model / "config.json", dtype="bfloat16")),
    ([torch.bfloat16, torch.float32, torch.float16], lambda model: change_weights(
        model, lambda tensors: {key.replace("model.", "model.language_model.").replace(
            "visual.", "model.visual."): its for key, its in tensors.items()})),
    ([torch.float16], lambda model: (
        change_json(model / "config.json", tie_word_embeddings=False), change_weights(
            model, lambda tensors: tensors | {
                "lm_head.weight": tensors["model.embed_tokens.weight"].roll(1, 0)})))],
    ids=["as published", "config.json errs", "other names, mixed dtypes", "lm_head of its own"])
def test_everything_else_leaves_as_it_came(trainer, tiny_model, tmp_path, dtypes, change):
    """Names, shards, dtypes, frozen tensors bit for bit; json, txt and jinja files byte for byte. A
    shard that the index lacks is not read, a former model's files go, and the result loads."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny_model, source)
    shutil.copytree(tiny_model, out)
    change_weights(source, lambda tensors: {
        key: its.to(dtypes[k % len(dtypes)]) for k, (key, its) in enumerate(tensors.items())})
    change(source)
    carried = {file.name for file in source.glob("*.json")} | {"chat_template.jinja", "merges.txt"}
    for name in ("chat_template.jinja", "merges.txt", "checkpoint.json", "log.jsonl",
                 "checkpoint-9-master.safetensors"):
        (source / name).write_text("{ }\n")
    (source / "generation_config.json").write_text('{"top_k":  1, "temperature": 1e-06}')
    done = trainer.run(tmp_path, "--model", source, "--steps", 1, "--out", "out")
    assert done.returncode == 0, done.stdout
    files, before, after = trainer.module.weight_files(source), {}, {}
    assert {file.name for file in out.glob("model*.safetensors")} == {file.name for file in files}
    for file in files:
        assert set(load_file(file)) == set(load_file(out / file.name))
        before, after = before | load_file(file), after | load_file(out / file.name)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    trained = {key for key in before if trainer.module.plain(key).startswith(trainer.trains)}
    assert moved <= trained and len(moved) > 0.6 * len(trained)  # a norm's 1 + 1e-3 is 1 in bf16
    for key, its in before.items():
        assert after[key].dtype == its.dtype
        assert ((after[key].float() - its.float()).abs() < 2e-3 + 0.01 * its.float().abs()).all()
    for name in carried:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert trainer.module.read_checkpoint(out)["step"] == 1 and len(records(out)) == 2
    _, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def lost(model, index):
    (model / "model.safetensors").unlink()
    change_json(model / "model.safetensors.index.json", **index)


@pytest.mark.parametrize("change, message", [
    (lambda model: change_weights(model, lambda tensors: {
        key: its for key, its in tensors.items() if "merger.mlp.0.bias" not in key}),
     "1 tensors are missing or have another shape than config.json says, model.visual.merger"),
    (lambda model: change_json(model / "config.json", vision_config={"depth": 1}),
     "tensors are missing or have another shape"),
    (lambda model: os.truncate(model / "model.safetensors", 5000),
     "model/model.safetensors: no complete model directory"),
    (lambda model: lost(model, {"weight_map": {"a": "model-2-of-2.safetensors"}}),
     "model/model-2-of-2.safetensors: no complete model directory"),
    (lambda model: lost(model, {}), "model: no complete model directory"),
    (lambda model: (model / "tokenizer.json").unlink(), "has no tokenizer.json; copy the tokenize"),
    (lambda model: change_json(model / "config.json", quantization_config={"bits": 4}),
     "model: its weights are quantised; take the 16-bit model"),
    (shutil.rmtree, "model: no complete model directory, and none on the hub")])
def test_models_that_cannot_be_read(trainer, tiny_model, tmp_path, change, message):
    shutil.copytree(tiny_model, tmp_path / "model")
    change(tmp_path / "model")
    with contextlib.chdir(tmp_path), pytest.raises(geometry.DataError) as error:
        trainer.module.load_model(*trainer.module.find_model("model"))
    assert message in str(error.value)


# --- killed, stopped, continued


class Killed(BaseException):
    pass


@contextlib.contextmanager
def killed_at(number, module):
    """What changes files in `module` dies the number-th time: one is half written, or not moved."""
    times = itertools.count(1)

    def deadly(call, target):
        def wrapped(*args, **more):
            if next(times) != number:
                return call(*args, **more)
            if target is not None:
                call(*args, **more)
                os.truncate(args[target], os.path.getsize(args[target]) // 2)
            raise Killed
        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for where, name, target in ((module, "save_file", 1), (shutil, "copyfile", 1), (
                Path, "write_text", 0), (Path, "unlink", None), (os, "replace", None)):
            patch.setattr(where, name, deadly(getattr(where, name), target))
        with contextlib.suppress(Killed):
            yield


def test_kill_while_a_checkpoint_is_saved(trainer, tmp_path):
    """Killed at any point, what checkpoint.json names is whole and of one step."""
    optimizer, steps = optimizer_of(trainer, torch.nn.Linear(9, 9)), []
    for number in range(12):
        for _, master, adam in optimizer.tensors.values():
            master.data.fill_(number)
            adam.state[master] = dict.fromkeys(("exp_avg", "exp_avg_sq"), master.detach().clone())
        with killed_at(number, trainer.module):
            trainer.module.save_checkpoint(tmp_path, {"step": number}, optimizer)
        state = trainer.module.read_checkpoint(tmp_path)
        for file in state["files"].values():
            assert {float(its.unique()) for its in load_file(tmp_path / file).values()} == {
                state["step"]}
        steps.append(state["step"])
    # three files, checkpoint.json, its name; then the older ones are deleted
    assert steps == [0, 0, 0, 0, 0, 0, 6, 7, 8, 9, 10, 11]
    trainer.module.save_checkpoint(tmp_path, {"step": 12}, optimizer)
    assert len(os.listdir(tmp_path)) == 4  # nothing else is left


def test_kill_while_a_model_is_saved(trainer, tiny_model, tmp_path):
    """Killed at any point, there is the former model, or one that is refused as not complete, never
    a mixture; saving again ends it."""
    out, ends, seen = tmp_path / "out", [], []
    shutil.copytree(tiny_model, tmp_path / "source")
    as_published(tmp_path / "source")
    source, headers = trainer.module.find_model(str(tmp_path / "source"))
    model, _ = trainer.module.load_model(source, headers)
    optimizer = optimizer_of(trainer, model)
    for _, master, _ in optimizer.tensors.values():
        master.data += 1

    def weights():
        files = trainer.module.weight_files(trainer.module.find_model(str(out))[0])
        return [(file.name, file.read_bytes()) for file in files]

    for number in itertools.count():
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tiny_model, out)
        with killed_at(number, trainer.module):
            trainer.module.save_model(model, source, out, optimizer)
            ends.append("new")
        if number == 0:
            new, former = weights(), [("model.safetensors",
                                       (tiny_model / "model.safetensors").read_bytes())]
        elif len(ends) > 1:
            break
        else:
            with contextlib.suppress(geometry.DataError):
                seen.append((former, new).index(weights()))
            trainer.module.save_model(model, source, out, optimizer)
        assert weights() == new and not (out / "incoming").exists()
    assert seen == sorted(seen) and set(seen) == {0, 1}


@pytest.fixture(scope="module")
def four_steps(trainer, tmp_path_factory):
    """One uninterrupted run of four steps, its flags, and its folder."""
    cwd = tmp_path_factory.mktemp("run")
    done = trainer.run(cwd, *FOUR, "--steps", 4, "--out", "four")
    assert done.returncode == 0, done.stdout
    return cwd / "four"


FOUR = ["--precision", "fp16", "--batch", 2]


def assert_same_run(trainer, one, other, stopped=False):
    """Two runs' states and logs, times apart; one that was `stopped` may lack an evaluation."""
    states = [trainer.module.read_checkpoint(out) for out in (one, other)]
    for key in ("step", "t", "good", "scale"):
        assert states[0][key] == states[1][key]
    for file in ("model.safetensors", *states[0]["files"].values()):
        a, b = load_file(one / file), load_file(other / file)
        assert set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)
    for a, b in zip(records(one), records(other), strict=True):
        assert stopped or set(a) == set(b)
        assert all(a[key] == b[key] for key in a.keys() & b.keys() if not key.endswith("_per_s"))


def test_a_run_is_lengthened_with_data_and_model_moved(trainer, four_steps, scenes, tiny_model,
                                                       tmp_path):
    """2 + 2 steps equal 4, to the last bit, log included; all other flags are the checkpoint's."""
    places = {"data": scenes, "model": tiny_model}
    for name, its in places.items():
        shutil.copytree(its, tmp_path / name)
    done = trainer.run(tmp_path, *FOUR, "--steps", 2, "--out", "out", *itertools.chain(
        *((f"--{name}", name) for name in places)))
    assert done.returncode == 0, done.stdout
    for name in places:
        (tmp_path / name).rename(tmp_path / f"moved_{name}")
    done = trainer.script(tmp_path, "--resume", "--out", "out", "--steps", 4, *itertools.chain(
        *((f"--{name}", f"moved_{name}") for name in places)))
    assert done.returncode == 0, done.stdout
    assert_same_run(trainer, four_steps, tmp_path / "out")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_resume_goes_on(trainer, four_steps, tmp_path, number):
    """The step is finished first. Begun again without --resume, the run is not thrown away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.module, "print_step", lambda *_: signal.raise_signal(number))
        done = trainer.run(tmp_path, *FOUR, "--steps", 4, "--out", "out")
    assert done.returncode == 128 + number
    assert "stopped after step 2; go on with --resume --out out" in done.stdout
    assert not (tmp_path / "out/model.safetensors").exists()
    done = trainer.run(tmp_path, *FOUR, "--steps", 4, "--out", "out")
    assert done.returncode == 1 and "out holds a run stopped at step 2 of 4; go on" in done.stdout
    done = trainer.script(tmp_path, "--resume", "--out", "out")
    assert done.returncode == 0, done.stdout
    assert_same_run(trainer, four_steps, tmp_path / "out", stopped=True)


def test_two_processes_equal_one(trainer, tmp_path):
    """Three samples a step, on one process or on two, one of which has two."""
    for out, processes in (("one", 1), ("two", 2)):
        done = trainer.run(tmp_path, "--steps", 2, "--batch", 3, "--out", out, processes=processes)
        assert done.returncode == 0, done.stdout
    for a, b in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        for key in a.keys() & {"loss", "excess", "grad_norm", "update_norm"}:
            assert abs(a[key] - b[key]) < 1e-3 * abs(a[key])
    a, b = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "two"))
    far = torch.cat([(a[key] - b[key]).abs().flatten() for key in a])
    # a step is 1e-3; Adam's first one is lr * sign, even where the gradient is almost 0
    assert float((far > 2e-4).float().mean()) < 1e-3


def test_resume_is_refused(trainer, four_steps, scenes, tiny_model, tmp_path):
    """With another value of a flag, another question in the data, another weight in the model."""
    def refused(message, *flags):
        done = trainer.script(tmp_path, "--resume", "--out", "out", "--steps", 6, *flags)
        assert done.returncode in (1, 2) and message in done.stdout, done.stdout

    for its, name in ((four_steps, "out"), (scenes, "data"), (tiny_model, "model")):
        shutil.copytree(its, tmp_path / name)
    refused("--resume: --lr was 0.001 and must stay so", "--lr", 2e-3)
    refused("--resume: --save-every was 2 and must stay so", "--save-every", 1)
    refused("--out elsewhere has no checkpoint.json to --resume from", "--out", "elsewhere",
            "--data", "data", "--model", "model")
    write_question(tmp_path / "data", "train", "camera_turn", "fill", "scene_0", (0, 2), "?", "1")
    refused("--out out was begun with another --data than data", "--data", "data")
    change_weights(tmp_path / "model", lambda tensors: tensors | {"lm_head.bias": torch.zeros(1)})
    refused("--out out was begun with another --model than model", "--model", "model")


@pytest.mark.parametrize("steps", [6, 4])
def test_full_disk(trainer, four_steps, tmp_path, steps):
    """No file may grow past 100 kB, while the checkpoint or the model is written: one line says so,
    and the last checkpoint and model are whole."""
    shutil.copytree(four_steps, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in four_steps.glob("*[!l]")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        done = trainer.script(tmp_path, "--resume", "--out", "out", "--steps", steps)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.returncode == 1 and "too large" in done.stdout.splitlines()[-1]
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before
    done = trainer.script(tmp_path, "--resume", "--out", "out", "--steps", steps)
    assert done.returncode == 0 and len(records(tmp_path / "out")) == steps + 1


# --- what cannot be used


def test_hostile_data(trainer, scenes, tmp_path):
    """A broken picture, one longer than 200 : 1, half an emoji in a question and in an answer: each
    is named once and left out; control tokens are text; all else is trained on."""
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    broken = data / "boxes/images/scene_0/image_color/0.jpg"
    os.truncate(broken, 500)
    long = render(np.array([4, 4, 3.0]), np.array([2, 2, 1.5]), 0, np.eye(3), 2010, 10)
    for k in range(2):
        write_view(data / "boxes/images/long", k, long)
    text = "<|image_pad|><|im_end|><|vision_start|>"
    for scene, name, question, answer in (
            ("long", "long", "?", "1"), ("scene_1", "a", "\ud83d", "1"),
            ("scene_1", "b", "?", "\ud83d"), ("scene_1", "c", text, text)):
        write_question(data, "train", "camera_turn", "fill", scene, (0, 1), question, answer,
                       id=name)
    done = trainer.run(tmp_path, "--data", data, "--steps", 28, "--save-every", 28, "--out", "out")
    assert done.returncode == 0, done.stdout
    bad = [f"{broken}: cannot be read as an image", "long: "]
    if trainer.trains != "visual.":  # the encoder reads no text
        bad += ["a: images or text cannot be encoded", "b: its answer cannot be encoded"]
    assert [done.stdout.count(f"skipped {its}") for its in bad] == [1] * len(bad), done.stdout
    assert f"{len(bad)} samples could not be used" in done.stdout
    assert done.stdout.count("skipped ") == len(bad)
    left_out = [line["skipped"] for line in records(tmp_path / "out") if "skipped" in line]
    assert len(left_out) == 3 + len(bad) and all("no usable sample (" in its for its in left_out)


def test_nothing_usable_is_one_line(trainer, scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "data")
    for path in (tmp_path / "data").glob("boxes/images/*/image_color/*"):
        path.write_text("no picture")
    done = trainer.run(tmp_path, "--data", "data", "--steps", 2, "--out", "out")
    assert done.returncode == 1 and "held-out" in done.stdout.splitlines()[-1]


def test_steps_that_are_not_finite(trainer, tiny_model, tmp_path):
    """A NaN weight makes every step NaN: each is left out and named, none is saved, five end it."""
    shutil.copytree(tiny_model, tmp_path / "model")
    change_weights(tmp_path / "model", lambda tensors: tensors | {
        "visual.blocks.1.norm1.weight": torch.full((128,), math.nan)})
    done = trainer.run(tmp_path, "--model", "model", "--steps", 9, "--save-every", 9,
                       "--out", "out")
    assert done.returncode == 1
    assert done.stdout.count("left out: gradient norm nan (scene_") == 5
    assert "five steps in a row were not finite" in done.stdout.splitlines()[-1]
    assert not (tmp_path / "out/checkpoint.json").exists()


@pytest.mark.parametrize("flags, message", [
    *([[f"--{name}", value], f"--{name} is out of range"] for name, value in (
        ("seed", -1), ("lr", 0), ("lr", "nan"), ("steps", 0), ("batch", 0), ("heldout", 0),
        ("max-pixels", 0), ("workers", 0), ("save-every", -2), ("clip", 0), ("samples", 0))),
    (["--precision", "int8"], "invalid choice"), (["--res"], "unrecognized arguments: --res"),
    (["--resume"], "has no checkpoint.json to --resume from"),
    (["--data", "nowhere"], "nowhere: no such directory; --data takes the folder that holds"),
    (["--out", "taken"], "File exists: 'taken'"), (["--out", "model"], "is the start model's")])
def test_bad_arguments(trainer, tiny_model, tmp_path, flags, message):
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "model").symlink_to(tiny_model)
    done = trainer.run(tmp_path, *flags)
    assert done.returncode in (1, 2) and message in done.stdout.splitlines()[-1], done.stdout


def test_the_script_on_a_console_of_ascii(trainer, scenes, tmp_path, monkeypatch):
    """As a user starts it: letters that the console lacks end nothing; an error is one line."""
    shutil.copytree(scenes, tmp_path / "Zürich")
    write_question(tmp_path / "Zürich", "val", "camera_turn", "fill", "scene_7", (0, 2),
                   "Où – là?", "10 – 20", id="été")
    monkeypatch.chdir(tmp_path)
    name = f"{trainer.module.__name__}.py"
    for flags, message in ((["--steps", 1, "--data", "Zürich", "--heldout", 20], "wrote   out"),
                           (["--data", "nowhere"], f"{name}: nowhere: no such directory")):
        console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", console)
        monkeypatch.setattr(sys, "argv", ["-", *map(str, [*trainer.flags, "--out", "out", *flags])])
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as stop:
            print(stop)
        console.flush()
        assert message in console.buffer.getvalue().decode().splitlines()[-1]


def test_real_frames(trainer, shared, tmp_path):
    done = trainer.run(tmp_path, "--data", shared / "spar", "--max-pixels", 112 * 112, "--steps", 2,
                       "--out", "out")
    assert done.returncode == 0 and "0 samples could not be used" in done.stdout, done.stdout


# --- said at the start


@pytest.mark.parametrize("device, dtype, trained, offload, needs", [
    ("cpu", torch.float32, 1024, False, {"host": 16.3}),  # GiB: weight, gradient and two moments
    ("cpu", torch.bfloat16, 1024, False, {"host": 18.3}),  # master weights
    ("cpu", torch.bfloat16, 512, False, {"host": 10.3}),  # half of it is frozen
    ("cuda", torch.float16, 1024, False, {"GPU": 18.3, "host": 0.3}),
    ("cuda", torch.bfloat16, 1024, True, {"GPU": 2.3, "host": 16.3}),
    ("cuda", torch.float32, 1024, True, {"GPU": 4.3, "host": 16.3})])
def test_memory_line(trainer, monkeypatch, device, dtype, trained, offload, needs):
    """For 2^30 parameters in tensors of 2^20; advice only where less is free than needed."""
    for free in (20, 10):
        monkeypatch.setattr(Path, "read_text", lambda path: f"MemAvailable:  {free * 2**20} kB")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 2**30, 2**40))
        line = trainer.module.memory_line(
            2**30, [2**20] * trained, 0, dtype, torch.device(device), offload)
        said = ", ".join(f"{where} {its:.1f} GiB" for where, its in needs.items())
        assert line.startswith(f"memory  {said}")
        assert ("more than is free: --freeze" in line) == (max(needs.values()) > free)
    line = trainer.module.memory_line(2**30, [2**30], 2**12, dtype, torch.device("cpu"))
    assert float(line.split()[2]) > needs["host"]  # the largest tensor's update, activations


def test_what_a_gpu_can_do(trainer, monkeypatch, capsys):
    """fp16, and a word, where bf16 is missing; a word where a GPU is there but cannot be used."""
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for gpu, bf16, smi, best, warning in (
            (True, True, "smi", "bf16", ""), (True, False, "smi", "fp16", "has no bf16"),
            (False, False, "smi", "fp32", "GPU cannot be used"), (False, False, None, "fp32", "")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
        monkeypatch.setattr(shutil, "which", lambda name: smi)
        for asked, dtype in [("auto", names[best]), *names.items()]:
            rank, world, device, got = trainer.module.start_processes(asked)
            said = capsys.readouterr().out
            assert (rank, world, device.type, got) == (0, 1, "cuda" if gpu else "cpu", dtype)
            assert warning in said and bool(warning) == ("warning" in said)
