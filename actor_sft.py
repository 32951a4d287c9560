"""Stages 2 and 3 of HATCH: supervised fine-tuning on answers, then the cold start of ActoR, "how to
move" (Action-then-Answer Reasoning, section 3.4).

    --target answer   question -> answer; all data, the full model trains
    --target actions  question -> the camera moves between all views, then the answer; a tenth of
                      the data. Teaches the form that reinforcement learning starts from.
    --target mixed    both in one run: a share --mix of actions among direct answers (the hybrid
                      cold start of Actial)

    what is taught            rewards.write_response of geometry.actions_from_pose, all pairs
    what is asked             chat_prompt, equal to the model's published chat template
    where a token is          rope_positions, equal to the library's get_rope_index
    loss                      TokenLogProbs: -log p of the response's tokens, end token included

    python actor_sft.py --target answer     # reads out/pasta, writes out/sft
    python actor_sft.py --target actions    # reads out/sft, writes out/cold_start
    python actor_sft.py --target answer --data /path/to/spar    # the paper's values
    torchrun --nproc_per_node 4 actor_sft.py --target answer --batch 4 --data ...

Writes --out: the model (an ordinary Hugging Face directory), log.jsonl, checkpoint.safetensors (for
--resume).

The samples of a step stand one behind the other in one row without padding, and each attends to
itself only (each_alone).

Axes: L tokens of a row, T response tokens, D feature, W words of the vocabulary, h w merged tokens
of an image.

Beyond the paper: the choices tagged "not in the paper" on their lines; the README lists them.
"""

import argparse
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
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer, DynamicCache, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    apply_rotary_pos_emb, apply_rotary_pos_emb_vision)

import geometry
import rewards

DEMO = Path("out/demo")
MADE_BY = {"out/pasta": "python pasta.py --grid 4",  # the stages before, and what runs them
           "out/sft": "python actor_sft.py --target answer"}
