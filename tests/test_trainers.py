"""What every trainer promises: precision by hand, models in and out, resuming, processes, and one
line for bad input. Whole runs are tested for each; plumbing, which has the same source in all of
them (test_repository.py), for pasta.py."""

import argparse
import collections
import contextlib
import importlib
import io
import itertools
import json
import math
import os
import pickle
import re
import runpy
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import conftest
import geometry
import pasta
from conftest import ROOT, block_with, kills, quicken, records, run_block
from scenes import (
    as_published, change_json, change_weights, make_scenes, render, write_question,
    write_recordings, write_tum, write_view)

FLAGS = {"pasta": "--heldout 3", "actor_sft": "--heldout 3",
         "actor_grpo": "--batch 1 --group 3 --max-new-tokens 4 --rollouts-every 2"}


@pytest.fixture(scope="module")
def trainers(scenes, tiny_model):
    """{name: a script's name, module, flags of a short run, and what runs it}."""
    every = ["--data", scenes, "--model", tiny_model, *(
        "--lr 1e-3 --max-pixels 3136 --save-every 2 --workers 1 --out out".split())]
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch.setattr)
        yield {name: argparse.Namespace(
            name=name, module=importlib.import_module(name), flags=[*every, *own.split()],
            run=lambda cwd, *flags, name=name: conftest.run(f"{name}.py", ROOT, cwd, *flags))
            for name, own in FLAGS.items()}


@pytest.fixture(scope="module", params=FLAGS)
def trainer(request, trainers):
    return trainers[request.param]


# --- precision by hand


def small():
    torch.manual_seed(0)
    return torch.nn.Sequential(collections.OrderedDict(
        visual=torch.nn.Linear(6, 16), tanh=torch.nn.Tanh(), head=torch.nn.Linear(16, 1)))


def read_checkpoint(path):
    return torch.load(path, weights_only=True)


def optimizer_of(model, dtype=torch.float32, lr=1e-2, warmup=0):
    return pasta.Optimizer(model, argparse.Namespace(
        lr=lr, vision_lr=lr / 4, warmup=warmup, clip=1e-2, betas=[0.9, 0.95], offload=False),
        dtype, torch.device("cpu"))


@pytest.mark.parametrize("dtype, warmup, lr", [
    (torch.float32, 0, 1e-2), (torch.bfloat16, 7, 1e-5), (torch.float16, 0, 1e-5)])
def test_optimizer_equals_the_library(dtype, warmup, lr):
    """AdamW, clipped, on fp32 masters, at an lr whose steps round away in 16 bits, and at a smaller
    one for the image encoder; fp32 sums of a step's gradients, also of those too small for fp16,
    the 16-bit ones gone at once; warm-up; both norms; what is frozen."""
    ours, theirs, masters = small(), small().to(dtype), small()
    x, alive, clipped = torch.randn(32, 6, generator=torch.Generator().manual_seed(1)), [], set()
    for model in (ours, theirs, masters):
        model[2].bias.requires_grad_(False)
    (a, b, c, frozen), trained = theirs.parameters(), list(masters.parameters())[:3]
    scale = 2.0**16 if dtype == torch.float16 else 1.0
    optimizer = optimizer_of(ours, dtype, warmup=warmup, lr=lr)
    for p in list(ours.parameters())[:3]:
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(any(p.grad is not None for p in ours.parameters())))
    rates = [lr / 4, lr / 4, lr]
    library = torch.optim.AdamW([{"params": [p]} for p in trained], lr, (0.9, 0.95),
                                weight_decay=0.0)
    for step in range(20):
        sums = [0.0] * 3
        for size, half in zip((1e-2, 1e-5) if step % 3 else (1e-8, 1e-8), x.to(dtype).split(16)):
            optimizer.backward(size * ours(half).float().square().sum())
            loss = size * scale * theirs(half).float().square().sum()
            sums = [total + its.float() for total, its in zip(
                sums, torch.autograd.grad(loss, (a, b, c)))]
        norm = optimizer.reduce()
        assert optimizer.step(norm)
        for p, total in zip(trained, sums):
            p.grad = total / scale
        wanted = float(torch.nn.utils.clip_grad_norm_(trained, 1e-2))
        for its, rate in zip(library.param_groups, rates):
            its["lr"] = rate * min(1, (step + 1) / max(warmup, 1))
        library.step()
        for p, master in zip((a, b, c), trained):
            p.data.copy_(master)
        clipped.add(wanted > 1e-2)
        assert norm == pytest.approx(wanted, rel=1e-4) and norm > 0
    assert clipped == {True, False} and len(alive) == 120 and not any(alive)
    for (p, master), wanted, rate in zip(
            optimizer.tensors.values(), trained, rates, strict=True):
        torch.testing.assert_close(master, wanted, rtol=0, atol=1e-2 * rate)
        assert p.dtype == dtype and torch.equal(p, master.to(dtype))
    assert torch.equal(ours[2].bias, frozen)


