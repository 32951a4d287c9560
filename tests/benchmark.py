"""Speed and memory, as ratios within one run: python tests/benchmark.py WHAT

    pasta   Eq. 1 against a warp of every pixel; a training step against the bare encoder; memory;
            on a CUDA GPU also Qwen2.5-VL-3B's vision tower at its real size
    index   a million lines of annotations
    rewards 32 completions about three views, as one step of reinforcement learning scores
    sft     tokens/s beside transformers.Trainer (needs accelerate); memory of the loss at Qwen's
            151,936 words; on a CUDA GPU also the 3B configuration
    grpo    a step with one sequence a group beside G separate rows; --peer: beside TRL's trainer
    evaluate    greedy answers beside transformers' `generate`; scoring 7,000 predictions

Medians of interleaved repetitions. Nothing here is a test: machines differ, ratios less so.
"""

import argparse
import contextlib
import io
import itertools
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import actor_grpo  # noqa: E402
import actor_sft  # noqa: E402
import evaluate  # noqa: E402
import geometry  # noqa: E402
import pasta  # noqa: E402
import rewards  # noqa: E402

TINY = {"depth": 4, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4,
        "out_hidden_size": 192, "window_size": 112, "fullatt_block_indexes": [1, 3]}
MIDDLE = {"depth": 8, "hidden_size": 320, "intermediate_size": 856, "num_heads": 5,
          "out_hidden_size": 512, "window_size": 112, "fullatt_block_indexes": [3, 7]}
REAL = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "out_hidden_size": 2048, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}


def interleaved(functions, repeat, calls=1):
    """Median seconds of each function; in turn, `calls` times in a row each."""
    times = [[] for _ in functions]
    for _ in range(repeat + 1):
        for function, taken in zip(functions, times):
            start = time.perf_counter()
            for _ in range(calls):
                function()
            taken.append((time.perf_counter() - start) / calls)
    return [float(np.median(taken[1:])) for taken in times]  # the first round warms up


# ------------------------------------------------------------------------------------ Eq. 1


def rendered_pair(width=640, height=480):
    rng = np.random.default_rng(0)
    room = geometry.make_room(rng)
    _, poses = geometry._pick_cameras(room, rng, 64)
    K = np.array([[500.0, 0, 319.5], [0, 500.0, 239.5], [0, 0, 1]])
    return [geometry.View(np.zeros((height, width, 3), np.uint8),
                          geometry.cast(room, K, pose, width, height)[0].astype(np.float32),
                          K, pose)
            for pose in poses[:2]]


