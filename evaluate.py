"""Evaluation of HATCH: Tables 1 to 4 of the paper as commands, and a page to look at.

    --bench rooms      held-out rendered rooms, with SPAR-Bench's tasks (needs no download)
    --bench spar-mv    SPAR-Bench, several images    Tables 1 to 3
    --bench mindcube   MindCube-Tiny                 Table 1
    --bench mmsi       MMSI-Bench                    Table 1
    --bench spar-si    SPAR-Bench, one image         Table 4
    --bench cvbench    CV-Bench, one image           Table 4

    what is asked      the benchmark's published prompt, or ACTION_INSTRUCTION    prompt_of
    what is answered   the <answer> block, if there is one                        answer_of
    how it is scored   as the benchmark's official code does                      score_answer
    what is reported   weighted means of task means, bootstrap intervals          table_rows

    python evaluate.py                        # reads out/grpo, writes out/evaluation/rooms
    python evaluate.py --blind                # the same, every picture grey
    python evaluate.py --bench spar-mv --data /path/to/SPAR-Bench
    python evaluate.py --score a/predictions.jsonl b/predictions.jsonl    # no model: scores only
    python evaluate.py --curves out/*/log.jsonl                           # training curves only
    torchrun --nproc_per_node 4 evaluate.py --bench mmsi --data /path/to/MMSI-Bench

Writes --out: predictions.jsonl (as they are made: an interrupted evaluation continues),
results.json, report.html.

Deviations from the official scorers: a response ends at its first end token; the answer is cut out
of <answer>, or else of what follows reasoning, and stripped before the official rule sees it; an
empty answer scores 0, where SPAR-Bench's own code scores it 1.
"""

import argparse
import base64
import csv
import html
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import zlib
from collections import Counter
from datetime import timedelta
from functools import partial, reduce
from pathlib import Path
from typing import Callable, NamedTuple

if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # read when torch is imported: without it freed
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # memory lies in pieces

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoTokenizer, GenerationConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil)

import geometry
import rewards

END = ["<|im_end|>", "<|endoftext|>"]  # of a turn; of a text, which a base model may write instead
MADE_BY = {"out/pasta": "python pasta.py --grid 4",  # the stages, and what runs them
           "out/sft": "python actor_sft.py --target answer",
           "out/cold_start": "python actor_sft.py --target actions",
           "out/grpo": "python actor_grpo.py"}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Evaluate a Qwen2.5-VL on spatial benchmarks.")
    # what to evaluate on what
    p.add_argument("--bench", choices=tuple(BENCHES), help="default: rooms")
    p.add_argument("--model", help="directory or hub id; default: out/grpo. With --score: its name")
    p.add_argument("--data", help="the benchmark's file or folder; default: the demo's rooms")
    p.add_argument("--mode", choices=("action", "language", "direct"),
                   help="asked for before the answer: camera moves, words (Table 3), nothing; "
                        "about a single image always nothing")
    p.add_argument("--blind", action="store_true", help="every picture grey: what questions tell")
    p.add_argument("--limit", type=int, help="how many questions, drawn at random; default: all")
    # without a model
    p.add_argument("--score", nargs="+", metavar="FILE",
                   help="score these predictions.jsonl, of any engine, instead of making some")
    p.add_argument("--curves", nargs="+", metavar="FILE",
                   help="draw these log.jsonl; default: out/*/log.jsonl. Alone: writes curves.svg")
    p.add_argument("--convention", choices=("hatch", "spar"), default="hatch",
                   help="SPAR-Bench's averages: over questions, as the paper's, or over task means")
    # generation
    p.add_argument("--max-pixels", type=int,
                   help="per image; default: 448 * 448, demo 112 * 112, mindcube 480 * 480")
    p.add_argument("--max-new-tokens", type=int,  # not in the paper
                   help="default: 96 + 64 a pair of views, 256 for language, for direct answers "
                        "as the benchmark's own code")
    p.add_argument("--batch", type=int, default=16, help="questions at a time, over all processes")
    p.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                   help="auto: bf16 on CUDA, fp16 on a GPU without bf16, fp32 on a CPU")
    p.add_argument("--workers", type=int, default=min(8, os.cpu_count()),
                   help="threads that prepare questions ahead")
    # looking
    p.add_argument("--out", help="default: out/evaluation, and the benchmark's name below it")
    p.add_argument("--overwrite", action="store_true", help="start over, whatever --out holds")
    p.add_argument("--show", type=int, default=24, help="questions in report.html, over all tasks")
    args = p.parse_args(argv)

    for name, value in vars(args).items():
        if type(value) is int and value < (name != "show"):
            p.error(f"--{name.replace('_', '-')} is out of range: {value}")
    args.answer = not args.score and bool(not args.curves or args.bench or args.data or args.model)
    if not args.answer:
        args.out = args.out or "out/evaluation"
        return args
    args.bench, args.model = args.bench or "rooms", args.model or "out/grpo"
    if args.bench == "rooms" and args.data is None:  # all that differs in the demo
        args.data, args.max_pixels = "out/demo/data", args.max_pixels or 112 * 112
    its, single = BENCHES[args.bench], args.bench in ("spar-si", "cvbench")
    if args.data is None:
        p.error(f"--bench {args.bench} needs --data: {its.data}")
    if args.mode not in (None, "direct") and single:
        p.error(f"--bench {args.bench} has one image a question: it is asked about directly")
    args.out = args.out or f"out/evaluation/{args.bench}{'-blind' * args.blind}"
    args.mode = args.mode or ("direct" if single else "action")
    args.max_pixels = args.max_pixels or its.max_pixels
    return args


# --------------------------------------------------------------------------------- what is asked


class Item(NamedTuple):
    """A question of a benchmark, as its published file has it."""

    id: str
    task: str  # what scores are averaged over
    question: str
    gold: str
    images: Callable  # call it for the PIL images, `views` of them
    views: int
    poses: np.ndarray | None = None  # cam2world (views, 4, 4), where they are known


SPAR_LEVELS = {
    "Low": tuple(f"{what}_prediction_{of}{views}" for views in ("", "_mv")
                 for what in ("depth", "distance") for of in ("oc", "oo")),
    "Middle": ("position_matching", "camera_motion_infer", "view_change_infer"),
    "High": ("distance_infer_center_oo", "distance_infer_center_oo_mv", "obj_spatial_relation_oo",
             "obj_spatial_relation_oc_mv", "obj_spatial_relation_oo_mv", "spatial_imagination_oc",
             "spatial_imagination_oc_mv", "spatial_imagination_oo", "spatial_imagination_oo_mv")}
SPAR_MULTI_VIEW = tuple(task for task in itertools.chain(*SPAR_LEVELS.values())
                        if task.endswith("_mv") or task in SPAR_LEVELS["Middle"])
MINDCUBE_SETTINGS = ("around", "rotation", "translation", "among", "other")
MMSI_GROUPS = {
    "Position": tuple(f"Positional Relationship ({pair})" for pair in (
        "Cam.–Cam.", "Obj.–Obj.", "Reg.–Reg.", "Cam.–Obj.", "Obj.–Reg.", "Cam.–Reg.")),
    "Attribute": ("Attribute (Meas.)", "Attribute (Appr.)"),
    "Motion": ("Motion (Cam.)", "Motion (Obj.)"), "MSR": ("MSR",)}