def test_rate_of_the_image_encoder(trainer):
    """It is that of all else, unless said; the demo's own after PaStA."""
    parse, names = trainer.module.parse_args, ("lr", "vision_lr")
    demo = {"actor_sft": (4e-4, 4e-5), "actor_grpo": (1e-4, 1e-5)}
    for flags, rates in (
            ([], demo.get(trainer.name)), (["--data", "-"], (1e-5, 1e-5)),
            (["--data", "-", "--lr", "1e-3"], (1e-3, 1e-3)),
            (["--data", "-", "--lr", "1e-3", "--vision-lr", "1e-6"], (1e-3, 1e-6))):
        if trainer.name != "pasta":
            args = parse(flags)
            assert tuple(getattr(args, name) for name in names) == rates, flags


def test_fp16_loss_scale():
    """Overflow moves no weight and halves the scale; 1,000 good steps double it."""
    model, x = small(), torch.ones(4, 6, dtype=torch.float16)
    optimizer = optimizer_of(model, torch.float16)
    before = [p.clone() for p in model.parameters()]
    for scale in (2.0**15, 2.0**14):
        optimizer.backward(model(x).float().sum() * 1e5)
        assert not optimizer.step(optimizer.reduce())
        assert (optimizer.scale, optimizer.t) == (scale, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    optimizer.good += 998
    for scale in (2.0**14, 2.0**15, 2.0**15):
        optimizer.step(optimizer.reduce())
        assert optimizer.scale == scale


def test_a_block_trains_whose_input_does_not():
    """As a fork has it that freezes the embeddings: the weights of a recomputed block get the
    gradient that they get without; a frozen block and a pass without gradients stay as they are."""
    model, x = small(), torch.randn(4, 6)
    model(x).sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    pasta.recompute_in_backward(model)
    model(x).sum().backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), wanted))
    with torch.no_grad():
        assert not model(x).requires_grad
    assert not model.requires_grad_(False)(x).requires_grad


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("start", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype, made, stepped", [(torch.bfloat16, 6, 18), (torch.float32, 4, 16)])
def test_peak_memory(dtype, start, made, stepped, steps):
    """Bytes a parameter when the optimiser is made and in its steps: at most 5 % above weights,
    masters, gradients and moments, and the update of the largest tensor, wherever in between."""
    with torch.autograd.profiler.profile(profile_memory=True) as seen:
        model = torch.nn.Sequential(*[torch.nn.Linear(64, 64, dtype=start) for _ in range(40)])
        optimizer = optimizer_of(model, dtype)
        for _ in range(steps):
            for _, master in optimizer.tensors.values():
                master.grad = torch.ones_like(master)
            optimizer.step(optimizer.reduce())
    size, most = 40 * 65 * 64, stepped if steps else max(made, start.itemsize)
    live = np.cumsum([event.nbytes() for event in seen.kineto_results.events()
                      if event.name() == "[memory]"]) / size
    assert abs(live[-1] - (stepped - 4 if steps else made)) < 0.01  # no gradient is left
    assert most - 0.01 < live.max() < 1.05 * most + 4 * 64 * 64 / size


# --- models in and out


@pytest.mark.parametrize("name, dtypes, change", [
    ("pasta", [torch.bfloat16], as_published),
    ("actor_grpo", [torch.bfloat16, torch.float32, torch.float16], lambda model: change_weights(
        model, lambda tensors: {key.replace("model.", "model.language_model.").replace(
            "visual.", "model.visual."): its for key, its in tensors.items()} | {
                name: tensors["model.embed_tokens.weight"].float()  # tied, and there twice
                for name in ("model.language_model.embed_tokens.weight", "lm_head.weight")})),
    ("actor_sft", [torch.float16], lambda model: (
        change_json(model / "config.json", tie_word_embeddings=False), change_weights(
            model, lambda tensors: tensors | {
                "lm_head.weight": tensors["model.embed_tokens.weight"].roll(1, 0)})))])
def test_everything_else_leaves_as_it_came(trainers, tiny_model, tmp_path, name, dtypes, change):
    """Names, shards, dtypes, frozen tensors bit for bit; json, txt and jinja files byte for byte. A
    shard that the index lacks is not read, a former model's files go."""
    source, out, before, after = tmp_path / "source", tmp_path / "out", {}, {}
    for path in (source, out):
        shutil.copytree(tiny_model, path)
    change_weights(source, lambda tensors: {
        key: its.to(dtypes[k % len(dtypes)]) for k, (key, its) in enumerate(tensors.items())})
    change(source)
    for file in ("chat_template.jinja", "merges.txt", "generation_config.json"):
        (source / file).write_text('{"top_k":  1, "temperature": 1e-06}\n')
    carried = [its for its in source.iterdir() if its.suffix in (".json", ".jinja", ".txt")]
    _, loaded, _ = pasta.load_model(str(source))
    assert loaded.dtype == (dtypes[0] if len(dtypes) == 1 else torch.float32)
    done = trainers[name].run(tmp_path, *trainers[name].flags, "--model", source, "--steps", 1)
    assert done.returncode == 0, done.stdout
    files = pasta.weight_files(source)
    assert {file.name for file in out.glob("model*.safetensors")} == {file.name for file in files}
    for file in files:
        assert set(load_file(file)) == set(load_file(out / file.name))
        before, after = before | load_file(file), after | load_file(out / file.name)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    trained = {key for key in before if name != "pasta" or key.startswith("visual.")}
    assert moved <= trained and len(moved) > 0.6 * len(trained)  # a norm's 1 + 1e-3 is 1 in bf16
    for key, its in before.items():
        assert after[key].dtype == its.dtype
        assert ((after[key].float() - its.float()).abs() < 2e-3 + 0.01 * its.float().abs()).all()
    assert all((out / file.name).read_bytes() == file.read_bytes() for file in carried)
    assert {its.name for its in [*out.glob("*.safetensors"), *out.glob("*.bin")]} == {
        its.name for its in files}  # servers read as weights whatever is called so
    (ordinary := tmp_path / "ordinary").touch()
    assert {its.stat().st_mode for its in [*out.iterdir(), *tiny_model.iterdir()]} == {
        ordinary.stat().st_mode}


def change_text_config(model, **changes):
    config = json.loads((model / "config.json").read_text())
    change_json(model / "config.json", text_config=config["text_config"] | changes, **changes)


@pytest.mark.parametrize("change, message", [
    (lambda model: change_weights(model, lambda tensors: {
        key: its for key, its in tensors.items() if "merger.mlp.0.bias" not in key}),
     "1 tensors are missing or have another shape than config.json says, model.visual.merger"),
    (lambda model: os.truncate(model / "model.safetensors", 5000), "SafetensorError"),
    (lambda model: (as_published(model), (model / "model-00001-of-00002.safetensors").unlink()),
     "model-00001-of-00002.safetensors"),
    (lambda model: (model / "tokenizer.json").unlink(), "it has no tokenizer.json; copy the tok"),
    (lambda model: (model / "config.json").unlink(), "config.json"),
    (lambda model: change_json(model / "config.json", quantization_config={"bits": 4}),
     "its weights are quantised; take the 16-bit model"),
    *((lambda model, change=change: change_text_config(model, **change), "") for change in (
        {"_attn_implementation": "flash_attention_2"}, {"hidden_size": "x"}, {"use_cache": None},
        {"num_hidden_layers": [4]}, {"rope_parameters": 3})),
    (shutil.rmtree, "")])
def test_models_that_cannot_be_read(tiny_model, tmp_path, change, message):
    shutil.copytree(tiny_model, tmp_path / "model")
    change(tmp_path / "model")
    with contextlib.chdir(tmp_path), pytest.raises(geometry.DataError) as error:
        pasta.load_model("model")
    assert str(error.value).startswith("model: no complete Qwen2.5-VL (")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_kill_while_a_run_is_saved(tiny_model, tmp_path):
    """checkpoint.pt is whole and of one step. The model is of one step, or refused as not complete,
    whether its files have the former one's names or not. Nothing else is left."""
    out, published, numbers, seen = tmp_path / "out", tmp_path / "published", itertools.count(), []
    for path in (out, published):
        shutil.copytree(tiny_model, path)
    as_published(published)
    _, model, _ = pasta.load_model(str(published))
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name)
    optimizer = optimizer_of(model)
    optimizer.reduce()
    optimizer.step(1.0)

    def save():
        number = next(numbers)
        for _, master in optimizer.tensors.values():
            master.data.fill_(number)
            for kind in ("exp_avg", "exp_avg_sq"):
                optimizer.adam.state[master][kind].fill_(number)
        pasta.save_checkpoint(out, {}, number, 9, optimizer)
        pasta.save_model(model, (tiny_model, published)[number % 2], out, optimizer)

    def step_of(tensors):
        (step,) = {float(its) for its in tensors for its in its.unique()}
        return step

    def step_of_model():
        return step_of([its for file in pasta.weight_files(pasta.load_model(str(out))[0])
                        for key, its in load_file(file).items() if "norm" in key])

    def step_of_checkpoint():
        state = read_checkpoint(out / "checkpoint.pt")
        saved = [its for tensors in state["optimizer"]["tensors"].values()
                 for kind, its in tensors.items() if kind != "step"]
        assert step_of(saved) == state["step"]
        return state["step"]

    save()
    for kill, _ in enumerate(kills(save), 1):
        behind = kill - step_of_checkpoint()
        with contextlib.suppress(geometry.DataError):
            seen.append((kill - step_of_model(), behind))
    save()
    assert (step_of_model(), step_of_checkpoint()) == (next(numbers) - 1,) * 2
    assert {(True, True), (True, False)} <= {(model > 0, state > 0) for model, state in seen}
    assert {file.name for file in out.glob("checkpoint*")} == {"checkpoint.pt"}