def warp_every_pixel(x, y, n, t=0.05, t_rel=0.05):
    """Directional overlap by a warp in the manner of LoFTR's ground truth: a list of pixels, here
    all of them, is lifted by the depth at each, moved to y's camera, projected, and kept where it
    falls inside y and agrees with y's depth at the nearest pixel. Batched torch, float32."""
    depth_x, depth_y = torch.from_numpy(x.depth)[None], torch.from_numpy(y.depth)[None]
    K_x, K_y = torch.from_numpy(x.K).float()[None], torch.from_numpy(y.K).float()[None]
    T = torch.from_numpy(np.linalg.inv(y.cam2world) @ x.cam2world).float()[None]
    (H, W), (H_y, W_y) = x.depth.shape, y.depth.shape
    v, u = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    points = torch.stack([u, v], -1).reshape(1, -1, 2)  # (1, L, 2)
    d = depth_x[0, points[0, :, 1], points[0, :, 0]][None]  # (1, L)
    lifted = torch.cat([points, torch.ones_like(points[..., :1])], -1) * d[..., None]
    moved = T[:, :3, :3] @ (K_x.inverse() @ lifted.transpose(2, 1)) + T[:, :3, 3:]  # (1, 3, L)
    z = moved[:, 2]
    projected = (K_y @ moved).transpose(2, 1)
    uv = projected[..., :2] / (projected[..., 2:] + 1e-4)
    inside = ((uv > -0.5).all(-1) & (uv[..., 0] < W_y - 0.5) & (uv[..., 1] < H_y - 0.5) & (z > 0))
    nearest = uv.round().long()
    nearest[~inside] = 0
    at = depth_y[0, nearest[0, :, 1], nearest[0, :, 0]][None]
    agrees = (z - at).abs() < torch.maximum(torch.tensor(t), t_rel * z)
    seen = ((d != 0) & inside & (at != 0) & agrees)[0]
    P = n * n
    i = (points[0, :, 1] * n // H) * n + points[0, :, 0] * n // W
    j = ((uv[0, :, 1] + 0.5) * n / H_y).long() * n + ((uv[0, :, 0] + 0.5) * n / W_y).long()
    hits = torch.bincount(i[seen] * P + j[seen], minlength=P * P).view(P, P)
    return (hits / torch.bincount(i[d[0] != 0], minlength=P).clamp(min=1)[:, None]).numpy()


def overlap():
    x, y = rendered_pair()

    def dense():
        return (warp_every_pixel(x, y, 4) + warp_every_pixel(y, x, 4).T) / 2

    error = np.abs(geometry.correspondence(x, y, 4) - dense()).max()
    threads = torch.get_num_threads()
    for number in (1, threads):
        torch.set_num_threads(number)
        slow, ours = interleaved([dense, lambda: geometry.correspondence(x, y, 4)], 10, calls=5)
        print(f"overlap of a 640x480 pair: warp of every pixel in torch, {number} thread(s), "
              f"{slow * 1e3:.1f} ms, correspondence {ours * 1e3:.1f} ms: {slow / ours:.1f}x")
    print(f"  max |dS| between the two {error:.4f}")


# ----------------------------------------------------------------------------- training step


def make_encoder(config, device="cpu"):
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(vision_config=config).vision_config
    with torch.device(device):
        return Qwen2_5_VisionTransformerPretrainedModel._from_config(config, dtype=torch.float32)


def training_step(name, config, size, steps, rounds=5):
    """Steps of pasta's own loop, reading and overlaps included, against forward and backward alone
    of the same encoder on the same pixels, and of the library's untouched one."""
    with tempfile.TemporaryDirectory() as folder:
        data = geometry.render_rooms(Path(folder) / "data", rooms=24, size=size)
        samples = geometry.load_samples(data, tasks=("depth_prediction_oc_mv",))
        args = pasta.parse_args(["--data", str(data), "--model", "-", "--steps", str(steps)])
        frames = pasta.Frames(args, own_val=True)
        order = pasta.sample_order(range(len(samples)), 0)
        library, encoder = make_encoder(config), pasta.speed_up(make_encoder(config))
        optimizer = pasta.Adam(encoder, torch.float32, 1e-5, 1.0)
        prepare = partial(pasta.pairs_at, samples, frames)
        stored = [prepare(order(k))[1] for k in range(steps)]
        times = {"pasta": [], "bare": [], "library": []}

        def forward_backward(tower):
            for ready in stored:
                pixels = torch.cat([frame["patches"] for frame in ready])
                grid = torch.tensor([(1, *frame["grid"]) for frame in ready])
                tower(pixels, grid_thw=grid).pooler_output.sum().backward()

        def train():
            with ThreadPoolExecutor(args.workers) as pool:
                for batch in pasta.prepared_ahead(pool, prepare, order, args, 0, 0, 1):
                    _, ready, pairs = batch[0]
                    e = pasta.encode(encoder, ready, args.grid, "cpu")
                    loss, _ = pasta.alignment_loss(e, pairs, len(pairs), args)
                    optimizer.backward(loss)
                    optimizer.step(optimizer.reduce())

        names = ("pasta", "bare", "library")
        functions = (train, lambda: forward_backward(encoder), lambda: forward_backward(library))
        times = dict(zip(names, interleaved(functions, rounds)))
    per = {key: value / steps for key, value in times.items()}
    print(f"training step, {name} tower, three {size}x{size} views: {per['pasta'] * 1e3:.0f} ms, "
          f"with images and overlaps; bare forward and backward {per['bare'] * 1e3:.0f} ms: "
          f"{per['pasta'] / per['bare']:.2f}x; the library's tower as it comes "
          f"{per['library'] * 1e3:.0f} ms: {per['pasta'] / per['library']:.2f}x")


def peak_rss():
    """Peak resident memory of this process in MB; on Linux without what it was forked from."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_memory(recompute):
    """Peak resident memory of forward and backward on three 448x448 views, over that before."""
    encoder = pasta.speed_up(make_encoder(MIDDLE))
    if recompute:
        for block in encoder.blocks:
            pasta.recompute_in_backward(block)
    pasta.Adam(encoder, torch.float32, 1e-5, 1.0)
    pixels, grid = torch.randn(3 * 1024, 1176), torch.tensor([[1, 32, 32]] * 3)
    before = peak_rss()
    encoder(pixels, grid_thw=grid).pooler_output.sum().backward()
    print(peak_rss() - before)


def memory():
    kept, recomputed = (float(subprocess.run(
        [sys.executable, __file__, "peak-memory", *flag], capture_output=True, text=True,
        check=True).stdout) for flag in ([], ["--recompute"]))
    print(f"peak memory of a step, middle tower, three 448x448 views: {kept:.0f} MB of activations "
          f"kept, {recomputed:.0f} MB recomputed: {kept / recomputed:.1f}x")


def real_size():
    """Qwen2.5-VL-3B's vision tower, random weights, bf16 with fp32 master weights, recomputing."""
    if not torch.cuda.is_available():
        print("the real size: not measured, no CUDA GPU here")
        return
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    (matmul,) = interleaved([lambda: ((a @ b), torch.cuda.synchronize())], 20)
    rate = 2 * 8192**3 / matmul
    del a, b
    args = pasta.parse_args(["--grid", "4", "--data", "-", "--model", "-"])
    S = torch.rand(16, 16, device="cuda")
    pairs = [(x, y, S) for x, y in itertools.combinations(range(3), 2)]
    ready = [{"patches": torch.randn(1024, 1176).pin_memory(), "grid": (32, 32)}] * 3
    for recompute in (True, False):
        encoder = pasta.speed_up(make_encoder(REAL, "cuda"))
        optimizer = pasta.Adam(encoder, torch.bfloat16, 1e-5, 1.0)
        for block in encoder.blocks if recompute else ():
            pasta.recompute_in_backward(block)
        torch.cuda.reset_peak_memory_stats()

        def step():
            e = pasta.encode(encoder, ready, args.grid, "cuda")
            loss, _ = pasta.alignment_loss(e, pairs, len(pairs), args)
            optimizer.backward(loss)
            optimizer.step(optimizer.reduce())
            torch.cuda.synchronize()

        (seconds,) = interleaved([step], 20)
        weights = sum(p.numel() for name, p in encoder.named_parameters() if "merger" not in name)
        merger = sum(p.numel() for p in encoder.merger.parameters())
        # query . key and weights . value; recomputing is not counted
        attention = 3 * 1280 * (28 * 1024 * 64 + 4 * 1024 * 1024) * 4
        useful = 3 * (2 * 3 * 1024 * (weights + merger / 4) + attention)
        print(f"the real size, three 448x448 views, {'recomputing' if recompute else 'keeping'} "
              f"activations: {1 / seconds:.2f} steps/s, peak "
              f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, "
              f"{useful / seconds / rate:.0%} of the {rate / 1e12:.0f} TFLOP/s "
              "that a bf16 matrix product of 8192 reaches here")
        del encoder, optimizer
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------- index


def index(lines):
    """Index synthetic annotations of SPAR's size; the samples themselves are parsed on demand."""
    with tempfile.TemporaryDirectory() as folder:
        names = [f"scene0000_00/image_color/{k}.jpg" for k in (12, 345, 6789)]
        line = json.dumps({
            "id": "scene0000_00_16", "type": "depth_prediction_oc_mv", "image": names,
            "depth": [name.replace("color", "depth") for name in names], "red_point": [[500, 500]],
            "conversations": [{"from": "human", "value": "How deep? " * 25},
                              {"from": "gpt", "value": "1.5"}]}) + "\n"
        qa = Path(folder) / "scannet/qa_jsonl/train/depth_prediction_oc_mv/fill"
        qa.mkdir(parents=True)
        for k in range(4):
            (qa / f"fill_{k}.jsonl").write_text(line * (lines // 4))
        code = ("import sys, time; sys.path.insert(0, sys.argv[1]); import geometry, re\n"
                "start = time.perf_counter(); samples = geometry.load_samples(sys.argv[2])\n"
                "seconds = time.perf_counter() - start; samples[len(samples) - 1]\n"
                "peak = int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
                "print(len(samples), seconds, peak / 1024)")
        here = str(Path(__file__).resolve().parent.parent)
        out = subprocess.run([sys.executable, "-c", code, here, folder], capture_output=True,
                             text=True, check=True).stdout.split()
        print(f"index: {int(out[0]):,} lines of {len(line)} bytes in {float(out[1]):.2f} s, "
              f"peak memory of the process {float(out[2]):.0f} MB")


# ----------------------------------------------------------------------------------- rewards


def reward_step():
    """Total rewards of well-formed completions (the slow kind: every plan becomes a pose)."""
    rng = np.random.default_rng(0)

    def plans():
        poses = [geometry.look(rng.uniform(0, 5, 3), rng.uniform(-4, 4), rng.uniform(-0.4, 0.4))
                 for _ in range(3)]
        return {(i, j): geometry.actions_from_pose(geometry.relative_pose(poses[i], poses[j]))
                for i, j in rewards.required_pairs(3)}

    gold = rewards.Gold(plans(), "1.5", "depth_prediction_oc_mv", "fill", 3)
    texts = [rewards.write_response(plans(), "1.4") for _ in range(32)]
    (seconds,) = interleaved([lambda: [rewards.total_reward(text, gold) for text in texts]], 50)
    print(f"rewards of 32 completions about three views: {seconds * 1e3:.1f} ms")


# ------------------------------------------------------------------------ supervised fine-tuning


def demo_examples(folder, size=224):
    """The demo's tiny model and examples of both forms: (directory, {"equal", "mixed"} batches)."""
    data = geometry.render_rooms(Path(folder) / "data", rooms=24, size=size)
    path = Path(folder) / "model"
    pasta.make_demo_model(path, data, seed=0)
    args = actor_sft.parse_args(["--max-pixels", str(size * size)])
    tokenizer = actor_sft.AutoTokenizer.from_pretrained(path)
    examples = actor_sft.Examples(args, tokenizer)
    made = [examples.make(sample, form) for form in ("actions", "answer")
            for sample in geometry.load_samples(data, tasks=geometry.MULTI_VIEW_TASKS)]
    made = [made[k] for k in np.random.default_rng(0).permutation(len(made))]
    three = sorted((e for e in made if e.form == "actions" and e.gold.views == 3),
                   key=lambda e: len(e.ids))
    middle = len(three) // 2 - 16
    return path, {"equal": [three[middle + 8 * k:middle + 8 * k + 8] for k in range(4)],
                  "mixed": [made[8 * k:8 * k + 8] for k in range(4)]}


def padded(examples, image_token):
    """A batch in the usual form: padded on the right, -100 where nothing is trained."""
    L = max(len(e.ids) for e in examples)
    ids, seen = torch.zeros(len(examples), L).long(), torch.zeros(len(examples), L).long()
    labels = torch.full((len(examples), L), -100)
    for b, e in enumerate(examples):
        ids[b, :len(e.ids)], seen[b, :len(e.ids)] = e.ids, 1
        labels[b, e.prompt:len(e.ids)] = e.ids[e.prompt:]
    return {"input_ids": ids, "attention_mask": seen, "labels": labels,
            "pixel_values": torch.cat([e.patches for e in examples]),
            "image_grid_thw": actor_sft.grids_of(examples),
            "mm_token_type_ids": (ids == image_token).int()}


def our_sft_steps(path, batches):
    args = actor_sft.parse_args([])
    model, _ = actor_sft.load_model(path, args, torch.device("cpu"))
    optimizer = actor_sft.Adam(model, torch.float32, 1e-5, 1.0)

    def steps():
        for batch in batches:
            for row in actor_sft.pack(batch, model.config.image_token_id, args.max_tokens):
                log_p, _ = actor_sft.response_log_probs(model, row, torch.device("cpu"))
                optimizer.backward(-log_p.mean())
            optimizer.step(optimizer.reduce())

    return steps


def trainer_steps(path, batches):
    """transformers.Trainer on the same batches; it stays as it comes, with its own AdamW."""
    from transformers import Trainer, TrainingArguments

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path)
    image_token = model.config.image_token_id
    flat = [example for batch in batches for example in batch]

    def steps():
        with tempfile.TemporaryDirectory() as out:
            arguments = TrainingArguments(
                out, per_device_train_batch_size=len(batches[0]), max_steps=len(batches),
                learning_rate=1e-5, lr_scheduler_type="constant", weight_decay=0.0, use_cpu=True,
                remove_unused_columns=False, report_to=[], save_strategy="no", logging_steps=1000,
                disable_tqdm=True)
            trainer = Trainer(model, arguments, train_dataset=flat,
                              data_collator=lambda some: padded(some, image_token))
            trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(flat)
            with contextlib.redirect_stdout(io.StringIO()):  # its own report
                trainer.train()

    return steps


def sft():
    try:
        import accelerate  # noqa: F401
    except ImportError:
        sys.exit("benchmark.py sft: transformers.Trainer needs it: pip install accelerate")
    with tempfile.TemporaryDirectory() as folder:
        path, sets = demo_examples(folder)
        for name, batches in sets.items():
            lengths = [[len(e.ids) for e in batch] for batch in batches]
            real = sum(map(sum, lengths))
            padding = 1 - real / sum(len(one) * max(one) for one in lengths)
            theirs, ours = interleaved(
                [trainer_steps(path, batches), our_sft_steps(path, batches)], 5)
            print(f"sft, samples of {name} length, 8 a step: Trainer {real / theirs:,.0f} tokens/s "
                  f"({padding:.0%} padding beside them), packed rows {real / ours:,.0f} "
                  f"(no padding): {theirs / ours:.2f}x", flush=True)
    for what in ("trainer", "ours", "plain-loss", "chunked-loss"):
        peak = float(subprocess.run([sys.executable, __file__, "peak-memory", "--of", what],
                                    capture_output=True, text=True, check=True).stdout.split()[-1])
        print(f"peak memory, {what}: {peak:.0f} MB", flush=True)
    real_sft()


def sft_peak(what):
    with tempfile.TemporaryDirectory() as folder:
        path, sets = demo_examples(folder)
        steps = (trainer_steps if what == "trainer" else our_sft_steps)(path, sets["mixed"])
        before = peak_rss()
        steps()
        print(peak_rss() - before)


def loss_peak(what, W=151_936, D=128, T=2000):
    """Forward and backward of the loss alone, Qwen's vocabulary: above weight and its gradient."""
    hidden = torch.randn(T, D, requires_grad=True)
    weight = (torch.randn(W, D) / 10).requires_grad_()
    targets = torch.randint(W, (T,))
    weight.grad = torch.zeros_like(weight)
    room = torch.ones_like(weight)  # what autograd's own gradient will take
    before = peak_rss()
    del room
    if what == "plain-loss":
        torch.nn.functional.cross_entropy(hidden @ weight.T, targets).backward()
    else:
        (-actor_sft.TokenLogProbs.apply(hidden, weight, targets)[0].mean()).backward()
    print(peak_rss() - before)


def published_3b():
    """Qwen2.5-VL-3B-Instruct's configuration, from its config.json, with random weights."""
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 11_008,
            "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
            "max_position_embeddings": 128_000, "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
        vision_config=REAL, tie_word_embeddings=True, image_token_id=151_655,
        video_token_id=151_656, vision_start_token_id=151_652, vision_end_token_id=151_653)


def real_sft():
    """One sample of three 448x448 images, 250 response tokens, at 3B."""
    if not torch.cuda.is_available():
        print("sft at 3B: not measured, no CUDA GPU here")
        return
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    (matmul,) = interleaved([lambda: ((a @ b), torch.cuda.synchronize())], 20)
    rate = 2 * 8192**3 / matmul
    del a, b
    for offload in (False, True):
        torch.cuda.empty_cache()
        with torch.device("cpu" if offload else "cuda"):
            model = Qwen2_5_VLForConditionalGeneration(published_3b())
        actor_sft.prepare_model(model, None, recompute=True)
        optimizer = actor_sft.Adam(model, torch.bfloat16, 1e-5, 1.0)
        model.to("cuda")
        prompt = torch.cat([torch.full((40,), 9707), *(
            torch.tensor([151_652, *[151_655] * 256, 151_653]) for _ in range(3)),
            torch.full((120,), 9707)])
        example = actor_sft.Example("", torch.cat([prompt, torch.full((250,), 1000)]), len(prompt),
                                    torch.randn(3 * 1024, 1176), [(16, 16)] * 3, None, "actions")
        (row,) = actor_sft.pack([example], 151_655, 8192)
        torch.cuda.reset_peak_memory_stats()

        def step():
            log_p, _ = actor_sft.response_log_probs(model, row, torch.device("cuda"))
            optimizer.backward(-log_p.mean())
            optimizer.step(optimizer.reduce())
            torch.cuda.synchronize()

        (seconds,) = interleaved([step], 3 if offload else 10)
        text = sum(p.numel() for p in model.model.language_model.layers.parameters())
        vision = sum(p.numel() for p in model.model.visual.parameters())
        useful = 6 * (text * len(row.ids) + vision * 3072 + 151_936 * 2048 * 250)
        print(f"sft at 3B, three 448x448 images, 250 response tokens{', --offload' * offload}: "
              f"{len(row.ids) / seconds:,.0f} tokens/s, peak "
              f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, {useful / seconds / rate:.0%} "
              f"of the {rate / 1e12:.0f} TFLOP/s that a bf16 matrix product of 8192 reaches here")
        del model, optimizer


# ----------------------------------------------------------------------------------- GRPO


def grpo_setting(folder, size, G, T):
    """The tiny model twice, a prompt of three images, random completions of T tokens."""
    data = geometry.render_rooms(Path(folder) / f"data{size}", rooms=2, size=size, held_out=0)
    path = Path(folder) / "model"
    if not path.exists():
        pasta.make_demo_model(path, data, seed=0)
    args = actor_grpo.parse_args(["--max-pixels", str(size * size)])
    args.no_recompute = True
    model, tokenizer = actor_grpo.load_model(path, args, torch.device("cpu"))
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(path)
    prompts = actor_grpo.Prompts(args, tokenizer, model.config.image_token_id)
    sample = geometry.load_samples(data, tasks=("depth_prediction_oc_mv",))[0]
    tokens = torch.randint(10, 500, (G, T), generator=torch.Generator().manual_seed(0))
    return model, plain, prompts.make(sample), tokens, tokenizer


def one_sequence_phases(model, prompt, tokens, banned):
    G, T = tokens.shape
    mask, A = torch.ones_like(tokens, dtype=torch.bool), torch.linspace(-1, 1, G)
    noise = actor_grpo.uniforms(0, 0, 0, G, T)[None]

    def rollout():
        with torch.no_grad():
            actor_grpo.rollout(model, [prompt], noise, [T], 1.0, banned, [-1], [None])

    def reference():
        with torch.no_grad():
            return actor_grpo.group_log_probs(model, prompt, tokens, mask, 1.0)

    def policy():
        log_p = actor_grpo.group_log_probs(model, prompt, tokens, mask, 1.0)
        old = log_p.detach()
        actor_grpo.grpo_loss(log_p, old, old, A, mask, 0.2, 0.01)[0].backward()

    return rollout, reference, policy


def separate_row_phases(model, prompt, tokens):
    """The same with G rows, each with the whole prompt and its images, by the plain model call and
    the library's `generate`; logits of the completions only."""
    G, T = tokens.shape
    mask, A = torch.ones_like(tokens, dtype=torch.bool), torch.linspace(-1, 1, G)
    ids = torch.cat([prompt.ids.expand(G, -1), tokens], dim=1)
    image = {"pixel_values": prompt.patches.repeat(G, 1),
             "image_grid_thw": prompt.grids.repeat(G, 1)}

    def log_probs():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **image,
                       mm_token_type_ids=(ids == model.config.image_token_id).int(),
                       logits_to_keep=T + 1).logits[:, :-1]
        return torch.log_softmax(logits, -1).gather(-1, tokens[..., None])[..., 0]

    def rollout():
        one = ids[:1, :-T]
        model.generate(
            input_ids=one, attention_mask=torch.ones_like(one), pixel_values=prompt.patches,
            image_grid_thw=prompt.grids, do_sample=True, top_k=0, num_return_sequences=G,
            mm_token_type_ids=(one == model.config.image_token_id).int(),
            max_new_tokens=T, min_new_tokens=T, pad_token_id=0)

    def reference():
        with torch.no_grad():
            return log_probs()

    def policy():
        log_p = log_probs()
        old = log_p.detach()
        actor_grpo.grpo_loss(log_p, old, old, A, mask, 0.2, 0.01)[0].backward()

    return rollout, reference, policy