# The benchmarks' own prompts, to the letter; of SPAR-Bench by task.
BY_LETTER = "Answer with the option's letter from the given choices directly."
SPAR_PROMPTS = {
    **dict.fromkeys(SPAR_LEVELS["Low"],
                    "\n{question}\nPlease answer the question using a single word or phrase."),
    **dict.fromkeys(SPAR_LEVELS["Middle"],
                    "\n{question}\nThe values represent the bounding box coordinates normalized to "
                    "a 0-1000 scale, with the top-left corner as the origin of the image.\n"
                    + BY_LETTER),
    **dict.fromkeys(SPAR_LEVELS["High"], "\n{question}\n\n" + BY_LETTER),
    "view_change_infer": "\n{question}\n\n"}
MINDCUBE_PROMPT = (
    "[Task]\nYour task is to analyze the spatial arrangement of objects in the scene by examining "
    "the provided images, which show the scene from different viewpoints.\n[Answer Instruction]\n"
    "You only need to provide *ONE* correct answer selecting from the options listed below. For "
    "example, if you think the correct answer is 'A. Above' from 'A. Above B. Under C. Front D. "
    "Behind', your response should **only** be '<answer>A. Above</answer>'.\n\n[Question]\n"
    "{question}")
MMSI_PROMPT = "{question}\n" + BY_LETTER + " Enclose the option's letter within ``."
INSTRUCTIONS = {"action": rewards.ACTION_INSTRUCTION, "language": rewards.LANGUAGE_INSTRUCTION}


def prompt_of(item, bench, mode):
    """The text behind the images. mode "direct", or one image: the published prompt (the rooms':
    what training asked); "action", "language": what training asked, since HATCH's are unpublished.
    """
    if mode in INSTRUCTIONS and item.views > 1:
        return f"{item.question}\n{INSTRUCTIONS[mode]}"  # not in the paper
    return BENCHES[bench].prompt[item.task].replace("{question}", item.question)


# ------------------------------------------------------------------------------ how it is scored


def before_end(text):
    """A text up to its first end token, which other engines may hand out with what is behind it."""
    return re.split("|".join(map(re.escape, END)), text, maxsplit=1)[0]


def answer_of(response):
    """The answer in a response: its first <answer> block outside of reasoning that holds something;
    without a block, what follows the last reasoning.

    Reasoning stands between <think> or <action> and its end. Where a text begins with the end of a
    <think>, a chat template opened it; what never closes reaches to the text's end.
    """
    text = before_end(response)
    thoughts = re.findall("</?think>", text)
    depth = 1 if thoughts and thoughts[0] == "</think>" else 0
    outside, behind = "", ""
    for part in re.split("(</?(?:think|action)>)", text):
        if part in ("<think>", "<action>"):
            depth += 1
            behind = ""
        elif part in ("</think>", "</action>"):
            depth = max(0, depth - 1)
            behind = ""
        elif depth == 0:
            outside += part
            behind = part
    blocks = re.findall(r"<answer>(.*?)(?=</?answer>|\Z)", outside, re.DOTALL)
    if blocks:
        return next(filter(None, map(str.strip, blocks)), "")
    return behind.strip()


def score_answer(bench, task, answer, gold):
    """Official score in [0, 1] of an answer's text (see answer_of)."""
    if read_letter := BENCHES[bench].letter:
        return float((read_letter(answer) or "").lower() == gold.lower())
    return score_spar(task, answer, gold)


def score_spar(task, prediction, gold):
    """SPAR-Bench's score of a text, in [0, 1]: its official rules, by task alone.

    Two of its oddities are kept, since they are in every published number: any part of the gold's
    text counts, and view changes are measured relative to the prediction. One is not: an empty
    prediction scores 0 here.
    """
    if not prediction:
        return 0.0
    if task == "camera_turn":  # the rooms' own, not in SPAR-Bench
        return rewards.camera_turn(prediction, gold)
    try:
        if task == "view_change_infer":  # mean of five axes
            p, g = ({key: float(value) for key, value in (
                item.split(":") for item in text.split(","))} for text in (prediction, gold))
            moved, asked = ([d.get(positive, 0.0) - d.get(negative, 0.0)
                             for positive, negative in rewards.AXES] for d in (p, g))
            # swapped, as in the official code
            return float(np.mean(list(map(rewards.mean_relative_accuracy, asked, moved))))
        if task in SPAR_LEVELS["Low"]:
            numbers = re.findall(r"(?<!\^)\d+\.\d+|(?<!\^)\d+", prediction)
            p = float(numbers[-1 if task.endswith("_mv") else 0])  # of several views, the last
            return rewards.mean_relative_accuracy(p, float(gold))
    except (IndexError, ValueError):  # no number, or an item that is not key:number
        return 0.0
    prediction, gold = prediction.lower(), gold.lower()
    return float(prediction in gold or prediction[0] == gold)


def mindcube_letter(text):
    """The letter A-E that MindCube's extractor reads, or None. The first rule that fires; the last
    match within a rule, but for the final one."""
    inside = re.search(r"<Answer>(.*?)(?:<|$)", text, re.DOTALL)
    for where, rules in (
            (text, (r"([A-E])\.",)),
            (inside[1] if inside else "", (
                r"[Mm]y answer is ([A-E])", r"[Tt]he answer is ([A-E])", r"\b([A-E])\b")),
            (text, (r"(?:^|\n)(?:Answer: )?([A-E])(?:$|\s)", r'[*"]([A-E])[*"]',
                    r"\bAnswer:?\s*([A-E])\b", r"[Mm]y answer is ([A-E])", r"answer is ([A-E])"))):
        for rule in rules:
            if found := re.findall(rule, where):
                return found[-1]
    for line in reversed(text.split("\n")):
        if found := re.search(r"\b([A-E])\b", line):
            return found[1]
    return None


def mmsi_letter(text):
    """The letter A-D that MMSI-Bench's extractor reads, or None."""
    for ticks in (r"``([^`]*)``", r"`([^`]*)`"):
        if found := re.search(ticks, text):
            text = found[1]
    found = re.search(r"\b[A-D]\b(?!\s[a-zA-Z])", text)
    return found[0] if found else None


def cvbench_letter(text):
    """The letter, lower case, that CV-Bench's extractors read; "" if nothing is there."""
    text = text.lower().strip()
    for said in ("answer is", "answer:"):
        text = text.rpartition(said)[2]
    return text.strip().rstrip(".:,").lstrip("(").rstrip(")")[:1]


class Bench(NamedTuple):
    """A benchmark: where it is, and how it is read, asked, scored and averaged."""

    title: str
    data: str  # what --data takes
    files: tuple  # patterns of its files: the first that finds any
    fields: tuple  # of a row: id, task, question, gold
    groups: dict  # of its table: {label: tasks}
    prompt: dict  # {task: text}, the question in place of {question}
    letter: Callable | None = None  # reads a choice from an answer; None: score_spar
    longest: int = 128  # tokens of a direct answer
    max_pixels: int = 448 * 448


SPAR = ("a copy of huggingface.co/datasets/jasonzhango/SPAR-Bench",
        ("test-*.parquet", "*.parquet", "*.jsonl"), ("id", "task", "question", "answer"))