def assert_same_log(one, other, rel):
    """Times apart; an evaluation may be where the other has none; groups in any order."""
    for a, b in zip(records(one), records(other), strict=True):
        for key in a.keys() & b.keys() - {"tokens_per_s", "pairs_per_s", "seconds"}:
            assert a[key] == b[key] or a[key] == pytest.approx(b[key], rel=rel, abs=rel / 1e3), key
        assert a["step"] == 0 or a["grad_norm"] > 0
    one, other = ([sorted(out.open()) for out in path.glob("rollouts.jsonl")]
                  for path in (one, other))
    assert [its[1:] for its in one] == [its[1:] for its in other]  # the first one has the args


def test_stopped_and_resumed_runs_equal_one(trainer, scenes, tiny_model, tmp_path):
    """A run is lengthened, data and model moved; each signal stops it when the step is finished;
    begun again without --resume, it is not thrown away. State, model, log and rollouts are, to the
    last bit, those of a run without a stop."""
    reduce = trainer.module.Optimizer.reduce

    def go_on(code, *flags, number=0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer.module.Optimizer, "reduce", lambda self: (
                number and signal.raise_signal(number)) or reduce(self))
            done = trainer.run(tmp_path, *flags)
        assert done.returncode == code, done.stdout
        return done.stdout

    for its, name in ((scenes, "moved_data"), (tiny_model, "moved_model")):
        (tmp_path / name).symlink_to(its)
    flags = [*trainer.flags, "--batch", 2, "--steps", 3, "--precision",
             "fp16" if trainer.name == "pasta" else "fp32"]  # fp16 is slow on a CPU
    go_on(0, *flags, "--out", "whole")
    go_on(0, *flags, "--steps", 1)
    (tmp_path / "out/log.jsonl").open("a").write('{"step": 2, "loss"')  # by a kill
    again = [*flags, *"--resume --data moved_data --model moved_model".split()]
    printed = go_on(130, *again, number=signal.SIGINT)
    assert "stopped after step 2; the same command with --resume goes on" in printed
    assert "out holds a run stopped at step 2 of 3: the same command with --resume" in go_on(
        1, *flags)
    go_on(143 if trainer.name == "pasta" else 129, *again, number=(
        signal.SIGTERM if trainer.name == "pasta" else signal.SIGHUP))
    (tmp_path / "out/model.safetensors").unlink()  # by a kill while it was written
    go_on(0, *again)
    paths = tmp_path / "whole", tmp_path / "out"
    a, b = (read_checkpoint(path / "checkpoint.pt") for path in paths)
    assert all(a[key] == b[key] for key in ("identity", "step", "steps"))
    a, b = a["optimizer"], b["optimizer"]
    assert all(a[key] == b[key] for key in ("t", "good", "scale"))
    assert [*a["tensors"]] == [*b["tensors"]]
    for name, its in a["tensors"].items():
        assert set(its) == set(b["tensors"][name]) == {"master", "step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(its[kind], b["tensors"][name][kind]) for kind in its)
    a, b = (load_file(path / "model.safetensors") for path in paths)
    assert set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)
    assert_same_log(*paths, 0)


