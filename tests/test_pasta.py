"""pasta.py: Eqs. 2-5 against naive loops, features, precision, resuming, processes, bad input."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

import conftest
import geometry
import pasta
from conftest import records


run = partial(conftest.run, "pasta.py")


@pytest.fixture(scope="module")
def flags(rooms, tiny_model):
    return ["--data", rooms, "--model", tiny_model, "--grid", 4, "--heldout", 4, "--lr", 1e-3,
            "--eval-every", 2]


# --- the method


def naive_loss(S, e_x, e_y, tau1, tau2):
    """Eqs. 2, 3 and 5 one number at a time, in float64. Returns the loss and H(p)."""
    P = len(S)
    CE = H = 0.0
    for i in range(P):
        z = [math.exp(float(S[i][j]) / tau1) for j in range(P)]
        cos = []
        for j in range(P):
            dot = sum(float(a) * float(b) for a, b in zip(e_x[i], e_y[j]))
            cos.append(dot / math.sqrt(sum(float(a) ** 2 for a in e_x[i])
                                       * sum(float(b) ** 2 for b in e_y[j])))
        w = [math.exp(c / tau2) for c in cos]
        for j in range(P):
            p = z[j] / sum(z)
            CE -= p * math.log(w[j] / sum(w))
            H -= p * math.log(p)
    return CE / P, H / P


def test_loss_against_naive_loop():
    g = torch.Generator().manual_seed(0)
    args = pasta.parse_args([])
    e = [torch.randn(9, 5, generator=g, dtype=torch.float64) for _ in range(3)]
    S = [torch.rand(9, 9, generator=g, dtype=torch.float64) * (torch.rand(9, 9, generator=g) < 0.3)
         for _ in range(2)]
    S[0][2] = 0
    pairs = [(0, 1, S[0]), (0, 2, S[1])]
    loss, excess = pasta.alignment_loss(e, pairs, len(pairs), args)
    wanted = floor = 0.0
    for x, y, s in pairs:
        for one in (naive_loss(s, e[x], e[y], 0.1, 0.07), naive_loss(s.T, e[y], e[x], 0.1, 0.07)):
            wanted, floor = wanted + one[0] / 2, floor + one[1] / 2
    assert abs(float(loss) - wanted) < 1e-9 and abs(float(excess) - (wanted - floor)) < 1e-9
    assert float(excess) > 0


def test_excess_is_zero_for_the_perfect_encoder():
    """cos = S exactly and tau1 = tau2: nothing is left to learn, though the loss is far from 0."""
    S = torch.full((4, 4), 0.1, dtype=torch.float64) + 0.8 * torch.eye(4, dtype=torch.float64)
    e_x = torch.eye(4, dtype=torch.float64)
    rows = S.T.clone()  # e_y[j] . e_x[i] = S[i, j]; norms made 1 by a fifth coordinate
    e_y = torch.cat([rows, (1 - rows.square().sum(-1, keepdim=True)).sqrt()], dim=1)
    e_x = torch.cat([e_x, torch.zeros(4, 1, dtype=torch.float64)], dim=1)
    CE, H = pasta.directional_loss(S, e_x, e_y, 0.1, 0.1)
    assert abs(float(CE - H)) < 1e-12 and float(H) > 0.001


def test_rows_without_overlap():
    """Uniform target as Eq. 2 gives it; left out with skip_empty; nothing at all costs nothing."""
    g = torch.Generator().manual_seed(0)
    e_x, e_y = torch.randn(4, 8, generator=g), torch.randn(4, 8, generator=g)
    S = torch.zeros(4, 4)
    S[1, 2] = 0.7
    assert torch.allclose(pasta.target_distribution(S, 0.1)[0], torch.full((4,), 0.25))
    p, log_q = pasta.target_distribution(S, 0.1), pasta.log_prediction(e_x, e_y, 0.07)
    only, _ = pasta.directional_loss(S, e_x, e_y, 0.1, 0.07, skip_empty=True)
    assert torch.allclose(only, -(p * log_q)[1].sum())
    none, _ = pasta.directional_loss(S * 0, e_x, e_y, 0.1, 0.07, skip_empty=True)
    assert float(none) == 0


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 16])
@pytest.mark.parametrize("h, w", [(8, 8), (13, 19), (5, 3)])
def test_cells_have_the_edges_of_the_geometry(n, h, w):
    """Each token is cut into 240 x 240 dots; a cell's feature is the mean of the dots within."""
    tokens = torch.randn(
        h, w, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    k = 240
    wanted = np.zeros((n * n, 3))
    rows = (np.arange(h * k) + 0.5) / (h * k) * n
    columns = (np.arange(w * k) + 0.5) / (w * k) * n
    for a in range(n):
        for b in range(n):
            in_row = np.bincount(np.arange(h * k)[rows.astype(int) == a] // k, minlength=h)
            in_column = np.bincount(np.arange(w * k)[columns.astype(int) == b] // k, minlength=w)
            weight = np.outer(in_row, in_column) / (in_row.sum() * in_column.sum())
            wanted[a * n + b] = (weight[..., None] * tokens.numpy()).sum((0, 1))
    assert np.abs(pasta.cell_features(tokens, n).numpy() - wanted).max() < 1e-5


def test_match_accuracy_by_hand():
    e = torch.eye(3)
    S = torch.tensor([[0.9, 0.0, 0.0], [0.2, 0.0, 0.1], [0.0, 0.0, 0.0]])
    guess, similarity, gold, overlaps = pasta.matches(S, e, e)
    assert (guess.tolist() == [0, 1, 2] and gold.tolist()[:2] == [0, 0]
            and overlaps.tolist() == [True, True, False])


# --- the encoder


def frames_of(args, *sizes, seed=0):
    """Prepared frames of random pictures of the given (W, H)."""
    rng = np.random.default_rng(seed)
    prepare = pasta.Frames(args, True)
    views = [geometry.View(rng.integers(0, 255, (H, W, 3), dtype=np.uint8),
                           np.ones((H, W), np.float32), np.eye(3), np.eye(4)) for W, H in sizes]
    return [prepare.patches(view) for view in views]


def test_raster_order_in_an_image_wider_than_one_window(tiny_model):
    """A bright square moves over a 336x224 image: the token that changes most is where it is.

    Attention is cut off (its output projection zeroed), so each token sees its own pixels only. The
    merged tokens are 8 x 12, the windows 4 x 4: in window order the places would come out permuted.
    """
    encoder = pasta.load_encoder(tiny_model, "cpu")
    for block in encoder.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
        torch.nn.init.zeros_(block.attn.proj.bias)
    args = pasta.parse_args([])
    prepare = pasta.Frames(args, True)

    def tokens(image):
        view = geometry.View(image, np.ones((224, 336), np.float32), np.eye(3), np.eye(4))
        frame = prepare.patches(view)
        with torch.no_grad():
            return encoder(
                frame["patches"], grid_thw=torch.tensor([(1, *frame["grid"])])).pooler_output

    grey = np.full((224, 336, 3), 90, np.uint8)
    base = tokens(grey)
    for row, column in ((0, 0), (0, 5), (3, 11), (4, 4), (7, 2), (5, 9)):
        image = grey.copy()
        image[row * 28:row * 28 + 28, column * 28:column * 28 + 28] = 250
        assert int((tokens(image) - base).norm(dim=-1).argmax()) == row * 12 + column
    # and through the cells: a 2 x 3 block of tokens makes one cell of a 4 x 4 grid
    image = grey.copy()
    image[2 * 56:3 * 56, 3 * 84:4 * 84] = 250
    frames = [
        prepare.patches(geometry.View(i, np.ones((224, 336), np.float32), np.eye(3), np.eye(4)))
        for i in (grey, image)]
    with torch.no_grad():
        a, b = pasta.encode(encoder, frames, 4, "cpu")
    assert int((a - b).norm(dim=-1).argmax()) == 2 * 4 + 3


def test_images_of_different_size_in_both_orders(tiny_model):
    encoder = pasta.load_encoder(tiny_model, "cpu")
    args = pasta.parse_args([])
    a, b = frames_of(args, (224, 224), (532, 364))
    assert a["grid"] == (16, 16) and b["grid"] == (26, 38)
    with torch.no_grad():
        alone = [pasta.encode(encoder, [f], 5, "cpu")[0] for f in (a, b)]
        forth, back = (pasta.encode(encoder, [a, b], 5, "cpu"),
                       pasta.encode(encoder, [b, a], 5, "cpu"))
    for one, x, y in zip(alone, forth, back[::-1]):
        assert torch.allclose(one, x, atol=1e-5) and torch.allclose(one, y, atol=1e-5)


def test_faster_encoder_and_recomputing_change_no_number(tiny_model):
    """Grouped windows, patch product, recomputing: the library's features and gradients."""
    args = pasta.parse_args([])
    frames = frames_of(args, (224, 224), (252, 364), (224, 224))
    S = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    gradients = []
    for kind in ("library", "faster", "recomputing"):
        encoder = pasta.load_encoder(tiny_model, "cpu")
        if kind != "library":
            pasta.speed_up(encoder)
        if kind == "recomputing":
            for block in encoder.blocks:
                pasta.recompute_in_backward(block)
        e = pasta.encode(encoder, frames, 4, "cpu")
        loss, _ = pasta.alignment_loss(e, [(0, 1, S), (1, 2, S)], 2, args)
        loss.backward()
        gradients.append((loss.item(), torch.cat([p.grad.flatten() for p in encoder.parameters()])))
    for loss, gradient in gradients[1:]:
        assert abs(loss - gradients[0][0]) < 1e-5
        assert float((gradient - gradients[0][1]).norm() / gradients[0][1].norm()) < 1e-4


def test_recomputing_keeps_no_activation(tiny_model):
    """What autograd holds on to between forward and backward shrinks to a few tensors a block."""
    frames, kept = frames_of(pasta.parse_args([]), (224, 224)), []
    for recompute in (False, True):
        encoder = pasta.load_encoder(tiny_model, "cpu")
        if recompute:
            for block in encoder.blocks:
                pasta.recompute_in_backward(block)
        held = 0

        def hold(tensor):
            nonlocal held
            held += 0 if tensor.requires_grad and tensor.is_leaf else tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            pasta.encode(encoder, frames, 4, "cpu")
        kept.append(held)
    assert kept[1] < 0.4 * kept[0]


def test_gradient_reaches_the_whole_encoder_and_learning_lowers_the_loss(tiny_model, rooms):
    encoder = pasta.load_encoder(tiny_model, "cpu")
    args = pasta.parse_args([])
    prepare = pasta.Frames(args, True)
    sample = geometry.load_samples(rooms, tasks=("depth_prediction_oc_mv",))[0]
    frames, pairs = prepare.prepare(sample, pasta.all_pairs(sample))
    assert [(x, y) for x, y, _ in pairs] == [(0, 1), (0, 2), (1, 2)]
    optimizer, losses = pasta.Adam(encoder, torch.float32, 1e-3, 1.0), []
    for step in range(8):
        loss, _ = pasta.alignment_loss(pasta.encode(encoder, frames, 4, "cpu"), pairs, 3, args)
        optimizer.backward(loss)
        norm = optimizer.reduce()
        if step == 0:
            assert all(float(g.norm()) > 0 for g in optimizer.grads)
        change = optimizer.step(norm)
        losses.append(float(loss.detach()))
        assert change > 0
    assert losses[-1] < losses[0] - 0.05


# --- precision by hand


def small(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).to(dtype)


def test_adam_equals_the_library():
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    ours, theirs = small(), small()
    mine = pasta.Adam(ours, torch.float32, 1e-2, 0.5)
    library = torch.optim.AdamW(theirs.parameters(), 1e-2, weight_decay=0.0)
    for _ in range(20):
        mine.backward(ours(x).square().sum())
        mine.step(mine.reduce())
        library.zero_grad()
        theirs(x).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        library.step()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert torch.allclose(a, b, atol=1e-6)


def test_update_norm_is_the_change_of_the_weights():
    model = small()
    optimizer = pasta.Adam(model, torch.float32, 1e-2, 1.0)
    before = optimizer.master.clone()
    optimizer.backward(model(torch.ones(3, 6)).sum())
    change = optimizer.step(optimizer.reduce())
    assert abs(change - float((optimizer.master - before).norm())) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights_move_where_working_weights_cannot(dtype):
    """At lr 1e-5 one step rounds away in 16 bits; a hundred of them, kept in fp32, do not."""
    model = small()
    optimizer = pasta.Adam(model, dtype, 1e-5, 1.0)
    assert next(model.parameters()).dtype == dtype
    start, working = optimizer.master.clone(), model[0].weight.detach().clone()
    x = torch.ones(4, 6, dtype=dtype)
    optimizer.backward(model(x).float().mean() / 100)
    optimizer.step(optimizer.reduce())
    stuck = float((model[0].weight == working).float().mean())
    for _ in range(99):
        optimizer.backward(model(x).float().mean() / 100)
        optimizer.step(optimizer.reduce())
    assert stuck > 0.5
    assert abs(float((optimizer.master - start).abs().median()) - 1e-3) < 1e-4
    assert torch.equal(model[0].weight.flatten(), optimizer.master[:96].to(dtype))


def test_fp16_loss_scale():
    """Gradients that fp16 cannot hold survive by the scale; overflow halves it, moves no weight."""
    model = small()
    optimizer = pasta.Adam(model, torch.float16, 1e-3, 1.0)
    x = torch.ones(4, 6, dtype=torch.float16)
    optimizer.backward(model(x).float().sum() * 1e-7)
    norm = optimizer.reduce()
    assert optimizer.scale == 2**16 and 1e-8 < norm < 1e-5
    optimizer.step(norm)
    before = optimizer.master.clone()
    optimizer.backward(model(x).float().sum() * 1e4)
    assert not math.isfinite(optimizer.reduce())
    assert optimizer.skip() and optimizer.scale == 2**15 and torch.equal(optimizer.master, before)
    assert float(optimizer.grad.abs().sum()) == 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_in_16_bits(root, tmp_path, flags, precision):
    done = run(root, tmp_path, *flags, "--steps", 3, "--out", "out", "--precision", precision)
    assert done.returncode == 0, done.stdout
    steps = records(tmp_path / "out")[1:]
    assert all(step["update_norm"] > 0 and step["excess"] > 0 for step in steps)


# --- the model directory


def test_demo_model_is_an_ordinary_directory(tiny_model):
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tiny_model, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = "How far is the red ball (red point) from the blue pillar?"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for name, number in (("<|image_pad|>", model.config.image_token_id),
                         ("<|video_pad|>", model.config.video_token_id),
                         ("<|vision_start|>", model.config.vision_start_token_id),
                         ("<|im_end|>", model.config.get_text_config().eos_token_id)):
        assert tokenizer(name)["input_ids"] == [number]
    assert len(tokenizer("1234")["input_ids"]) == 4  # one token a digit, as Qwen's
    assert Qwen2VLImageProcessorPil.from_pretrained(tiny_model).patch_size == 14


def shard_like_published(model, path):
    """The model as Qwen publishes it: keys "visual.*", "model.*", "lm_head.*"; three bf16 files."""
    path.mkdir()
    tensors = {}
    for key, tensor in load_file(model / "model.safetensors").items():
        key = key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        tensors[key] = tensor.to(torch.bfloat16)
    names, index = sorted(tensors), {}
    for k in range(3):
        part = {name: tensors[name] for name in names[k::3]}
        name = f"model-{k + 1:05}-of-00003.safetensors"
        save_file(part, path / name, {"format": "pt"})
        index |= dict.fromkeys(part, name)
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index}))
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (path / file.name).write_bytes(file.read_bytes())
    return tensors