BENCHES = {
    "rooms": Bench(
        "Rendered rooms", "the folder that `python pasta.py --grid 4` rendered", ("rooms.jsonl",),
        SPAR[2], SPAR_LEVELS | {"Middle": (*SPAR_LEVELS["Middle"], "camera_turn")},
        dict.fromkeys((*SPAR_MULTI_VIEW, "camera_turn"),
                      "{question}\n" + rewards.ANSWER_INSTRUCTION)),
    "spar-mv": Bench("SPAR-Bench-MV", *SPAR, SPAR_LEVELS, {
        task: SPAR_PROMPTS[task] for task in SPAR_MULTI_VIEW}, longest=100),
    "mindcube": Bench(
        "MindCube-Tiny", "a copy of huggingface.co/datasets/MLL-Lab/MindCube, data.zip unpacked",
        ("MindCube_tinybench.jsonl",), ("id", "id", "question", "gt_answer"),
        {name.capitalize(): (name,) for name in MINDCUBE_SETTINGS},
        dict.fromkeys(MINDCUBE_SETTINGS, MINDCUBE_PROMPT), mindcube_letter, 4096, 480 * 480),
    "mmsi": Bench(
        "MMSI-Bench", "a copy of huggingface.co/datasets/RunsenXu/MMSI-Bench",
        ("MMSI_Bench.parquet", "MMSI_bench.tsv", "*.parquet", "*.jsonl"),
        ("id", "question_type", "question", "answer"), MMSI_GROUPS,
        dict.fromkeys(itertools.chain(*MMSI_GROUPS.values()), MMSI_PROMPT), mmsi_letter),
    "spar-si": Bench("SPAR-Bench-SI", *SPAR, SPAR_LEVELS, {
        task: SPAR_PROMPTS[task] for task in SPAR_PROMPTS if task not in SPAR_MULTI_VIEW},
        longest=100),
    "cvbench": Bench(
        "CV-Bench", "a copy of huggingface.co/datasets/nyu-visionx/CV-Bench",
        ("test_*.parquet", "*.parquet", "*.jsonl"), ("idx", "source", "prompt", "answer"),
        {"2D": ("ADE20K", "COCO"), "3D": ("Omni3D",)},
        dict.fromkeys(("ADE20K", "COCO", "Omni3D"), "{question}\n" + BY_LETTER), cvbench_letter)}


# ------------------------------------------------------------------------------ what is reported

PAPER_NAMES = ("Qwen2.5-VL-3B (paper)", "HATCH (paper)")
PAPER = {  # Tables 1 and 4
    "spar-mv": {"Low": (13.4, 41.3), "Middle": (26.2, 47.4), "High": (32.6, 67.1),
                "Avg": (24.9, 53.6)},
    "mindcube": {"Around": (46.4, 65.6), "Rotation": (34.5, 31.0), "Among": (35.3, 50.2),
                 "Avg": (37.8, 50.2)},
    "mmsi": {"Position": (27.8, 30.5), "Attribute": (19.2, 20.8), "Motion": (23.3, 23.3),
             "MSR": (25.8, 24.7), "Avg": (25.6, 27.0)},
    "overall": {"Overall": (29.4, 43.6)},  # the mean of these three averages
    "spar-si": {"Low": (16.0, 41.1), "High": (32.5, 49.7), "Avg": (23.9, 45.2)},
    "cvbench": {"2D": (69.3, 70.5), "3D": (72.2, 78.4), "Avg": (70.7, 74.5)}}
TABLE_1 = {"spar-mv", "mindcube", "mmsi"}
FORM = ("R_fmt", "R_act", "R_act, turns", "R_act, walks")  # further rows, where they can be had
NOTE = """Percent, in brackets 95 % bootstrap intervals. The paper's columns are from its tables.
R_fmt: the response has the form asked for; R_act: how close its camera moves are to the true ones;
constant: of the best answer to every question of a task, or the best plan for every pair."""


class Run(NamedTuple):
    """Scored predictions of one model on one benchmark."""

    bench: str
    name: str  # of the model, and how it was asked
    records: list
    scores: dict  # {task, or one of FORM: [in [0, 1]]}
    rows: dict  # of table_rows
    constants: dict  # {row's label: percent that can be had without looking}, where that is known


def table_rows(bench, scores, convention="hatch", draws=1000):
    """A benchmark's table {label: (depth, n, score, low, high)}: groups (depth 0) with their tasks
    (1), the average, FORM; in percent, low to high the 95 % bootstrap interval.

    scores {task: [in [0, 1]]}. How a number is made of its tasks' means: SPAR-Bench's over all
    questions; convention "spar": over tasks. MindCube, MMSI-Bench: over all questions. CV-Bench:
    (2D + 3D) / 2, 2D = (ADE20K + COCO) / 2.
    """
    counts = {task: len(values) for task, values in scores.items()}
    even = bench == "cvbench" or (convention == "spar" and BENCHES[bench].letter is None)
    parts = {label: {task: 1 if even else counts[task] for task in tasks if task in counts}
             for label, tasks in BENCHES[bench].groups.items()}
    parts["Avg"] = {task: w / len(weights) if bench == "cvbench" else w
                    for weights in parts.values() for task, w in weights.items()
                    if task != "translation"}
    lines = []
    for label, weights in parts.items():
        lines += [(label, 0, weights)] * bool(weights)
        if label != "Avg" and label.lower() not in map(str.lower, weights):
            lines += [(task, 1, {task: 1}) for task in weights]
    lines += [(kind, int("," in kind), {kind: 1}) for kind in FORM if kind in counts]

    rng, rows = np.random.default_rng(0), {}
    means = {task: np.array([np.mean(scores[task]), *np.array(scores[task])[
        rng.integers(0, n, (draws, n))].mean(1)]) for task, n in sorted(counts.items())}
    for label, depth, weights in lines:  # as it is; then its questions drawn again, task by task
        score, *again = 100 * sum(w * means[task] for task, w in weights.items()) / sum(
            weights.values())
        low, high = np.percentile(again, (2.5, 97.5)).tolist()
        rows[label] = depth, sum(counts[task] for task in weights), float(score), low, high
    return rows