def peer(G=8, T=96, steps=6):
    """A whole step beside TRL's GRPOTrainer: same model, prompt, G, length, loss and beta.

    TRL's published processor needs torchvision, so it gets one that knows this prompt only. On a
    CPU it projects every position through the LM head; here it projects the completions' alone.
    """
    try:
        from datasets import Dataset
        from transformers import ProcessorMixin, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError:
        sys.exit("benchmark.py grpo --peer: pip install trl")

    class OnePrompt(ProcessorMixin):
        chat_template = ""

        def __init__(self, tokenizer, prompt):
            self.tokenizer, self.prompt = tokenizer, prompt

        def apply_chat_template(self, conversation, tokenize=False, **_):
            if not tokenize:
                return "?"
            fields = self(text=conversation)
            return {"input_ids": fields.pop("input_ids").tolist(), **fields,
                    "mm_token_type_ids": fields["mm_token_type_ids"].tolist()}

        def __call__(self, text, **_):
            ids = self.prompt.ids.expand(len(text), -1)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
                    "pixel_values": self.prompt.patches.repeat(len(text), 1),
                    "image_grid_thw": self.prompt.grids.repeat(len(text), 1),
                    "mm_token_type_ids": (
                        ids == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()}

        def batch_decode(self, *args, **kwargs):
            return self.tokenizer.batch_decode(*args, **kwargs)

    def completions_only(model, input_ids, attention_mask, logits_to_keep, batch_size=None,
                         compute_entropy=False, compute_aux_loss=False, num_images=None, **images):
        logits = model(input_ids=input_ids, attention_mask=attention_mask, **images,
                       logits_to_keep=logits_to_keep + 1).logits[:, :-1]
        log_p = torch.log_softmax(logits, -1).gather(-1, input_ids[:, -logits_to_keep:, None])
        return log_p[..., 0], torch.zeros_like(log_p[..., 0]), None

    for size in (224, 448):
        with tempfile.TemporaryDirectory() as folder:
            model, plain, prompt, tokens, tokenizer = grpo_setting(folder, size, G, T)
            optimizer = actor_grpo.Adam(model, torch.float32, 1e-5, 1.0)
            banned = tokenizer.convert_tokens_to_ids(actor_grpo.BANNED)
            phases, ours, theirs = one_sequence_phases(model, prompt, tokens, banned), [], []

            class Between(TrainerCallback):
                """Times TRL's steps, and after each of them one of ours."""

                def on_step_begin(self, *_, **__):
                    self.start = time.perf_counter()

                def on_step_end(self, *_, **__):
                    theirs.append(time.perf_counter() - self.start)
                    start = time.perf_counter()
                    for phase in phases:
                        phase()
                    optimizer.step(optimizer.reduce())
                    ours.append(time.perf_counter() - start)

            config = GRPOConfig(
                folder, per_device_train_batch_size=G, num_generations=G, max_steps=steps,
                max_completion_length=T, beta=0.01, loss_type="grpo", temperature=1.0, top_k=0,
                generation_kwargs={"min_new_tokens": T}, learning_rate=1e-5, use_cpu=True,
                bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no",
                logging_steps=1000, disable_tqdm=True)
            pictures = [Image.new("RGB", (size, size))] * 3  # not looked at
            trainer = GRPOTrainer(
                plain, reward_funcs=lambda completions, **_: list(map(float, range(G))),
                args=config, processing_class=OnePrompt(tokenizer, prompt), callbacks=[Between()],
                train_dataset=Dataset.from_list([{
                    "prompt": [{"role": "user", "content": "?"}], "images": pictures}] * steps))
            trainer._get_per_token_logps_and_entropies = completions_only
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.train()
            one, other = np.median(ours[1:]), np.median(theirs[1:])
            print(f"grpo, three {size}x{size} images, {G} completions of {T}: a step of TRL "
                  f"{other:.2f} s, ours {one:.2f} s: {other / one:.1f}x", flush=True)


