"""Speed and memory, as ratios within one run: python tests/benchmark.py WHAT

    pasta    Eq. 1 against a warp of every pixel; a training step against the bare encoder; memory
    index    a million lines of annotations
    rewards  32 completions about three views, as one step of reinforcement learning scores
    sft      a step beside transformers.Trainer at batch 1 (needs accelerate); memory of the loss at
             Qwen's 151,936 words
    grpo     a prompt computed once beside G separate rows; sampling 4 prompts together beside one
             by one; --peer: a step beside TRL's trainer, and sampling
    evaluate scoring 7,000 predictions
    gpu      a whole step of each stage at 3B's size, random weights, the paper's values; needs a
             CUDA GPU, or a small model: --model out/demo/model
    table2   docs/table2.zip: the demo's Table 2, its differences and their intervals

Medians of interleaved repetitions. Nothing here is a test: machines differ, ratios less so.
"""

import argparse
import contextlib
import copy
import io
import itertools
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from transformers import (
    Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel)

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import actor_grpo  # noqa: E402
import actor_sft  # noqa: E402
import evaluate  # noqa: E402
import geometry  # noqa: E402
import pasta  # noqa: E402
import rewards  # noqa: E402
import scenes  # noqa: E402

CPU = torch.device("cpu")
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
    K = np.array([[500.0, 0, 319.5], [0, 500.0, 239.5], [0, 0, 1]])
    return [geometry.View(np.zeros((height, width, 3), np.uint8),
                          geometry.cast(room, K, pose, width, height)[0].astype(np.float32),
                          K, pose)
            for pose in room.poses[:2]]


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


def make_data(folder, size, **more):
    """Scenes of three views, `size` pixels a side: a SPAR-7M-RGBD tree."""
    scenes.render.__defaults__ = size, size
    return scenes.make_scenes(Path(folder) / f"data{size}", **more)


def optimizer_of(module, model, dtype=torch.float32, device=CPU, offload=False):
    return module.Optimizer(model, argparse.Namespace(
        lr=1e-5, vision_lr=1e-5, warmup=0, clip=1.0, betas=(0.9, 0.999), offload=offload),
        dtype, device)


def training_step(name, config, size, rounds=5):
    """Steps of pasta's own loop, reading and overlaps included, against forward and backward alone
    of the library's encoder on the same pixels."""
    with tempfile.TemporaryDirectory() as folder:
        walk = geometry.Walk(make_data(folder, size), 100, 0, ("depth_prediction_oc_mv",))
        args = pasta.parse_args(["--data", "-"])
        library, encoder = make_encoder(config), make_encoder(config)
        optimizer, steps = optimizer_of(pasta, encoder), len(walk.drawn)
        ready = partial(pasta.prepare, args=args, processor=Qwen2VLImageProcessorPil(
            size={"shortest_edge": 56 * 56, "longest_edge": size * size}))
        stored = [ready(sample) for sample in walk.samples]

        def bare():
            for _, pixels, grids, _ in stored:
                library(pixels, grid_thw=grids).pooler_output.sum().backward()

        def train():
            for ((_, (_, pixels, grids, pairs)),) in walk.batches(ready, 0, steps, 1, 0, 1, 2):
                e = pasta.encode(encoder, pixels, grids, args.grid)
                optimizer.backward(pasta.alignment_loss(e, pairs, len(pairs), args)[0])
                optimizer.step(optimizer.reduce())

        ours, theirs = (seconds / steps for seconds in interleaved([train, bare], rounds))
    print(f"training step, {name} tower, three {size}x{size} views: {ours * 1e3:.0f} ms, images "
          f"and overlaps included; bare forward and backward of the library's tower "
          f"{theirs * 1e3:.0f} ms: {ours / theirs:.2f}x", flush=True)


