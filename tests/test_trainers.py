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
import runpy
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import conftest
import geometry
import pasta
from conftest import ROOT, kills, quicken, records
from scenes import (
    as_published, change_json, change_weights, make_scenes, render, write_question, write_view)

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
    for (p, master, _), wanted, rate in zip(
            optimizer.tensors.values(), trained, rates, strict=True):
        torch.testing.assert_close(master, wanted, rtol=0, atol=1e-2 * rate)
        assert p.dtype == dtype and torch.equal(p, master.to(dtype))
    assert torch.equal(ours[2].bias, frozen)


def test_rate_of_the_image_encoder(trainer):
    """It is that of all else, unless said; the demo's own after PaStA."""
    parse, names = trainer.module.parse_args, ("lr", "vision_lr")
    demo = {"pasta": (1e-3, 1e-3), "actor_sft": (4e-4, 4e-5), "actor_grpo": (1e-4, 1e-5)}
    for flags, rates in (
            ([], demo[trainer.name]), (["--data", "-"], (1e-5, 1e-5)),
            (["--data", "-", "--lr", "1e-3"], (1e-3, 1e-3)),
            (["--data", "-", "--lr", "1e-3", "--vision-lr", "1e-6"], (1e-3, 1e-6))):
        if trainer.name != "pasta" or "--vision-lr" not in flags:
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


@pytest.mark.parametrize("dtype, norms, last", [
    (torch.float32, [math.nan, None, math.inf] + 3 * [math.nan], "4 of them: gradient norm nan "),
    (torch.float16, 25 * [math.inf], "25 of them: gradient norm inf "),
    (torch.float32, 2 * [math.nan] + 48 * [None],
     "48 of them: no usable sample .why.; look at the samples")])
def test_steps_in_a_row_without_an_update(dtype, norms, last):
    """Five that are not finite end a run, 25 with a loss scale, 50 of any kind (None: no sample
    could be used). An update begins the count anew."""
    optimizer = optimizer_of(small(), dtype)
    walk = argparse.Namespace(first_problem=lambda: " (why)")

    def miss(norm):
        return pasta.left_out(
            7, norm is not None, norm, [("a", None)], optimizer, walk, print)

    for norm in norms[:-1]:
        assert miss(norm)["skipped"].endswith(" (a)")
    optimizer.reduce()
    assert optimizer.step(1.0) and not optimizer.missed
    for norm in norms[:-1]:
        miss(norm)
    with pytest.raises(geometry.DataError, match=f"^{len(norms)} steps in a row .*{last}"):
        miss(norms[-1])


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
            for _, master, _ in optimizer.tensors.values():
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
    (source / "checkpoint.json").write_text("{ }")  # of the run that made it
    loaded, _ = pasta.load_model(*pasta.find_model(str(source)))
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
    assert pasta.read_checkpoint(out)["step"] == 1


@pytest.mark.parametrize("change, message", [
    (lambda model: change_weights(model, lambda tensors: {
        key: its for key, its in tensors.items() if "merger.mlp.0.bias" not in key}),
     "1 tensors are missing or have another shape than config.json says, model.visual.merger"),
    (lambda model: os.truncate(model / "model.safetensors", 5000),
     "model/model.safetensors: no complete model directory"),
    (lambda model: (as_published(model), (model / "model-00001-of-00002.safetensors").unlink()),
     "model/model-00001-of-00002.safetensors: no complete model directory"),
    (lambda model: (model / "tokenizer.json").unlink(), "has no tokenizer.json; copy the tokenize"),
    (lambda model: change_json(model / "config.json", quantization_config={"bits": 4}),
     "model: its weights are quantised; take the 16-bit model"),
    (shutil.rmtree, "model: no complete model directory, and none on the hub")])
def test_models_that_cannot_be_read(tiny_model, tmp_path, change, message):
    shutil.copytree(tiny_model, tmp_path / "model")
    change(tmp_path / "model")
    with contextlib.chdir(tmp_path), pytest.raises(geometry.DataError) as error:
        pasta.load_model(*pasta.find_model("model"))
    assert message in str(error.value)