def score_run(bench, name, mode, records, convention="hatch"):
    """Score records {"item", "response"}: adds "answer" and "score" and, where reasoning was asked
    for (mode "action" or "language"), "R_fmt", "R_act" and "walks": the camera does more than turn.
    Returns the Run."""
    scores, golds, constants = {}, {}, {}
    for record in records:
        item, text = record["item"], before_end(record["response"] or "")
        record["response"] = record["response"] and text
        record["answer"] = answer_of(text)
        record["score"] = score_answer(bench, item.task, record["answer"], item.gold)
        found = {item.task: record["score"]}
        if mode in INSTRUCTIONS and item.views > 1:
            block = "action" if mode == "action" else "think"
            found["R_fmt"] = record["R_fmt"] = rewards.format_reward(text, item.views, block)
        if mode == "action" and item.views > 1 and item.poses is not None:
            parts = {"": rewards.gold_plans(item.poses)}
            for pair, plan in parts[""].items():
                kind = ", turns" if rewards.only_turns({pair: plan}) else ", walks"
                parts.setdefault(kind, {})[pair] = plan
            for kind, plans in parts.items():
                found[f"R_act{kind}"] = rewards.action_reward(text, plans)
                golds.setdefault(kind, []).append(plans)
            record |= {"R_act": found["R_act"], "walks": ", walks" in parts}
        for kind, value in found.items():
            scores.setdefault(kind, []).append(value)
    # what can be had without looking at the pictures
    for kind, those in golds.items():
        _, plan = rewards.constant_plan(those)
        constants[f"R_act{kind}"] = [rewards.action_reward(
            rewards.write_response(dict.fromkeys(gold, plan), "-"), gold) for gold in those]
    if bench == "rooms":
        for task in sorted(scores.keys() - FORM):
            same = [record["item"].gold for record in records if record["item"].task == task]
            constants[task] = constant_answer(bench, task, same)
    known = {label: row[2] for label, row in table_rows(bench, constants, convention, 1).items()}
    return Run(bench, name, records, scores, table_rows(bench, scores, convention), known)


def constant_answer(bench, task, golds):
    """Scores [in [0, 1]] of one text as the answer to all questions of a task: that of the golds
    which scores most."""
    best = []
    for said in sorted(set(golds)):
        scores = [score_answer(bench, task, said, gold) for gold in golds]
        best = max(best, scores, key=sum)
    return best


def tables(runs):
    """The tables as text: for each benchmark its runs side by side, then the paper's rows; then
    Overall of what has a run on each of Table 1's; and what is to be said below them."""
    found, averages = [], {}
    for bench in dict.fromkeys(run.bench for run in runs):
        those, paper = [run for run in runs if run.bench == bench], PAPER.get(bench, {})
        beside = ["n", "constant"] if any(run.constants for run in those) else ["n"]
        header = [text for run in those for text in (run.name, *beside)]
        table = [[BENCHES[bench].title, *header, *[*PAPER_NAMES] * bool(paper)]]
        every = {task: [0] for run in those for task in run.scores}
        for label, (depth, *_) in table_rows(bench, every, draws=1).items():  # in their order
            cells = []
            for run in those:
                _, n, *numbers = run.rows.get(label, ("", ""))
                cells += ["{:.1f} ({:.1f}-{:.1f})".format(*numbers) if numbers else "", f"{n}"]
                if "constant" in beside:
                    cells.append(f"{run.constants[label]:.1f}" if label in run.constants else "")
            cells += [f"{score:.1f}" for score in paper.get(label, ())] or [""] * 2 * bool(paper)
            table.append(["  " * depth + label, *cells])
        found.append(table)
    for run in runs:
        averages.setdefault(run.name, {})[run.bench] = run.rows["Avg"][2]
    for name, its in averages.items():
        if TABLE_1 <= its.keys():
            cells = (np.mean([its[bench] for bench in TABLE_1]), *PAPER["overall"]["Overall"])
            found.append([["Table 1", name, *PAPER_NAMES],
                          ["Overall", *(f"{cell:.1f}" for cell in cells)]])
    lines = []
    for table in found:
        first, *others = ([max(map(len, column))] for column in zip(*table))
        lines += ["   ".join([row[0].ljust(*first), *(
            cell.rjust(*width) for cell, width in zip(row[1:], others))]) for row in table] + [""]
    for run in runs:
        if missing := sum(record["response"] is None for record in run.records):
            lines.append(f"{run.name}: {missing:,} questions without a response count as wrong.")
    return printable("\n".join([*lines, NOTE]))


# ------------------------------------------------------------------------------------- its data


def load_items(bench, data, skip=print):
    """All usable questions of a benchmark: list[Item], in the file's order; opens no picture yet.

    bench: name in BENCHES; data: its published file, or a folder that holds it; skip: told of each
    row that cannot be used. Raises DataError if nothing usable is there, or two copies are.
    """
    its, data, items, seen, ids = BENCHES[bench], Path(data), [], {}, Counter()
    below = files_below(data)
    found = ([path for path in below if path.match(pattern)] for pattern in its.files)
    files = [data] if data.is_file() else next(filter(None, found), [])
    for path in files:
        for number, row in enumerate(read_rows(path, its.fields)):
            try:
                item = read_item(bench, row, path.parent)
            except (ValueError, TypeError) as error:  # DataError is a ValueError
                skip(f"{path.name}, row {number}: {error}")
                continue
            if seen.setdefault(item[:4], path) != path or path.parent != files[0].parent:
                raise geometry.DataError(f"{data} holds two copies of {its.title}, {files[0]} and "
                                         f"{path}: name one with --data")
            if item.task in its.prompt:  # not of SPAR-Bench's other half
                ids[item.id] += 1  # CV-Bench counts in each of its files
                again = f"#{ids[item.id]}" * (ids[item.id] > 1)
                items.append(item._replace(id=item.id + again))
    if not items:
        raise geometry.DataError(f"{data}: no usable question of {its.title}; --data takes "
                                 f"{its.data}")
    return items


def files_below(folder):
    """All files below a folder, in order, behind links too; each real folder once."""
    files, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        if os.path.realpath(place) in seen:
            folders.clear()  # or links could lead round in circles
            continue
        seen.add(os.path.realpath(place))
        files += [Path(place, name) for name in names]
    return sorted(files)


def read_item(bench, row, folder):
    """Item of a row {field: value} of a file in `folder`. Raises DataError for one that cannot be
    used: a field is missing, or no answer can match its gold."""
    its = BENCHES[bench]
    if missing := [field for field in its.fields if row.get(field) in (None, "")]:
        raise geometry.DataError(f"it has no {missing[0]}")
    name, task, question, gold = (str(row[field]) for field in its.fields)
    task = task.strip().replace("-", "–")  # MMSI-Bench's copies have either
    if bench == "mindcube":
        task = next((setting for setting in its.prompt if setting in task.lower()), "other")
    if task not in its.prompt and task not in SPAR_PROMPTS:
        raise geometry.DataError(f"unknown task {task!r:.60}")
    letter = re.fullmatch(r"\(?([A-Za-z])[).:]*", gold.strip())
    gold = letter[1].upper() if letter else gold.strip()
    if score_answer(bench, task, gold, gold) < 1:
        raise geometry.DataError(f"no answer can match its gold {gold!r:.60}")
    cells = row.get("images") or row.get("image")
    if row.get("base64"):  # a tsv's cell: several pictures stand in a list, as Python prints it
        parts = re.findall(r"[^\[\],'\"]+", re.sub(r"\s|data:[^,]*,", "", row["base64"]))
        cells = [base64.b64decode(part, validate=True) for part in parts]
    if not cells:
        raise geometry.DataError("it has no image")
    cells = cells if isinstance(cells, list) else [cells]
    poses = np.array(row["pose"], float).reshape(len(cells), 4, 4) if row.get("pose") else None
    return Item(name, task, question, gold, partial(open_images, cells, folder), len(cells), poses)