def peak_rss():
    """Peak resident memory of this process in MB; on Linux without what it was forked from."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_memory(recompute):
    """Peak resident memory of forward and backward on three 448x448 views, over that before."""
    encoder = make_encoder(MIDDLE)
    for block in encoder.blocks if recompute else ():
        pasta.recompute_in_backward(block)
    for p in encoder.parameters():
        p.grad = torch.zeros_like(p)
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


def demo_model(folder, data):
    """The demo's tiny model: its directory, the model, the tokenizer."""
    pasta.make_demo_model(Path(folder) / "model", data, seed=0)
    return actor_sft.load_model(str(Path(folder) / "model"))


def padded(examples, image_token):
    """A batch in the usual form: padded on the right, -100 where nothing is trained."""
    (e,) = examples
    labels = e.ids.clone()
    labels[:e.prompt_length] = -100
    return {"input_ids": e.ids[None], "labels": labels[None], **e.images,
            "attention_mask": torch.ones_like(e.ids)[None],
            "mm_token_type_ids": (e.ids == image_token).int()[None]}


def our_sft_steps(model, examples):
    optimizer = optimizer_of(actor_sft, model)

    def steps():
        for example in examples:
            optimizer.backward(-actor_sft.response_log_probs(model, example).mean())
            optimizer.step(optimizer.reduce())

    return steps


def trainer_steps(model, examples):
    """transformers.Trainer on the same samples; it stays as it comes, with its own AdamW."""
    from transformers import Trainer, TrainingArguments

    image_token = model.config.image_token_id

    def steps():
        with tempfile.TemporaryDirectory() as out:
            arguments = TrainingArguments(
                out, per_device_train_batch_size=1, max_steps=len(examples),
                learning_rate=1e-5, lr_scheduler_type="constant", weight_decay=0.0, use_cpu=True,
                remove_unused_columns=False, report_to=[], save_strategy="no", logging_steps=1000,
                disable_tqdm=True)
            trainer = Trainer(model, arguments, train_dataset=examples,
                              data_collator=lambda some: padded(some, image_token))
            trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(examples)
            with contextlib.redirect_stdout(io.StringIO()):  # its own report
                trainer.train()

    return steps


def sft():
    try:
        import accelerate  # noqa: F401
    except ImportError:
        sys.exit("benchmark.py sft: transformers.Trainer needs it: pip install accelerate")
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(folder, 224)
        path, model, tokenizer = demo_model(folder, data)
        plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(path)
        make = partial(actor_sft.make_example, args=actor_sft.parse_args(["--data", "-"]),
                       tokenizer=tokenizer, target="actions", processor=Qwen2VLImageProcessorPil(
                           size={"shortest_edge": 56 * 56, "longest_edge": 224 * 224}))
        examples = list(map(make, geometry.load_samples(data)))
        tokens = sum(len(e.ids) for e in examples)
        theirs, ours = interleaved(
            [trainer_steps(plain, examples), our_sft_steps(model, examples)], 5)
        print(f"sft, batch 1, two or three 224x224 images: Trainer {tokens / theirs:,.0f} "
              f"tokens/s, ours {tokens / ours:,.0f}: {theirs / ours:.2f}x", flush=True)
    for what in ("plain-loss", "chunked-loss"):
        peak = float(subprocess.run([sys.executable, __file__, "peak-memory", "--of", what],
                                    capture_output=True, text=True, check=True).stdout.split()[-1])
        print(f"peak memory, {what}: {peak:.0f} MB", flush=True)


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
        (-actor_sft.log_probs(hidden, weight, targets).mean()).backward()
    print(peak_rss() - before)


# ----------------------------------------------------------------------------------- GRPO


