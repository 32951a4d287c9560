"""Stage 1 of HATCH, "how to look": Patch-Level Spatial Alignment (PaStA, section 3.3).

Two views of one room, each cut into n x n patches. From depth and camera poses we know which
patches show the same place (S, Eq. 1); the image encoder should know it too: the features of two
patches are to be as similar as the patches overlap. Only the image encoder trains.

    Eq. 1  S       patch overlap of two views            geometry.correspondence
    Eq. 2  p(j|i)  target, softmax of S / tau1           target_distribution
    Eq. 3  q(j|i)  prediction, softmax of cosine / tau2  log_prediction
    Eq. 4  L_CL    both directions, all pairs            alignment_loss
    Eq. 5  L_X->Y  cross-entropy of p and q              directional_loss

    python pasta.py --grid 4                     # renders rooms, makes a tiny Qwen2.5-VL, aligns it
    python pasta.py --grid 4 --model Qwen/Qwen2.5-VL-3B-Instruct --data /path/to/spar
    torchrun --nproc_per_node 4 pasta.py --grid 4 --batch 4 --model ... --data ...

Writes --out: the model with its aligned encoder (an ordinary Hugging Face directory), log.jsonl,
matches.png (matches of held-out pairs before and after), checkpoint.pt (for --resume; may be
deleted when the run has ended).

Axes: V views, H W pixels, n grid side, P = n * n patches, D feature, h w merged tokens of an image.

Deviations from the paper, and what it leaves open, are tagged "not in the paper: NAME" where they
stand; docs/choices.md has the list.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import pickle
import platform
import shutil
import signal
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

# Torch reads this when it is imported. Without it, freed memory is left in pieces of no use.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil)

import geometry
import rewards

MADE_BY = {"out/demo/model": "python pasta.py --grid 4"}  # {model directory: what writes it}
MAY_BE_0 = ("seed", "t", "t_rel", "warmup")  # the other numbers of the command line are above 0


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description="PaStA: align Qwen2.5-VL's image encoder across posed views.",
        allow_abbrev=False)
    # what to train on what; without --model and --data, a demo that needs neither
    p.add_argument("--model", help="model directory or hub id; default: "
                                   "Qwen/Qwen2.5-VL-3B-Instruct, demo: a tiny Qwen2.5-VL")
    p.add_argument("--data", help="SPAR-7M-RGBD tree (the folder that holds scannet/, ...); "
                                  "default: rendered rooms")
    p.add_argument("--out", default="out/pasta", help="where the aligned model and the log go")
    p.add_argument("--samples", type=int, default=10_000,
                   help="how many multi-image samples to draw (paper: 10,000)")
    p.add_argument("--max-pixels", type=int,  # not in the paper: image size
                   help="budget per image, larger ones are scaled down; "
                        "default: 448 * 448, demo: 112 * 112")
    # the objective
    p.add_argument("--grid", type=int, default=4,
                   help="n: patches per side; default: 4; the paper sweeps 2 to 6")
    p.add_argument("--tau1", type=float, default=0.1,  # not in the paper: target temperature
                   help="target temperature: 1 is near uniform, 0.05 near argmax")
    p.add_argument("--tau2", type=float, default=0.07,  # not in the paper: prediction temperature
                   help="prediction temperature; lower asks for sharper features")
    p.add_argument("--t", type=float, default=0.05,  # not in the paper: depth agreement
                   help="depth agreement in metres; sensor noise is 0.004-0.02")
    p.add_argument("--t-rel", type=float, default=0.05,  # not in the paper: depth agreement
                   help="and as a share of the depth; the larger one counts")
    p.add_argument("--skip-empty", action="store_true",  # not in the paper: empty rows
                   help="leave out patches without overlap; Eq. 2 makes their target uniform")
    # optimisation
    p.add_argument("--steps", type=int, help="default: one epoch; demo: 1000")
    p.add_argument("--batch", type=int,
                   help="samples per step over all processes; paper: 1; demo: 4")
    p.add_argument("--lr", type=float,
                   help="fixed; paper: 1e-5; demo, whose model starts random: 1e-3")
    p.add_argument("--clip", type=float, default=1.0,  # not in the paper: optimiser
                   help="largest gradient norm")
    p.add_argument("--seed", type=int, default=0,
                   help="decides the data order, and the demo's rooms and weights")
    # looking and saving
    p.add_argument("--heldout", type=int, default=64, help="held-out pairs to evaluate on")
    p.add_argument("--save-every", type=int, help="steps between checkpoints, each with a look at "
                                                  "held-out pairs; default: a quarter")
    p.add_argument("--resume", action="store_true",
                   help="go on from --out's checkpoint; else the same command")
    # the machine
    p.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                   help="of the working weights; auto: bf16 on a GPU, fp16 where it has none, fp32 "
                        "on a CPU. Master weights are always fp32")
    p.add_argument("--no-recompute", action="store_true",
                   help="keep activations instead of recomputing them: faster, more memory")
    p.add_argument("--workers", type=int, default=min(8, os.cpu_count()),
                   help="threads that prepare images and overlaps ahead")

    given = p.parse_args(argv)  # other defaults depend on it
    demo = given.data is None
    if demo:  # without --data
        values = {"model": "out/demo/model", "data": "out/demo/data", "batch": 4, "lr": 1e-3,
                  "steps": 1000, "max_pixels": 112 * 112, "no_recompute": True}
    else:
        values = {"model": "Qwen/Qwen2.5-VL-3B-Instruct", "batch": 1, "lr": 1e-5,
                  "max_pixels": 448 * 448}
    return settle(p, argv, values | {
        "demo": demo, "warmup": 0, "offload": False,
        "betas": [0.9, 0.999]})  # not in the paper: optimiser


# ------------------------------------------------------------------------------------ the method


def cell_features(tokens, n):
    """Average a feature map (h, w, D) over n x n cells -> e (P, D).

    Cells have the fractional edges k / n that geometry uses, so a token that straddles an edge
    counts for each side by its share, and any h and w will do.
    """
    h, w, D = tokens.shape
    A_h = cell_weights(h, n, tokens.device)  # (n, h)
    A_w = cell_weights(w, n, tokens.device)  # (n, w)
    return torch.einsum("ah,hwd,bw->abd", A_h, tokens.float(), A_w).reshape(n * n, D)


def cell_weights(length, n, device):
    """(n, length): the share of cell k that each of `length` equal tokens fills, such as
    [[2/3, 1/3, 0], [0, 1/3, 2/3]] for 3 tokens and 2 cells."""
    edges = torch.arange(n + 1, device=device) * (length / n)  # not in the paper: pooling
    low = edges[:-1, None]
    high = edges[1:, None]
    token = torch.arange(length, device=device)
    return (torch.minimum(high, token + 1) - torch.maximum(low, token)).clamp(min=0) * (n / length)


def target_distribution(S, tau1):
    """p(j | i): (P, P) overlap -> (P, P), rows sum to 1. A row without overlap becomes uniform."""
    return torch.softmax(S / tau1, dim=-1)  # Eq. 2


def log_prediction(e_x, e_y, tau2):
    """log q(j | i): patch features (P, D) of two views -> (P, P)."""
    cos = F.normalize(e_x, dim=-1) @ F.normalize(e_y, dim=-1).T
    return torch.log_softmax(cos / tau2, dim=-1)  # Eq. 3


def directional_loss(S, e_x, e_y, tau1, tau2, skip_empty=False):
    """L_X->Y and its floor: S (P, P), e_x and e_y (P, D) -> cross-entropy, entropy of p; scalars.

    The cross-entropy cannot fall below H(p), so what says how far training got is the excess
    CE - H(p), the Kullback-Leibler divergence. skip_empty: average over patches with overlap only.
    """
    p = target_distribution(S, tau1)
    log_q = log_prediction(e_x, e_y, tau2)
    CE = -(p * log_q).sum(-1)  # (P,)
    H = -(p * p.clamp(min=1e-30).log()).sum(-1)  # (P,)
    if skip_empty:
        rows = S.amax(-1) > 0
        if not rows.any():
            return CE.sum() * 0, H.sum() * 0  # 0, with a gradient to go backward from
        CE = CE[rows]
        H = H[rows]
    return CE.mean(), H.mean()  # Eq. 5


def alignment_loss(e, pairs, count, args):
    """L_CL and its excess: e, list of (P, D); pairs, list of (x, y, S); count = |P|, all ranks."""
    loss = excess = 0.0
    for x, y, S in pairs:
        L_xy, H_xy = directional_loss(S, e[x], e[y], args.tau1, args.tau2, args.skip_empty)
        L_yx, H_yx = directional_loss(S.T, e[y], e[x], args.tau1, args.tau2, args.skip_empty)
        loss = loss + (L_xy + L_yx) / count  # Eq. 4
        excess = excess + (L_xy + L_yx - H_xy - H_yx).detach() / count
    return loss, excess


def encode(encoder, pixels, grids, n):
    """Patch features of V images of any sizes -> list of e (P, D). As the image processor has them:
    pixels (all squares of 14 x 14, 1176), grids (V, 3) of frames, rows and columns of squares."""
    merge = encoder.config.spatial_merge_size  # so many squares a side are one token
    encoded = encoder(pixels.to(encoder.device), grid_thw=grids.to(encoder.device))
    # what the language model reads, in raster order; last_hidden_state is in the order of the
    # attention windows, which is the same only in small images
    tokens = encoded.pooler_output  # (sum of h w, D)  # not in the paper: which features
    sizes = [(h // merge, w // merge) for _, h, w in grids.tolist()]
    images = tokens.split([h * w for h, w in sizes])
    return [cell_features(image.view(h, w, -1), n) for image, (h, w) in zip(images, sizes)]


def matches(S, e_x, e_y):
    """Which patch of y each patch of x is matched to, and whether that is right.

    Returns guess (P,), gold (P,) = the patch with most overlap, and overlaps (P,) bool: whether
    there is one at all.
    """
    cos = F.normalize(e_x, dim=-1) @ F.normalize(e_y, dim=-1).T
    guess = cos.argmax(-1)  # argmax q = argmax cos
    most, gold = S.max(-1)
    return guess, gold, most > 0


# ------------------------------------------------------------------------------- views and pairs


def prepare(sample, args, processor, dtype=torch.float32):
    """What a step needs of a sample: views; pixels, in dtype, and grids as `encode` takes them; the
    (x, y, S) of all pairs of views, x < y. Raises DataError if one of them cannot be used."""
    views = sample.views()
    pairs = []
    pictures = [view.image for view in views]  # not in the paper: markers
    try:
        images = processor(images=pictures, return_tensors="pt")
        for x, y in itertools.combinations(range(len(views)), 2):
            S = geometry.correspondence(views[x], views[y], args.grid, args.t, args.t_rel)
            pairs.append((x, y, torch.from_numpy(S).float()))
    except (ValueError, TypeError) as error:  # a picture longer than 200 : 1, too few pixels
        raise geometry.DataError(f"{sample.id}: {error}") from None
    return views, images["pixel_values"].to(dtype), images["image_grid_thw"], pairs


def heldout_pairs(walk, count):
    """`count` different held-out pairs of frames, or as many as there are: Samples of two views."""
    by_images = {}  # many samples show the same pair
    for sample in itertools.islice(walk.heldout_samples(), 1000 + 20 * count):
        for x, y in itertools.combinations(range(len(sample.images)), 2):
            images = [sample.images[x], sample.images[y]]
            depths = [sample.depths[x], sample.depths[y]]
            if walk.has_val or geometry.is_held_out(images):  # the held-out frame may be the third
                pair = dataclasses.replace(sample, images=images, depths=depths)
                by_images.setdefault(frozenset(images), pair)
    pairs = list(by_images.values())
    # in random order, so that the first few show different scenes
    order = np.random.default_rng(0).permutation(len(pairs))
    return [pairs[k] for k in order[:count]]


# ------------------------------------------------------------------------------------------ main


def main(argv=None):
    args = parse_args(argv)
    rank, world, device, dtype = start_processes(args.precision)
    say = partial(print, flush=True) if rank == 0 else lambda *_, **__: None
    if args.demo:  # rooms and a tiny model, written once in the layouts of real ones
        say("Demo: rendered rooms and a tiny Qwen2.5-VL. The real run:\n"
            "  python pasta.py --grid 4 --model Qwen/Qwen2.5-VL-3B-Instruct --data /path/to/spar")
        if rank == 0:
            geometry.render_rooms(args.data, seed=args.seed)
            make_demo_model(Path("out/demo/model"), args.data, args.seed)
        gather([])  # the others read what the first process wrote
    out = Path(args.out)
    source, model, _ = load_model(args.model)

    # samples to train on, in the order of --seed, and pairs to look at
    walk = geometry.Walk(args.data, args.samples, args.seed)
    args.steps = args.steps or max(1, len(walk.drawn) // args.batch)  # not in the paper: epochs
    args.save_every = args.save_every or max(1, args.steps // 4)
    identity, state = begin(args, dtype, walk, source)
    start = state["step"] if state else 0
    say(f"data    {args.data}: {len(walk.drawn):,} of {len(walk.samples):,} multi-image samples, "
        f"{args.batch} a step over {world} process(es); {args.steps - start:,} steps")

    # the model's image encoder in the working dtype, with fp32 masters
    encoder = model.model.visual
    size = sum(p.numel() for p in encoder.parameters())
    say(f"model   {args.model}: the image encoder trains, {size:,} parameters, {dtype} on {device}")
    say(memory_line(encoder, 1, args, dtype, device))
    if not args.no_recompute:
        for block in encoder.blocks:
            recompute_in_backward(block)
    optimizer = Optimizer(encoder, args, dtype, device)

    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": args.max_pixels})
    ready = partial(prepare, args=args, processor=processor, dtype=dtype)
    if rank == 0:  # the encoder as it starts, also when resuming: for `drift` and "before"
        open_logs(out, args, state)
        heldout = walk.prepared(ready, heldout_pairs(walk, args.heldout), args.workers)
        overlaps = [(*views, pairs[0][2].numpy()) for views, _, _, pairs in heldout]
        line, odd = geometry.describe_pairs(overlaps)
        say(f"views   {line}")
        if odd:
            say(f"warning: {odd}")
        progress, start_features, before = evaluate(encoder, heldout, args)
        say(f"start   match accuracy {progress['match_accuracy']:.1%} of held-out patches "
            f"(chance {progress['chance']:.1%})")
        if not state:
            write_line(out / "log.jsonl", {"step": 0, **progress})
    if state:
        optimizer.load(state["optimizer"])
        state = None  # its file is closed

    stops = catch_signals()
    begun = time.monotonic()
    missed = []  # why each step since the last update changed nothing
    batches = walk.batches(ready, start, args.steps, args.batch, rank, world, args.workers)
    for step, batch in enumerate(batches, start + 1):
        tick = time.monotonic()
        samples = [prepared for _, prepared in batch if prepared]
        # |P| counts the pairs of all processes, so that their gradients add up
        pairs_here = [len(pairs) for *_, pairs in samples]
        count = sum(gather(pairs_here))  # not in the paper: pairs of a step
        loss = excess = 0.0
        for _, pixels, grids, pairs in samples:
            e = encode(encoder, pixels, grids, args.grid)
            pairs = [(x, y, S.to(device)) for x, y, S in pairs]
            L_CL, over_floor = alignment_loss(e, pairs, count, args)
            optimizer.backward(L_CL)
            loss += L_CL.item()
            excess += over_floor.item()
        grad_norm = optimizer.reduce()
        moved = count > 0 and optimizer.step(grad_norm)

        record = {"step": step, "loss": sum(gather([loss])), "excess": sum(gather([excess])),
                  "grad_norm": grad_norm, "pairs_per_s": count / (time.monotonic() - tick)}
        if moved:
            missed.clear()
        else:
            record = left_out(step, count, grad_norm, batch, missed, say)
        stop = gather(stops)
        saves = stop or step == args.steps or step % args.save_every == 0
        if rank == 0:
            if saves and not stop:
                progress, _, after = evaluate(encoder, heldout, args, start_features)
                draw_matches(out / "matches.png", heldout, before, after, args.grid)
                record |= progress
                say(f"step {step}  match accuracy {record['match_accuracy']:.1%} of held-out "
                    f"patches, excess {record['heldout_excess']:.3f}, drift {record['drift']:.2f}")
            write_line(out / "log.jsonl", record)
            if saves:  # before a line is printed: a closed terminal takes none
                save_checkpoint(out, identity, step, args.steps, optimizer)
            left = (time.monotonic() - begun) / (step - start) * (args.steps - step)
            print_step(record, args.steps, left, ("loss", "excess", "grad_norm", "pairs_per_s"))
        if stop:
            gather([])  # wait until the first has saved: torchrun ends all when one ends
            say(f"stopped after step {step}; the same command with --resume goes on")
            sys.exit(128 + stop[0])
        if len(missed) == 25:
            break

    if optimizer.t == 0 or len(missed) == 25:
        raise geometry.DataError(
            f"{len(missed)} steps in a row changed no weight, the last: {', '.join(missed[-1:])}"
            f"{walk.first_problem()}; look at the samples named above, or lower --lr")
    problems = len(set(gather([*walk.skipped])))
    if rank == 0:
        save_model(model, source, out, optimizer)
        say(f"wrote   {out}: the model with its aligned encoder, log.jsonl, matches.png; "
            f"{problems} problems with the data")
    if world > 1:
        dist.destroy_process_group()


# ----------------------------------------------------------------------- looking at what it learnt


def evaluate(encoder, heldout, args, start_features=None):
    """Match held-out pairs, each as `prepare` gives it. Returns the record for the log, the patch
    features of all pairs, and their `matches`, from the first view to the second.

    match_accuracy: share of the patches with overlap, in both directions, whose most similar patch
    is the one that overlaps most. chance: 1 / P. drift: relative change of the features since the
    start, |e - e_start| / |e_start|; the frozen language model has not seen the new ones.
    """
    right = total = 0
    sums = torch.zeros(2)  # of the loss and its excess
    features = []
    matched = []
    for _, pixels, grids, pairs in heldout:
        ((x, y, S),) = pairs
        with torch.no_grad():
            e = [one.cpu() for one in encode(encoder, pixels, grids, args.grid)]
            sums += torch.stack(alignment_loss(e, pairs, len(heldout), args))
        forth = matches(S, e[x], e[y])
        back = matches(S.T, e[y], e[x])
        for guess, gold, overlaps in (forth, back):
            right += int((guess == gold)[overlaps].sum())
            total += int(overlaps.sum())
        features.append(torch.stack(e))
        matched.append(forth)
    features = torch.stack(features)  # (pairs, 2, P, D)
    start = features if start_features is None else start_features
    record = {"match_accuracy": right / max(total, 1), "chance": 1 / args.grid**2,
              "drift": float((features - start).norm() / start.norm()),
              "heldout_loss": float(sums[0]), "heldout_excess": float(sums[1])}
    return record, features, matched


def draw_matches(path, heldout, before, after, n):
    """A picture of three held-out pairs, before training (left) and now (right): the first ones of
    which half of the first view's patches or more overlap with the second view.

    Of each such patch a line leads to its match: green if that overlaps most, red if not.
    """
    def overlaps_little(k):
        _, _, overlaps = before[k]
        return 2 * int(overlaps.sum()) < n * n

    rows = []
    for k in sorted(range(len(heldout)), key=overlaps_little)[:3]:
        views, *_ = heldout[k]
        left = match_panel("before", views, before[k], n)
        right = match_panel("after", views, after[k], n)
        rows.append(np.hstack([left, right]))
    Image.fromarray(np.vstack(rows)).save(path)


def match_panel(title, views, matched, n, side=260, head=46, gap=9):
    """Two views side by side, made square, with their cells, and a line for each match."""
    guess, gold, overlaps = matched
    shown = overlaps.nonzero()[:, 0].tolist()
    font = ImageFont.load_default(15)
    panel = Image.new("RGB", (2 * side + 5 * gap, side + head + gap), "white")
    draw = ImageDraw.Draw(panel)
    right = int((guess == gold)[overlaps].sum())
    draw.text((gap, 4), f"{title}: {right} of {len(shown)} right", fill="black", font=font)
    lefts = (gap, side + 4 * gap)
    for number, (view, left) in enumerate(zip(views, lefts)):
        draw.text((left, head - 21), f"view {number}", fill=(110, 110, 110), font=font)
        panel.paste(Image.fromarray(view.image).resize((side, side)), (left, head))
        for k in range(1, n):
            at = k * side // n
            draw.line([left + at, head, left + at, head + side], fill=(190, 190, 190))
            draw.line([left, head + at, left + side, head + at], fill=(190, 190, 190))
    for i in shown:
        apart = ((i % n + 0.5) / n - 0.5) * 0.6  # or lines along a row would hide each other
        ends = []
        for cell, left in zip((i, int(guess[i])), lefts):
            row, column = divmod(cell, n)
            ends.append((left + (column + 0.5) * side / n, head + (row + 0.5 + apart) * side / n))
        colour = (20, 170, 60) if guess[i] == gold[i] else (220, 40, 40)
        draw.line(ends, fill="white", width=5)
        draw.line(ends, fill=colour, width=3)
        for u, v in ends:
            draw.ellipse([u - 5, v - 5, u + 5, v + 5], fill=colour, outline="white")
    return panel


# ------------------------------------------------ mixed precision and checkpointing, by hand


class Recompute(torch.autograd.Function):
    """Activation checkpointing: keep what goes into a function, run it again in the backward pass.
    What it uses beside its inputs, a block's weights, gets gradients in that second run."""

    @staticmethod
    def forward(ctx, run, *inputs):
        ctx.run = run
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)  # outputs that nobody used cost nothing
        return run(*inputs)  # autograd is off in here: nothing inside is kept

    @staticmethod
    def backward(ctx, *grads):
        inputs = []
        for tensor, needs_grad in zip(ctx.saved_tensors, ctx.needs_input_grad[1:]):
            inputs.append(tensor.detach().requires_grad_(needs_grad))
        with torch.enable_grad():
            outputs = ctx.run(*inputs)
        if not isinstance(outputs, tuple):
            outputs = (outputs,)
        used = [k for k, grad in enumerate(grads) if grad is not None]  # outputs
        torch.autograd.backward([outputs[k] for k in used], [grads[k] for k in used])
        return None, *(tensor.grad for tensor in inputs)  # None: of `run`


