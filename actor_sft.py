"""Stages 2 and 3 of HATCH: supervised fine-tuning on answers, then the cold start of ActoR, "how to
move" (Action-then-Answer Reasoning, section 3.4).

    --target answer   question -> answer; all data, the full model trains
    --target actions  question -> the camera moves between all views, then the answer; a tenth of
                      the data. Teaches the form that reinforcement learning starts from.
    --target mixed    both in one run: a share --mix of actions among direct answers (the hybrid
                      cold start of Actial)

    what is asked             rewards.encode_prompt, equal to the model's published chat template
    what is taught            make_example: rewards.write_response of the teacher's plans
    loss                      response_log_probs: -log p of the response's tokens, end included
    what it then writes       evaluate_responses: greedily, to held-out questions, and its rewards

    python actor_sft.py --target answer     # reads out/pasta, writes out/sft
    python actor_sft.py --target actions    # reads out/sft, writes out/cold_start
    python actor_sft.py --target answer --data /path/to/spar    # the paper's values
    torchrun --nproc_per_node 4 actor_sft.py --target answer --batch 4 --data ...

Writes --out: the model (an ordinary Hugging Face directory), log.jsonl, checkpoint.pt (for
--resume; may be deleted when the run has ended).

Axes: L tokens of a sample, T response tokens, D feature, W words of the vocabulary.

Beyond the paper: the choices tagged "not in the paper: NAME"; docs/choices.md lists them.
"""

import argparse
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
import zlib
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

# Torch reads this when it is imported. Without it, freed memory is left in pieces of no use.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer, GenerationConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil)

import geometry
import rewards

MADE_BY = {"out/pasta": "python pasta.py --grid 4",  # the stages, and what runs them
           "out/sft": "python actor_sft.py --target answer",
           "out/cold_start": "python actor_sft.py --target actions",
           "out/grpo": "python actor_grpo.py"}
MAY_BE_0 = ("seed", "warmup")  # the other numbers of the command line are above 0


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description="Supervised fine-tuning of Qwen2.5-VL on answers, or on actions and answers.",
        allow_abbrev=False)
    # what to train on what
    p.add_argument("--target", choices=("answer", "actions", "mixed"), default="answer",
                   help="what a response is: the answer; all camera moves, then the answer; both")
    p.add_argument("--model", help="model directory or hub id; default: out/pasta; for --target "
                                   "actions out/sft")
    p.add_argument("--data", help="SPAR-7M-RGBD tree; default: the demo's rooms")
    p.add_argument("--out", help="default: out/sft, or out/cold_start if there are actions")
    p.add_argument("--samples", type=int,
                   help="how many multi-image samples to draw; paper, default: 10,000, a tenth for "
                        "--target actions; demo: 20,000")
    p.add_argument("--tasks", nargs="+",  # not in the paper: which samples
                   help="SPAR tasks to train on; default: all with several images; demo: "
                        "camera_turn, for actions all")
    p.add_argument("--mix", type=float, default=0.1,  # not in the paper: hybrid cold start
                   help="share of action responses in --target mixed")
    p.add_argument("--max-pixels", type=int, help="budget per image, larger ones are scaled down; "
                                                  "default: 448 * 448, demo: 112 * 112")
    p.add_argument("--freeze", default="nothing",  # not in the paper: what trains
                   choices=("vision", "language", "nothing"),
                   help="keep the image encoder, or the language model, as it is")
    # optimisation
    p.add_argument("--steps", type=int, help="default: one epoch; demo: 400")
    p.add_argument("--batch", type=int,
                   help="samples per step over all processes; paper: 1; demo: 8")
    p.add_argument("--lr", type=float, help="paper: 1e-5; demo: 4e-4")
    p.add_argument("--vision-lr", type=float,  # not in the paper: rate of the encoder
                   help="lr of the image encoder; default: --lr; demo: 4e-5, since a language "
                        "model that starts random needs more than what PaStA has taught")
    p.add_argument("--warmup", type=int,
                   help="steps in which lr rises to its value; default: 0, it is fixed; demo: 50")
    p.add_argument("--clip", type=float, default=1.0,  # not in the paper: optimiser
                   help="largest gradient norm")
    p.add_argument("--seed", type=int, default=0, help="decides which samples, in which order")
    # looking and saving
    p.add_argument("--heldout", type=int, default=256, help="held-out samples to evaluate on")
    p.add_argument("--save-every", type=int, help="steps between checkpoints, each with a look at "
                                                  "held-out samples; default: a quarter; demo: 100")
    p.add_argument("--resume", action="store_true",
                   help="go on from --out's checkpoint; else the same command")
    # the machine
    p.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                   help="of the working weights; auto: bf16 on a GPU, fp16 where it has none, fp32 "
                        "on a CPU. Master weights are always fp32")
    p.add_argument("--offload", action="store_true",
                   help="master weights and moments in host memory: slower, but 2 bytes a "
                        "parameter on the GPU instead of 18")
    p.add_argument("--no-recompute", action="store_true",
                   help="keep activations instead of recomputing them: faster, more memory")
    p.add_argument("--workers", type=int, default=min(8, os.cpu_count()),
                   help="threads that prepare samples ahead")

    given = p.parse_args(argv)  # other defaults depend on it
    actions = given.target == "actions"
    values = {"model": "out/sft" if actions else "out/pasta",
              "out": "out/sft" if given.target == "answer" else "out/cold_start"}
    if given.data is None:  # the only place where demo and real run differ
        values |= {"data": "out/demo/data", "samples": 20_000, "max_pixels": 112 * 112,
                   "batch": 8, "lr": 4e-4, "vision_lr": 4e-5, "warmup": 50, "betas": [0.9, 0.98],
                   "tasks": list(geometry.MULTI_VIEW_TASKS) if actions else ["camera_turn"],
                   "steps": 400, "save_every": 100, "no_recompute": True}
    else:
        values |= {"samples": 1_000 if actions else 10_000, "max_pixels": 448 * 448,
                   "tasks": list(geometry.MULTI_VIEW_TASKS), "batch": 1, "lr": 1e-5,
                   "vision_lr": given.lr or 1e-5, "warmup": 0, "betas": [0.9, 0.999]}
    return settle(p, argv, values)