def test_a_terminal_that_closes_loses_no_step(trainer, tmp_path, monkeypatch):
    """SIGHUP, or Ctrl-C on a pipe to `tee`: the step is saved although nothing can be printed."""
    reduce = trainer.module.Optimizer.reduce

    def refuse(text):
        raise BrokenPipeError("closed")

    def hang_up(self):
        signal.raise_signal(signal.SIGHUP)
        monkeypatch.setattr(sys.stdout, "write", refuse)
        return reduce(self)

    monkeypatch.setattr(trainer.module.Optimizer, "reduce", hang_up)
    with pytest.raises(BrokenPipeError):
        trainer.run(tmp_path, *trainer.flags, "--steps", 3)
    assert read_checkpoint(tmp_path / "out/checkpoint.pt")["step"] == 1
    assert records(tmp_path / "out")[-1]["step"] == 1


TWO = """import json, os, sys
import conftest
conftest.quicken()
for script, *flags in json.loads(sys.argv[1]):  # the processes meet anew for each
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False",
                   "MASTER_PORT": str(int(os.environ["MASTER_PORT"]) + 1)}
    __import__(script).main(flags)
"""


def test_two_processes_equal_one(trainers, scenes, tmp_path):
    """Three samples a step, on one process or on two, one of which has two; a broken picture is a
    problem whoever met it. torchrun, which takes long to start, runs the scripts in turn."""
    (tmp_path / "two.py").write_text(TWO)
    shutil.copytree(scenes, tmp_path / "data")
    os.truncate(tmp_path / "data/boxes/images/scene_0/image_color/0.jpg", 500)
    runs = {name: [*map(str, its.flags), "--steps", "2", "--batch", "3", "--data", "data", "--out",
                   f"{name}_2"] for name, its in trainers.items()}
    done = conftest.run("two.py", tmp_path, tmp_path, json.dumps([
        [name, *flags] for name, flags in runs.items()]), processes=2,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert done.returncode == 0, done.stdout
    problems = re.findall("; (.*) problems with the data", done.stdout)
    for name, flags in runs.items():
        done = trainers[name].run(tmp_path, *flags, "--out", name)
        assert done.returncode == 0 and f"; {problems.pop(0)} problems with" in done.stdout
        assert "; 0 problems with" not in done.stdout
        assert_same_log(tmp_path / name, tmp_path / f"{name}_2", 1e-3)


def test_hostile_data(trainer, tmp_path):
    """A broken picture, one longer than 200 : 1, half an emoji in a question and in an answer, a
    gold that no answer can match: each is named once and left out; control tokens are text; all
    else is trained on, also behind five unusable samples in a row."""
    data = make_scenes(tmp_path / "data", train=2, val=1)
    broken = data / "boxes/images/scene_0/image_color/0.jpg"
    os.truncate(broken, 500)
    long = render(np.array([4, 4, 3.0]), np.array([2, 2, 1.5]), 0, np.eye(3), 2010, 10)
    for k in range(2):
        write_view(data / "boxes/images/long", k, long)
    for name, scene, *texts in (
            *[(f"long {k}", "long", "?", "A") for k in range(10)], ("a", "scene_1", "\ud83d", "A"),
            ("b", "scene_1", "?", "\ud83d"), ("c", "scene_1", "?", " "),
            ("d", "scene_1", *["<|image_pad|><|im_end|><|vision_start|>"] * 2)):
        write_question(data, "train", "position_matching", "select", scene, (0, 1), *texts, id=name)
    done = trainer.run(tmp_path, *trainer.flags, "--data", data, "--steps", 23)
    assert done.returncode == 0, done.stdout
    bad = [f"{broken}: cannot be read as an image", *(f"long {k}: " for k in range(10)), *(
        trainer.name != "pasta") * ["a: images or text cannot be encoded",
                                    "c: no answer to a select question of position_matching can"],
        *(trainer.name == "actor_sft") * ["b: its answer cannot be encoded"]]
    assert [done.stdout.count(f"skipped {its}") for its in bad] == [1] * len(bad), done.stdout
    assert done.stdout.count("skipped ") == len(bad)
    assert f"{len(bad)} problems with the data" in done.stdout
    left_out = [line.get("skipped", "") for line in records(tmp_path / "out")]
    assert all("no usable sample (" in its for its in left_out if its)
    assert left_out.count("") and any(all(left_out[k:k + 5]) for k in range(18))


def test_steps_that_are_not_finite(trainer, tiny_model, tmp_path):
    """A NaN weight makes every step NaN: each is left out and named; 25 in a row end the run, and
    no model is written."""
    shutil.copytree(tiny_model, tmp_path / "model")
    change_weights(tmp_path / "model", lambda tensors: tensors | {
        "visual.blocks.1.norm1.weight": torch.full((128,), math.nan)})
    done = trainer.run(tmp_path, *trainer.flags, *"--model model --steps 30 --batch 1".split(),
                       "--save-every", 30)
    assert done.returncode == 1
    assert done.stdout.count("left out: gradient norm nan (scene_") == 25
    assert "25 steps in a row changed no weight, the last: gradient norm nan; look at" in (
        done.stdout.splitlines()[-1])
    assert not (tmp_path / "out/model.safetensors").exists()


def test_a_run_without_an_update_writes_no_model(trainer, scenes, tiny_model, tmp_path):
    """Here no training picture is there. It fails however short it is, and when it is resumed."""
    shutil.copytree(scenes, tmp_path / "data")
    for number in range(6):
        shutil.rmtree(tmp_path / f"data/boxes/images/scene_{number}/image_color")
    flags = [*trainer.flags, "--data", "data", "--steps", 3]
    for more, ending in (([], "3 steps in a row changed no weight, the last: no usable sample (3 "
                          "problems, the first: data/boxes/images/scene_"),
                         (["--resume"], "0 steps in a row changed no weight, the last: ;")):
        done = trainer.run(tmp_path, *flags, *more)
        assert done.returncode == 1 and done.stdout.splitlines()[-1].startswith(
            f"{trainer.name}.py: {ending}"), done.stdout
        assert not (tmp_path / "out/model.safetensors").exists()
        assert read_checkpoint(tmp_path / "out/checkpoint.pt")["step"] == 3


def test_logits_that_are_not_finite(trainers, tiny_model, tmp_path):
    """A look at held-out samples says so; the log has null, which strict readers take."""
    shutil.copytree(tiny_model, tmp_path / "model")
    change_weights(tmp_path / "model", lambda tensors: tensors | {
        "model.norm.weight": torch.full((192,), math.nan)})
    run, flags = trainers["actor_sft"].run, trainers["actor_sft"].flags
    done = run(tmp_path, *flags, *"--model model --freeze language --steps 1".split())
    assert done.returncode == 1 and "warning: logits that are not finite in 3 of 3" in done.stdout
    lines = [json.loads(line, parse_constant=pytest.fail)
             for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert lines[1]["answer"] is None and lines[1]["heldout_loss"] is None


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:-9], lambda data: data[:200],
    lambda data: bytes(len(data)),
    lambda data: pickle.dumps(argparse.Namespace())])