def grpo(G=8, T=96):
    for size in (224, 448):
        with tempfile.TemporaryDirectory() as folder:
            model, plain, prompt, tokens, tokenizer = grpo_setting(folder, size, G, T)
            banned = tokenizer.convert_tokens_to_ids(actor_grpo.BANNED)
            ours = one_sequence_phases(model, prompt, tokens, banned)
            theirs = separate_row_phases(plain, prompt, tokens)
            difference = float((ours[1]() - theirs[1]()).abs().max())
            seconds = interleaved([*ours, *theirs], 5)
            print(f"grpo, three {size}x{size} images, {len(prompt.ids)} prompt tokens, {G} "
                  f"completions of {T} (log p differs by {difference:.0e}):")
            for k, name in enumerate(("rollout", "reference", "policy")):
                print(f"  {name:9}  one sequence {seconds[k]:.2f} s, separate rows "
                      f"{seconds[k + 3]:.2f} s: {seconds[k + 3] / seconds[k]:.1f}x")
            one, rows = sum(seconds[:3]), sum(seconds[3:])
            print(f"  in all     one sequence {one:.2f} s, separate rows {rows:.2f} s: "
                  f"{rows / one:.1f}x", flush=True)
        peaks = [float(subprocess.run(
            [sys.executable, __file__, "peak-memory", "--of", what, "--size", str(size)],
            capture_output=True, text=True, check=True).stdout.split()[-1])
            for what in ("one-sequence", "separate-rows")]
        print(f"  peak memory of the policy pass: {peaks[0]:.0f} MB, separate rows "
              f"{peaks[1]:.0f} MB: {peaks[1] / peaks[0]:.1f}x", flush=True)