def grpo_setting(folder, size, G, T):
    """The tiny model twice, a prompt of three images, random completions of T tokens."""
    data = make_data(folder, size)
    _, model, tokenizer = demo_model(folder, data)
    sample = geometry.load_samples(data, tasks=("depth_prediction_oc_mv",))[0]
    args = actor_grpo.parse_args(["--data", "-", "--max-new-tokens", str(T)])
    prompt = actor_grpo.make_prompt(sample, args, tokenizer, Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": size * size}), model)
    tokens = torch.randint(10, 400, (G, T), generator=torch.Generator().manual_seed(0))
    return model, copy.deepcopy(model), prompt, tokens, tokenizer


def sampler(model, prompts, G, T):
    """What samples G completions of T tokens, which nothing ends, of prompts all together."""
    noise = torch.stack([actor_grpo.uniforms(0, 0, k, G, T) for k in range(len(prompts))])
    none = torch.tensor([-1], device=model.device)
    return partial(actor_grpo.rollout, model, prompts, noise.to(model.device), 1.0, none[:0], none)


def one_prompt_phases(model, prompts, tokens):
    """The passes of a step of our own, each prompt computed once: rollout, reference, policy."""
    G, T = tokens.shape
    mask = torch.ones_like(tokens, dtype=torch.bool)
    A = torch.linspace(-1, 1, G)

    def reference():
        with torch.no_grad():
            return torch.stack([actor_grpo.group_log_probs(model, prompt, tokens, mask, 1.0)
                                for prompt in prompts])

    def policy():
        for prompt in prompts:
            log_p = actor_grpo.group_log_probs(model, prompt, tokens, mask, 1.0)
            old = log_p.detach()
            loss, _ = actor_grpo.grpo_loss(log_p, old, old, A, mask, 0.2, 0.01)
            (loss / len(prompts)).backward()

    return sampler(model, prompts, G, T), reference, policy


def sampling(name, model, prompt, G, T, B=4, repeat=3):
    """B prompts, all of them together beside one by one."""
    together, one = sampler(model, [prompt] * B, G, T), sampler(model, [prompt], G, T)

    def one_by_one():
        for _ in range(B):
            one()

    fast, slow = interleaved([together, one_by_one], repeat)
    print(f"sampling {B} x {G} x {T} tokens{name}: one by one {slow:.2f} s, together {fast:.2f} s: "
          f"{slow / fast:.1f}x", flush=True)


def separate_row_phases(model, prompt, tokens):
    """The same with G rows, each with the whole prompt and its images, by the plain model call and
    the library's `generate`; logits of the completions only."""
    G, T = tokens.shape
    mask, A = torch.ones_like(tokens, dtype=torch.bool), torch.linspace(-1, 1, G)
    ids = torch.cat([prompt.ids.expand(G, -1), tokens], dim=1)
    image = {key: its.repeat(G, 1) for key, its in prompt.images.items()}

    def log_probs():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **image,
                       mm_token_type_ids=(ids == model.config.image_token_id).int(),
                       logits_to_keep=T + 1).logits[:, :-1]
        return torch.log_softmax(logits, -1).gather(-1, tokens[..., None])[..., 0]

    def rollout():
        one = ids[:1, :-T]
        model.generate(
            input_ids=one, attention_mask=torch.ones_like(one), **prompt.images,
            do_sample=True, top_k=0, num_return_sequences=G,
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


def peer(B, size, G=8, T=96, steps=6):
    """A whole step beside TRL's GRPOTrainer: same model, B prompts, G, length, loss and beta.

    TRL as it is set for this: all B x G completions generated at once, G rows a pass of the loss,
    accumulated over B passes. All prompts are alike, which neither side makes use of. TRL's
    published processor needs torchvision, so it gets one that knows this prompt only. On a CPU it
    projects every position through the LM head; here it projects the completions' alone.
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
                    **{key: its.repeat(len(text), 1) for key, its in self.prompt.images.items()},
                    "mm_token_type_ids": (
                        ids == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()}

        def batch_decode(self, *args, **kwargs):
            return self.tokenizer.batch_decode(*args, **kwargs)

    def completions_only(model, input_ids, attention_mask, logits_to_keep, batch_size=None,
                         compute_entropy=False, compute_aux_loss=False, num_images=None, **images):
        parts = []
        for some in torch.arange(len(input_ids)).split(batch_size or len(input_ids)):
            own = {name: its.unflatten(0, (len(input_ids), -1))[some].flatten(0, 1)
                   for name, its in images.items() if its is not None}  # all rows have as many
            logits = model(input_ids=input_ids[some], attention_mask=attention_mask[some], **own,
                           logits_to_keep=logits_to_keep + 1).logits[:, :-1]
            targets = input_ids[some, -logits_to_keep:, None]
            parts.append(torch.log_softmax(logits, -1).gather(-1, targets)[..., 0])
        log_p = torch.cat(parts)
        return log_p, torch.zeros_like(log_p), None

    with tempfile.TemporaryDirectory() as folder:
        model, plain, prompt, tokens, tokenizer = grpo_setting(folder, size, G, T)
        optimizer = optimizer_of(actor_grpo, model)
        phases = one_prompt_phases(model, [prompt] * B, tokens)
        ours, theirs = [], []

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
            gradient_accumulation_steps=B, generation_batch_size=B * G,
            max_completion_length=T, beta=0.01, loss_type="grpo", temperature=1.0, top_k=0,
            generation_kwargs={"min_new_tokens": T}, learning_rate=1e-5, use_cpu=True,
            bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no",
            logging_steps=1000, disable_tqdm=True)
        pictures = [Image.new("RGB", (size, size))] * 3  # not looked at
        trainer = GRPOTrainer(
            plain, reward_funcs=lambda completions, **_: [
                float(k % G) for k in range(len(completions))],
            args=config, processing_class=OnePrompt(tokenizer, prompt), callbacks=[Between()],
            train_dataset=Dataset.from_list([{
                "prompt": [{"role": "user", "content": "?"}], "images": pictures}] * B * steps))
        trainer._get_per_token_logps_and_entropies = completions_only
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        one, other = np.median(ours[1:]), np.median(theirs[1:])
        print(f"grpo {B} x {G}, {size}x{size}: TRL {other:.2f} s, ours {one:.2f} s: "
              f"{other / one:.1f}x", flush=True)
        if B > 1:
            sampling(f", {size}x{size}", model, prompt, G, T, B)


def grpo(G=8, T=96):
    for size in (224, 448):
        with tempfile.TemporaryDirectory() as folder:
            model, plain, prompt, tokens, _ = grpo_setting(folder, size, G, T)
            ours = one_prompt_phases(model, [prompt], tokens)
            theirs = separate_row_phases(plain, prompt, tokens)
            difference = float((ours[1]()[0] - theirs[1]()).abs().max())
            seconds = interleaved([*ours, *theirs], 5)
            print(f"grpo, three {size}x{size} images, {len(prompt.ids)} prompt tokens, {G} "
                  f"completions of {T} (log p differs by {difference:.0e}):")
            for k, name in enumerate(("rollout", "reference", "policy")):
                print(f"  {name:9}  one prompt {seconds[k]:.2f} s, separate rows "
                      f"{seconds[k + 3]:.2f} s: {seconds[k + 3] / seconds[k]:.1f}x")
            one, rows = sum(seconds[:3]), sum(seconds[3:])
            print(f"  in all     one prompt {one:.2f} s, separate rows {rows:.2f} s: "
                  f"{rows / one:.1f}x", flush=True)
            sampling(f", {size}x{size}", model, prompt, G, T)
        peaks = [float(subprocess.run(
            [sys.executable, __file__, "peak-memory", "--of", what, "--size", str(size)],
            capture_output=True, text=True, check=True).stdout.split()[-1])
            for what in ("one-prompt", "separate-rows")]
        print(f"  peak memory of the policy pass: {peaks[0]:.0f} MB, separate rows "
              f"{peaks[1]:.0f} MB: {peaks[1] / peaks[0]:.1f}x", flush=True)


def grpo_peak(what, size):
    with tempfile.TemporaryDirectory() as folder:
        model, plain, prompt, tokens, _ = grpo_setting(folder, size, 8, 96)
        phases = (one_prompt_phases(model, [prompt], tokens) if what == "one-prompt"
                  else separate_row_phases(plain, prompt, tokens))
        before = peak_rss()
        phases[2]()
        print(peak_rss() - before)


# ----------------------------------------------------------------------------------- evaluation


def scoring(N=7000):
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        data, path = Path(folder) / "spar.jsonl", Path(folder) / "predictions.jsonl"
        plans = {pair: [{"turn_right_deg": 20}, {"move_forward_m": 1.5}]
                 for pair in rewards.required_pairs(3)}
        with open(data, "w") as questions, open(path, "w") as responses:
            for k in range(N):
                task = str(rng.choice([*evaluate.SPAR_MULTI_VIEW]))
                gold = {"Low": "1.5", "High": "A"}.get(next(
                    level for level, its in evaluate.SPAR_LEVELS.items() if task in its), "A")
                questions.write(json.dumps({
                    "id": k, "task": task, "question": f"Where? {k}" * 20, "image": ["a.jpg"] * 3,
                    "answer": "move_right:1.0" if task == "view_change_infer" else gold}) + "\n")
                responses.write(json.dumps(
                    {"id": k, "response": rewards.write_response(plans, "B")}) + "\n")

        def score():
            subprocess.run([sys.executable, evaluate.__file__, "--score", path, "--bench",
                            "spar-mv", "--data", data, "--mode", "action", "--out", folder,
                            "--show", "0"], check=True, capture_output=True, cwd=folder)

        (seconds,) = interleaved([score], 3)
        print(f"evaluate, scoring {N:,} stored predictions: {seconds:.1f} s, the whole command, "
              "importing torch included")


# ------------------------------------------------------------------------------ the paper's Table 2

ROWS = {"no PaStA, no ActoR": "neither", "ActoR, no PaStA": "without", "PaStA, no ActoR": "answers",
        "HATCH after its cold start": "cold_start", "HATCH": "rooms"}  # folders in out/evaluation
COLUMNS = ("camera_turn", "view_change_infer", "R_act, turns", "R_act, walks")
T_975 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # of Student's t, by the number of seeds


def table2(archive):
    """The demo's Table 2, from a zip of SEED/out/... as docs/experiment.md's commands write it.

    Percent: mean and standard deviation over seeds; differences of rows, paired by seed, with the
    95 % interval of Student's t. Then how each cold start and each GRPO went.
    """
    with zipfile.ZipFile(archive) as files:
        texts = {name: files.read(name).decode() for name in files.namelist()}
    seeds = sorted({name.split("/")[0] for name in texts})
    scores = {}  # {(row, column): {seed: percent}}
    for (row, folder), seed in itertools.product(ROWS.items(), seeds):
        results = texts.get(f"{seed}/out/evaluation/{folder}/results.json")
        (run,) = json.loads(results)["runs"] if results else ({"rows": {}},)
        for column in COLUMNS:
            if column in run["rows"]:
                scores.setdefault((row, column), {})[seed] = run["rows"][column][2]
                best = scores.setdefault(("best constant", column), {})
                best[seed] = run["constants"][column]
    print("| | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (1 + len(COLUMNS)))
    for row in ("best constant", *ROWS):
        cells = []
        for column in COLUMNS:
            values = [*scores.get((row, column), {}).values()]
            cells.append(f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" if values else "")
        print(f"| {row} | " + " | ".join(cells) + " |")
    for one, other in itertools.combinations(("best constant", *ROWS), 2):
        for column in COLUMNS:
            say_difference(column, one, scores.get((one, column), {}),
                           other, scores.get((other, column), {}))
    for name, text in sorted(texts.items()):
        if name.endswith("log.jsonl"):
            say_how_it_went(name, [json.loads(line) for line in text.splitlines()])


def say_difference(column, one, before, other, after):
    """One row above another, {seed: percent} each: shown if the interval leaves 0 out."""
    gains = [after[seed] - before[seed] for seed in sorted(after.keys() & before.keys())]
    if len(gains) > 1:
        half = T_975[len(gains)] * np.std(gains, ddof=1) / len(gains) ** 0.5
        verdict = "shown" if abs(np.mean(gains)) > half else "not shown"
        print(f"{column}: {other} above {one} by {np.mean(gains):.1f} +- {half:.1f}, {verdict} "
              f"(by seed {', '.join(f'{gain:.1f}' for gain in gains)})")


def say_how_it_went(name, log):
    """PaStA's and the cold start's looks; GRPO's sampled R_act in its first and last ten steps."""
    looks = [look for look in log if "match_accuracy" in look]
    if looks:
        print(f"{name}: match accuracy {looks[0]['match_accuracy']:.3f}, then "
              f"{looks[-1]['match_accuracy']:.3f}; chance {looks[0]['chance']:.3f}")
    for look in log:
        if "action_constant" in look:
            print(f"{name}: step {look['step']}, form {look['format']:.3f}, R_act "
                  f"{look['action']:.3f} = {look['action'] / look['action_constant']:.2f} of the "
                  f"best constant plan's")
    R_act = [line["reward_action"] for line in log if "reward_action" in line]
    if R_act:
        first, last = np.array(R_act[:10]), np.array(R_act[-10:])
        error = float(np.hypot(first.std(ddof=1), last.std(ddof=1)) / 10**0.5)
        print(f"{name}: sampled R_act {first.mean():.3f} in the first ten steps, {last.mean():.3f} "
              f"in the last; standard error of the difference {error:.3f}")


# ------------------------------------------------------------------------------------- a CUDA GPU


def published_3b():
    """Qwen2.5-VL-3B-Instruct's configuration, from its config.json."""
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 11_008,
            "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
            "max_position_embeddings": 128_000, "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
        vision_config=REAL, tie_word_embeddings=True, image_token_id=151_655,
        video_token_id=151_656, vision_start_token_id=151_652, vision_end_token_id=151_653)