def test_published_keys_and_shards(root, tmp_path, tiny_model, flags):
    """Only the vision tower is read and changed; all else passes through, and the result loads."""
    before = shard_like_published(tiny_model, tmp_path / "published")
    done = run(root, tmp_path, *flags, "--model", tmp_path / "published", "--steps", 2,
               "--out", "out")
    assert done.returncode == 0, done.stdout
    after = {}
    for k in range(3):
        name = f"model-{k + 1:05}-of-00003.safetensors"
        part = load_file(tmp_path / "out" / name)
        assert set(part) == set(load_file(tmp_path / "published" / name))
        after |= part
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key.startswith("visual.") for key in changed)
    assert all(after[key].dtype == torch.bfloat16 for key in after)
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    weight = dict(model.named_parameters())["model.visual.blocks.0.attn.qkv.weight"]
    assert torch.equal(weight, after["visual.blocks.0.attn.qkv.weight"])


# --- runs


@pytest.fixture(scope="module")
def four_steps(root, tmp_path_factory, flags):
    """One uninterrupted run of four steps."""
    cwd = tmp_path_factory.mktemp("run")
    done = run(root, cwd, *flags, "--steps", 4, "--out", "four")
    assert done.returncode == 0, done.stdout
    return cwd / "four", done.stdout