def test_checkpoints_that_cannot_be_read(trainers, tmp_path, damage):
    """One line says so, at a new start, too."""
    run, flags = trainers["pasta"].run, trainers["pasta"].flags
    assert run(tmp_path, *flags, "--steps", 1).returncode == 0
    file = tmp_path / "out/checkpoint.pt"
    file.write_bytes(damage(file.read_bytes()))
    for more in (["--resume"], []):
        done = run(tmp_path, *flags, "--steps", 2, *more)
        assert done.returncode == 1 and done.stdout.splitlines()[-1].startswith(
            "pasta.py: out/checkpoint.pt: cannot be read; remove it to start over ("), done.stdout


def test_a_full_disk(trainers, tmp_path):
    """It ends a run in one line, whose last checkpoint is spared."""
    run, flags = trainers["pasta"].run, [*trainers["pasta"].flags, "--save-every", 1]
    assert run(tmp_path, *flags, "--steps", 1).returncode == 0
    (tmp_path / "out/checkpoint.tmp").symlink_to("/dev/full")
    done = run(tmp_path, *flags, "--steps", 2, "--resume")
    assert done.returncode == 1 and "No space left" in done.stdout.splitlines()[-1], done.stdout
    assert read_checkpoint(tmp_path / "out/checkpoint.pt")["step"] == 1