def recomputed(module, run, x, *others):
    """run(x, *others), which uses the weights of `module`, by Recompute."""
    trains = any(p.requires_grad for p in module.parameters())
    if trains and torch.is_grad_enabled() and not x.requires_grad:
        x = x.detach().requires_grad_()  # without an input that needs a gradient: no second run
    return Recompute.apply(run, x, *others)


def recompute_in_backward(block):
    """Wrap a transformer block of the library, called as block(hidden, **others)."""
    run = block.forward
    block.forward = lambda hidden, **others: recomputed(block, partial(run, **others), hidden)


class Optimizer:
    """Mixed precision by hand: AdamW on fp32 master copies of what trains in a 16-bit model.

    At lr 1e-5 most updates are smaller than the spacing of bf16 numbers, which alone would hardly
    move. So the model computes in 16 bits, while weights, gradients and moments are kept in fp32.
    An fp32 model is its own master. fp16 gradients underflow: the loss is scaled up for them.
    Within a whole model the image encoder has a learning rate of its own.
    """

    def __init__(self, model, args, dtype, device):
        self.warmup = args.warmup
        self.clip = args.clip
        self.t = 0  # updates
        self.good = 0  # steps in a row whose gradient was finite
        self.scale = 2.0**16 if dtype == torch.float16 else 1.0
        self.tensors = {}  # {name: (the model's tensor, its master)}
        groups = {}  # {lr: masters}
        home = torch.device("cpu") if args.offload else device  # of masters and moments
        for name, p in model.named_parameters():
            if p.requires_grad:
                master = torch.nn.Parameter(p.data.to(home, torch.float32))
                if dtype == torch.float32 and home == device:
                    p.data = master.data  # one tensor
                p.register_post_accumulate_grad_hook(partial(self.take, master))
                self.tensors[name] = p, master
                lr = args.vision_lr if "visual." in name else args.lr
                groups.setdefault(lr, []).append(master)
        self.adam = torch.optim.AdamW(
            [{"params": masters, "lr": lr, "full_lr": lr} for lr, masters in groups.items()],
            betas=args.betas, weight_decay=0, fused=True)
        place(model, dtype, device)

    @staticmethod
    def take(master, p):
        """Called when a weight's gradient is there: the 16-bit ones never exist all at once."""
        grad = p.grad.to(master.device, torch.float32)
        master.grad = grad if master.grad is None else master.grad.add_(grad)
        p.grad = None

    def backward(self, loss):
        (loss * self.scale).backward()

    def reduce(self):
        """Sum the gradient over processes, undo the scale. Returns its norm, maybe inf or NaN."""
        norms = []
        for _, master in self.tensors.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            if dist.is_initialized():
                dist.all_reduce(master.grad)
            master.grad /= self.scale
            norms.append(master.grad.norm())
        return float(torch.stack(norms).norm())

    def step(self, norm):
        """One update by the gradient, clipped; norm: what `reduce` returned. Returns whether it was
        made: a gradient that is not finite changes nothing but the scale."""
        finite = math.isfinite(norm)
        if finite:
            self.t += 1
            self.good += 1
            shrink = min(1.0, self.clip / (norm + 1e-12))
            for group in self.adam.param_groups:
                group["lr"] = group["full_lr"] * min(1.0, self.t / max(self.warmup, 1))
            for _, master in self.tensors.values():
                master.grad *= shrink
            self.adam.step()
            for p, master in self.tensors.values():
                p.data.copy_(master.data)
            if self.scale > 1 and self.good % 1000 == 0:
                self.scale *= 2
        else:
            self.good = 0
            self.scale = max(1.0, self.scale / 2)
        self.adam.zero_grad()
        return finite

    def state(self):
        """What a checkpoint holds: masters and, after the first update, AdamW's state of each."""
        tensors = {}
        for name, (_, master) in self.tensors.items():
            tensors[name] = {"master": master.detach(), **self.adam.state.get(master, {})}
        return {"t": self.t, "good": self.good, "scale": self.scale, "tensors": tensors}

    def load(self, state):
        """Continue from what `state` returned; its tensors are copied one by one."""
        self.t = state["t"]
        self.good = state["good"]
        self.scale = state["scale"]
        for name, (p, master) in self.tensors.items():
            saved = dict(state["tensors"][name])
            master.data.copy_(saved.pop("master"))
            p.data.copy_(master.data)
            self.adam.state[master] = {
                kind: tensor.to(master.device, copy=True) for kind, tensor in saved.items()}