def test_log_and_pictures(four_steps):
    out, text = four_steps
    lines = records(out)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert set(lines[1]) == {"step", "loss", "excess", "grad_norm", "update_norm", "pairs_per_s"}
    for line in (lines[0], lines[2], lines[4]):
        assert 0 <= line["match_accuracy"] <= 1 and line["chance"] == 1 / 16
    assert lines[0]["drift"] == 0 < lines[2]["drift"]
    assert Image.open(out / "matches.png").size[0] > 800
    assert "trains" in text and "batch   1" in text and "left 0:00" in text


def test_resume_is_exact(root, four_steps, flags, tmp_path):
    """2 + 2 steps equal 4, to the last bit, log included."""
    whole, _ = four_steps
    assert run(root, tmp_path, *flags, "--steps", 2, "--out", "half").returncode == 0
    done = run(root, tmp_path, *flags, "--steps", 4, "--out", "half", "--resume")
    assert done.returncode == 0, done.stdout
    for name in ("checkpoint.safetensors", "model.safetensors"):
        a, b = load_file(whole / name), load_file(tmp_path / "half" / name)
        assert set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)
    for a, b in zip(records(whole), records(tmp_path / "half"), strict=True):
        assert {k: v for k, v in a.items() if k != "pairs_per_s"} == {
            k: v for k, v in b.items() if k != "pairs_per_s"}