def random_3b(path, data):
    """A directory of the published model's shapes: random bf16 weights, the demo's tokenizer."""
    pasta.make_demo_model(path, data, seed=0)
    demo = Qwen2_5_VLConfig.from_pretrained(path)
    config = published_3b()
    for token in ("image_token_id", "video_token_id", "vision_start_token_id",
                  "vision_end_token_id"):
        setattr(config, token, getattr(demo, token))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(path, max_shard_size="20GB")
    return path


def three_views(folder, size):
    """A tree whose questions show three views each, 24 to train on and 16 held out."""
    data = make_data(folder, size, train=24, val=16)
    for questions in data.glob("boxes/qa_jsonl/*/*"):
        if questions.name != "depth_prediction_oc_mv":
            shutil.rmtree(questions)
    return data


ALL_TRAIN = ((69, []), (10, ["--offload"]))
STAGES = (  # script, its flags; steps of the paper's run; held-out samples of each of its five
    # looks; (GiB that a GPU must have, the flags that it then needs), as docs/gpu.md has them
    (pasta, [], 10_000, 64, ((14, []),)),
    (actor_sft, ["--target", "answer"], 10_000, 256, ALL_TRAIN),
    (actor_sft, ["--target", "actions"], 1_000, 256, ALL_TRAIN),
    (actor_grpo, [], 2_500, 0, ((77, []), (18, ["--offload"]), (11, ["--offload", "--beta", "0"]))))