def test_kill_while_a_run_is_saved(tiny_model, tmp_path):
    """What checkpoint.json names is whole and of one step. The model is of one step, or refused as
    not complete, whether its files have the former one's names or not. Nothing else is left."""
    out, published, numbers, seen = tmp_path / "out", tmp_path / "published", itertools.count(), []
    for path in (out, published):
        shutil.copytree(tiny_model, path)
    as_published(published)
    model, _ = pasta.load_model(*pasta.find_model(str(published)))
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name)
    optimizer = optimizer_of(model)

    def save():
        number = next(numbers)
        for _, master, adam in optimizer.tensors.values():
            master.data.fill_(number)
            adam.state[master] = dict.fromkeys(("exp_avg", "exp_avg_sq"), master.detach().clone())
        pasta.save_checkpoint(out, {"step": number, "args": {"steps": 0}}, optimizer)
        pasta.save_model(model, (tiny_model, published)[number % 2], out, optimizer)

    def step_of(files):
        its = [its for file in files for key, its in load_file(file).items() if "norm" in key]
        (step,) = {float(its.unique()) for its in its}
        return step

    save()
    for kill, _ in enumerate(kills(save), 1):
        state = pasta.read_checkpoint(out)
        assert step_of(out / file for file in state["files"].values()) == state["step"]
        with contextlib.suppress(geometry.DataError):
            seen.append((kill - step_of(pasta.weight_files(pasta.find_model(str(out))[0])),
                         kill - state["step"]))
    save()
    steps = step_of(pasta.weight_files(out)), pasta.read_checkpoint(out)["step"]
    assert steps == (next(numbers) - 1,) * 2
    assert {(True, True), (True, False), (False, False)} == {
        (model > 0, state > 0) for model, state in seen}
    assert len(list(out.glob("checkpoint*"))) == 4 and not (out / "incoming").exists()


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
    begun again without --resume, it is not thrown away. All other flags are the checkpoint's, and
    state, model, log and rollouts are, to the last bit, those of a run without a stop."""
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
    again = "--resume --out out --data moved_data --model moved_model".split()
    said = go_on(130, *again, "--steps", 3, number=signal.SIGINT)
    assert "stopped after step 2; go on with --resume --out out" in said
    assert "out holds a run stopped at step 2 of 3; go on" in go_on(1, *flags)
    go_on(143 if trainer.name == "pasta" else 129, *again, number=(
        signal.SIGTERM if trainer.name == "pasta" else signal.SIGHUP))
    go_on(0, *again[:3])
    paths = tmp_path / "whole", tmp_path / "out"
    a, b = map(pasta.read_checkpoint, paths)
    assert all(a[key] == b[key] for key in ("step", "t", "good", "scale", "files"))
    assert [b["args"][key] for key in ("data", "model")] == again[4::2]
    for file in ("model.safetensors", *a["files"].values()):
        a, b = (load_file(path / file) for path in paths)
        assert set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)
    assert_same_log(*paths, 0)


TWO = """import json, os, sys
import conftest
conftest.quicken()
for script, *flags in json.loads(sys.argv[1]):  # the processes meet anew for each
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False",
                   "MASTER_PORT": str(int(os.environ["MASTER_PORT"]) + 1)}
    __import__(script).main(flags)