def test_two_processes_equal_one(root, flags, tmp_path):
    """The same two samples a step, on one process or on two; their pair counts differ."""
    for out, processes in (("one", 1), ("two", 2)):
        done = run(root, tmp_path, *flags, "--steps", 2, "--batch", 2, "--out", out,
                   processes=processes)
        assert done.returncode == 0, done.stdout
    for a, b in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        for key in ("loss", "excess", "grad_norm", "match_accuracy"):
            if key in a:
                assert abs(a[key] - b[key]) < 1e-4 * max(1, abs(a[key]))
    a, b = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "two"))
    moved = max(float((a[key] - b[key]).abs().max()) for key in a)
    # a step is 1e-3; Adam's first one is lr * sign, whatever the gradient's size
    assert moved < 2e-4


def test_a_batch_that_cannot_be_shared(root, flags, tmp_path):
    done = run(root, tmp_path, *flags, "--steps", 2, "--out", "out", processes=2)
    assert done.returncode and (
        "--batch 1 cannot be shared by 2 processes: use --batch 2" in done.stdout)


def test_signal_saves_and_resume_goes_on(root, flags, tmp_path):
    command = [sys.executable, str(root / "pasta.py"), *map(str, flags), "--steps", "5000",
               "--eval-every", "5000", "--out", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    log = tmp_path / "out" / "log.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and not (log.exists() and log.read_text().count("\n") > 4):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM and "--resume goes on" in text
    step = pasta.read_checkpoint(tmp_path / "out" / "checkpoint.safetensors")["step"]
    assert records(tmp_path / "out")[-1]["step"] == step > 2
    # started again without --resume, it does not throw the unfinished run away
    done = run(root, tmp_path, *flags, "--steps", 5000, "--eval-every", 5000, "--out", "out")
    assert done.returncode == 1 and f"holds a run stopped at step {step} of 5000" in done.stdout
    done = run(root, tmp_path, *flags, "--steps", step + 1, "--eval-every", 5000, "--out", "out",
               "--resume")
    assert done.returncode == 0 and records(tmp_path / "out")[-1]["step"] == step + 1


def test_kill_during_a_save(four_steps, tmp_path):
    """Killed at whatever moment of saving, the last checkpoint loads."""
    checkpoint = tmp_path / "checkpoint.safetensors"
    code = """
import sys, torch; sys.path.insert(0, sys.argv[2])
import pasta
from pathlib import Path
for step in range(10_000):
    pasta.save_tensors(Path(sys.argv[1]), {"master": torch.full((2_000_000,), float(step))},
                       {"state": '{"step": %d}' % step})
    print(step, flush=True)
"""
    rng = np.random.default_rng(0)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(checkpoint), str(four_steps[0].parent.parent)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.path.dirname(pasta.__file__)})
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.wait()
        step = pasta.read_checkpoint(checkpoint)["step"]
        assert torch.equal(load_file(checkpoint)["master"], torch.full((2_000_000,), float(step)))