def run_stage(module, flags):
    """The script's own main, which here saves nothing: when each step ended, and its record."""
    ends = []

    def note(path, record):
        if path.name == "log.jsonl" and record.get("step"):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append((time.perf_counter(), record))

    nothing = {name: lambda *_, **__: None
               for name in ("save_checkpoint", "save_model", "print_step")}
    with mock.patch.multiple(module, write_line=note, catch_signals=list, **nothing):
        with contextlib.redirect_stdout(io.StringIO()):
            module.main(flags)
    return ends


def gpu(model=None, size=448, steps=8):
    """Whole steps of each stage by the scripts themselves, with the paper's values and the flags
    that the GPU needs; images of `size` pixels a side, reading them included, saving not. Of random
    weights no completion ends, so that GRPO samples as many tokens as it may: 288 for three views.
    """
    room = float("inf")
    if torch.cuda.is_available():
        room = torch.cuda.get_device_properties(0).total_memory / 2**30
    elif model is None:
        sys.exit("benchmark.py gpu: no CUDA GPU here. It needs one of 16 GB or more (driver 580 or "
                 "newer for torch's default wheel), 10 GB of disk in the temporary folder, and "
                 "below 80 GB of GPU memory 64 GiB of free host memory. The same steps on this "
                 "machine's CPU: --model with a small one, such as out/demo/model")
    with tempfile.TemporaryDirectory() as folder:
        data = three_views(folder, size)
        model = model or random_3b(Path(folder) / "3b", data)
        for number, (module, flags, in_all, heldout, choices) in enumerate(STAGES):
            fitting = [needed for least, needed in choices if least <= room]
            flags = [*flags, *(fitting[0] if fitting else choices[-1][1])]
            name = " ".join([Path(module.__file__).name, *flags])
            given = ["--model", str(model), "--data", str(data), "--steps", str(steps),
                     "--save-every", str(steps), "--out", f"{folder}/{number}"]
            if heldout:
                given += ["--heldout", "16"]
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                ends = run_stage(module, [*flags, *given])
            except (geometry.DataError, torch.OutOfMemoryError) as error:
                print(f"{name}: {str(error).splitlines()[0]}", flush=True)
                continue
            print(f"{name}: {say_step(ends, in_all, heldout)}", flush=True)


