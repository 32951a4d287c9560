"""Stage 1 of HATCH, "how to look": Patch-Level Spatial Alignment (PaStA, section 3.3).

Two views of one room, each cut into n x n patches. From depth and camera poses we know which
patches show the same place (S, Eq. 1); the image encoder should know it too: the features of two
patches are to be as similar as the patches overlap. Only the image encoder trains, the language
model is not even loaded.

    Eq. 1  S       patch overlap of two views            geometry.correspondence
    Eq. 2  p(j|i)  target, softmax of S / tau1           target_distribution
    Eq. 3  q(j|i)  prediction, softmax of cosine / tau2  log_prediction
    Eq. 4  L_CL    both directions, all pairs            alignment_loss
    Eq. 5  L_X->Y  cross-entropy of p and q              directional_loss

    python pasta.py --grid 4                     # renders rooms, makes a tiny Qwen2.5-VL, aligns it
    python pasta.py --grid 4 --model Qwen/Qwen2.5-VL-3B-Instruct --data /path/to/spar
    torchrun --nproc_per_node 4 pasta.py --grid 4 --batch 4 --model ... --data ...

Writes --out: the model with its aligned encoder (an ordinary Hugging Face directory), log.jsonl,
matches.png (matches of held-out pairs before and after), checkpoint.safetensors (for --resume).

Axes: V views, H W pixels, n grid side, P = n * n patches, D feature, h w merged tokens of an image.

Deviations from the paper, and what it leaves open: each is tagged "not in the paper" on its line;
the README lists them with their flags.
"""

import argparse
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2VLImageProcessorPil
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel, apply_rotary_pos_emb_vision)

import geometry
import rewards