END = ["<|im_end|>", "<|endoftext|>"]  # of a turn; of a text, which a base model may write instead


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description="Supervised fine-tuning of Qwen2.5-VL on answers, or on actions and answers.")
    # what to train on what
    p.add_argument("--target", choices=("answer", "actions", "mixed"), default="answer",
                   help="what a response is: the answer; all camera moves, then the answer; both")
    p.add_argument("--model", help="model directory or hub id; default: out/pasta; for --target "
                                   "actions out/sft")
    p.add_argument("--data", help="SPAR-7M-RGBD tree; default: the demo's rooms")
    p.add_argument("--out", help="where the model and the log go; default: out/sft, or "
                                 "out/cold_start if actions are among the targets")
    p.add_argument("--samples", type=int, default=10_000,
                   help="how many multi-image samples to draw (paper: 10,000)")
    p.add_argument("--fraction", type=float,
                   help="share of them to use; default: 1, for --target actions 0.1 (paper; "
                        "demo: 0.6)")
    p.add_argument("--mix", type=float, default=0.1,  # not in the paper
                   help="share of action responses in --target mixed")
    p.add_argument("--max-pixels", type=int, default=448 * 448,
                   help="budget per image; larger ones are scaled down")
    p.add_argument("--max-tokens", type=int, default=8192,
                   help="longest row of packed samples; a sample that is longer alone is left out")
    p.add_argument("--freeze", choices=("vision", "language"),
                   help="keep the image encoder, or the language model, as it is")
    # optimisation
    p.add_argument("--steps", type=int, help="default: one epoch; demo: 400, actions 360")
    p.add_argument("--batch", type=int,
                   help="samples per step over all processes; paper: 1; demo: 4")
    p.add_argument("--lr", type=float,
                   help="fixed; paper: 1e-5; demo, whose model starts random: 5e-4, actions 7e-4")
    p.add_argument("--clip", type=float, default=1.0,  # not in the paper
                   help="largest gradient norm")
    p.add_argument("--seed", type=int, default=0, help="decides which samples, in which order")
    # the machine
    p.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                   help="of the working weights; auto: bf16 on CUDA, fp32 on a CPU. "
                        "Master weights are always fp32")
    p.add_argument("--offload", action="store_true",
                   help="keep master weights and moments in host memory: slower steps, but on the "
                        "GPU 2 bytes a parameter instead of 18")
    p.add_argument("--no-recompute", action="store_true",
                   help="keep activations instead of recomputing them: faster, more memory")
    p.add_argument("--workers", type=int, default=min(8, os.cpu_count()),
                   help="threads that prepare samples ahead")
    # looking and saving
    p.add_argument("--heldout", type=int, default=64, help="held-out samples to evaluate on")
    p.add_argument("--show", type=int, default=0,
                   help="training examples to print, what is trained between marks")
    p.add_argument("--eval-every", type=int,
                   help="steps between evaluations, each with a checkpoint; default: a quarter")
    p.add_argument("--resume", action="store_true", help="continue from --out's checkpoint")
    args = p.parse_args(argv)

    args.demo, actions = args.data is None, args.target == "actions"
    if args.demo:  # the only place where demo and real run differ
        args.data, args.no_recompute = str(DEMO / "data"), True
        # of the demo's 1,647 samples 0.6 are as many as the paper's tenth of 10,000
        scale = ({"lr": 7e-4, "batch": 4, "steps": 360, "fraction": 0.6} if actions else
                 {"lr": 5e-4, "batch": 4, "steps": 400, "fraction": 1.0})
    else:
        scale = {"lr": 1e-5, "batch": 1, "steps": None, "fraction": 0.1 if actions else 1.0}
    scale |= {"model": "out/sft" if actions else "out/pasta",
              "out": "out/sft" if args.target == "answer" else "out/cold_start"}
    for name, value in scale.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.seed < 0:
        p.error(f"--seed must be 0 or more, got {args.seed}")
    for name in ("samples", "max_pixels", "max_tokens", "steps", "batch", "heldout", "eval_every",
                 "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            p.error(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    for name in ("lr", "clip"):
        if not getattr(args, name) > 0:
            p.error(f"--{name} must be above 0, got {getattr(args, name)}")
    for name in ("fraction", "mix"):
        if not 0 < getattr(args, name) <= 1:
            p.error(f"--{name} must be above 0 and at most 1, got {getattr(args, name)}")
    return args


# ------------------------------------------------------------------------------------ the method


def chat_prompt(text, image_tokens):
    """What the model reads before its response: the images, then the text, as Qwen's ChatML.

    image_tokens: how many merged tokens each image has. Equal to the published chat template with
    each <|image_pad|> repeated so often.
    """
    images = "".join(f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in image_tokens)
    return ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n{images}{text}<|im_end|>\n<|im_start|>assistant\n")


def rope_positions(ids, image_token, sizes):
    """Rotary positions (3, L) of tokens ids (L,): time, row and column.

    Text counts up in all three alike. The tokens of an image, of `sizes` [(h, w), ...] merged
    tokens, share one time and have its rows and columns; text goes on behind the largest.
    """
    parts, here, at = [], 0, 0  # here: token; at: position
    for h, w in sizes:
        text = int((ids[here:] == image_token).nonzero()[0])
        parts.append(at + torch.arange(text).expand(3, -1))
        at += text
        row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        parts.append(at + torch.stack([torch.zeros(h * w).long(), row.flatten(), column.flatten()]))
        here, at = here + text + h * w, at + max(h, w)
    parts.append(at + torch.arange(len(ids) - here).expand(3, -1))
    return torch.cat(parts, dim=1)


class TokenLogProbs(torch.autograd.Function):
    """log p of target tokens, in chunks of positions: logits never exist for all of them.

    hidden (T, D), weight (W, D), targets (T,) -> log p (T,) fp32, and whether the target is the
    likeliest word (T,). With 151,936 words the logits of 2,000 tokens would be 1.2 GB, three times.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk=128):
        ctx.chunk, log_p, likeliest, normaliser = chunk, [], [], []
        for h, y in zip(hidden.split(chunk), targets.split(chunk)):
            logits = (h @ weight.T).float()  # (chunk, W)
            normaliser.append(logits.logsumexp(-1))
            log_p.append(logits.gather(-1, y[:, None])[:, 0] - normaliser[-1])
            likeliest.append(logits.argmax(-1) == y)
        ctx.save_for_backward(hidden, weight, targets, torch.cat(normaliser))
        likeliest = torch.cat(likeliest)
        ctx.mark_non_differentiable(likeliest)
        return torch.cat(log_p), likeliest

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, normaliser = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            h, y, g = hidden[part], targets[part, None], grad[part, None]
            # d log p(y) / d logits = onehot(y) - p
            d_logits = (h @ weight.T).float().sub_(normaliser[part, None]).exp_().mul_(-g)
            d_logits.scatter_add_(-1, y, g)
            d_logits = d_logits.to(weight.dtype)
            d_hidden[part] = d_logits @ weight
            if d_weight is not None:
                d_weight.addmm_(d_logits.T, h)
        return d_hidden, d_weight, None, None


def attend(attention, library, hidden_states, position_embeddings, layout=None, **kwargs):
    """The language model's self-attention, with `layout` to say which token sees which.

    layout(layer, q, k, v) -> (rows, heads, tokens, d), of q, k and v (rows, their heads, tokens,
    d). Without one, the library's own, which works with its cache.
    """
    if layout is None:
        return library(hidden_states=hidden_states, position_embeddings=position_embeddings,
                       **kwargs)
    q, k, v = (project(hidden_states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
               for project in (attention.q_proj, attention.k_proj, attention.v_proj))
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    out = layout(attention.layer_idx, q, k, v)
    return attention.o_proj(out.transpose(1, 2).flatten(2)), None


def each_alone(layer, q, k, v, lengths):
    """Layout of a row of samples of `lengths` tokens, each causal within itself: needs no mask."""
    samples = zip(*(x.split(lengths, dim=2) for x in (q, k, v)))
    return torch.cat([F.scaled_dot_product_attention(*sample, is_causal=True, enable_gqa=True)
                      for sample in samples], dim=2)


def embed(model, ids, patches, grids, images=None):
    """Words and images as features: ids (..., L), patches and grids of all images -> (..., L, D).

    images: the image tokens (sum of h * w, D), if they are known already.
    """
    features = model.get_input_embeddings()(ids)
    if images is None:
        images = encode_images(model, patches, grids, ids.device)
    here = (ids == model.config.image_token_id)[..., None]
    return features.masked_scatter(here, images.to(features.dtype))


def encode_images(model, patches, grids, device):
    """Image tokens (sum of h * w, D) of patches, in the order in which the prompt has them."""
    return model.model.visual(patches.to(device), grid_thw=grids.to(device)).pooler_output


def response_log_probs(model, row, device):
    """log p of each response token of a Row, and whether it is the likeliest one: (T,), (T,)."""
    ids = row.ids.to(device)[None]
    hidden = model.model.language_model(
        inputs_embeds=embed(model, ids, row.patches, row.grids),
        position_ids=row.positions.to(device)[:, None], attention_mask={"full_attention": None},
        use_cache=False, layout=partial(each_alone, lengths=row.lengths)
    ).last_hidden_state[0]  # (L, D)
    trained = row.trained.to(device).nonzero()[:, 0]
    # the features of a token predict the one after it
    return TokenLogProbs.apply(hidden[trained - 1], model.lm_head.weight, ids[0, trained])


def generate_greedily(model, examples, end, longest, device):
    """The likeliest response to each example's prompt, token by token: list of token lists.

    One batch, prompts padded on the left, the library's cache. A response ends before the first
    token that is in `end`, or after `longest` tokens.
    """
    prompts = [example.ids[:example.prompt] for example in examples]
    B, L = len(prompts), max(map(len, prompts))
    ids, seen = torch.full((B, L), end[0]), torch.zeros(B, L, dtype=torch.long)
    positions = torch.zeros(3, B, L, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        ids[b, L - len(prompt):], seen[b, L - len(prompt):] = prompt, 1
        positions[:, b, L - len(prompt):] = rope_positions(
            prompt, model.config.image_token_id, examples[b].sizes)
    ids, seen, positions = ids.to(device), seen.to(device), positions.to(device)
    patches = torch.cat([example.patches for example in examples])
    cache, written, ended = DynamicCache(config=model.config.text_config), [], ids.new_zeros(B) > 0
    with torch.no_grad():
        features = embed(model, ids, patches, grids_of(examples))
        for _ in range(longest):
            hidden = model.model.language_model(
                inputs_embeds=features, position_ids=positions, attention_mask=seen,
                past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
            token = model.lm_head(hidden).argmax(-1)  # (B,)
            written.append(token.masked_fill(ended, end[0]))
            ended = ended | torch.isin(token, token.new_tensor(end))
            if ended.all():
                break
            features = model.get_input_embeddings()(token[:, None])
            positions = positions[:, :, -1:].amax(0, keepdim=True).expand(3, -1, -1) + 1
            seen = torch.cat([seen, seen.new_ones(B, 1)], dim=1)
    return [row[:next((k for k, token in enumerate(row) if token in end), len(row))]
            for row in torch.stack(written, dim=1).tolist()]


# ------------------------------------------------------------------------------ samples and rows


class Example(NamedTuple):
    """A sample as tokens: ids (L,), the first `prompt` of them asked, the others taught."""

    id: str
    ids: torch.Tensor
    prompt: int
    patches: torch.Tensor  # of all its images
    sizes: list  # merged tokens (h, w) of each image
    gold: rewards.Gold
    form: str  # "answer" or "actions"


class Row(NamedTuple):
    """Examples one behind the other: ids (L,), positions (3, L), trained (L,) bool."""

    ids: torch.Tensor
    positions: torch.Tensor
    trained: torch.Tensor
    lengths: list
    patches: torch.Tensor
    grids: torch.Tensor


class Examples:
    """Turns samples into examples. What cannot be used is reported once, by name, and left out;
    `skipped` holds it."""

    def __init__(self, args, tokenizer):
        self.args, self.tokenizer, self.skipped = args, tokenizer, set()
        self.processor = Qwen2VLImageProcessorPil(
            size={"shortest_edge": 56 * 56, "longest_edge": args.max_pixels})

    def skip(self, error):
        if str(error) not in self.skipped:
            self.skipped.add(str(error))
            print(f"skipped {error}", flush=True)

    def make(self, sample, form):
        """Example of a geometry.Sample; form "answer" or "actions". None if it is left out."""
        try:
            images = self.processor(images=sample.pictures(), return_tensors="pt")
            gold = rewards.gold_of(sample)
            grids = images["image_grid_thw"][:, 1:] // self.processor.merge_size
            sizes = [tuple(size) for size in grids.tolist()]
            instruction, response = rewards.ANSWER_INSTRUCTION, gold.answer
            if form == "actions":
                instruction = rewards.ACTION_INSTRUCTION
                response = rewards.write_response(gold.actions, gold.answer)
            prompt = self.tokenizer(chat_prompt(f"{sample.question}\n{instruction}",
                                                [h * w for h, w in sizes]))["input_ids"]
            taught = self.tokenizer(f"{response}<|im_end|>")["input_ids"]
            if len(prompt) + len(taught) > self.args.max_tokens:
                raise geometry.DataError(
                    f"{sample.id} ({sample.task}): {len(prompt) + len(taught)} tokens, "
                    f"--max-tokens is {self.args.max_tokens}")
        except geometry.DataError as error:
            return self.skip(error)
        return Example(sample.id, torch.tensor(prompt + taught), len(prompt),
                       images["pixel_values"], sizes, gold, form)


def pack(examples, image_token, longest):
    """Rows of at most `longest` tokens, the examples in their order."""
    rows, row = [], []
    for example in examples:
        if row and sum(len(e.ids) for e in row) + len(example.ids) > longest:
            rows.append(row)
            row = []
        row.append(example)
    return [_row(row, image_token) for row in [*rows, row] if row]


def _row(examples, image_token):
    return Row(
        torch.cat([e.ids for e in examples]),
        torch.cat([rope_positions(e.ids, image_token, e.sizes) for e in examples], dim=1),
        torch.cat([torch.arange(len(e.ids)) >= e.prompt for e in examples]),
        [len(e.ids) for e in examples],
        torch.cat([e.patches for e in examples]), grids_of(examples))


def grids_of(examples):
    """(images, 3): frames, rows and columns of patches of every image, as the encoder wants it."""
    return torch.tensor([(1, 2 * h, 2 * w) for e in examples for h, w in e.sizes])


def held_out(sample):
    """Whether a sample is kept from training, where the data has no val split: one set of frames in
    five, by a hash of the frames' names."""
    names = sorted("/".join(path.parts[-3:]) for path in sample.images)  # scene, folder, frame
    return zlib.crc32("|".join(names).encode()) % 5 == 0


def choose_samples(samples, own_val, args, skip):
    """Indices of the samples to train on: the drawn ones that are not held out, in random order.

    skip: told of records that cannot be read.
    """
    kept = []
    for k in np.random.default_rng([args.seed, 0]).permutation(len(samples))[:args.samples]:
        try:
            if own_val or not held_out(samples[k]):
                kept.append(int(k))
        except geometry.DataError as error:
            skip(error)
    return kept


def find_heldout(val, own_val, args, skip):
    """`--heldout` samples to evaluate on, or as many as there are; skip as in choose_samples."""
    found = []
    for k in np.random.default_rng(0).permutation(len(val)):
        try:
            sample = val[int(k)]
            if own_val or held_out(sample):
                found.append(sample)
        except geometry.DataError as error:
            skip(error)
        if len(found) == args.heldout:
            break
    return found


def form_of(index, args):
    """What sample `index` is trained on: "answer" or "actions"."""
    if args.target == "mixed":
        share = np.random.default_rng([args.seed, 2, index]).random()
        return "actions" if share < args.mix else "answer"
    return args.target


def example_at(samples, examples, args, index):
    """(name, Example or None) of sample `index`."""
    try:
        sample = samples[index]
    except geometry.DataError as error:
        examples.skip(error)
        return f"sample {index}", None
    return sample.id, examples.make(sample, form_of(index, args))


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


def prepared_ahead(pool, prepare, order, args, start, rank, world):
    """Yield each step's [prepare(index), ...] of this process, computed ahead by `pool`."""
    mine = range(rank, args.batch, world)
    ahead, submitted, queue = 2 + args.workers // len(mine), start, deque()
    for step in range(start, args.steps):
        while submitted < min(step + ahead, args.steps):
            queue.append([pool.submit(prepare, order(submitted * args.batch + k)) for k in mine])
            submitted += 1
        yield [job.result() for job in queue.popleft()]


# ----------------------------------------------------------------------- looking at what it learnt


def evaluate_heldout(model, heldout, examples, pool, args, device, batch=16):
    """Loss on held-out samples, and what the model itself writes to them.

    Returns the record for the log and [(Example, written text)]. heldout_loss: -log p of a response
    token. answer: mean R_ans. For actions also format and action: mean R_fmt and R_act.
    """
    form = "answer" if args.target == "answer" else "actions"
    ready = [e for e in pool.map(lambda sample: examples.make(sample, form), heldout) if e]
    if not ready:
        raise geometry.DataError(
            f"{args.data}: none of the {len(heldout)} held-out samples can be read")
    log_p, written, end = [], [], examples.tokenizer.convert_tokens_to_ids(END)
    for start in range(0, len(ready), batch):
        some = ready[start:start + batch]
        for row in pack(some, model.config.image_token_id, args.max_tokens):
            with torch.no_grad():
                log_p.append(response_log_probs(model, row, device)[0].cpu())
        pairs = max(len(e.gold.actions) for e in some)
        longest = 64 if form == "answer" else 96 + 64 * pairs  # not in the paper
        for e, tokens in zip(some, generate_greedily(model, some, end, longest, device)):
            written.append((e, examples.tokenizer.decode(tokens)))
    record = {"heldout_loss": -float(torch.cat(log_p).mean())}
    if form == "answer":
        record["answer"] = float(np.mean([rewards.answer_reward(
            text, e.gold.answer, e.gold.task, e.gold.kind) for e, text in written]))
    else:
        parts = [rewards.total_reward(text, e.gold) for e, text in written]
        for name in ("format", "action", "answer"):
            record[name] = float(np.mean([part[name] for part in parts]))
    return record, written


def constant_plan(golds):
    """(R_act, plan): the one plan that, written for every pair, scores best; of the golds' own.

    Knowing it, a model that looks at no image can score this much.
    """
    plans = [plan for gold in golds for plan in gold.actions.values()]
    texts = {views: [rewards.write_response(dict.fromkeys(rewards.required_pairs(views), plan), "")
                     for plan in plans] for views in {gold.views for gold in golds}}
    scores = [np.mean([rewards.action_reward(texts[gold.views][k], gold.actions)
                       for gold in golds]) for k in range(len(plans))]
    return max(scores), plans[int(np.argmax(scores))]


def show_example(example, tokenizer):
    """Print an example as the model reads it, each trained token between bars."""
    asked = tokenizer.decode(example.ids[:example.prompt].tolist())
    asked = re.sub(r"(<\|image_pad\|>)+", lambda m: f"[{len(m[0]) // 13} image tokens]", asked)
    taught = tokenizer.batch_decode(example.ids[example.prompt:, None])
    print(f"--- {example.id}: read\n{asked}\n--- trained, token by token\n|{'|'.join(taught)}|",
          flush=True)


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


def load_model(path, args, device):
    """Model and tokenizer of a directory; the model in fp32, frozen where --freeze says."""
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise geometry.DataError(
            f"{path}: cannot be read as a Qwen2.5-VL ({str(error).splitlines()[0]})") from None
    if info["missing_keys"] or info["mismatched_keys"]:
        lacking = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
        raise geometry.DataError(f"{path}: {len(lacking)} tensors are missing or have another "
                                 f"shape than config.json says, {lacking[0]} among them")
    prepare_model(model, args.freeze, not args.no_recompute)
    if not args.offload:
        model.to(device)
    return model, tokenizer


def prepare_model(model, freeze, recompute):
    """Freeze "vision", "language" or None, and put this file's attention and recomputing in."""
    frozen = {"vision": [model.model.visual], "language": [model.model.language_model,
                                                           model.lm_head], None: []}
    for part in frozen[freeze]:
        part.requires_grad_(False)
    speed_up(model.model.visual)
    for layer in model.model.language_model.layers:
        layer.self_attn.forward = partial(attend, layer.self_attn, layer.self_attn.forward)
    if recompute:
        for block in (*model.model.visual.blocks, *model.model.language_model.layers):
            recompute_in_backward(block)


def save_whole_model(model, source, out):
    """Write `model` to `out`, and beside it what `source` has of tokenizer and processor files.

    First to out/incoming; the files are moved when all are there, so a kill harms no model.
    """
    incoming = out / "incoming"
    shutil.rmtree(incoming, ignore_errors=True)
    try:
        model.save_pretrained(incoming)
        for file in source.iterdir():
            if file.suffix in (".json", ".txt", ".jinja") and not file.match("*.index.json"):
                if not (incoming / file.name).exists():
                    shutil.copyfile(file, incoming / file.name)
    except (OSError, SafetensorError) as error:
        raise geometry.DataError(
            f"could not save {incoming} ({error}). The checkpoint is untouched: free some space "
            "and run the same command with --resume") from None
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


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def print_progress(record, steps, left):
    """One line a step, in place on a terminal; else about 30 in all. Evaluations always stay."""
    line = f"step {record['step']}/{steps}"
    line += "".join(f"  {name} {record[key]:.{digits}f}" for name, key, digits in (
        ("loss", "loss", 3), ("accuracy", "token_accuracy", 3), ("grad", "grad_norm", 2),
        ("update", "update_norm", 4), ("tokens/s", "tokens_per_s", 0)) if key in record
    ) + f"  left {clock(left)}"
    live, keep = sys.stdout.isatty(), "heldout_loss" in record
    if keep:
        line += "\n        " + heldout_line(record)
    if live or keep or record["step"] == 5 or record["step"] % max(1, steps // 30) == 0:
        print(line.ljust(90) if live else line, end="\n" if keep or not live else "\r", flush=True)


def heldout_line(record):
    return f"held-out loss {record['heldout_loss']:.3f}; written responses: " + ", ".join(
        f"R_{short} {record[name]:.3f}" for short, name in (
            ("fmt", "format"), ("act", "action"), ("ans", "answer")) if name in record)


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = start_processes()
    say = partial(print, flush=True) if rank == 0 else lambda *_, **__: None
    if args.batch % world:
        raise geometry.DataError(
            f"--batch {args.batch} cannot be shared by {world} processes: use --batch {world}")
    precision = {"auto": "bf16" if device.type == "cuda" else "fp32"}.get(
        args.precision, args.precision)
    if args.offload and precision == "fp32":
        raise geometry.DataError("--offload keeps the fp32 master weights in host memory and needs "
                                 "--precision bf16 or fp16 beside them")
    if args.model in MADE_BY and not (Path(args.model) / "config.json").exists():
        raise geometry.DataError(f"{args.model}: not there yet; run `{MADE_BY[args.model]}` first")
    if args.demo:
        say("Demo: rendered rooms. The real run:\n"
            f"  python actor_sft.py --target {args.target} --data /path/to/spar")
        if not Path(args.data).is_dir():
            raise geometry.DataError(f"{args.data}: not there yet; run `python pasta.py --grid 4`, "
                                     "which renders it, or name a tree with --data")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.safetensors"

    state = None
    if args.resume:
        state = read_checkpoint(checkpoint)
        check_resume(state, args, (
            "target", "model", "data", "samples", "fraction", "mix", "max_pixels", "max_tokens",
            "freeze", "batch", "lr", "clip", "seed", "precision"), checkpoint)
    elif checkpoint.exists() and (
            old := read_checkpoint(checkpoint))["step"] < old["args"]["steps"]:
        raise geometry.DataError(
            f"{out} holds a run stopped at step {old['step']} of {old['args']['steps']}: continue "
            f"it with --resume, or remove {checkpoint} or name another --out to start over")
    start = state["step"] if state else 0

    source = find_model(args.model)
    model, tokenizer = load_model(source, args, device)
    examples = Examples(args, tokenizer)
    samples = geometry.load_samples(args.data, tasks=geometry.MULTI_VIEW_TASKS)
    try:
        val, own_val = geometry.load_samples(
            args.data, split="val", tasks=geometry.MULTI_VIEW_TASKS), True
    except geometry.DataError:
        val, own_val = samples, False
    heldout = find_heldout(val, own_val, args, examples.skip)
    drawn = choose_samples(samples, own_val, args, examples.skip)
    drawn = drawn[:math.ceil(args.fraction * len(drawn))]
    if not heldout or not drawn:
        raise geometry.DataError(f"{args.data}: too few samples to train on some and hold out "
                                 "others; add samples, or a val folder beside train")
    order = sample_order(drawn, args.seed)
    args.steps = args.steps or max(1, len(drawn) // args.batch)
    args.eval_every = args.eval_every or max(1, args.steps // 4)
    say(f"data    {args.data}: {len(samples):,} multi-image samples, {len(drawn):,} of them used; "
        f"{len(heldout)} held out " + ("from val" if own_val else "(no val split: one in five)"))

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    optimizer = Adam(model, dtype, args.lr, args.clip)
    if args.offload:
        model.to(device)  # the working weights; the optimiser's stay in host memory
    trained = optimizer.master.numel()
    say(f"model   {args.model}: {precision} on {device}, fp32 master weights"
        f"{' in host memory' if args.offload else ''}; "
        f"torch {torch.__version__}, transformers {transformers.__version__}")
    if rank == 0:
        print_trainable(model, ("model.visual", "model.language_model"))
    memory = dtype.itemsize * sum(p.numel() for p in model.parameters())
    memory += trained * (16 * (not args.offload) - 4 * optimizer.shared)  # shared: no copy
    say(f"memory  {memory / 2**30:.2f} GiB of weights, gradients and moments, and the activations "
        f"of {'one block' if not args.no_recompute else 'all blocks'} at a time\n"
        f"batch   {args.batch} samples a step over {world} process(es), packed into rows of at "
        f"most {args.max_tokens:,} tokens; {args.steps - start:,} steps")

    with ThreadPoolExecutor(args.workers) as pool:
        if rank == 0:
            log = Log(out / "log.jsonl", args, start if state else None)
            for index in drawn[:args.show]:
                if example := example_at(samples, examples, args, index)[1]:
                    show_example(example, tokenizer)
            if not state:
                record, written = evaluate_heldout(model, heldout, examples, pool, args, device)
                say("start   " + heldout_line(record))
                if args.target != "answer":
                    record["action_constant"], plan = constant_plan([e.gold for e, _ in written])
                    say(f"        R_act of the best constant plan {record['action_constant']:.3f}: "
                        f"{json.dumps(plan)}")
                log.write({"step": 0, **record})
        if state:
            optimizer.load(load_file(checkpoint), state["optimizer"])

        trouble, interrupt, clock_start = 0, Interrupt(), time.monotonic()
        tick = clock_start
        prepare = partial(example_at, samples, examples, args)
        batches = prepared_ahead(pool, prepare, order, args, start, rank, world)
        for step, batch in enumerate(batches, start + 1):
            rows = pack([example for _, example in batch if example],
                        model.config.image_token_id, args.max_tokens)
            # the mean over the response tokens of all rows of all processes, so that their
            # gradients add up to those of one process with all
            count, tokens, stop = all_sum([sum(int(row.trained.sum()) for row in rows),
                                           sum(len(row.ids) for row in rows), interrupt.number],
                                          device)
            loss = right = 0.0
            for row in rows:
                log_p, likeliest = response_log_probs(model, row, device)
                row_loss = -log_p.sum() / count
                optimizer.backward(row_loss)
                loss, right = loss + row_loss.item(), right + int(likeliest.sum())
            grad_norm = optimizer.reduce()
            loss, right = all_sum([loss, right], device)

            record = {"step": step, "loss": loss, "token_accuracy": right / max(count, 1),
                      "grad_norm": grad_norm, "update_norm": 0.0}
            if count and math.isfinite(loss + grad_norm):
                record["update_norm"], trouble = optimizer.step(grad_norm), 0
            else:
                names = ", ".join(gather([name for name, _ in batch]))
                why = (f"loss {loss}, gradient norm {grad_norm}" if count else "no usable sample")
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
            record["tokens_per_s"], left = (
                tokens / (now - tick), (now - clock_start) / (step - start) * (args.steps - step))

            look = step == args.steps or step % args.eval_every == 0
            if rank == 0:
                if look or stop:  # first what cannot be had again
                    save_checkpoint(checkpoint, optimizer, step, args)
                if look and not stop:
                    progress, written = evaluate_heldout(
                        model, heldout, examples, pool, args, device)
                    record.update(progress)
                log.write(record)
                print_progress(record, args.steps, left)
            if stop:
                gather([])  # torchrun ends all when one has ended: after the first has saved
                say(f"stopped after step {step}, saved in {out}; "
                    "the same command with --resume goes on from here")
                sys.exit(128 + (interrupt.number or signal.SIGTERM))
            tick = time.monotonic()

    skipped = set(gather(sorted(examples.skipped)))
    if rank == 0:
        save_whole_model(model, source, out)
        for example, text in written[:4] if start < args.steps else ():
            gold = (example.gold.answer if example.form == "answer" else
                    rewards.write_response(example.gold.actions, example.gold.answer))
            say(f"--- {example.id}, {example.gold.task} ({example.gold.kind})\n"
                f"gold    {gold}\nwritten {text}")
        if skipped:
            say(f"skipped {len(skipped)} samples that cannot be used, named above")
        say(f"wrote   {out}: the model, log.jsonl")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except geometry.DataError as error:
        sys.exit(f"actor_sft.py: {error}")
    except OSError as error:  # a full disk, a file where a folder should be, no permission
        sys.exit(f"actor_sft.py: {error}; what was saved before is untouched")
    except KeyboardInterrupt:
        sys.exit("actor_sft.py: interrupted before training began; nothing to save")