def test_what_is_loaded_is_copied(tmp_path):
    """A checkpoint's files would stay on the disk for as long as they are mapped."""
    optimizer = optimizer_of(small())
    optimizer.reduce()
    optimizer.step(1.0)
    pasta.save_checkpoint(tmp_path, {}, 1, 1, optimizer)
    path = tmp_path / "checkpoint.pt"
    optimizer.load(torch.load(path, mmap=True, weights_only=True)["optimizer"])
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_bad_arguments(trainer, scenes, tiny_model, tmp_path):
    """Among them: data with another question, a model with another weight than the run had."""
    for its, name in ((scenes, "data"), (tiny_model, "model")):
        shutil.copytree(its, tmp_path / name)
    assert trainer.run(tmp_path, *trainer.flags, "--steps", 1).returncode == 0
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "empty/mine/images").mkdir(parents=True)
    write_question(tmp_path / "data", "train", "camera_turn", "fill", "scene_0", (0, 2), "?", "1")
    change_weights(tmp_path / "model", lambda tensors: tensors | {"lm_head.bias": torch.zeros(1)})
    for flags, message in (
            *((f"--{flag}", f"--{flag.split()[0]} is out of range") for flag in (
                "seed -1", "lr 0", "lr nan", "steps 0", "batch 0", "save-every -2")),
            ("--precision int8", "invalid choice"), ("--res", "unrecognized arguments: --res"),
            ("--model nowhere", "nowhere: no complete Qwen2.5-VL ("),
            ("--data nowhere", "nowhere: no such directory; --data takes the folder that holds"),
            ("--data empty", "found there: nothing; see docs/data.md"),
            ("--out taken", "File exists: 'taken'"),
            ("--model model --out model", "--out model is the start model's"),
            ("--resume --out new", "--out new has no checkpoint.pt: leave --resume out"),
            ("--resume --lr 2e-3", "out was begun with lr 0.001, not 0.002: only the same command"),
            ("--resume --vision-lr 2e-3", "out was begun with vision_lr 0.001, not 0.002: only"),
            ("--resume --precision bf16", "with precision torch.float32, not torch.bfloat16: only"),
            ("--resume --precision fp32", "wrote   out"),  # as auto is on a CPU
            ("--resume --data data", "--out out was begun with data "),
            ("--resume --model model", "--out out was begun with model ")):
        if trainer.name == "pasta":  # it trains the encoder alone
            flags = flags.replace("--vision-lr", "--lr")
            message = message.replace("vision_lr", "lr")
        done = trainer.run(tmp_path, *trainer.flags, "--steps", 1, *flags.split())
        assert message in done.stdout.splitlines()[-1], done.stdout
        assert done.returncode in (1, 2) or message.startswith("wrote")