DEMO = Path("out/demo")


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description="PaStA: align Qwen2.5-VL's image encoder across posed views.")
    # what to train on what; without --model and --data, a demo that needs neither
    p.add_argument("--model", help="model directory or hub id; default: a tiny random Qwen2.5-VL")
    p.add_argument("--data",
                   help="SPAR-7M-RGBD tree (the folder that holds scannet/, ...); "
                        "default: rendered rooms")
    p.add_argument("--out", default="out/pasta", help="where the aligned model and the log go")
    p.add_argument("--samples", type=int, default=10_000,
                   help="how many multi-image samples to draw (paper: 10,000)")
    p.add_argument("--max-pixels", type=int, default=448 * 448,
                   help="budget per image; larger ones are scaled down")
    # the objective
    p.add_argument("--grid", type=int, default=4,
                   help="n: patches per side; the paper sweeps 2 to 6")
    p.add_argument("--tau1", type=float, default=0.1,  # not in the paper
                   help="target temperature: 1 is near uniform, 0.05 near argmax")
    p.add_argument("--tau2", type=float, default=0.07,  # not in the paper
                   help="prediction temperature; lower asks for sharper features")
    p.add_argument("--t", type=float, default=0.05,  # not in the paper
                   help="depth agreement in metres; sensor noise is 0.004-0.02")
    p.add_argument("--t-rel", type=float, default=0.05,  # not in the paper
                   help="and as a share of the depth; the larger one counts")
    p.add_argument("--skip-empty", action="store_true",  # not in the paper
                   help="leave out patches without overlap; Eq. 2 makes their target uniform")
    # optimisation
    p.add_argument("--steps", type=int, help="default: one epoch; demo: 1500")
    p.add_argument("--batch", type=int,
                   help="samples per step over all processes; paper: 1; demo: 2")
    p.add_argument("--lr", type=float,
                   help="fixed; paper: 1e-5; demo, whose model starts random: 5e-4")
    p.add_argument("--clip", type=float, default=1.0,  # not in the paper
                   help="largest gradient norm")
    p.add_argument("--seed", type=int, default=0,
                   help="decides the data order, and the demo's rooms and weights")
    # the machine
    p.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                   help="of the working weights; auto: bf16 on CUDA, fp32 on a CPU. "
                        "Master weights are always fp32")
    p.add_argument("--no-recompute", action="store_true",
                   help="keep activations instead of recomputing them: faster, more memory")
    p.add_argument("--workers", type=int, default=min(8, os.cpu_count()),
                   help="threads that prepare images and overlaps ahead")
    # looking and saving
    p.add_argument("--heldout", type=int, default=64, help="held-out pairs to evaluate on")
    p.add_argument("--eval-every", type=int,
                   help="steps between evaluations, each with a checkpoint; default: a quarter")
    p.add_argument("--resume", action="store_true", help="continue from --out's checkpoint")
    args = p.parse_args(argv)

    args.demo = args.data is None
    if args.demo:  # the only place where demo and real run differ
        args.data, args.no_recompute = str(DEMO / "data"), True
        scale = {"lr": 5e-4, "batch": 2, "steps": 1500}
    else:
        scale = {"lr": 1e-5, "batch": 1, "steps": None}
        if args.model is None:
            p.error("--data needs a --model: Qwen/Qwen2.5-VL-3B-Instruct, or out/demo/model, which "
                    "`python pasta.py --grid 4` makes")
    for name, value in scale.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("samples", "grid", "max_pixels", "steps", "batch", "heldout", "eval_every",
                 "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            p.error(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    if args.seed < 0:
        p.error(f"--seed must be 0 or more, got {args.seed}")
    for name in ("tau1", "tau2", "lr", "clip"):
        if not getattr(args, name) > 0:
            p.error(f"--{name} must be above 0, got {getattr(args, name)}")
    return args


# ------------------------------------------------------------------------------------ the method


def cell_features(tokens, n):
    """Average a feature map (h, w, D) over n x n cells -> e (P, D).

    Cells have the fractional edges k / n that geometry uses, so a token that straddles an edge
    counts for each side by its share, and any h and w will do.
    """
    h, w, D = tokens.shape
    A_h, A_w = _cell_weights(h, n, tokens.device), _cell_weights(w, n, tokens.device)
    return torch.einsum("ah,hwd,bw->abd", A_h, tokens.float(), A_w).reshape(n * n, D)


def _cell_weights(length, n, device):
    """(n, length): the share of cell k that each of `length` equal tokens fills; rows sum to 1."""
    edges = torch.arange(n + 1, device=device) * (length / n)
    low, high = edges[:-1, None], edges[1:, None]
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
    p, log_q = target_distribution(S, tau1), log_prediction(e_x, e_y, tau2)
    CE = -(p * log_q).sum(-1)  # (P,)
    H = -(p * p.clamp(min=1e-30).log()).sum(-1)  # (P,)
    rows = S.amax(-1) > 0 if skip_empty else torch.ones_like(CE, dtype=torch.bool)
    if not rows.any():
        return CE.sum() * 0, H.sum() * 0
    return CE[rows].mean(), H[rows].mean()  # Eq. 5


def alignment_loss(e, pairs, count, args):
    """L_CL and its excess: e, list of (P, D); pairs, list of (x, y, S); count = |P|, all ranks."""
    loss = excess = 0.0
    for x, y, S in pairs:
        L_xy, H_xy = directional_loss(S, e[x], e[y], args.tau1, args.tau2, args.skip_empty)
        L_yx, H_yx = directional_loss(S.T, e[y], e[x], args.tau1, args.tau2, args.skip_empty)
        loss = loss + (L_xy + L_yx) / count  # Eq. 4
        excess = excess + (L_xy + L_yx - H_xy - H_yx).detach() / count
    return loss, excess


def matches(S, e_x, e_y):
    """Which patch of y each patch of x is matched to, and whether that is right.

    Returns guess (P,), similarity (P,), gold (P,) = the patch with most overlap, and overlaps (P,)
    bool: whether there is one at all.
    """
    cos = F.normalize(e_x, dim=-1) @ F.normalize(e_y, dim=-1).T
    similarity, guess = cos.max(-1)  # argmax q = argmax cos
    most, gold = S.max(-1)
    return guess, similarity, gold, most > 0


def encode(encoder, frames, n, device):
    """Patch features of prepared frames, all sizes at once -> list of e (P, D), fp32."""
    pixels = torch.cat([frame["patches"] for frame in frames]).to(device, non_blocking=True)
    grid_thw = torch.tensor([(1, *frame["grid"]) for frame in frames], device=device)
    # pooler_output is in raster order, and what the language model reads; last_hidden_state is in
    # the order of the attention windows, which shows only in images larger than one window
    tokens = encoder(pixels, grid_thw=grid_thw).pooler_output  # (sum of h * w, D)
    merge = encoder.config.spatial_merge_size
    sizes = [(frame["grid"][0] // merge, frame["grid"][1] // merge) for frame in frames]
    maps = tokens.split([h * w for h, w in sizes])
    return [cell_features(m.view(h, w, -1), n) for m, (h, w) in zip(maps, sizes)]


# ------------------------------------------------------------------------------- frames and pairs


class Frames:
    """Turns samples into what a step needs: image patches for the encoder and S for every pair.

    Frames that cannot be read are reported once, by name, and left out; `skipped` holds them.
    own_val: whether the data has a val split. If not, one frame pair in five is held out, by a hash
    of the frames' names, in whichever samples it occurs.
    """

    def __init__(self, args, own_val):
        self.args, self.own_val, self.skipped = args, own_val, set()
        self.processor = Qwen2VLImageProcessorPil(
            size={"shortest_edge": 56 * 56, "longest_edge": args.max_pixels})

    def read(self, sample, k):
        """View k of a sample, or None if it cannot be read or is too small."""
        try:
            view = sample.view(k)
            if min(view.depth.shape) < self.args.grid:
                raise geometry.DataError(
                    f"{sample.depths[k]}: smaller than --grid {self.args.grid}")
            return view
        except geometry.DataError as error:
            return self.skip(error)

    def skip(self, error):
        if str(error) not in self.skipped:
            self.skipped.add(str(error))
            print(f"skipped {error}", flush=True)

    def patches(self, view):
        """The encoder's input for a view: {"patches" (h' * w', 1176) float32, "grid": (h', w')}."""
        out = self.processor(images=[view.image], return_tensors="pt")
        return {"patches": out["pixel_values"],
                "grid": tuple(out["image_grid_thw"][0, 1:].tolist())}

    def overlap(self, x, y):
        S = geometry.correspondence(x, y, self.args.grid, self.args.t, self.args.t_rel)
        return torch.from_numpy(S).float()

    def held_out(self, sample, pair):
        """Whether this pair of frames is kept from training; data with a val split keeps none."""
        names = sorted("/".join(sample.images[k].parts[-3:]) for k in pair)  # scene, folder, frame
        return not self.own_val and zlib.crc32("|".join(names).encode()) % 5 == 0

    def prepare(self, sample, pairs):
        """Read the frames that `pairs`, [(a, b), ...] of views of a sample, need.

        Returns frames, dicts as of `patches` with the "image" beside; and [(x, y, S), ...] with
        indices into frames. Pairs of unreadable frames are left out, so both lists can be empty.
        """
        views = {k: self.read(sample, k) for k in sorted({k for pair in pairs for k in pair})}
        used = [k for k in views if views[k]]
        frames = [{**self.patches(views[k]), "image": views[k].image} for k in used]
        return frames, [(used.index(a), used.index(b), self.overlap(views[a], views[b]))
                        for a, b in pairs if views[a] and views[b]]


def all_pairs(sample):
    """The unordered pairs (a, b), a < b, of a sample's views."""
    return list(itertools.combinations(range(len(sample.images)), 2))


def draw_samples(samples, frames, count, seed):
    """Indices of `count` random samples (or all) that have a pair of views to train on."""
    drawn = np.random.default_rng([seed, 0]).permutation(len(samples))[:count]
    if frames.own_val:
        return drawn
    kept = []
    for k in drawn:
        try:
            if not all(frames.held_out(samples[k], pair) for pair in all_pairs(samples[k])):
                kept.append(k)
        except geometry.DataError as error:
            frames.skip(error)
    return kept


def sample_order(drawn, seed):
    """Position k of training -> index of a sample: the drawn ones, in a new order each epoch.

    A function of (seed, k) alone, so a resumed run goes on where it stopped.
    """
    epochs = {}

    def at(k):
        epoch, place = divmod(k, len(drawn))
        if epoch not in epochs:
            epochs.clear()
            epochs[epoch] = np.random.default_rng([seed, 1, epoch]).permutation(len(drawn))
        return int(drawn[epochs[epoch][place]])

    return at


def find_held_out(samples, frames, count):
    """`count` different held-out frame pairs, or as many as there are: list of (sample, (a, b))."""
    found, rng = {}, np.random.default_rng(0)
    for index in rng.permutation(len(samples))[:1000 + 20 * count]:
        try:
            sample = samples[int(index)]
        except geometry.DataError as error:
            frames.skip(error)
            continue
        for pair in all_pairs(sample):
            if frames.own_val or frames.held_out(sample, pair):
                found.setdefault(frozenset(sample.images[k] for k in pair), (sample, pair))
        if len(found) >= 3 * count:
            break
    found = list(found.values())
    # in random order, so that the first few show different scenes
    return [found[k] for k in rng.permutation(len(found))[:count]]


def prepared_ahead(pool, prepare, order, args, start, rank, world):
    """Yield each step's [prepare(index), ...] of this process, computed ahead by `pool`."""
    mine = range(rank, args.batch, world)
    ahead, submitted, queue = 2 + args.workers // len(mine), start, deque()
    for step in range(start, args.steps):
        while submitted < min(step + ahead, args.steps):
            queue.append([pool.submit(prepare, order(submitted * args.batch + k)) for k in mine])
            submitted += 1
        yield [job.result() for job in queue.popleft()]


def pairs_at(samples, frames, index):
    """(name, frames, pairs) of sample `index`, without the held-out pairs."""
    try:
        sample = samples[index]
    except geometry.DataError as error:
        frames.skip(error)
        return f"sample {index}", [], []
    pairs = [pair for pair in all_pairs(sample) if not frames.held_out(sample, pair)]
    return sample.id, *frames.prepare(sample, pairs)


# ----------------------------------------------------------------------- looking at what it learnt


def evaluate(encoder, held_out, frames, pool, args, device, start_features=None):
    """Match the held-out pairs. Returns the record for the log, the patch features of all pairs,
    and what draw_matches needs of the first three.

    match_accuracy: share of the patches with overlap, in both directions, whose most similar patch
    is the one that overlaps most. chance: 1 / P. drift: relative change of the features since the
    start, |e - e_start| / |e_start|; the frozen language model has not seen the new ones.
    """
    right = total = 0
    sums, features, shown = torch.zeros(2), [], []
    for ready, pairs in pool.map(lambda job: frames.prepare(job[0], [job[1]]), held_out):
        for x, y, S in pairs:
            with torch.no_grad():
                e = [f.cpu() for f in encode(encoder, ready, args.grid, device)]
                sums += torch.stack(alignment_loss(e, [(x, y, S)], 1, args))
            forth, back = matches(S, e[x], e[y]), matches(S.T, e[y], e[x])
            for guess, _, gold, overlaps in (forth, back):
                right += int((guess == gold)[overlaps].sum())
                total += int(overlaps.sum())
            features.append(torch.stack([e[x], e[y]]))
            if len(shown) < 3:
                shown.append((ready[x]["image"], ready[y]["image"], forth))
    if not features:
        raise geometry.DataError(
            f"{args.data}: none of the {len(held_out)} held-out pairs can be read")
    features = torch.stack(features)  # (pairs, 2, P, D)
    start = features if start_features is None else start_features
    record = {"match_accuracy": right / max(total, 1), "chance": 1 / args.grid**2,
              "drift": float((features - start).norm() / start.norm()),
              "heldout_loss": float(sums[0]) / len(features),
              "heldout_excess": float(sums[1]) / len(features)}
    return record, features, shown


def draw_matches(path, before, after, n):
    """A picture of the first held-out pairs, before training (left) and now (right).

    Lines join the up to 12 patches of the first view that are surest of their match (and have a
    true one) to their match in the second view: green if that patch overlaps most, red if not.
    """
    panels = [[_match_panel(title, *view, n) for title, view in (("before", b), ("after", a))]
              for b, a in zip(before, after)]
    gap = 14
    width = max(panel.width for row in panels for panel in row)
    height = panels[0][0].height
    page = Image.new("RGB", (2 * width + 3 * gap, len(panels) * (height + gap) + gap), "white")
    for r, row in enumerate(panels):
        for c, panel in enumerate(row):
            page.paste(panel, (gap + c * (width + gap), gap + r * (height + gap)))
    beside = path.with_name("." + path.name)
    page.save(beside, format="PNG")
    os.replace(beside, path)


def _match_panel(title, image_x, image_y, matched, n, height=260, head=24):
    guess, similarity, gold, overlaps = matched
    views = [Image.fromarray(image) for image in (image_x, image_y)]
    views = [view.resize((round(view.width * height / view.height), height)) for view in views]
    left = (0, views[0].width + 6)
    panel = Image.new("RGB", (left[1] + views[1].width, head + height), "white")
    draw = ImageDraw.Draw(panel)
    for view, x in zip(views, left):
        panel.paste(view, (x, head))
        for k in range(1, n):
            u, v = x + k * view.width // n, head + k * height // n
            draw.line([u, head, u, head + height], fill=(190, 190, 190))
            draw.line([x, v, x + view.width, v], fill=(190, 190, 190))
    surest = similarity.masked_fill(~overlaps, -2.0).argsort(descending=True)[
        :min(12, int(overlaps.sum()))]
    for i in surest.tolist():
        apart = ((i % n + 0.5) / n - 0.5) * 0.5  # or lines along a row would hide each other
        ends = [(x + (cell % n + 0.5) * view.width / n,
                 head + (cell // n + 0.5 + apart) * height / n)
                for cell, view, x in zip((i, int(guess[i])), views, left)]
        colour = (20, 170, 60) if guess[i] == gold[i] else (220, 40, 40)
        draw.line(ends, fill="white", width=5)
        draw.line(ends, fill=colour, width=3)
        for u, v in ends:
            draw.ellipse([u - 5, v - 5, u + 5, v + 5], fill=colour, outline="white")
    right = int((guess == gold)[surest].sum())
    draw.text((2, 2), f"{title}: {right} of the {len(surest)} surest matches are right",
              fill="black", font=ImageFont.load_default(15))
    return panel


# -------------------------------------------------------------------------------------- plumbing


class Recompute(torch.autograd.Function):
    """Activation checkpointing: keep a block's input only, run it again in the backward pass."""

    @staticmethod
    def forward(ctx, run, hidden):
        ctx.run = run
        ctx.save_for_backward(hidden)
        return run(hidden)  # autograd is off in here: nothing inside the block is kept

    @staticmethod
    def backward(ctx, grad):
        hidden = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.run(hidden)
        torch.autograd.backward(out, grad)  # adds to the gradients of the block's weights
        return None, hidden.grad


def recompute_in_backward(block):
    """Wrap a transformer block so that it keeps none of its activations.

    What goes into the block must require grad, since autograd sees the hidden states only.
    """
    run = block.forward
    block.forward = lambda hidden, **kwargs: Recompute.apply(partial(run, **kwargs), hidden)


def attend_in_groups(attention, hidden, cu_seqlens, position_embeddings, **_):
    """The image encoder's attention with all windows of one length in one call; same numbers.

    The library's own loops over windows: 448x448 pixels, three views and 32 blocks are 1,356 calls
    instead of 32. hidden (L, D); cu_seqlens: where windows (or images, in full attention) begin
    and end.
    """
    L = len(hidden)
    q, k, v = attention.qkv(hidden).view(L, 3, attention.num_heads, -1).unbind(1)  # (L, heads, d)
    q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
    outs, places = [], []
    for length in lengths.unique().tolist():
        rows = starts[lengths == length, None] + torch.arange(length, device=hidden.device)
        out = F.scaled_dot_product_attention(*(x[rows].transpose(1, 2) for x in (q, k, v)))
        outs.append(out.transpose(1, 2).reshape(rows.numel(), -1))  # (windows * length, D)
        places.append(rows.flatten())
    return attention.proj(torch.cat(outs)[torch.cat(places).argsort()])


def embed_patches(embed, pixels):
    """Patch embedding as the matrix product that it is: a 3-D convolution by patch is slow."""
    return F.linear(pixels.to(embed.proj.weight.dtype), embed.proj.weight.flatten(1))


def speed_up(encoder):
    encoder.patch_embed.forward = partial(embed_patches, encoder.patch_embed)
    for block in encoder.blocks:
        block.attn.forward = partial(attend_in_groups, block.attn)
    return encoder


class Adam:
    """AdamW without weight decay, on one flat fp32 master copy of what trains in a model.

    At lr 1e-5 most updates are smaller than the spacing of bf16 numbers: weights kept in bf16 alone
    would hardly move. So the model computes in its working dtype, while the optimiser keeps fp32
    weights and moments, and rounds back after each step. An fp32 model needs no copy: its
    parameters and gradients become views of the flat vectors. fp16 gradients underflow, so the loss
    is scaled up before the backward pass and the gradient down after it.
    """

    def __init__(self, model, dtype, lr, clip, betas=(0.9, 0.999), eps=1e-8):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.lr, self.clip, self.betas, self.eps = lr, clip, betas, eps
        self.master = torch.cat([p.detach().float().flatten() for p in self.parameters])
        self.grad, self.m, self.v = (torch.zeros_like(self.master) for _ in range(3))
        self.t = self.good = 0  # updates; updates since the loss scale last changed
        self.scale = 2.0**16 if dtype == torch.float16 else 1.0
        sizes = [p.numel() for p in self.parameters]
        self.weights = [w.view_as(p) for w, p in zip(self.master.split(sizes), self.parameters)]
        self.grads = [g.view_as(p) for g, p in zip(self.grad.split(sizes), self.parameters)]
        self.shared = dtype == torch.float32
        for p, w, g in zip(self.parameters, self.weights, self.grads):
            if self.shared:
                p.data, p.grad = w, g
            else:
                p.data = w.to(dtype)
                p.register_post_accumulate_grad_hook(partial(self.take, g))
        for p in model.parameters():
            if not p.requires_grad:  # frozen: no master copy
                p.data = p.data.to(dtype)

    def backward(self, loss):
        """Add a loss's gradient, in fp32, to that of the losses before it in this step."""
        (loss * self.scale).backward()

    @staticmethod
    def take(g, p):
        """Called when p's gradient is there: the 16-bit ones never exist all at once."""
        g += p.grad.to(g.device)
        p.grad = None

    def reduce(self):
        """Sum the gradient over processes. Returns its norm, which may be inf or NaN."""
        if dist.is_initialized():
            dist.all_reduce(self.grad)
        self.grad /= self.scale
        return float(self.grad.norm())

    def step(self, norm):
        """One update, gradient clipped to self.clip. Returns the norm of the weights' change."""
        self.t, self.good = self.t + 1, self.good + 1
        self.grad *= min(1.0, self.clip / (norm + 1e-12))
        (b1, b2), change = self.betas, 0.0
        flat = (self.master, self.grad, self.m, self.v)
        for w, g, m, v in zip(*(x.split(1 << 22) for x in flat)):  # in pieces: small temporaries
            m.lerp_(g, 1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            root = (v / (1 - b2**self.t)).sqrt_().add_(self.eps)
            update = root.reciprocal_().mul_(m).mul_(self.lr / (1 - b1**self.t))
            w -= update
            change = change + update.square().sum()
        if self.scale > 1 and self.good % 1000 == 0:
            self.scale *= 2
        self.publish()
        return float(change) ** 0.5

    def skip(self):
        """Drop a non-finite gradient. Returns True if a lower loss scale may mend it."""
        self.grad.zero_()
        self.good, may_mend = 0, self.scale > 1
        self.scale = max(1.0, self.scale / 2)
        return may_mend

    def publish(self):
        """Round the master weights into the model; clear the gradient."""
        self.grad.zero_()
        if not self.shared:
            for p, w in zip(self.parameters, self.weights):
                p.data.copy_(w)

    def state(self):
        return ({"master": self.master, "m": self.m, "v": self.v},
                {"t": self.t, "scale": self.scale, "good": self.good})

    def load(self, tensors, numbers):
        for name in ("master", "m", "v"):
            getattr(self, name).copy_(tensors[name])
        self.t, self.scale, self.good = numbers["t"], numbers["scale"], numbers["good"]
        self.publish()


def save_tensors(path, tensors, metadata):
    """Write safetensors beside `path`, then rename: a kill or full disk spares the old file."""
    beside = path.with_name(path.name + ".tmp")
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, beside, metadata)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise geometry.DataError(
            f"could not save {path} ({error}). What was saved before is untouched: "
            "free some space and continue with --resume") from None


def save_checkpoint(path, optimizer, step, args):
    tensors, numbers = optimizer.state()
    state = {"step": step, "optimizer": numbers, "args": vars(args)}
    save_tensors(path, tensors, {"state": json.dumps(state)})


def read_checkpoint(path):
    """The state beside a checkpoint's tensors: {"step", "optimizer", "args"}."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["state"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise geometry.DataError(f"{path}: cannot be read as a checkpoint ({error})") from None


def check_resume(state, args, names, path):
    """Resuming is exact only with the arguments that the run was started with."""
    for name in names:
        then, now = state["args"].get(name), getattr(args, name)
        if then != now:
            raise geometry.DataError(
                f"{path} was made with --{name.replace('_', '-')} {then}, not {now}: "
                "resume with the same, or start over in another --out")


def find_model(name):
    """Directory of a model: `name` itself, or the hub's copy of it."""
    path = Path(name)
    if not path.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) or path.parent.is_dir():
            raise geometry.DataError(
                f"{name}: no such model directory. `python pasta.py --grid 4` makes a tiny one in "
                f"{DEMO / 'model'}; the paper's is Qwen/Qwen2.5-VL-3B-Instruct")
        try:
            from huggingface_hub import snapshot_download

            path = Path(snapshot_download(
                name, allow_patterns=["*.json", "*.txt", "*.jinja", "*.safetensors"]))
        except Exception as error:  # the hub raises dozens of kinds: offline, gated, misspelt, ...
            raise geometry.DataError(
                f"{name}: no such directory, and the hub has not given it either "
                f"({str(error).strip().splitlines()[0]})") from None
    if not (path / "config.json").exists() or not list(path.glob("*.safetensors")):
        raise geometry.DataError(
            f"{path}: a model directory holds config.json and *.safetensors, this one does not")
    return path


# "visual." as published, "model.visual." in newer files
VISION_KEY = re.compile(r"(?:model\.)?visual\.(.+)")


def load_encoder(model, device):
    """The vision tower of a model directory in fp32, out of its shards; all else is left there."""
    config = Qwen2_5_VLConfig.from_pretrained(model)
    weights = {}
    for shard in sorted(model.glob("model*.safetensors")):
        try:
            with safe_open(shard, framework="pt") as file:
                for key in file.keys():
                    if found := VISION_KEY.fullmatch(key):
                        weights[found[1]] = file.get_tensor(key)
        except SafetensorError as error:
            raise geometry.DataError(
                f"{shard}: cannot be read ({error}); an interrupted download?") from None
    encoder = Qwen2_5_VisionTransformerPretrainedModel._from_config(
        config.vision_config, dtype=torch.float32)
    lacking = sorted(set(encoder.state_dict()) - set(weights))
    if lacking:
        raise geometry.DataError(
            f"{model}: {len(lacking)} tensors of the image encoder are not in its "
            f"model*.safetensors, visual.{lacking[0]} among them")
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise geometry.DataError(f"{model}: its image encoder is not what config.json says: "
                                 f"{str(error).splitlines()[-1].strip()}") from None
    return encoder.to(device)


def save_model(model, out, encoder_weights):
    """Write model directory `model` to `out` with another vision tower and all else unchanged.

    encoder_weights: name without prefix -> tensor. Shards keep their names, keys and dtypes. The
    files are written to out/incoming first and moved when all are there, so a kill harms no model.
    """
    incoming = out / "incoming"
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir(parents=True)
    for source in sorted(model.iterdir()):
        if source.match("model*.safetensors"):
            with safe_open(source, framework="pt") as file:
                tensors, metadata = (
                    {key: file.get_tensor(key) for key in file.keys()}, file.metadata())
            for key, tensor in tensors.items():
                if found := VISION_KEY.fullmatch(key):
                    tensors[key] = encoder_weights[found[1]].to(tensor.dtype)
            save_tensors(incoming / source.name, tensors, metadata)
        elif source.suffix in (".json", ".txt", ".jinja"):
            shutil.copyfile(source, incoming / source.name)
    move_in(incoming, out)


def move_in(incoming, out):
    """Move the files of a whole model from `incoming` to `out`, in place of a former model's."""
    written = {file.name for file in incoming.iterdir()}
    for name in sorted(written):
        os.replace(incoming / name, out / name)
    incoming.rmdir()
    for file in out.glob("model*.safetensors*"):  # shards of a former model would be read as well
        if file.name not in written:
            file.unlink()


def make_demo_model(path, data, seed):
    """Write a tiny random Qwen2.5-VL and a tokenizer trained on the texts of `data` to `path`.

    The real classes in a small configuration: 4 vision blocks of width 128, every other with window
    attention; 4 language layers of width 192. Special tokens have Qwen's names. Made once per seed.
    """
    stamp = path.with_suffix(".json")
    if stamp.exists() and json.loads(stamp.read_text()) == {"seed": seed}:
        return
    texts = [rewards.ACTION_INSTRUCTION, rewards.ANSWER_INSTRUCTION, rewards.LANGUAGE_INSTRUCTION]
    for sample in geometry.load_samples(data):
        gold = rewards.gold_of(sample)
        texts += [sample.question, sample.answer, rewards.write_response(gold.actions, gold.answer)]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
               "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = transformers.Qwen2Tokenizer().train_new_from_iterator(
        texts, 1200, new_special_tokens=special, show_progress=False)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in special}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 192, "intermediate_size": 512,
            "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
            "max_position_embeddings": 8192, "initializer_range": 0.08,  # see below
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
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
    making = path.with_name(path.name + ".partial")
    shutil.rmtree(making, ignore_errors=True)
    transformers.utils.logging.disable_progress_bar()
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(making)
    tokenizer.save_pretrained(making)
    Qwen2VLImageProcessorPil().save_pretrained(making)
    stamp.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    making.rename(path)
    stamp.write_text(json.dumps({"seed": seed}))


def start_processes():
    """Join torchrun's process group if there is one. Returns rank, world, device."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        # both, since --offload keeps gradients in host memory
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # the others wait while the first evaluates and saves
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    return rank, world, device


def all_sum(numbers, device):
    """Each number summed over all processes."""
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def gather(items):
    """What the lists of all processes hold, in one list."""
    everyone = [items]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, items)
    return [item for its in everyone for item in its]


class Interrupt:
    """Remembers SIGINT or SIGTERM, so that the loop can finish its step and save.

    Repeats are ignored, since launchers forward what the processes have got already; only Ctrl-C
    again, five seconds later, ends the process at once.
    """

    def __init__(self):
        self.number = self.since = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number, frame):
        if not self.number:
            self.number, self.since = number, time.monotonic()
            print(f"\n{signal.Signals(number).name}: finishing this step, then saving", flush=True)
        elif number == signal.SIGINT and time.monotonic() - self.since > 5:
            sys.exit("interrupted again: not saved")


class Log:
    """log.jsonl: arguments, versions, then a line a step; on resume, lines up to that step stay."""

    def __init__(self, path, args, resumed_at):
        self.path = path
        head = {"args": vars(args), "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "numpy": np.__version__}}
        kept = []
        if resumed_at is not None and path.exists():
            for line in path.read_text().splitlines(keepends=True)[1:]:
                # a kill can cut the last line
                if line.endswith("\n") and json.loads(line)["step"] <= resumed_at:
                    kept.append(line.rstrip())
        path.write_text("\n".join([json.dumps(head), *kept]) + "\n")

    def write(self, record):
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")


def print_trainable(model, parts):
    """What trains and what is frozen: parameters of each of the named submodules."""
    for name in parts:
        parameters = list(model.get_submodule(name).parameters())
        verb = "trains" if any(p.requires_grad for p in parameters) else "frozen"
        print(f"  {verb}  {name:21} {sum(p.numel() for p in parameters):>13,}")
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"  trains  {'in all':21} {count:>13,} parameters")


def print_step(record, steps, left):
    """One line a step, in place on a terminal; else about 30 in all. Evaluations always stay."""
    line = f"step {record['step']}/{steps}"
    line += "".join(f"  {name} {record[key]:.{digits}f}" for name, key, digits in (
        ("loss", "loss", 3), ("excess", "excess", 3), ("grad", "grad_norm", 2),
        ("update", "update_norm", 4), ("pairs/s", "pairs_per_s", 1)) if key in record
    ) + f"  left {clock(left)}"
    if "match_accuracy" in record:
        line += (f"\n        match accuracy {record['match_accuracy']:.1%} of held-out patches, "
                 f"excess {record['heldout_excess']:.3f}, drift {record['drift']:.2f}")
    live, keep = sys.stdout.isatty(), "match_accuracy" in record
    if live or keep or record["step"] == 5 or record["step"] % max(1, steps // 30) == 0:
        print(line.ljust(90) if live else line, end="\n" if keep or not live else "\r", flush=True)


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = start_processes()
    say = partial(print, flush=True) if rank == 0 else lambda *_, **__: None
    if args.batch % world:
        raise geometry.DataError(
            f"--batch {args.batch} cannot be shared by {world} processes: use --batch {world}")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.safetensors"

    # without --data or --model: rooms and a tiny model, written once in the layouts of real ones
    if args.demo:
        say(f"Demo: rendered rooms and {args.model or 'a tiny random Qwen2.5-VL'}. The real run:\n"
            "  python pasta.py --grid 4 --model Qwen/Qwen2.5-VL-3B-Instruct --data /path/to/spar")
        if rank == 0:
            geometry.render_rooms(args.data, seed=args.seed)
    if args.model is None:
        args.model = str(DEMO / "model")
        if rank == 0:
            make_demo_model(DEMO / "model", args.data, args.seed)
    if world > 1:
        dist.barrier()  # the others read what the first process wrote

    samples = geometry.load_samples(args.data, tasks=geometry.MULTI_VIEW_TASKS)
    try:
        val, own_val = geometry.load_samples(
            args.data, split="val", tasks=geometry.MULTI_VIEW_TASKS), True
    except geometry.DataError:
        val, own_val = samples, False
    frames = Frames(args, own_val)
    held_out = find_held_out(val, frames, args.heldout)
    drawn = draw_samples(samples, frames, args.samples, args.seed)
    if not held_out or not len(drawn):
        raise geometry.DataError(f"{args.data}: too few pairs of views to train on some and hold "
                                 "out others; add samples, or a val folder beside train")
    order = sample_order(drawn, args.seed)
    args.steps = args.steps or max(1, len(drawn) // args.batch)
    args.eval_every = args.eval_every or max(1, args.steps // 4)
    say(f"data    {args.data}: {len(samples):,} multi-image samples, "
        f"{len(drawn):,} of them drawn; {len(held_out)} held-out pairs "
        + ("from val" if own_val else "(no val split: one frame pair in five is kept out)"))

    state = None
    if args.resume:
        state = read_checkpoint(checkpoint)
        check_resume(state, args, (
            "model", "data", "samples", "max_pixels", "grid", "tau1", "tau2", "t", "t_rel",
            "skip_empty", "batch", "lr", "clip", "seed", "precision"), checkpoint)
    elif checkpoint.exists() and (
            old := read_checkpoint(checkpoint))["step"] < old["args"]["steps"]:
        raise geometry.DataError(
            f"{out} holds a run stopped at step {old['step']} of {old['args']['steps']}: continue "
            f"it with --resume, or remove {checkpoint} or name another --out to start over")
    start = state["step"] if state else 0

    precision = {"auto": "bf16" if device.type == "cuda" else "fp32"}.get(
        args.precision, args.precision)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    model = find_model(args.model)
    encoder = speed_up(load_encoder(model, device))
    optimizer = Adam(encoder, dtype, args.lr, args.clip)
    if not args.no_recompute:
        for block in encoder.blocks:
            recompute_in_backward(block)
    size = optimizer.master.numel()
    say(f"model   {args.model}: image encoder in {precision} on {device}, fp32 master weights; "
        f"torch {torch.__version__}, transformers {transformers.__version__}")
    if rank == 0:
        print_trainable(encoder, ("patch_embed", "blocks", "merger"))
    say(f"memory  {size * (16 if optimizer.shared else 16 + dtype.itemsize) / 2**30:.2f} GiB "
        "of weights, gradients and moments, and the activations of "
        f"{'one block' if not args.no_recompute else 'all blocks'} at a time\n"
        f"batch   {args.batch} samples a step over {world} process(es), all their pairs; "
        f"{args.steps - start:,} steps")

    with ThreadPoolExecutor(args.workers) as pool:
        if rank == 0:  # the encoder as it starts, also when resuming: for `drift` and "before"
            record, features, before = evaluate(encoder, held_out, frames, pool, args, device)
            say(f"start   match accuracy {record['match_accuracy']:.1%} of held-out patches "
                f"(chance {record['chance']:.1%})")
            log = Log(out / "log.jsonl", args, start if state else None)
            if not state:
                log.write({"step": 0, **record})
        if state:
            optimizer.load(load_file(checkpoint), state["optimizer"])

        trouble, interrupt, clock_start = 0, Interrupt(), time.monotonic()
        tick = clock_start
        prepare = partial(pairs_at, samples, frames)
        batches = prepared_ahead(pool, prepare, order, args, start, rank, world)
        for step, batch in enumerate(batches, start + 1):
            ready, pairs = [], []
            for _, its_frames, its_pairs in batch:
                pairs += [(x + len(ready), y + len(ready), S.to(device)) for x, y, S in its_pairs]
                ready += its_frames
            # |P| counts the pairs of all processes, so that their gradients add up to those of one
            # process with all
            count, stop = all_sum([len(pairs), interrupt.number], device)
            loss = excess = 0.0
            if pairs:
                e = encode(encoder, ready, args.grid, device)
                loss, excess = alignment_loss(e, pairs, count, args)
                optimizer.backward(loss)
                loss, excess = loss.item(), excess.item()
            grad_norm = optimizer.reduce()
            loss, excess = all_sum([loss, excess], device)

            record = {"step": step, "loss": loss, "excess": excess, "grad_norm": grad_norm,
                      "update_norm": 0.0}
            if count and math.isfinite(loss + grad_norm):
                record["update_norm"], trouble = optimizer.step(grad_norm), 0
            else:
                names = ", ".join(gather([name for name, *_ in batch]))
                why = (f"loss {loss}, gradient norm {grad_norm}" if count
                       else "no readable pair of views")
                say(f"step {step} left out: {why} ({names})")
                record = {"step": step, "skipped": f"{why} ({names})"}
                if count and not optimizer.skip():
                    trouble += 1
                if trouble == 5:
                    raise geometry.DataError(
                        f"five steps in a row were not finite, the last being step {step}: lower "
                        "--lr, or look at the samples named above. What was saved before is in "
                        f"{out}")
            now = time.monotonic()
            record["pairs_per_s"], left = (
                count / (now - tick), (now - clock_start) / (step - start) * (args.steps - step))

            look = step == args.steps or step % args.eval_every == 0
            if rank == 0:
                if look or stop:  # first what cannot be had again
                    save_checkpoint(checkpoint, optimizer, step, args)
                if look and not stop:
                    progress, _, after = evaluate(
                        encoder, held_out, frames, pool, args, device, features)
                    draw_matches(out / "matches.png", before, after, args.grid)
                    record.update(progress)
                log.write(record)
                print_step(record, args.steps, left)
            if stop:
                gather([])  # torchrun ends all when one has ended: after the first has saved
                say(f"stopped after step {step}, saved in {out}; "
                    "the same command with --resume goes on from here")
                sys.exit(128 + (interrupt.number or signal.SIGTERM))
            tick = time.monotonic()

    skipped = set(gather(sorted(frames.skipped)))
    if rank == 0:
        names = [name for name, _ in encoder.named_parameters()]
        save_model(model, out, dict(zip(names, optimizer.weights)))
        if skipped:
            say(f"skipped {len(skipped)} frames or records that cannot be read, named above")
        say(f"wrote   {out}: the model with its aligned encoder, log.jsonl, matches.png")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except geometry.DataError as error:
        sys.exit(f"pasta.py: {error}")
    except OSError as error:  # a full disk, a file where a folder should be, no permission
        sys.exit(f"pasta.py: {error}; what was saved before is untouched")
    except KeyboardInterrupt:
        sys.exit("pasta.py: interrupted before training began; nothing to save")