def grpo_peak(what, size):
    with tempfile.TemporaryDirectory() as folder:
        model, plain, prompt, tokens, _ = grpo_setting(folder, size, 8, 96)
        phases = (one_sequence_phases(model, prompt, tokens, []) if what == "one-sequence"
                  else separate_row_phases(plain, prompt, tokens))
        before = peak_rss()
        phases[2]()
        print(peak_rss() - before)


# ----------------------------------------------------------------------------------- evaluation


def answering(B=16, T=128):
    """Tokens/s of B prompts of different length at once, and whether the texts are the same."""
    with tempfile.TemporaryDirectory() as folder:
        data = geometry.render_rooms(Path(folder) / "data", rooms=8, held_out=0.5)
        path = Path(folder) / "model"
        pasta.make_demo_model(path, data, seed=0)
        evaluate.import_torch()
        args = evaluate.parse_args(["--data", str(data), "--max-new-tokens", str(T)])
        ours, tokenizer = evaluate.load_for_answers(path, "fp32", torch.device("cpu"))
        plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(path).eval()
        processor = Qwen2VLImageProcessorPil(
            size={"shortest_edge": 56 * 56, "longest_edge": args.max_pixels})
        items = evaluate.load_items("rooms", data)
        asked = [evaluate.ask(k, items, args, tokenizer, processor) for k in range(B)]
        L = max(one.prompt for one in asked)
        ids = torch.stack([torch.nn.functional.pad(one.ids, (L - one.prompt, 0)) for one in asked])
        seen = torch.stack([torch.arange(L) >= L - one.prompt for one in asked]).long()
        never, written = len(tokenizer) - 1, {}  # no end token: every response has T tokens

        def theirs():
            written["theirs"] = plain.generate(
                input_ids=ids, attention_mask=seen, pixel_values=torch.cat(
                    [one.patches for one in asked]), image_grid_thw=evaluate.grids_of(asked),
                mm_token_type_ids=(ids == plain.config.image_token_id).int(), do_sample=False,
                max_new_tokens=T, eos_token_id=never, pad_token_id=0)[:, L:].tolist()

        def mine():
            written["ours"] = evaluate.generate_greedily(
                ours, asked, [never], T, torch.device("cpu"))

        seconds = interleaved([theirs, mine], 5)
        same = np.mean([a == b for a, b in zip(written["theirs"], written["ours"])])
        print(f"evaluate, {B} prompts of {min(one.prompt for one in asked)} to {L} tokens, {T} new "
              f"ones each: generate {B * T / seconds[0]:,.0f} tokens/s, ours "
              f"{B * T / seconds[1]:,.0f}: {seconds[0] / seconds[1]:.2f}x; {same:.0%} of the "
              "responses are the same", flush=True)