def place(model, dtype, device):
    """Move a model to a device, its weights in dtype, one by one: the whole never exists twice. The
    buffers, among them the rotary frequencies, keep their own dtype."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)
    model.to(device)


# -------------------------------------------------------------------------------------- plumbing


def settle(p, argv, values):
    """The arguments, parsed again with `values` as defaults. One out of range ends the run."""
    p.set_defaults(**values)
    args = p.parse_args(argv)
    for name, value in vars(args).items():
        least = 0 if name in MAY_BE_0 else 1e-30  # above 0
        if type(value) in (int, float) and not value >= least:  # NaN is out of range as well
            p.error(f"--{name.replace('_', '-')} is out of range: {value}")
    return args


def start_processes(precision):
    """Join torchrun's process group if there is one. Returns rank, world, device, working dtype."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    best = "fp32"
    backend = "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # plans anew for every length of a text
        best = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        backend = "cpu:gloo,cuda:nccl"  # tensors may be on either side
    if world > 1:
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # one saves, others wait
    if precision == "auto" and best == "fp16" and rank == 0:
        print("warning: this GPU has no bf16: --precision auto is fp16")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return rank, world, device, dtypes[best if precision == "auto" else precision]


def gather(items):
    """What the lists of all processes hold, in one list."""
    everyone = [items]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, items)
    return list(itertools.chain(*everyone))