def test_full_disk_while_saving(root, four_steps, flags, tmp_path):
    """Files may not grow past 1 MB: one line says so, and the checkpoint of before is whole."""
    assert run(root, tmp_path, *flags, "--steps", 2, "--out", "out").returncode == 0
    before = (tmp_path / "out/checkpoint.safetensors").read_bytes()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    done = run(root, tmp_path, *flags, "--steps", 4, "--out", "out", "--resume", preexec_fn=limit)
    assert done.returncode == 1 and "Traceback" not in done.stdout
    assert "could not save out/checkpoint.safetensors" in done.stdout.splitlines()[-1]
    assert (tmp_path / "out/checkpoint.safetensors").read_bytes() == before
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_disk_too_full_for_a_picture(root, flags, tmp_path):
    """The checkpoint is written before the picture; no room for either is one line."""
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = run(root, tmp_path, *flags, "--steps", 2, "--out", "out", preexec_fn=limit)
    assert done.returncode == 1 and "Traceback" not in done.stdout
    assert "could not save out/checkpoint.safetensors" in done.stdout.splitlines()[-1]


def test_shards_of_a_former_model_go(root, flags, tmp_path, tiny_model):
    """A model in one file, then one in three shards, in the same --out: the second one loads."""
    shard_like_published(tiny_model, tmp_path / "published")
    assert run(root, tmp_path, *flags, "--steps", 1, "--out", "out").returncode == 0
    done = run(root, tmp_path, *flags, "--model", tmp_path / "published", "--steps", 1,
               "--out", "out")
    assert done.returncode == 0, done.stdout
    assert not (tmp_path / "out/model.safetensors").exists()
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == 3
    Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert run(root, tmp_path, *flags, "--steps", 1, "--out", "out").returncode == 0
    assert [f.name for f in (tmp_path / "out").glob("model*")] == ["model.safetensors"]