# ------------------------------------------------------------------------------------ the method


class Example(NamedTuple):
    """A sample as tokens: ids (L,), the first prompt_length of them asked, the others taught."""

    id: str
    ids: torch.Tensor
    prompt_length: int
    images: dict
    gold: rewards.Gold
    target: str  # "answer" or "actions"


def make_example(sample, args, tokenizer, processor, target=None, dtype=torch.float32):
    """The Example of a geometry.Sample.

    target: "answer" or "actions"; None leaves it to --target. dtype: what the pixels are cast to.
    """
    target = target or args.target
    if target == "mixed":
        # a hash, uniform in [0, 1): the same whenever this sample is drawn, wherever the tree lies
        names = ["/".join(path.parts[-3:]) for path in sample.images]
        text = f"{args.seed} {sample.id} {sample.question} {names}"
        uniform = zlib.crc32(text.encode(errors="replace")) / 2**32
        target = "actions" if uniform < args.mix else "answer"
    gold = rewards.gold_of(sample, plans=target == "actions")  # trees without poses do for answers
    if target == "actions":
        instruction = rewards.ACTION_INSTRUCTION
        response = rewards.write_response(gold.actions, gold.answer)
    else:
        instruction = rewards.ANSWER_INSTRUCTION
        response = gold.answer
    prompt, images = rewards.encode_prompt(tokenizer, processor, sample.pictures(),
                                           f"{sample.question}\n{instruction}", sample.id)
    try:
        end = tokenizer.convert_tokens_to_ids(rewards.END[0])
        taught = [*tokenizer(response)["input_ids"], end]
    except TypeError as error:
        raise geometry.DataError(f"{sample.id}: its answer cannot be encoded ({error})") from None
    images["pixel_values"] = images["pixel_values"].to(dtype)
    return Example(sample.id, torch.tensor(prompt + taught), len(prompt), images, gold, target)


def response_log_probs(model, example):
    """log p of each token of an Example's response, its end token included: (T,) fp32."""
    ids = example.ids.to(model.device)
    hidden = model.model(
        input_ids=ids[None], mm_token_type_ids=(ids == model.config.image_token_id).int()[None],
        pixel_values=example.images["pixel_values"].to(model.device),
        image_grid_thw=example.images["image_grid_thw"].to(model.device),
        use_cache=False).last_hidden_state[0]  # (L, D); a cache would grow again in recomputing
    taught = ids[example.prompt_length:]  # (T,)
    # the features of a token predict the one after it
    return log_probs(hidden[-len(taught) - 1:-1], model.lm_head.weight, taught)


def log_probs(hidden, weight, targets, chunk=128):
    """log p of target words: hidden (T, D), weight (W, D), targets (T,) -> (T,) fp32, of logits
    that were rounded to the working dtype.

    In chunks of positions, each computed again in the backward pass, so that logits never exist for
    all positions: of 2,000 tokens and 151,936 words they would take 1.2 GB, and autograd would hold
    several tensors of that size. The weight is an input of each chunk, so that autograd adds up its
    gradient before the optimiser takes it.
    """
    parts = zip(hidden.split(chunk), targets.split(chunk))
    return torch.cat([Recompute.apply(chunk_log_probs, h, weight, y) for h, y in parts])