def load_model(name):
    """The directory of model `name`, a path or an id on the hub; the model, on the CPU; tokenizer.
    The model is fp32 unless all tensors of its files are of one 16-bit dtype."""
    path = Path(name)
    if name in MADE_BY and not (path / "config.json").exists():
        raise geometry.DataError(f"{name}: not there yet; run `{MADE_BY[name]}` first")
    transformers.utils.logging.disable_progress_bar()
    try:
        if not path.is_dir():
            path = Path(snapshot_download(name, allow_patterns=[
                "*.json", "*.txt", "*.jinja", "*.safetensors"]))
        # without config.json the library builds its default giant until memory ends
        if "quantization_config" in json.loads((path / "config.json").read_text()):
            raise ValueError("its weights are quantised; take the 16-bit model")
        if not (path / "tokenizer.json").exists() and not (path / "vocab.json").exists():
            raise ValueError("it has no tokenizer.json; copy the tokenizer's files from its source")
        kinds = set()  # dtypes of the files themselves: config.json may say another
        for file in weight_files(path):
            with safe_open(file, framework="pt") as tensors:
                kinds |= {tensors.get_slice(key).get_dtype() for key in tensors.keys()}
        kind = kinds.pop() if len(kinds) == 1 else "mixed"
        dtype = {"BF16": torch.bfloat16, "F16": torch.float16}.get(kind, torch.float32)
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
        lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        if lacking:
            raise ValueError(f"{len(lacking)} tensors are missing or have another shape than "
                             f"config.json says, {lacking[0]} among them")
        # control tokens in texts are text; set once, since threads share the tokenizer
        tokenizer = AutoTokenizer.from_pretrained(path, split_special_tokens=True)
    except Exception as error:  # the library raises nearly any for a broken directory
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise geometry.DataError(f"{path}: no complete Qwen2.5-VL ({why})") from None
    # the library's 3-D convolution, one patch at a time, is slow; it is this matrix product
    embed = model.model.visual.patch_embed
    embed.forward = lambda pixels: F.linear(
        pixels.to(embed.proj.weight.dtype), embed.proj.weight.flatten(1))
    return path, model, tokenizer