def test_another_scripts_checkpoint(trainers, tmp_path):
    for name, other in itertools.permutations(trainers, 2):
        flags = [*trainers[name].flags, "--steps", 1, "--out", name]
        if not (tmp_path / name).exists():
            assert trainers[name].run(tmp_path, *flags).returncode == 0
        flags = [*trainers[other].flags, "--steps", 2, "--out", name, "--resume"]
        done = trainers[other].run(tmp_path, *flags)
        assert done.returncode == 1 and done.stdout.splitlines()[-1].startswith(
            f"{other}.py: --out {name} was begun with script {name}.py, not {other}.py: only")


def test_the_script_on_a_console_of_ascii(trainer, scenes, tmp_path, monkeypatch):
    """As a user starts it: letters that the console lacks end nothing; an error is one line, that
    of a library too."""
    (tmp_path / "Zürich").symlink_to(scenes)
    monkeypatch.chdir(tmp_path)
    for flags, message in (([], "wrote   out"),
                           (["--resume", "--lr", "1"], f"{trainer.name}.py: ")):
        console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", console)
        monkeypatch.setattr(sys, "argv", [
            "-", *map(str, trainer.flags), "--data", "Zürich", "--steps", "1", *flags])
        try:
            runpy.run_path(str(ROOT / f"{trainer.name}.py"), run_name="__main__")
        except SystemExit as stop:
            print(stop)
        console.flush()
        assert console.buffer.getvalue().decode().splitlines()[-1].startswith(message)


def test_real_frames(trainer, shared, tmp_path):
    done = trainer.run(tmp_path, *trainer.flags, "--data", shared / "spar", "--steps", 1)
    assert done.returncode == 0 and "0 problems with the data" in done.stdout, done.stdout