def chunk_log_probs(hidden, weight, targets):
    logits = F.linear(hidden, weight).float()  # (chunk, W)
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


# ------------------------------------------------------------------------------------------ main


def main(argv=None):
    args = parse_args(argv)
    rank, world, device, dtype = start_processes(args.precision)
    say = partial(print, flush=True) if rank == 0 else lambda *_, **__: None
    out = Path(args.out)
    source, model, tokenizer = load_model(args.model)

    # samples to train on, in the order of --seed, and others to look at
    walk = geometry.Walk(args.data, args.samples, args.seed, args.tasks)
    args.steps = args.steps or max(1, len(walk.drawn) // args.batch)  # not in the paper: epochs
    args.save_every = args.save_every or max(1, args.steps // 4)
    identity, state = begin(args, dtype, walk, source)
    start = state["step"] if state else 0
    say(f"data    {args.data}: {len(walk.drawn):,} of {len(walk.samples):,} multi-image samples, "
        f"{args.batch} a step over {world} process(es); {args.steps - start:,} steps")

    # the model in its working dtype, with fp32 masters of what trains
    model.requires_grad_(args.freeze != "language")
    model.model.visual.requires_grad_(args.freeze != "vision")
    say(f"model   {args.model}: {dtype} on {device}, {args.freeze} frozen")
    say(memory_line(model, 1, args, dtype, device))
    if not args.no_recompute:
        for block in (*model.model.visual.blocks, *model.model.language_model.layers):
            recompute_in_backward(block)
    optimizer = Optimizer(model, args, dtype, device)

    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": args.max_pixels})
    prepare = partial(make_example, args=args, tokenizer=tokenizer, processor=processor,
                      dtype=dtype)
    if state:
        optimizer.load(state["optimizer"])
    if rank == 0:
        open_logs(out, args, state)
        target = "answer" if args.target == "answer" else "actions"
        samples = list(itertools.islice(walk.heldout_samples(), args.heldout))
        heldout = walk.prepared(partial(prepare, target=target), samples, args.workers)
        blind = constants(heldout)
        if not state:
            progress, _ = evaluate_responses(model, tokenizer, heldout)
            progress |= blind
            write_line(out / "log.jsonl", {"step": 0, **progress})
            say("start   " + heldout_line(progress))
    state = None  # its file is closed

    stops = catch_signals()
    begun = time.monotonic()
    missed = []  # why each step since the last update changed nothing
    batches = walk.batches(prepare, start, args.steps, args.batch, rank, world, args.workers)
    for step, batch in enumerate(batches, start + 1):
        tick = time.monotonic()
        examples = [example for _, example in batch if example]
        # the mean over the response tokens of all processes, so that their gradients add up
        tokens = sum(gather([len(example.ids) - example.prompt_length for example in examples]))
        loss = 0.0
        for example in examples:
            part = -response_log_probs(model, example).sum() / tokens
            optimizer.backward(part)
            loss += part.item()
        grad_norm = optimizer.reduce()
        moved = tokens > 0 and optimizer.step(grad_norm)

        record = {"step": step, "loss": sum(gather([loss])), "grad_norm": grad_norm,
                  "tokens_per_s": tokens / (time.monotonic() - tick)}
        if moved:
            missed.clear()
        else:
            record = left_out(step, tokens, grad_norm, batch, missed, say)
        stop = gather(stops)
        saves = stop or step == args.steps or step % args.save_every == 0
        if rank == 0:
            if saves and not stop:
                progress, texts = evaluate_responses(model, tokenizer, heldout)
                progress |= blind
                record |= progress
                say(f"step {step}  {heldout_line(progress)}")
            write_line(out / "log.jsonl", record)
            if saves:  # before a line is printed: a closed terminal takes none
                save_checkpoint(out, identity, step, args.steps, optimizer)
            left = (time.monotonic() - begun) / (step - start) * (args.steps - step)
            print_step(record, args.steps, left, ("loss", "grad_norm", "tokens_per_s"))
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
        if start < args.steps:
            for example, text in zip(heldout[:3], texts):
                say(f"--- {example.id} ({example.gold.task}), answer {example.gold.answer}")
                say(text)
        say(f"wrote   {out}: the model, log.jsonl; {problems} problems with the data")
    if world > 1:
        dist.destroy_process_group()


# ----------------------------------------------------------------------- looking at what it learnt


def evaluate_responses(model, tokenizer, examples, batch=16):
    """Look at held-out Examples. Returns a record for the log, and the texts that the model wrote.

    The record has heldout_loss, the mean -log p of a response token; answer, the mean R_ans; and
    for Examples with actions format and action, the mean R_fmt and R_act, and action_turns, R_act
    of those whose camera only turns. If logits were not finite for one of them, a warning is
    printed and these rewards are NaN.
    """
    log_p = []
    texts = []
    for start in range(0, len(examples), batch):
        some = examples[start:start + batch]
        with torch.no_grad():
            log_p += [response_log_probs(model, example) for example in some]
        prompts = [(e.ids[:e.prompt_length].tolist(), e.images) for e in some]
        longest = [16 + 2 * (len(e.ids) - e.prompt_length)  # not in the paper: longest completion
                   for e in some]
        texts += generate_greedily(model, tokenizer, prompts, longest)
    lost = [example.id for example, text in zip(examples, texts) if text is None]
    if lost:
        print(f"warning: logits that are not finite in {len(lost)} of {len(texts)} held-out "
              f"samples, {lost[0]} among them: try --precision fp32", flush=True)
    values = {"format": [], "action": [], "action_turns": [], "answer": []}
    for example, text in zip(examples, texts):
        gold = example.gold
        if example.target == "answer":
            values["answer"].append(
                rewards.answer_reward(text, gold.answer, gold.task, gold.kind))
            continue
        score = rewards.total_reward(text, gold)
        for name in ("format", "action", "answer"):
            values[name].append(score[name])
        if rewards.only_turns(gold.actions):
            values["action_turns"].append(score["action"])
    record = {"heldout_loss": -float(torch.cat(log_p).mean())}
    for name, those in values.items():
        if those:
            record[name] = math.nan if lost else float(np.mean(those))
    return record, texts


def constants(examples):
    """What a model that sees nothing can reach: R_act of the best plan that is the same for all."""
    if examples[0].target == "answer":
        return {}
    golds = [example.gold.actions for example in examples]
    turns = [gold for gold in golds if rewards.only_turns(gold)]
    record = {"action_constant": rewards.constant_plan(golds)[0]}
    if turns:
        record["action_turns_constant"] = rewards.constant_plan(turns)[0]
    return record


def heldout_line(record):
    return "  ".join(f"{name} {value:.3f}" for name, value in record.items())


def generate_greedily(model, tokenizer, prompts, longest):
    """The response that the model writes to each prompt if it takes the likeliest token each time.

    prompts: [(ids, images) of rewards.encode_prompt]; longest: for each the tokens that its
    response may have. Returns a list of texts, None where a logit was NaN or +inf: then no token is
    the likeliest. All prompts are one batch, padded on the left; a response ends before its first
    end token, and what the batch writes behind its `longest` tokens does not count.
    """
    end = tokenizer.convert_tokens_to_ids(rewards.END)
    L = max(len(ids) for ids, _ in prompts)
    rows = [[end[0]] * (L - len(ids)) + list(ids) for ids, _ in prompts]
    seen = [[0] * (L - len(ids)) + [1] * len(ids) for ids, _ in prompts]
    rows = torch.tensor(rows, device=model.device)  # (B, L)
    pixels = torch.cat([images["pixel_values"] for _, images in prompts])
    grids = torch.cat([images["image_grid_thw"] for _, images in prompts])
    sound = torch.zeros(len(prompts), dtype=torch.long, device=model.device)
    model.generation_config = GenerationConfig()  # not the checkpoint's, which fills unset fields
    with torch.no_grad():
        written = model.generate(
            input_ids=rows, attention_mask=torch.tensor(seen, device=model.device),
            mm_token_type_ids=(rows == model.config.image_token_id).int(),
            pixel_values=pixels.to(model.device), image_grid_thw=grids.to(model.device),
            max_new_tokens=max(longest), do_sample=False, eos_token_id=end, pad_token_id=end[0],
            logits_processor=[partial(count_sound, sound, L)])
    texts = []
    for tokens, budget, sound_tokens in zip(written[:, L:].tolist(), longest, sound.tolist()):
        tokens = tokens[:budget]
        length = min([k for k, token in enumerate(tokens) if token in end], default=len(tokens))
        chosen = min(length + 1, len(tokens))  # the end token, too, if there is one
        texts.append(tokenizer.decode(tokens[:length]) if sound_tokens >= chosen else None)
    return texts


def count_sound(sound, L, ids, logits):
    """Called by `generate` before it chooses each token: ids (B, L + t), logits (B, W).

    Counts in `sound` (B,), in place, each row's tokens before the first whose logits hold NaN or
    +inf. It stays on the device, so that no token waits for the host.
    """
    fine = (logits < math.inf).all(-1)
    sound += fine & (sound == ids.shape[1] - L)  # as long as all t before were sound
    return logits


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


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # letters that a console lacks end no run
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
    except (geometry.DataError, OSError, SafetensorError, torch.OutOfMemoryError) as error:
        sys.exit(f"actor_sft.py: {str(error).strip().splitlines()[0]}")