def test_models_that_cannot_be_read(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    tensors = load_file(weights)
    name = next(key for key in tensors if key.endswith("visual.merger.mlp.0.bias"))
    save_file({**tensors, name: torch.zeros(3)}, weights)
    with pytest.raises(geometry.DataError, match="not what config.json says: size mismatch"):
        pasta.load_encoder(tmp_path / "model", "cpu")
    del tensors[name]
    save_file(tensors, weights)
    with pytest.raises(geometry.DataError, match="1 tensors of the image encoder are not in its"):
        pasta.load_encoder(tmp_path / "model", "cpu")
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(geometry.DataError, match="model.safetensors: cannot be read"):
        pasta.load_encoder(tmp_path / "model", "cpu")


def test_unreadable_frames_are_named_skipped_and_counted(root, flags, tmp_path, rooms):
    shutil.copytree(rooms, tmp_path / "data")
    broken = sorted((tmp_path / "data").glob("rooms/images/*/image_color/0.jpg"))[0]
    broken.write_bytes(broken.read_bytes()[:500])
    done = run(root, tmp_path, *flags, "--data", "data", "--steps", 25, "--eval-every", 25,
               "--out", "out")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(f"skipped data/{broken.relative_to(tmp_path / 'data')}") == 1
    assert "skipped 1 frames or records" in done.stdout


def test_non_finite_steps_are_left_out_and_end_the_run(root, flags, tmp_path, tiny_model):
    """A NaN weight makes every step NaN: each is named, none changes a weight, five end it."""
    shutil.copytree(tiny_model, tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors["visual.blocks.1.norm1.weight"][0] = math.nan
    save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    done = run(root, tmp_path, *flags, "--model", "model", "--steps", 20, "--out", "out")
    assert done.returncode == 1
    assert done.stdout.count("left out: loss nan") == 5 and "(room_0000" in done.stdout
    assert "five steps in a row were not finite" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("change, message", [
    (["--data", "nowhere"], "pasta.py: nowhere: no such directory"),
    (["--model", "nowhere"],
     "nowhere: no such model directory. `python pasta.py --grid 4` makes a tiny one"),
    (["--grid", "300"], "--grid 300"),
    (["--resume"], "out/checkpoint.safetensors: cannot be read as a checkpoint"),
    (["--seed", "-1"], "--seed must be 0 or more, got -1"),
    (["--max-pixels", "0"], "--max-pixels must be 1 or more, got 0"),
    (["--grid", "0"], "--grid must be 1 or more, got 0"),
    (["--tau1", "0"], "--tau1 must be above 0, got 0.0"),
    (["--lr", "0"], "--lr must be above 0, got 0.0"),
    (["--steps", "0"], "--steps must be 1 or more, got 0"),
])
def test_bad_arguments(root, flags, tmp_path, change, message):
    done = run(root, tmp_path, *flags, "--steps", 2, "--out", "out", *change)
    assert done.returncode in (1, 2) and message in done.stdout


def test_errors_are_one_line(root, flags, tmp_path):
    """As a user sees them: what ends the process is its last line, and no traceback."""
    (tmp_path / "taken").write_text("a file")
    for change, message in ((["--out", "taken"], "File exists: 'taken'"),
                            (["--data", "nowhere"], "nowhere: no such directory")):
        done = run(root, tmp_path, *flags, "--steps", 2, *change, env=None)
        assert done.returncode == 1 and "Traceback" not in done.stdout
        assert done.stdout.splitlines()[-1].startswith("pasta.py: ")
        assert message in done.stdout.splitlines()[-1]


def test_data_without_a_model(root, rooms, tmp_path):
    done = run(root, tmp_path, "--data", rooms)
    assert done.returncode == 2 and "--data needs a --model" in done.stdout


def test_resume_with_other_arguments(root, flags, four_steps):
    out, _ = four_steps
    done = run(root, out.parent, *flags, "--steps", 6, "--out", "four", "--resume", "--tau1", 0.3)
    assert done.returncode == 1 and "was made with --tau1 0.1, not 0.3" in done.stdout


def test_without_val_some_pairs_are_held_out(shared):
    """No pair of frames is both trained on and evaluated on, whichever samples it occurs in."""
    samples = geometry.load_samples(shared / "spar", tasks=geometry.MULTI_VIEW_TASKS)
    frames = pasta.Frames(pasta.parse_args([]), own_val=False)
    held = {frozenset(s.images[k] for k in pair)
            for s, pair in pasta.find_held_out(samples, frames, 64)}
    trained = {frozenset(s.images[k] for k in pair) for s in samples for pair in pasta.all_pairs(s)
               if not frames.held_out(s, pair)}
    assert held and trained and not held & trained
    for k in pasta.draw_samples(samples, frames, 1000, seed=0):  # none without a pair to train on
        assert not all(frames.held_out(samples[k], pair) for pair in pasta.all_pairs(samples[k]))


def test_real_frames(root, shared, tiny_model, tmp_path):
    done = run(root, tmp_path, "--grid", 4, "--data", shared / "spar", "--model", tiny_model,
               "--steps", 3, "--out", "out")
    assert done.returncode == 0, done.stdout
    assert Image.open(tmp_path / "out/matches.png").size[0] > 800


def test_sample_order_is_a_function_of_seed_and_position(rooms):
    samples = geometry.load_samples(rooms)
    frames = pasta.Frames(pasta.parse_args([]), own_val=True)
    drawn = pasta.draw_samples(samples, frames, 20, seed=5)
    assert len(set(drawn)) == 20
    order = pasta.sample_order(drawn, seed=5)
    first = [order(k) for k in range(60)]
    assert set(first[:20]) == set(first[20:40]) == set(drawn) and first[:20] != first[20:40]
    again = pasta.sample_order(drawn, seed=5)
    assert [again(k) for k in (57, 3, 39, 0)] == [first[k] for k in (57, 3, 39, 0)]
    assert [pasta.sample_order(drawn, seed=6)(k) for k in range(20)] != first[:20]
    assert set(pasta.draw_samples(samples, frames, 20, seed=6)) != set(drawn)