def weight_files(path):
    """The files with a model's weights, as from_pretrained chooses them."""
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    index = json.loads((path / "model.safetensors.index.json").read_text())
    return [path / name for name in sorted(set(index["weight_map"].values()))]


def plain(key):
    """A tensor's name without the prefixes, which differ between files and releases."""
    return key.removeprefix("model.").removeprefix("language_model.")


def save_model(model, source, out, optimizer):
    """Write model directory `source` to `out` with the trained tensors in place of its own.

    All else leaves as it came: other tensors bit for bit, dtypes, names, shards, json files. Old
    weights go first, new ones come last: a kill leaves what load_model refuses, not a mixture.
    """
    masters = {p: master.detach() for p, master in optimizer.tensors.values()}
    trained = {}
    for name, p in model.named_parameters(remove_duplicate=False):  # tied weights have two names
        if p in masters:
            trained[plain(name)] = masters[p]
    for file in out.glob("model*.safetensors*"):
        file.unlink()
    for file in source.iterdir():
        if file.suffix in (".json", ".txt", ".jinja"):
            shutil.copyfile(file, out / file.name)
    for file in weight_files(source):
        tensors = load_file(file)
        for key, tensor in tensors.items():
            if plain(key) in trained:
                tensors[key] = trained[plain(key)].to("cpu", tensor.dtype, copy=True)
        save_file(tensors, out / file.name, {"format": "pt"})
        shutil.copymode(out / "config.json", out / file.name)  # safetensors lets only us read it