@pytest.mark.parametrize("of", ["made", "real"])
def test_a_tree_of_your_own(of, trainers, rooms, tmp_path, request, capsys):
    """docs/data.md's script, as it stands, on rendered recordings or real ones: no scene is in both
    splits, answers are those of the images' order; then two steps of each stage."""
    scenes = sorted((rooms / "rooms/images").iterdir())[:3]
    if of == "real":
        scenes = sorted(request.getfixturevalue("shared").glob("spar/*/images/*"))
    write_recordings(tmp_path / "frames", scenes)
    for pose in (tmp_path / "frames").glob("scene_90001/pose/*"):  # these are in millimetres
        cam2world = np.loadtxt(pose)
        cam2world[:3, 3] /= 1000
        np.savetxt(pose, cam2world)
    run_block(block_with("geometry.correspondence("), tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("left out: ") == printed.count(".txt: holds inf or NaN") == 1, printed
    found = {split: geometry.load_samples(tmp_path / "tree", split) for split in ("train", "val")}
    seen = {split: {sample.images[0].parts[-3] for sample in samples}
            for split, samples in found.items()}
    assert seen["val"] == {scenes[1].name} and seen["train"] == {
        scene.name for scene in scenes} - seen["val"]
    for sample in (*found["train"][::3], *found["val"][::3]):
        x, y = sample.views()
        assert 0.1 <= geometry.correspondence(x, y, 4).sum() / 16 <= 0.8
        assert (sample.task, sample.question, sample.answer) in geometry.pose_questions(
            geometry.relative_pose(x.cam2world, y.cam2world))
    for name, *flags in (("pasta",), ("actor_sft", "--target", "answer"),
                         ("actor_sft", "--target", "actions"), ("actor_grpo",)):
        done = trainers[name].run(tmp_path, *trainers[name].flags, *flags, "--data", "tree",
                                  "--steps", 2, "--out", "_".join([name, *flags]))
        assert done.returncode == 0 and "; 0 problems with the data" in done.stdout, done.stdout
        assert "looks wrong" not in done.stdout


def test_a_recording_of_tum(tmp_path):
    """docs/data.md's block: metres, matrices, and only what belongs to one moment."""
    poses, depths = write_tum(tmp_path / "rgbd_dataset_freiburg1_room")
    run_block(block_with("groundtruth.txt"), tmp_path)
    scene = tmp_path / "frames/rgbd_dataset_freiburg1_room"
    files = [sorted((scene / name).iterdir()) for name in ("color", "depth", "pose")]
    assert [len(of_folder) for of_folder in files] == [4, 4, 4]
    for picture, depth, pose, wanted, metres in zip(*files, poses, depths):
        assert picture.stem == depth.stem == pose.stem
        np.testing.assert_allclose(np.loadtxt(pose), wanted, atol=1e-5)
        np.testing.assert_allclose(np.asarray(Image.open(depth)) / 1000, metres, atol=6e-4)


@pytest.mark.parametrize("device, dtype, copies, offload, weights, state", [
    ("cpu", torch.float32, 1, False, "4 GiB on cpu", "6 GiB on cpu"),  # gradient, two moments
    ("cpu", torch.bfloat16, 1, False, "2 GiB on cpu", "8 GiB on cpu"),  # and masters
    ("cuda", torch.float16, 2, False, "4 GiB on cuda", "8 GiB on cuda"),  # with a reference
    ("cuda", torch.bfloat16, 1, True, "2 GiB on cuda", "8 GiB on cpu"),
    ("cuda", torch.float32, 1, True, "4 GiB on cuda", "8 GiB on cpu")])
def test_memory_line(device, dtype, copies, offload, weights, state):
    """For 2^30 parameters, of which one half is frozen."""
    with torch.device("meta"):
        model = torch.nn.Sequential(*[torch.nn.Linear(2**19, 2**10, bias=False) for _ in range(2)])
    model[0].requires_grad_(False)
    assert pasta.memory_line(
        model, copies, argparse.Namespace(offload=offload), dtype, torch.device(device)) == (
        f"memory  weights {weights}, masters, gradients and moments {state}; activations come on "
        "top")


def test_what_a_gpu_can_do(monkeypatch, capsys):
    """fp16, and a word, once, where bf16 is missing and nothing else is asked for."""
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for gpu, bf16, best, warning in (
            (True, True, "bf16", ""), (True, False, "fp16", "has no bf16"),
            (False, False, "fp32", "")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
        for asked, dtype in [("auto", names[best]), *names.items()]:
            rank, world, device, got = pasta.start_processes(asked)
            printed = capsys.readouterr().out
            assert (rank, world, device.type, got) == (0, 1, "cuda" if gpu else "cpu", dtype)
            assert ("warning" in printed) == bool(warning and asked == "auto")
            assert not printed or warning in printed
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # it would plan for every length anew