"""


def test_two_processes_equal_one(trainers, tmp_path):
    """Three samples a step, on one process or on two, one of which has two; torchrun, which takes
    long to start, runs the scripts in turn."""
    (tmp_path / "two.py").write_text(TWO)
    runs = {name: [*map(str, its.flags), "--steps", "2", "--batch", "3", "--out", f"{name}_2"]
            for name, its in trainers.items()}
    done = conftest.run("two.py", tmp_path, tmp_path, json.dumps([
        [name, *flags] for name, flags in runs.items()]), processes=2,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert done.returncode == 0, done.stdout
    for name, flags in runs.items():
        assert trainers[name].run(tmp_path, *flags, "--out", name).returncode == 0
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
    """A NaN weight makes every step NaN: each is left out and named, none is saved, five end it."""
    shutil.copytree(tiny_model, tmp_path / "model")
    change_weights(tmp_path / "model", lambda tensors: tensors | {
        "visual.blocks.1.norm1.weight": torch.full((128,), math.nan)})
    done = trainer.run(tmp_path, *trainer.flags, *"--model model --steps 9 --save-every 9".split())
    assert done.returncode == 1
    assert done.stdout.count("left out: gradient norm nan (scene_") == 5
    assert "5 steps in a row changed no weight" in done.stdout.splitlines()[-1]
    assert not (tmp_path / "out/checkpoint.json").exists()


def test_a_run_without_an_update_writes_no_model(trainer, scenes, tiny_model, tmp_path):
    """Here no training picture is there. It fails however short it is, and when it is resumed."""
    shutil.copytree(scenes, tmp_path / "data")
    for number in range(6):
        shutil.rmtree(tmp_path / f"data/boxes/images/scene_{number}/image_color")
    for flags, problem in ((["--steps", 3], " (3 problems, the first: data/boxes/images/scene_"),
                           (["--resume"], "; look at the samples")):
        done = trainer.run(tmp_path, *trainer.flags, "--data", "data", *flags)
        assert done.returncode == 1 and done.stdout.splitlines()[-1].startswith(
            f"{trainer.name}.py: 3 steps in a row changed no weight, 3 of them: no usable sample"
            f"{problem}"), done.stdout
        assert not (tmp_path / "out/model.safetensors").exists()
        assert pasta.read_checkpoint(tmp_path / "out")["step"] == 3


def test_logits_that_are_not_finite(trainers, tiny_model, tmp_path):
    """A look at held-out samples says so; the log has null, which strict readers take."""
    shutil.copytree(tiny_model, tmp_path / "model")
    change_weights(tmp_path / "model", lambda tensors: tensors | {
        "model.norm.weight": torch.full((192,), math.nan)})
    run, flags = trainers["actor_sft"].run, trainers["actor_sft"].flags
    done = run(tmp_path, *flags, *"--model model --freeze language --steps 9".split())
    assert done.returncode == 1 and "warning: logits that are not finite in 3 of 3" in done.stdout
    lines = [json.loads(line, parse_constant=pytest.fail)
             for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert lines[1]["answer"] is None and lines[1]["heldout_loss"] is None


@pytest.mark.parametrize("file, damage, message", [
    ("log.jsonl", lambda text: text + b'{"step": 9, "inner": {"a": 1}', ""),
    ("log.jsonl", lambda text: text + b'[1]\n\n"step"\n{}\n\xff\xfe', ""),
    ("checkpoint.json", lambda text: b"", "checkpoint.json: cannot be read as a checkpoint"),
    ("checkpoint.json", lambda text: text[:-9], "checkpoint.json: cannot be read as a checkpoint"),
    ("checkpoint.json", lambda text: bytes(len(text)), "checkpoint.json: cannot be read as a chec"),
    ("checkpoint.json", lambda text: b'{"step": 1}', "checkpoint.json: cannot be read as a check"),
    ("checkpoint-1-master.safetensors", lambda text: text[:-9], "master.safetensors: this file of"),
    ("checkpoint-1-exp_avg.safetensors", lambda text: bytes(9), "avg.safetensors: this file of")])
def test_what_a_kill_or_a_disk_cut(trainers, tmp_path, monkeypatch, file, damage, message):
    """A line of a log is dropped; of a checkpoint one line says which file, at a new start too."""
    run, flags = trainers["pasta"].run, trainers["pasta"].flags
    monkeypatch.delattr(os, "sync")  # Windows has none
    assert run(tmp_path, *flags, "--steps", 1).returncode == 0
    (tmp_path / "out" / file).write_bytes(damage((tmp_path / "out" / file).read_bytes()))
    done = run(tmp_path, "--resume", "--out", "out", "--steps", 2)
    assert (done.returncode > 0) == bool(message) and message in done.stdout.splitlines()[-1]
    if not message:
        assert [line["step"] for line in records(tmp_path / "out")] == [0, 1, 2]
    if file == "checkpoint.json":
        done = run(tmp_path, *flags, "--steps", 1)
        assert message in done.stdout.splitlines()[-1]


def test_one_run_a_folder(trainers, tmp_path, monkeypatch):
    """A second one is refused until the first has ended; a warning where nothing can be locked."""
    run, flags = trainers["pasta"].run, [*trainers["pasta"].flags, "--steps", 1]
    (tmp_path / "out").mkdir()
    first = pasta.lock_folder(tmp_path / "out")
    done = run(tmp_path, *flags)
    assert done.returncode == 1 and "--out out: another run is writing" in done.stdout
    first.close()
    for fcntl, warning in ((sys.modules["fcntl"], False), (None, True), (argparse.Namespace(
            LOCK_EX=2, LOCK_NB=4, flock=lambda *_: os.open("/none/such", 0)), True)):
        monkeypatch.setitem(sys.modules, "fcntl", fcntl)
        done = run(tmp_path, *flags)
        assert done.returncode == 0 and ("warning: out cannot be locked" in done.stdout) == warning


@pytest.mark.parametrize("env, message", [
    ({"SLURM_STEP_NUM_TASKS": "2"}, "torchrun --nproc_per_node"),
    ({"WORLD_SIZE": "2"}, "RANK expected"), ({"WORLD_SIZE": ""}, "invalid literal"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}, "invalid")])
def test_processes_that_cannot_be_started(monkeypatch, env, message):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(geometry.DataError, match=message):
        pasta.start_processes("auto")


def test_what_is_loaded_is_copied(tmp_path):
    """A checkpoint's files would stay on the disk for as long as they are mapped."""
    optimizer = optimizer_of(small())
    optimizer.reduce()
    optimizer.step(1.0)
    pasta.save_checkpoint(tmp_path, {"step": 1, "args": {"steps": 1}}, optimizer)
    optimizer.load(tmp_path, pasta.read_checkpoint(tmp_path))
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_reader_that_has_gone(trainers, tmp_path):
    """Nor is a console closed, or a notebook's, the end of a run: the model is written."""
    (tmp_path / "gone.py").write_text(
        "import os, sys, conftest, pasta\nconftest.quicken()\n"
        "sys.stdout = pasta.Console(sys.stdout)\nos.close(1)\npasta.main(sys.argv[1:])")
    done = conftest.run("gone.py", tmp_path, tmp_path, *trainers["pasta"].flags, "--steps", 1,
                        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert done.returncode == 0 and (tmp_path / "out/model.safetensors").exists(), done.stdout
    (closed := io.StringIO()).close()
    for stream in (None, argparse.Namespace(write=str, flush=str, isatty=bool), closed):
        print("said", file=pasta.Console(stream))
    assert not pasta.Console(None).isatty()


def test_bad_arguments(trainer, scenes, tiny_model, tmp_path):
    """Among them: data with another question, a model with another weight than the run had."""
    for its, name in ((scenes, "data"), (tiny_model, "model")):
        shutil.copytree(its, tmp_path / name)
    assert trainer.run(tmp_path, *trainer.flags, "--steps", 1).returncode == 0
    (tmp_path / "taken").write_text("a file")
    write_question(tmp_path / "data", "train", "camera_turn", "fill", "scene_0", (0, 2), "?", "1")
    change_weights(tmp_path / "model", lambda tensors: tensors | {"lm_head.bias": torch.zeros(1)})
    for flags, message in (
            *((f"--{flag}", f"--{flag.split()[0]} is out of range") for flag in (
                "seed -1", "lr 0", "lr nan", "steps 0", "batch 0", "save-every -2")),
            ("--precision int8", "invalid choice"), ("--res", "unrecognized arguments: --res"),
            ("--model nowhere", "nowhere: no complete model directory"),
            ("--data nowhere", "nowhere: no such directory; --data takes the folder that holds"),
            ("--out taken", "File exists: 'taken'"),
            ("--model model --out model", "--out model is the start model's"),
            ("--resume --out new", "--out new has no checkpoint.json to --resume from"),
            ("--resume --lr 2e-3", "--resume: --lr was 0.001 and must stay so"),
            ("--resume --vision-lr 2e-3", "--resume: --vision-lr was 0.001 and must stay so"),
            ("--resume --data data", "--out out was begun with another --data than data"),
            ("--resume --model model", "--out out was begun with another --model than model")):
        if trainer.name == "pasta":  # it trains the encoder alone
            flags = flags.replace("--vision-lr", "--lr")
            message = message.replace("--vision-lr", "--lr")
        done = trainer.run(tmp_path, *trainer.flags, "--steps", 2, *flags.split())
        assert done.returncode in (1, 2) and message in done.stdout.splitlines()[-1], done.stdout


def test_the_script_on_a_console_of_ascii(trainer, scenes, tmp_path, monkeypatch):
    """As a user starts it: letters that the console lacks end nothing; an error is one line, that
    of a library too."""
    (tmp_path / "Zürich").symlink_to(scenes)
    monkeypatch.chdir(tmp_path)
    for flags, message in ((["--steps", "1"], "wrote   out"),
                           (["--resume", "--steps", "2"], f"{trainer.name}.py: ")):
        console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", console)
        monkeypatch.setattr(sys, "argv", [
            "-", *map(str, trainer.flags), "--data", "Zürich", *flags])
        try:
            runpy.run_path(str(ROOT / f"{trainer.name}.py"), run_name="__main__")
        except SystemExit as stop:
            print(stop)
        console.flush()
        assert console.buffer.getvalue().decode().splitlines()[-1].startswith(message)
        os.truncate("out/checkpoint-1-master.safetensors", 5000)


def test_real_frames(trainer, shared, tmp_path):
    done = trainer.run(tmp_path, *trainer.flags, "--data", shared / "spar", "--steps", 1)
    assert done.returncode == 0 and "0 problems with the data" in done.stdout, done.stdout


@pytest.mark.parametrize("device, dtype, trained, offload, needs", [
    ("cpu", torch.float32, 1024, False, {"host": 17.5}),  # GiB: weight, 1.1 (gradient, two moments)
    ("cpu", torch.bfloat16, 1024, False, {"host": 19.9}),  # master weights
    ("cpu", torch.bfloat16, 512, False, {"host": 11.1}),  # half of it is frozen
    ("cuda", torch.float16, 1024, False, {"GPU": 18.3, "host": 4.3}),  # a checkpoint
    ("cuda", torch.bfloat16, 1024, True, {"GPU": 2.3, "host": 17.9}),
    ("cuda", torch.float32, 1024, True, {"GPU": 4.3, "host": 17.9})])
def test_memory_line(monkeypatch, device, dtype, trained, offload, needs):
    """For 2^30 parameters in tensors of 2^20; advice only where less is free than needed."""
    for free in (20, 11):
        monkeypatch.setattr(Path, "read_text", lambda path: f"MemAvailable:  {free * 2**20} kB")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 2**30, 2**40))
        line = pasta.memory_line(2**30, [2**20] * trained, 0, dtype, torch.device(device), offload)
        assert line.startswith("memory  " + ", ".join(
            f"{where} {its:.1f} GiB" for where, its in needs.items()))
        assert ("more than is free: --freeze" in line) == (max(needs.values()) > free)
    monkeypatch.setattr(Path, "read_text", lambda path: "MemFree: 1 kB")  # as some kernels have it
    line = pasta.memory_line(2**30, [2**30], 2**12, dtype, torch.device("cpu"))
    assert float(line.split()[2]) > needs["host"]  # the largest tensor's update, activations
    more = pasta.memory_line(2**30, [2**30], 2**12, dtype, torch.device("cpu"), pixels=2**30 // 6)
    grown = float(more.split()[2]) - float(line.split()[2])
    assert grown == pytest.approx(dtype.itemsize, abs=0.11)  # GiB: held-out pictures


def test_what_a_gpu_can_do(monkeypatch, capsys):
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
            rank, world, device, got = pasta.start_processes(asked)
            said = capsys.readouterr().out
            assert (rank, world, device.type, got) == (0, 1, "cuda" if gpu else "cpu", dtype)
            assert warning in said and bool(warning) == ("warning" in said)
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # it would plan for every length anew