def memory_line(model, copies, args, dtype, device):
    """What weights and training take, by arithmetic; copies of the weights: 2 with a reference."""
    weights = copies * sum(p.numel() for p in model.parameters()) * dtype.itemsize
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    home = "cpu" if args.offload else device.type
    own_master = dtype == torch.float32 and home == device.type
    state = trained * (12 if own_master else 16)  # gradient, two moments, and a master, in fp32
    return (f"memory  weights {weights / 2**30:.2g} GiB on {device.type}, masters, gradients and "
            f"moments {state / 2**30:.2g} GiB on {home}; activations come on top")


def begin(args, dtype, walk, source):
    """Make --out. Returns the run's identity, which every checkpoint holds, and the checkpoint to
    --resume from, its tensors still in the file; None for a new run.

    The identity is all that numbers depend on: script, arguments, and checksums of data and start
    model: a run resumed on others would be wrong without a word. DataError if --out does not fit.
    """
    out = Path(args.out)
    if out.resolve() == source.resolve():
        raise geometry.DataError(f"--out {out} is the start model's; name another")
    out.mkdir(parents=True, exist_ok=True)
    identity = {"script": Path(__file__).name, **vars(args), "precision": str(dtype),
                "data": geometry.fingerprint(walk.samples.files),
                "model": geometry.fingerprint(weight_files(source))}
    for name in ("resume", "out", "steps", "save_every", "offload", "no_recompute", "workers"):
        identity.pop(name, None)
    path = out / "checkpoint.pt"
    state = None
    if path.exists():
        try:
            state = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
        except (RuntimeError, pickle.UnpicklingError) as error:
            raise geometry.DataError(f"{path}: cannot be read; remove it to start over "
                                     f"({str(error).splitlines()[0]})") from None
    if not args.resume:
        if state and state["step"] < state["steps"]:  # work that would be lost
            raise geometry.DataError(
                f"--out {out} holds a run stopped at step {state['step']} of {state['steps']}: the "
                "same command with --resume goes on, without its checkpoint.pt one starts over")
        return identity, None
    if state is None:
        raise geometry.DataError(f"--out {out} has no checkpoint.pt: leave --resume out")
    for name, value in identity.items():
        was = state["identity"].get(name)
        if was != value:
            raise geometry.DataError(f"--out {out} was begun with {name} {was}, not {value}: only "
                                     "the same command with --resume goes on")
    return identity, state