def say_step(ends, in_all, heldout):
    """What the ends of some steps say of a whole run. The first step warms up, the last one has a
    look at held-out samples; one that changed no weight, as the first may in fp16, is shorter."""
    times = [end for end, _ in ends]
    taken = [after - before for before, after, (_, record) in zip(times, times[1:-1], ends[1:])
             if "skipped" not in record]
    if not taken:
        return "no step changed a weight"
    step = float(np.median(taken))
    line = f"{step:.2f} s a step, {in_all:,} steps {in_all * step / 3600:.1f} h"
    if heldout:
        look = max(0, times[-1] - times[-2] - step) * heldout / 16
        line += f", five looks at {heldout} held-out samples {5 * look / 3600:.1f} h"
    else:
        line += f", completions of {ends[-1][1]['length']:.0f} tokens"
    if torch.cuda.is_available():
        line += (f"; peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, reserved "
                 f"{torch.cuda.max_memory_reserved() / 2**30:.1f}")
    return line


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=(
        "pasta", "index", "rewards", "sft", "grpo", "evaluate", "gpu", "table2", "peak-memory"))
    parser.add_argument("archive", nargs="?", type=Path, help="of table2")
    parser.add_argument("--recompute", action="store_true", help="of peak-memory")
    parser.add_argument("--of", help="of peak-memory: whose")
    parser.add_argument("--peer", action="store_true", help="of grpo: beside TRL's GRPOTrainer")
    parser.add_argument("--size", type=int, default=224, help="of peak-memory: of images")
    parser.add_argument("--model", help="of gpu: a directory, not random weights of 3B's size")
    chosen = parser.parse_args()
    if chosen.what == "index":
        index(1_000_000)
    elif chosen.what == "rewards":
        reward_step()
    elif chosen.what == "sft":
        sft()
    elif chosen.what == "grpo":
        for B, size in itertools.product((4, 1), (224, 448)) if chosen.peer else ():
            peer(B, size)
        if not chosen.peer:
            grpo()
    elif chosen.what == "evaluate":
        scoring()
    elif chosen.what == "gpu":
        gpu(chosen.model)
    elif chosen.what == "table2":
        table2(chosen.archive)
    elif chosen.of in ("plain-loss", "chunked-loss"):
        loss_peak(chosen.of)
    elif chosen.of:
        grpo_peak(chosen.of, chosen.size)
    elif chosen.what == "peak-memory":
        peak_memory(chosen.recompute)
    else:
        overlap()
        training_step("tiny", TINY, 224)
        training_step("middle", MIDDLE, 448)
        memory()