def read_rows(path, fields):
    """The rows {field: value} of a parquet, tsv or jsonl file; {} for a line that is none."""
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet

            file = pyarrow.parquet.ParquetFile(path)
            yield from file.read([name for name in file.schema_arrow.names if name in (
                *fields, "image", "images")]).to_pylist()  # not the depth maps
        except ImportError:
            raise geometry.DataError(f"{path}: reading it needs `pip install pyarrow`") from None
        except ValueError as error:  # as pyarrow's own are
            raise geometry.DataError(f"{path}: cannot be read as parquet ({error})") from None
    elif path.suffix == ".tsv":  # MMSI-Bench's: pictures in base64, several in a list
        csv.field_size_limit(1 << 30)
        text = io.StringIO(read_text(path), newline=None)  # a bare carriage return ends a line
        for row in csv.DictReader(text, delimiter="\t"):
            yield {**row, "id": row.get("index"), "question_type": row.get("category"),
                   "base64": row.get("image"), "image": None}
    elif path.suffix == ".jsonl":
        for line in filter(str.strip, read_text(path).split("\n")):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield row if isinstance(row, dict) else {}
    else:
        raise geometry.DataError(f"{path}: neither .parquet nor .tsv nor .jsonl")


def open_images(cells, folder):
    """PIL images of a row's cells: bytes, {"bytes", "path"}, or paths below `folder` or, as
    MindCube has it, below the folder above. Raises DataError."""
    pictures = []
    for k, cell in enumerate(cells):
        if isinstance(cell, dict):
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, str):
            places = folder / cell, folder.parent / cell
            pictures.append(geometry.open_image(places[not places[0].exists()]))
        else:
            pictures.append(geometry.open_image(io.BytesIO(cell), f"image {k}"))
    return pictures


def read_text(path):
    """A text file in UTF-8 or, as Windows tools write it, with a byte-order mark or in UTF-16."""
    data = Path(path).read_bytes()
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    return data.decode("utf-16" if utf16 else "utf-8-sig", errors="replace")