def save_checkpoint(out, identity, step, steps, optimizer):
    """Write checkpoint.pt beside the last one, then put it in its place: a kill or a full disk
    spares what was there. The logs' sizes say what of them belongs to it."""
    logs = {file.name: file.stat().st_size for file in out.glob("*.jsonl")}
    with open(out / "checkpoint.tmp", "wb") as file:
        torch.save({"identity": identity, "step": step, "steps": steps, "logs": logs,
                    "optimizer": optimizer.state()}, file)
    os.replace(out / "checkpoint.tmp", out / "checkpoint.pt")


def open_logs(out, args, state, names=("log.jsonl",)):
    """Begin each log with a line about the run; a resumed run's are cut to what was saved."""
    if state:
        for name, size in state["logs"].items():
            os.truncate(out / name, size)
        return
    (out / "checkpoint.pt").unlink(missing_ok=True)  # of a run that has ended
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "transformers": transformers.__version__, "numpy": np.__version__}
    for name in names:
        (out / name).write_text("")
        write_line(out / name, {
            "script": Path(__file__).name, "args": vars(args), "versions": versions})


def write_line(path, record):
    """Add a line of JSON that every reader takes: null for NaN and the infinities."""
    strict = json.loads(json.dumps(record), parse_constant=lambda _: None)
    with open(path, "a") as file:
        file.write(json.dumps(strict) + "\n")


def print_step(record, steps, left, fields):
    """One line a step on a terminal, else about 30 in all."""
    step = record["step"]
    if sys.stdout.isatty() or step in (1, steps) or step % max(1, steps // 30) == 0:
        shown = "  ".join(f"{name} {record[name]:.4g}" for name in fields if name in record)
        print(f"step {step}/{steps}  {shown}  left {timedelta(seconds=int(left))}", flush=True)


def left_out(step, count, grad_norm, batch, missed, say):
    """The record of a step that changed no weight; why is added to `missed`. count: what there was
    to learn from, 0 if no process had a sample; batch: [(name, prepared), ...] of this process."""
    names = ", ".join(gather([name for name, _ in batch]))
    why = f"gradient norm {grad_norm}" if count else "no usable sample"
    missed.append(why)
    say(f"step {step} left out: {why} ({names})")
    return {"step": step, "skipped": f"{why} ({names})"}


def catch_signals():
    """A list that SIGINT, SIGTERM and SIGHUP, a closed terminal, are added to when they come: the
    step is finished, then all is saved."""
    stops = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)  # Windows has none, under nohup it stays ignored
    for number in numbers:
        signal.signal(number, lambda number, _: stops.append(number))
    return stops


# ------------------------------------------------------------------------------ the demo's model