def scoring(N=7000):
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictions.jsonl"
        lines = [{"args": {"bench": "spar-mv", "model": "m", "mode": "action", "data": None}}]
        for k in range(N):
            task = str(rng.choice(evaluate.SPAR_MULTI_VIEW))
            plans = {pair: [{"turn_right_deg": int(rng.integers(90))}, {"move_forward_m": 1.5}]
                     for pair in rewards.required_pairs(3)}
            lines.append({"id": k, "task": task, "question": "Where?" * 50, "gold": "A",
                          "mode": "action", "views": 3,
                          "response": rewards.write_response(plans, "B")})
        path.write_text("\n".join(map(json.dumps, lines)))

        def score():
            subprocess.run([sys.executable, evaluate.__file__, "--score", path, "--out", folder],
                           check=True, capture_output=True, cwd=folder)

        (seconds,) = interleaved([score], 3)
        print(f"evaluate, scoring {N:,} stored predictions: {seconds:.1f} s, the whole command")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "what",
        choices=("pasta", "index", "rewards", "sft", "grpo", "evaluate", "peak-memory"))
    parser.add_argument("--recompute", action="store_true", help="of peak-memory")
    parser.add_argument("--of", help="of peak-memory: whose")
    parser.add_argument("--peer", action="store_true", help="of grpo: beside TRL's GRPOTrainer")
    parser.add_argument("--size", type=int, default=224, help="of peak-memory: of images")
    chosen = parser.parse_args()
    if chosen.what == "index":
        index(1_000_000)
    elif chosen.what == "rewards":
        reward_step()
    elif chosen.what == "sft":
        sft()
    elif chosen.what == "grpo":
        peer() if chosen.peer else grpo()
    elif chosen.what == "evaluate":
        answering()
        scoring()
    elif chosen.of in ("trainer", "ours"):
        sft_peak(chosen.of)
    elif chosen.of in ("plain-loss", "chunked-loss"):
        loss_peak(chosen.of)
    elif chosen.of:
        grpo_peak(chosen.of, chosen.size)
    elif chosen.what == "peak-memory":
        peak_memory(chosen.recompute)
    else:
        overlap()
        training_step("tiny", TINY, 224, steps=20)
        training_step("middle", MIDDLE, 448, steps=4)
        memory()
        real_size()