def answer(items, args, path, say, rank, world, device, dtype):
    """Answer those of `items` that predictions.jsonl at `path` has not, a line for each."""
    its, (source, headers) = BENCHES[args.bench], find_model(args.model)
    done = set(gather(continue_predictions(path, items, args, source, say) if rank == 0 else []))
    todo = [item for item in drawn(items, args.limit) if item.id not in done]
    say(f"data    {args.data}: {len(items):,} questions of {its.title}, {len(todo):,} to be asked")
    if not todo:
        return
    share = max(1, min(args.batch, len(todo)) // world)  # of each process
    steps = math.ceil(len(todo) / (share * world))
    weights = sum(numbers for numbers, _ in headers.values())
    need = dtype.itemsize * weights + share * (3 * args.max_pixels // 784 + 512) * 2**18 + 3e8
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
    say(f"model   {args.model}: {weights:,} parameters, {dtype} on {device}; mode {args.mode}\n"
        f"memory  {need / 2**30:.1f} GiB" + (
            ", more than is free: a smaller --batch or --max-pixels takes less" * (need > free)))
    model, tokenizer = load_model(source, headers)
    place(model.eval(), dtype, device)
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": args.max_pixels})
    prepared = geometry.read_ahead(partial(ask, todo, args, tokenizer, processor),
                                   range(rank, steps * share * world, world), args.workers)
    for _ in geometry.progress(range(steps), steps, "answering") if rank == 0 else range(steps):
        asked = [one for one in itertools.islice(prepared, share) if one]
        ready = [one for one in asked if one[2]]
        if ready:
            pairs = max(len(rewards.required_pairs(item.views)) for item, *_ in ready)
            longest = {"action": 96 + 64 * pairs, "language": 256}.get(args.mode, its.longest)
            texts = generate_greedily(model, tokenizer, [prompt for *_, prompt in ready],
                                      args.max_new_tokens or longest)
            for (_, line, _), text in zip(ready, texts):
                if text is None:
                    raise geometry.DataError(
                        f"{line['id']} ({line['task']}): the model's logits are not finite in "
                        f"--precision {args.precision}; try another one")
                line["response"] = text
        lines = gather([line for _, line, _ in asked])
        if rank == 0:
            with open(path, "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)


def ask(items, args, tokenizer, processor, k):
    """items[k], its line for predictions.jsonl, (ids, images) for the model; None behind the last.
    For what cannot be asked the line says why, and there are no ids."""
    if k >= len(items):
        return None
    item = items[k]
    line = {"id": item.id, "task": item.task, "question": item.question, "gold": item.gold}
    try:
        pictures = item.images()
        if args.blind:
            pictures = [Image.new("RGB", picture.size, "grey") for picture in pictures]
        text = prompt_of(item, args.bench, args.mode)
        return item, line, encode_prompt(tokenizer, processor, pictures, text, item.id)
    except (OSError, ValueError, TypeError) as error:  # DataError is a ValueError
        return item, line | {"skipped": str(error)}, None


def continue_predictions(path, items, args, source, say):
    """Ids of the answers at `path`, which is started anew if there are none, with --overwrite, or
    when their model has been trained again. DataError for those of another model or questions."""
    head = vars(args) | {"questions": checksum(items), "torch": torch.__version__,
                         "weights": geometry.fingerprint(weight_files(source))}
    if path.exists() and not args.overwrite:
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # a kill can cut the last line
        then, lines = read_predictions(path, say)
        other = [name for name in ("bench", "mode", "blind", "max_pixels", "max_new_tokens",
                                   "precision", "questions", "weights")
                 if then.get(name) != head[name]]
        if not other:
            return [name for name, line in lines.items() if "response" in line]
        if other == ["weights"] and then["model"] == args.model:
            say(f"{args.model} has been trained again since {path} was written: starting over")
        elif lines:
            raise geometry.DataError(f"{path} holds answers of {then.get('model')} with another "
                                     f"{', '.join(other)}: name another --out, or --overwrite")
    path.write_text(json.dumps({"args": head}) + "\n")
    return []


def checksum(items):
    """What tells the questions of a benchmark from others with the same ids."""
    return zlib.crc32(repr([item[:4] for item in items]).encode(errors="replace"))


def read_predictions(path, skip):
    """(arguments as the first line has them, {id: line}) of a predictions.jsonl; of the lines with
    an id, the last counts. skip: told of the others."""
    head, lines = {}, {}
    for number, line in enumerate(read_rows(Path(path), ()), 1):
        if type(line.get("id")) in (int, str):
            lines[str(line["id"])] = line
        elif isinstance(line.get("args"), dict) and not lines:
            head = line["args"]
        else:
            skip(f'{path}, line {number}: not JSON with an "id"')
    return head, lines


def read_run(path, args, skip, known):
    """(bench, name, mode, records) of a file of predictions, for score_run. Every question of the
    benchmark counts, one without a response as wrong; but not those that could not be asked.

    known: {(bench, data): items} that have been read. Raises DataError if nothing can be scored.
    """
    (said, lines), records = read_predictions(path, skip), []
    bench, data = args.bench or said.get("bench"), args.data or said.get("data")
    if bench not in tuple(BENCHES) or not isinstance(data, str):
        raise geometry.DataError(f"{path}: does not say which benchmark's: add --bench and --data")
    items = known[bench, data] = known.get((bench, data)) or load_items(bench, data, skip)
    if said.get("questions", checksum(items)) != checksum(items):
        raise geometry.DataError(f"{path}: was asked other questions than {data} holds now: name "
                                 "the right ones with --data")
    for name in lines.keys() - {item.id for item in items}:
        skip(f"{path}: the benchmark has no question {name!r:.60}")
    for item in drawn(items, args.limit or said.get("limit")):
        line = lines.get(item.id, {})
        text = line.get("response")
        if "skipped" in line:
            skip(f"{item.id} ({item.task}): {line['skipped']}")
        else:
            records.append({"item": item, "response": text if isinstance(text, str) else None})
    if not any(record["response"] for record in records):
        raise geometry.DataError(f"{path}: holds no response to a question of {data}")
    mode = str(args.mode or said.get("mode") or "")
    name = str(args.model or said.get("model") or Path(path).with_suffix(""))
    how = [name, mode, "blind" * (said.get("blind") is True)]
    return bench, ", ".join(filter(None, how)), mode, records


def drawn(items, limit):
    """`limit` of the questions, at random, in their order; without one, all."""
    kept = np.random.default_rng(0).permutation(len(items))
    return [items[k] for k in sorted(kept[:limit if type(limit) is int else None])]


# -------------------------------------------------------------- looking: curves, a page of it all

PANELS = {"pasta": ("match_accuracy", "excess"),
          "sft": ("loss", "heldout_loss", "answer", "action"),
          "grpo": ("reward_action", "reward_answer", "reward", "reward_format", "kl", "length")}
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000", "#999999")


def read_curve(path):
    """(stage, seed, {field: [(step, value)]}) of a log.jsonl."""
    fields, seed = {}, None
    for record in read_rows(Path(path), ()):
        if isinstance(record.get("args"), dict):  # its head
            seed = record["args"].get("seed")
        for name, value in record.items() if "step" in record else ():
            if type(value) in (int, float) and math.isfinite(value):
                fields.setdefault(name, []).append((record["step"], value))
    stage = "grpo" if "kl" in fields else "pasta" if "excess" in fields else "sft"
    return stage, seed, fields


def draw_curves(logs):
    """An SVG with a panel for each quantity in the logs, all runs in one; "" if there is none."""
    curves, panels = [read_curve(log) for log in logs], []
    names = run_names(logs, [seed for _, seed, _ in curves])
    for stage, field in ((stage, field) for stage, its in PANELS.items() for field in its):
        lines = [(name, *np.array(fields[field]).T) for name, (its, _, fields) in zip(names, curves)
                 if its == stage and len(fields.get(field, ())) > 1]
        if lines:
            panels.append(panel(f"{stage}: {field}", lines))
    return svg_of(panels)


def run_names(logs, seeds):
    """A name for the run of each log: its folder's, from where these part. Runs whose names differ
    in digits alone, and that have each a seed of their own, share the name with * for digits."""
    runs = [Path(os.path.abspath(log)).parent for log in logs]
    base = os.path.commonpath([run.parent for run in runs]) if runs else ""
    names = [str(run.relative_to(base)) for run in runs]
    alike = {}
    for name, seed in zip(names, seeds):
        alike.setdefault(re.sub(r"\d+", "*", name), []).append(str(seed))
    for k, name in enumerate(names):
        family = re.sub(r"\d+", "*", name)
        if 1 < len(alike[family]) == len(set(alike[family])):
            names[k] = family
    return names


def svg_of(panels):
    """An SVG of panels, two in a row; "" if there is none."""
    if not panels:
        return ""
    placed = [f'<g transform="translate({k % 2 * 640} {k // 2 * 360})">{its}</g>'
              for k, its in enumerate(panels)]
    return ('<svg xmlns="http://www.w3.org/2000/svg" style="background:#fff" font-size="14" '
            f'font-family="sans-serif" viewBox="0 0 1280 {(len(panels) + 1) // 2 * 360}">'
            f'{"".join(placed)}</svg>')


def panel(title, lines, axis="step"):
    """SVG of curves [(name, steps, values)], a colour a name. One of a name: thin as it is, thick
    its running mean. Several: thin their running means, thick the mean of these where all are."""
    left, right, top, bottom, drawn, means = 72, 620, 36, 300, {}, []
    for name, steps, values in lines:
        half = len(values) // 40  # a mean runs over a twentieth of its curve
        padded = np.pad(values, half, "edge")
        mean = np.convolve(padded, np.ones(2 * half + 1) / (2 * half + 1), "valid")
        drawn.setdefault(name, []).append((steps, values, mean))
        means.append(mean)
    low, high = min(map(np.min, means)), max(map(np.max, means))
    y = low, max(high, low + 0.01 * abs(low) + 1e-6)
    x = min(steps[0] for _, steps, _ in lines), max(steps[-1] for _, steps, _ in lines)
    parts = f'<text x="{left}" y="20">{title}</text>'
    for tick, at in zip(np.linspace(*y, 5), np.linspace(bottom, top, 5)):
        parts += (f'<path d="M{left} {at:.0f}H{right}" stroke="#ddd"/><text x="{left - 8}" '
                  f'y="{at + 5:.0f}" text-anchor="end">{tick:.3g}</text>')
    legend = f"{axis} {x[0]:g} to {x[1]:g}"
    for k, (name, curves) in enumerate(drawn.items()):
        colour = COLOURS[k % len(COLOURS)]
        if len(curves) == 1:
            (steps, values, mean), = curves
            looks = [(steps, values, 'opacity=".3"'), (steps, mean, 'stroke-width="2.5"')]
        else:
            looks = [(steps, mean, 'opacity=".5"') for steps, _, mean in curves]
            common = reduce(np.intersect1d, [steps for steps, *_ in curves])
            of_all = [np.interp(common, steps, mean) for steps, _, mean in curves]
            looks.append((common, np.mean(of_all, axis=0), 'stroke-width="2.5"'))
        for steps, values, look in looks:
            points = " ".join(f"{u:.1f},{v:.1f}" for u, v in zip(
                np.interp(steps, x, (left, right)), np.interp(values, y, (bottom, top))))
            parts += f'<polyline points="{points}" fill="none" stroke="{colour}" {look}/>'
        legend += f' <tspan fill="{colour}" font-weight="bold">{shown(name)}</tspan>'
    return f'{parts}<text x="{left}" y="330">{legend}</text>'


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>HATCH: evaluation</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: auto; padding: 1rem }
pre { overflow: auto; background: #f6f8fa; padding: .5rem; font-size: .9rem }
article { border-top: 1px solid #57606a; margin: 1rem 0; overflow-wrap: anywhere }
article pre { white-space: pre-wrap; max-height: 14rem }
.views { display: flex; flex-wrap: wrap; gap: .5rem } figure { margin: 0 }
figcaption { font-size: .85rem } img, figure svg { width: 12rem; background: #f6f8fa }
</style><h1>HATCH: evaluation</h1>"""
GOLD, WRITTEN = "#1a7f37", "#d55e00"


def write_page(path, runs, curves, show):
    """One self-contained page: tables, `show` questions, curves."""
    text, questions = tables(runs), draw_questions(runs, show)
    total = sum(len(run.records) for run in runs)
    parts = [PAGE, f'<pre class="tables">{shown(text, len(text))}</pre>',
             f"<p>{len(questions):,} of {total:,} questions, drawn evenly over tasks, right and "
             "wrong answers and, where this is known, cameras that only turn and that walk. Camera "
             f'paths are seen from above, ahead is up: <b style="color:{GOLD}">true</b>, '
             f'<b style="color:{WRITTEN}">written</b>.</p>']
    parts += [article(name, record) for name, record in questions]
    path.write_text("\n".join([*parts, curves]) + "</html>\n", encoding="utf-8")


def draw_questions(runs, show):
    """`show` questions of the runs as [(run's name, record)], at random, but each time one of those
    whose traits have been drawn least: task, right or wrong, a camera that only turns or walks."""
    rng, alike, seen, questions = np.random.default_rng(0), {}, Counter(), []
    for run in runs:
        for k in rng.permutation(len(run.records)):
            record = run.records[k]
            traits = (("task", run.bench, run.name, record["item"].task),
                      ("right", record["score"] >= 0.5), ("walks", record.get("walks")))
            alike.setdefault(traits, []).append((run.name, record))
    while alike and len(questions) < show:
        traits = min(alike, key=lambda traits: sum(seen[trait] for trait in traits))
        questions.append(alike[traits].pop())
        if not alike[traits]:
            del alike[traits]
        seen.update(traits)
    return questions


def shown(text, longest=2000):
    """Any text as HTML that shows it: escaped, control characters replaced, cut."""
    more = f" ... ({len(text):,} characters)" if len(text) > longest else ""
    return html.escape(printable(text[:longest])) + more


def article(name, record):
    """A question of the page: its pictures, texts, scores and camera paths."""
    item, response, figures = record["item"], record["response"] or "", []
    try:
        pictures = item.images()
    except (OSError, ValueError, TypeError):  # named when it was to be asked
        pictures = []
    for k, picture in enumerate(pictures):
        picture.thumbnail((400, 400))
        picture.save(buffer := io.BytesIO(), "JPEG", quality=80)
        data = base64.b64encode(buffer.getvalue()).decode()
        figures.append(f'<figure><img alt="" src="data:image/jpeg;base64,{data}">'
                       f"<figcaption>view {k}</figcaption></figure>")
    if "R_act" in record:
        written = rewards.parse_response(response).actions or {}
        figures += [from_above(pair, plan, written.get(pair))
                    for pair, plan in rewards.gold_plans(item.poses).items()]
    scores = ", ".join(f"{part} {record[part]:.2f}" for part in ("score", "R_act", "R_fmt")
                       if part in record)
    return (f'<article><b>{shown(item.task)}, {scores}</b> {shown(f"{item.id}, {name}")}'
            f'<div class="views">{"".join(figures)}</div><p>{shown(item.question)}</p>'
            f'<p>true <b>{shown(item.gold)}</b>, written <b>{shown(record["answer"], 200)}</b></p>'
            f"<pre>{shown(response)}</pre></article>")


def from_above(pair, gold, written):
    """An SVG of the camera's way from view i to view j by two plans; `written` may be None."""
    ways, said = [], "no plan"
    for colour, plan in ((GOLD, gold), (WRITTEN, written or [])):
        with np.errstate(all="ignore"):
            poses = [geometry.pose_from_actions(plan[:k]) for k in range(min(len(plan), 99) + 1)]
        xy = np.nan_to_num([(pose[0, 3], -pose[2, 3]) for pose in poses])  # right, ahead
        ways.append((colour, xy, math.degrees(math.atan2(poses[-1][0, 2], poses[-1][2, 2]))))
    if written is not None:
        d_t, d_r = geometry.pose_error(poses[-1], geometry.pose_from_actions(gold))
        said = f"off by {d_t:.2g} m and {d_r:.0f}°"
    reach = 1.8 * max(0.5, np.abs(ways[0][1]).max())  # what goes farther leaves the picture
    shapes = '<circle r=".05"/>'
    for colour, xy, gaze in ways[:1 + (written is not None)]:
        xy = np.clip(xy / reach, -9, 9)
        line = " ".join(f"{x:.3f},{y:.3f}" for x, y in xy)
        shapes += (
            f'<g fill="none" stroke="{colour}" stroke-width=".04"><polyline points="{line}"/>'
            f'<path d="M0 0V-.45M-.09 -.32L0 -.45L.09 -.32" '
            f'transform="translate({xy[-1][0]:.3f} {xy[-1][1]:.3f}) rotate({gaze:.0f})"/></g>')
    return (f'<figure><svg viewBox="-1 -1 2 2">{shapes}</svg>'
            f"<figcaption>view {pair[0]} to {pair[1]}, {said}</figcaption></figure>")


# ------------------------------------------------------------------------------------- plumbing


def encode_prompt(tokenizer, processor, pictures, text, name):
    """What the model reads before its response: token ids, and the encoder's input for the images.

    Qwen's ChatML, images first, equal to the published chat template. Control tokens are put in by
    their ids, all else is tokenised as text, whatever it holds. DataError, with the sample's name,
    for what image processor or tokenizer refuse.
    """
    try:
        images = processor(images=pictures, return_tensors="pt")
        system = tokenizer("system\nYou are a helpful assistant.")["input_ids"]
        user = tokenizer("user\n")["input_ids"]
        text = tokenizer(text)["input_ids"]
        assistant = tokenizer("assistant\n")["input_ids"]
        newline = tokenizer("\n")["input_ids"]
    except (ValueError, TypeError) as error:
        raise geometry.DataError(f"{name}: images or text cannot be encoded ({error})") from None
    control = tokenizer.convert_tokens_to_ids([
        "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"])
    im_start, im_end, vision_start, vision_end, image_pad = control
    ids = [im_start, *system, im_end, *newline]
    ids += [im_start, *user]
    for _, h, w in images["image_grid_thw"].tolist():  # in patches, merge_size^2 of them a token
        tokens = h * w // processor.merge_size**2
        ids += [vision_start, *[image_pad] * tokens, vision_end]
    ids += [*text, im_end, *newline]
    ids += [im_start, *assistant]
    return ids, dict(images)


def generate_greedily(model, tokenizer, prompts, longest):
    """The likeliest response to each prompt, (ids, images) as of encode_prompt: list of texts; None
    where a logit was NaN or +inf, which nothing can be the likeliest of.

    One batch, padded on the left; a response ends before the first end token, or after `longest`.
    """
    end = tokenizer.convert_tokens_to_ids(END)
    L = max(len(ids) for ids, _ in prompts)
    rows = []
    seen = []
    for ids, _ in prompts:
        padding = L - len(ids)
        rows.append([end[0]] * padding + list(ids))
        seen.append([0] * padding + [1] * len(ids))
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
            max_new_tokens=longest, do_sample=False, eos_token_id=end, pad_token_id=end[0],
            logits_processor=[partial(count_sound, sound, L)])
    texts = []
    for tokens, steps in zip(written[:, L:].tolist(), sound.tolist()):
        length = 0
        while length < len(tokens) and tokens[length] not in end:
            length += 1
        decided = min(length + 1, len(tokens))  # with the end token
        texts.append(tokenizer.decode(tokens[:length]) if steps >= decided else None)
    return texts


def count_sound(sound, L, ids, logits):
    """Count for each row how many of its tokens, from the first on, were chosen among logits that
    are neither NaN nor +inf: sound (B,) is changed in place, on the device, which nobody waits for.

    What `generate` calls before each token: ids (B, L + t), logits (B, W).
    """
    fine = (logits < math.inf).all(-1)
    sound += fine & (sound == ids.shape[1] - L)
    return logits


def find_model(name):
    """A complete 16- or 32-bit model: its directory, `name` or the hub's copy, and {plain name:
    (numbers, dtype as the file calls it)} of its tensors, from the files' headers."""
    path = Path(name)
    if name in MADE_BY and not (path / "config.json").exists():
        raise geometry.DataError(f"{name}: not there yet; run `{MADE_BY[name]}` first")
    file = path  # the one that is being read, for the error
    headers = {}
    try:
        if not path.is_dir():
            path = Path(snapshot_download(name, allow_patterns=[
                "*.json", "*.txt", "*.jinja", "*.safetensors"]))
        file = path
        config = json.loads((path / "config.json").read_text())
        for file in weight_files(path):
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():
                    header = tensors.get_slice(key)
                    headers[plain(key)] = math.prod(header.get_shape()), header.get_dtype()
    except (OSError, ValueError, KeyError, SafetensorError) as error:  # the hub's are among these
        raise geometry.DataError(f"{file}: no complete model directory, and none on the hub "
                                 f"({str(error).strip().splitlines()[0]})") from None
    if "quantization_config" in config:
        raise geometry.DataError(f"{path}: its weights are quantised; take the 16-bit model")
    if not (path / "tokenizer.json").exists() and not (path / "vocab.json").exists():
        raise geometry.DataError(f"{path}: has no tokenizer.json; copy the tokenizer's files from "
                                 "the model that it was made of")
    return path, headers


def weight_files(path):
    """The files with a model's weights, as from_pretrained chooses them."""
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    index = json.loads((path / "model.safetensors.index.json").read_text())
    return [path / name for name in sorted(set(index["weight_map"].values()))]


def plain(key):
    """A tensor's name without the prefixes, which differ between files and releases."""
    return re.sub(r"^(model\.)?(language_model\.)?", "", key)


def load_model(path, headers):
    """Model and tokenizer of a directory, on the CPU, in the widest dtype that its files state."""
    transformers.utils.logging.disable_progress_bar()
    kinds = "".join({kind for _, kind in headers.values()})  # config.json may say another
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16}.get(kinds, torch.float32)
    try:
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
        # control tokens in texts are text; set once, since threads share the tokenizer
        tokenizer = AutoTokenizer.from_pretrained(path, split_special_tokens=True)
        lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        if lacking:
            raise ValueError(f"{len(lacking)} tensors are missing or have another shape than "
                             f"config.json says, {lacking[0]} among them")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise geometry.DataError(
            f"{path}: cannot be read as a Qwen2.5-VL ({str(error).splitlines()[0]})") from None
    embed = model.model.visual.patch_embed  # the matrix product that it is: as a 3-D convolution
    embed.forward = lambda pixels: F.linear(  # by patch it is slow
        pixels.to(embed.proj.weight.dtype), embed.proj.weight.flatten(1))
    return model, tokenizer


def place(model, dtype, device):
    """Move a model to a device, its weights in dtype, one by one: the whole never exists twice. The
    buffers, among them the rotary frequencies, keep their own dtype."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)
    model.to(device)


def start_processes(precision):
    """Join torchrun's process group if there is one. Returns rank, world, device, working dtype."""
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        raise geometry.DataError("srun started several processes that do not know of each other: "
                                 "let it start one, torchrun --nproc_per_node N ...")
    device = torch.device("cpu")
    best = "fp32"
    try:
        rank = int(os.environ.get("RANK", 0))
        world = int(os.environ.get("WORLD_SIZE", 1))
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
            torch.backends.cuda.enable_cudnn_sdp(False)  # plans anew for every length of a text
            best = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        elif shutil.which("nvidia-smi"):
            print("warning: the GPU cannot be used (its driver? a torch without CUDA?): on the CPU")
        if world > 1:  # both backends, since --offload keeps gradients in host memory
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                    timeout=timedelta(hours=2))  # others wait while the first saves
    except (ValueError, RuntimeError) as error:
        raise geometry.DataError(f"processes cannot be started ({str(error).splitlines()[0]}): "
                                 "torchrun sets RANK, WORLD_SIZE and what else is needed") from None
    if best == "fp16":
        print("warning: this GPU has no bf16: --precision auto is fp16, with a loss scale")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return rank, world, device, dtypes[best if precision == "auto" else precision]


def gather(items):
    """What the lists of all processes hold, in one list."""
    everyone = [items]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, items)
    return list(itertools.chain(*everyone))


class Console:
    """Standard output that ends no run: neither by a letter that it lacks, nor when it is closed or
    its reader has gone."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):  # a notebook's has none
            stream.reconfigure(errors="replace")

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):
            self.stream = open(os.devnull, "w")

    def __getattr__(self, name):
        return getattr(self.stream, name)


class Skipped(list):
    """What could not be used, named: the first twenty at once, all of it in results.json."""

    def __call__(self, message):
        self.append(message)
        if len(self) <= 20:
            print(f"skipped {printable(message)}", flush=True)


def printable(text):
    """A text with control characters, lone surrogates and the like replaced."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}"
                   for c in text)


def main(argv=None):
    args = parse_args(argv)
    rank, world, device, dtype = start_processes(args.precision)
    say = partial(print, flush=True) if rank == 0 else lambda *_: None
    out, skipped, known = Path(args.out), Skipped(), {}
    out.mkdir(parents=True, exist_ok=True)
    if args.answer:
        items = load_items(args.bench, args.data, skipped if rank == 0 else lambda _: None)
        answer(items, args, out / "predictions.jsonl", say, rank, world, device, dtype)
        known[args.bench, args.data] = items
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    logs = args.curves or sorted(Path("out").glob("*/log.jsonl"))
    curves = draw_curves(logs)
    if args.curves and not curves:
        raise geometry.DataError(f"{', '.join(logs)}: no log with two steps or more")
    if not args.score and not args.answer:
        (out / "curves.svg").write_text(curves, encoding="utf-8")
        return say(f"wrote   {out / 'curves.svg'}")
    runs = [score_run(*read_run(file, args, skipped, known), args.convention)
            for file in args.score or [out / "predictions.jsonl"]]
    (out / "results.json").write_text(json.dumps({
        "args": vars(args), "skipped": skipped, "runs": [
            {"bench": run.bench, "name": run.name, "rows": run.rows, "constants": run.constants}
            for run in runs]}, indent=1) + "\n")
    write_page(out / "report.html", runs, curves, args.show)
    print("", tables(runs), sep="\n", flush=True)  # after the files are there
    say(f"wrote   {out}: {'' if args.score else 'predictions.jsonl, '}results.json, report.html; "
        f"{len(skipped):,} rows or pictures could not be used")


if __name__ == "__main__":
    sys.stdout = Console(sys.stdout)
    try:
        main()
    except (geometry.DataError, OSError, SafetensorError, torch.OutOfMemoryError) as error:
        sys.exit(f"evaluate.py: {str(error).strip().splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit("evaluate.py: interrupted; the same command goes on from the predictions made")