# Qwen's ChatML: for one turn about images, what rewards.encode_prompt writes
CHAT_TEMPLATE = """{% if messages[0].role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}
{%- if part.type == 'text' %}{{ part.text }}{% else %}<|vision_start|><|image_pad|><|vision_end|>
{%- endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def make_demo_model(path, data, seed):
    """Write a tiny Qwen2.5-VL and a tokenizer trained on the texts of `data` to `path`, once.

    The real classes in a small configuration, all special tokens named as Qwen's. Its weights are
    random, but for what a pretrained model has learnt from a trillion words and no tiny one can in
    minutes (put_heads_in).
    """
    stamp = path.with_suffix(".json")
    made_of = json.dumps({"seed": seed, "rooms": geometry.ROOM_VERSION})  # whose texts it reads
    if stamp.exists() and stamp.read_text() == made_of:
        return
    texts = 50 * [rewards.ACTION_INSTRUCTION, rewards.ANSWER_INSTRUCTION,
                  rewards.LANGUAGE_INSTRUCTION, "system\nYou are a helpful assistant.",
                  "user\n", "assistant\n"]  # in every prompt: few tokens
    samples = geometry.load_samples(data)
    for k in range(0, len(samples), max(1, len(samples) // 2000)):
        gold = rewards.gold_of(samples[k])
        texts += [samples[k].question, rewards.write_response(gold.actions, gold.answer)]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
               "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = transformers.Qwen2Tokenizer().train_new_from_iterator(
        texts, 1200, new_special_tokens=special, show_progress=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    ids = dict(zip(special, tokenizer.convert_tokens_to_ids(special)))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 192, "intermediate_size": 512,
            "num_hidden_layers": 4, "num_attention_heads": 3, "num_key_value_heads": 3,
            "max_position_embeddings": 8192, "initializer_range": 0.08,  # see below
            # Qwen's [16, 24, 24] gives columns the lowest frequencies: so small a model is blind
            # to them
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [0, 2, 30]},
            "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"]},
        vision_config={
            "depth": 4, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4,
            "out_hidden_size": 192, "window_size": 112, "fullatt_block_indexes": [1, 3],
            # about 1 / sqrt(width): at 0.02 so narrow a tower hardly learns
            "initializer_range": 0.08},
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True)
    torch.manual_seed(seed)
    transformers.utils.logging.disable_progress_bar()
    model = Qwen2_5_VLForConditionalGeneration(config)
    put_heads_in(model)
    stamp.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    for part in (model, tokenizer, Qwen2VLImageProcessorPil()):
        part.save_pretrained(path)
    shutil.copymode(path / "config.json", path / "model.safetensors")  # for all to read
    stamp.write_text(made_of)


@torch.no_grad()
def put_heads_in(model):
    """Give a tiny model the attention heads that let a pretrained one compare two pictures, and
    bind what it writes to what it has just written.

    Layer 0 writes *where* a token is into the features from 128 on. Layer 1 looks, in the picture
    before, for *what* a token shows, in the features below 128, and fetches where that was. Layer 2
    looks, with its first head, at the token *before*: without it the digits of an amount do not
    know whose they are, and the key that was written hardly counts. The heads know no pose, no room
    and no word: whether what they compare looks alike is up to the encoder, what follows from the
    token before to training.

    Weights are (out, in), of 192 features; q, k and v have 3 heads of 64 features. A position
    rotates those of q and k, which are 2 halves of 32 frequencies, high ones first: the row rotates
    the first 2, the column the other 30; in a text both are the token's place. The factors were
    found by trial, all on seed 0.
    """
    layers = model.model.language_model.layers
    where = layers[0].self_attn
    what = layers[1].self_attn

    # Layer 0: queries and keys are the same for all tokens, so what a token attends to depends on
    # its position alone, and so does the mixture of values that it receives: a mark of the place.
    for project in (where.q_proj, where.k_proj):
        project.weight.zero_()
        project.bias.normal_(0, 2)
    where.o_proj.weight *= 6  # as loud as what the token shows
    where.o_proj.weight[:128] = 0  # the mark goes into the features from 128 on

    # Layer 1: keys are made as queries are, of the features below 128: alike attracts.
    what.q_proj.weight *= 4
    what.q_proj.weight[:, 128:] = 0
    q = what.q_proj.weight.unflatten(0, (3, 2, 32))  # (heads, halves, frequencies, in), a view
    q[:, :, :8] = 0  # high frequencies tell neighbours apart: a little to the side is as good
    what.k_proj.weight.copy_(what.q_proj.weight)

    # A token is most alike to itself and to its neighbours. Opposite biases at three of the
    # columns' frequencies push away what stands at about the same column of the same picture.
    for project, sign in ((what.q_proj, 4), (what.k_proj, -4)):
        bias = project.bias.unflatten(0, (3, 2, 32))  # (heads, halves, frequencies), a view
        bias[:, 0, 2:5] = sign

    # It fetches the mark of the place of what it found, loudly.
    what.v_proj.weight[:, :128] = 0
    what.o_proj.weight *= 8

    # Layer 2, first head: queries and keys are the same for all tokens. At each frequency f the
    # query is the key turned back by f, so they agree most one position before.
    f = model.model.language_model.rotary_emb.inv_freq  # (32,), radians a position
    before = layers[2].self_attn
    for project in (before.q_proj, before.k_proj):
        project.weight[:64] = 0
    before.k_proj.bias[:64] = 6 * torch.cat([torch.ones_like(f), torch.zeros_like(f)])
    before.q_proj.bias[:64] = 6 * torch.cat([f.cos(), -f.sin()])

    # What is not put in begins quietly, and is left to training.
    for layer in layers[2:]:
        layer.self_attn.q_proj.weight *= 0.3
        layer.self_attn.k_proj.weight *= 0.3
    for layer in layers:
        layer.mlp.down_proj.weight.zero_()
    for parameter in model.model.visual.merger.mlp[-1].parameters():
        parameter *= 0.5


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # letters that a console lacks end no run
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
    except (geometry.DataError, OSError, SafetensorError, torch.OutOfMemoryError) as error:
        sys.exit(f"pasta.py: {str(error).strip().splitlines()[0]}")
