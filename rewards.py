"""The model's text: how it is asked, written, read and scored (section 3.4, appendices B and C).

    3.4     what a model reads before its response       encode_prompt
    Eq. 6   <action> A </action><answer> a </answer>     write_response, parse_response
    Eq. 7   A: a plan for every pair of views            required_pairs
    Eq. 8   R = l1 R_act + l2 R_ans + l3 R_fmt           total_reward
    Eq. 9   d_t, d_r of two poses                        geometry.pose_error
    Eq. 10  R_act = exp(-d_t / tau_t) exp(-d_r / tau_r)  action_reward
    C.3     R_ans, by task and question type             answer_reward
    Eq. 11  R_fmt in {0, 1}                              format_reward
    Eq. 12  l1 = l2 = l3 = 1                             WEIGHTS

Appendix C's sentences stand above what computes them, in its order. A model may write any text:
no part of the reward raises or is NaN for it, and each stays in [0, 1]. Views are counted from 0,
as in appendix B.2 (Eq. 7 counts from 1).

Beyond the paper: the choices tagged "not in the paper: NAME"; docs/choices.md lists them.
"""

import itertools
import json
import math
import re
import warnings
from typing import NamedTuple

import numpy as np

import geometry

# ------------------------------------------------------------------------------------- asking

# No prompt of the paper is published; these are ours.
ACTION_INSTRUCTION = ("First write how the camera moves between all views, as JSON in "
                      "<action></action>, then the answer alone in <answer></answer>.")
ANSWER_INSTRUCTION = (  # not in the paper: prompts
    "Write the answer alone, without an explanation.")
LANGUAGE_INSTRUCTION = (  # the ablation of Table 3: reasoning in words instead of actions
    "First reason in words about how the views relate in <think></think>, then write the answer "
    "alone in <answer></answer>.")
END = ["<|im_end|>", "<|endoftext|>"]  # end a turn; end a text, as a base model may do instead


def encode_prompt(tokenizer, processor, pictures, text, name):
    """What the model reads before its response: (token ids, the image encoder's input as a dict).

        <|im_start|>system
        You are a helpful assistant.<|im_end|>
        <|im_start|>user
        <|vision_start|><|image_pad|>...<|vision_end|>TEXT<|im_end|>    (vision: once a picture)
        <|im_start|>assistant

    This equals Qwen's published chat template. Control tokens are put in by their ids, all else is
    tokenised as text, whatever it holds. Raises DataError, with the sample's name, for what image
    processor or tokenizer refuse.
    """
    try:
        images = processor(images=pictures, return_tensors="pt")
        system = tokenizer("system\nYou are a helpful assistant.")["input_ids"]
        user = tokenizer("user\n")["input_ids"]
        question = tokenizer(text)["input_ids"]
        assistant = tokenizer("assistant\n")["input_ids"]
        newline = tokenizer("\n")["input_ids"]
    except (ValueError, TypeError) as error:
        raise geometry.DataError(f"{name}: images or text cannot be encoded ({error})") from None
    control = tokenizer.convert_tokens_to_ids([
        "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"])
    im_start, im_end, vision_start, vision_end, image_pad = control
    ids = [im_start, *system, im_end, *newline, im_start, *user]
    for _, h, w in images["image_grid_thw"].tolist():  # in squares of 14 x 14 pixels
        tokens = h * w // processor.merge_size**2  # so many squares are one token
        ids += [vision_start] + [image_pad] * tokens + [vision_end]
    return [*ids, *question, im_end, *newline, im_start, *assistant], dict(images)


# -------------------------------------------------------------------- writing and reading, B.2


class Response(NamedTuple):
    """What a response says. actions: {(i, j): plan} or None; answer: text or None."""

    actions: dict | None
    answer: str | None


def required_pairs(views):
    """The pairs (i, j), i < j, of `views` views that a response must cover."""
    return list(itertools.combinations(range(views), 2))  # Eq. 7


def write_response(actions, answer):
    """The teacher's text. actions: {(i, j): plan}, i < j from 0; answer: text.

    Compact JSON: indenting it costs twice the tokens.
    """
    A = json.dumps([{"from": i, "to": j, "action": plan}
                    for (i, j), plan in sorted(actions.items())],  # not in the paper: views from 0
                   separators=(",", ":"))
    return f"<action>{A}</action><answer>{answer}</answer>"  # Eq. 6


def parse_response(text):
    """Read a response: Response(actions or None, answer or None). Never raises.

    A part counts if its tags occur once and close. The actions must be a list of from, to, action
    with different pairs i < j and known actions of finite numbers; which pairs there are is not
    checked.
    """
    return Response(_parse_actions(_block(text, "action")), _block(text, "answer"))


def _block(text, tag):
    """What stands between <tag> and </tag>, stripped; None if either is not there exactly once, or
    in the wrong order, or nothing is between them."""
    opening = f"<{tag}>"
    closing = f"</{tag}>"
    if not isinstance(text, str) or text.count(opening) != 1 or text.count(closing) != 1:
        return None  # not in the paper: second answer
    inside = text[text.index(opening) + len(opening):text.index(closing)]
    return inside.strip() or None


# In characters; the plans of 16 views, 120 pairs, need a fifth of it.
LONGEST_PLAN = 100_000  # not in the paper: longest texts


def _parse_actions(block):
    """Text of an action block -> {(i, j): plan}, or None."""
    if block is None or len(block) > LONGEST_PLAN:
        return None
    try:
        items = json.loads(block, object_pairs_hook=_no_repeated_key)
        if not isinstance(items, list):
            return None
        actions = {}
        for item in items:
            i, j, plan = item["from"], item["to"], item["action"]
            if len(item) != 3 or type(i) is not int or type(j) is not int or not 0 <= i < j:
                return None
            if (i, j) in actions or not isinstance(plan, list):
                return None
            geometry.read_actions(plan)  # ValueError for what is no action
            actions[i, j] = plan
        return actions
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _no_repeated_key(pairs):
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a repeated key")  # not in the paper: broken plan
    return dict(pairs)


# ------------------------------------------------------------------ C.2, action accuracy reward

TAU_T = 1.0  # metres  # not in the paper: scales of R_act
TAU_R = 30.0  # degrees


def action_reward(text, gold_actions, tau_t=TAU_T, tau_r=TAU_R):
    """R_act in [0, 1]: how close the written plans come to the gold poses, mean over all pairs.

    gold_actions {(i, j): plan}, the required pairs; tau_t metres, tau_r degrees. A pair without a
    plan scores 0.
    """
    # "we first parse both as JSON. If parsing fails, R_act-acc is set to 0."
    actions = parse_response(text).actions or {}
    return _mean_similarity(actions, gold_actions, tau_t, tau_r)


def _mean_similarity(actions, gold_actions, tau_t, tau_r):
    """R_act of actions {(i, j): plan}; pairs that the gold lacks do not count."""
    if not gold_actions:
        return 0.0
    # "Each action list is converted into a relative camera pose (R, t) by composing the rotations
    # and translations specified by the plan."
    total = 0.0
    for pair, gold_plan in gold_actions.items():
        if pair in actions:
            pose = geometry.pose_from_actions(actions[pair])
            gold_pose = geometry.pose_from_actions(gold_plan)
            total += float(_similarity(pose, gold_pose, tau_t, tau_r))
    return total / len(gold_actions)  # not in the paper: several pairs


ROUNDING_M = 0.01  # plans are rounded to this: a smaller move or turn counts as none
ROUNDING_DEG = 1.0


def _similarity(pose, gold, tau_t, tau_r):
    """How close poses (..., 4, 4) come to gold poses (..., 4, 4): (...) in [0, 1]."""
    d_t, d_r = geometry.pose_error(pose, gold)
    similarity = np.exp(-d_t / tau_t) * np.exp(-d_r / tau_r)  # Eq. 10
    # "Optionally, degenerate "stop-like" predicted plans are penalized by setting R_act-acc = 0."
    # A plan is stop-like if it moves by less than a tenth of the gold's way and turns by less than
    # a tenth of its angle (or less than rounding leaves), while the gold does move or turn.
    moved, turned = geometry.pose_error(pose, np.eye(4))
    gold_moved, gold_turned = geometry.pose_error(gold, np.eye(4))
    no_move = moved < np.maximum(0.1 * gold_moved, ROUNDING_M)
    no_turn = turned < np.maximum(0.1 * gold_turned, ROUNDING_DEG)
    gold_goes = (gold_moved > ROUNDING_M) | (gold_turned > ROUNDING_DEG)
    stops = no_move & no_turn & gold_goes  # not in the paper: stop-like plans
    return np.where(stops, 0.0, similarity)


# ------------------------------------------------------------------ C.3, answer accuracy reward

# In characters; the longest gold, a view_change_infer, has 80.
LONGEST_ANSWER = 1000  # not in the paper: longest texts


def answer_reward(prediction, gold, task, kind):
    """R_ans in [0, 1]: how well a prediction matches the gold answer, both texts.

    task: of SPAR; kind: the question type, "select" or "fill". "The evaluation metric is selected
    based on the question sub-category and question type." Where METRICS has none, texts are
    compared literally, or by MRA if the gold holds one number, and a warning says so once.
    """
    # "If either is missing or the required structure cannot be parsed, the reward is set to 0."
    if not isinstance(prediction, str) or not isinstance(gold, str):
        return 0.0
    prediction = prediction.strip()
    gold = gold.strip()
    if not prediction or not gold or len(prediction) > LONGEST_ANSWER:
        return 0.0
    metric = _metric_of(task, kind)
    if metric is None:
        metric = exact  # not in the paper: other questions
        if len(_numbers(gold)) == 1:
            metric = numeric
        warnings.warn(f"appendix C.3 has no metric for {task} ({kind}): {metric.__name__} is used")
    return float(metric(prediction, gold))


def _metric_of(task, kind):
    """The function of (prediction, gold) that scores these questions; None if there is none."""
    if kind == "select":
        return selection
    for beginning, metric in METRICS.items():
        if task.startswith(beginning):
            return metric
    return None


def selection(prediction, gold):
    """ "For multiple-choice questions, we use an exact-match criterion with a permissive
    first-character rule, allowing predictions such as "C. ..." to match the gold answer "C"." """
    prediction = prediction.lower()  # not in the paper: matching
    gold = gold.lower()
    return prediction == gold or prediction[0] == gold


def exact(prediction, gold):
    return prediction.lower() == gold.lower()


NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


def _numbers(text):
    """All numbers in a text, however they are bracketed."""
    return [float(number) for number in NUMBER.findall(text)]


def numeric(prediction, gold):
    """ "For numerical fill questions (e.g., distance or depth prediction), we use Mean Relative
    Accuracy (MRA). Both [texts] must contain exactly one numeric value; otherwise the reward is
    0." """
    p = _numbers(prediction)
    g = _numbers(gold)
    return mean_relative_accuracy(p[0], g[0]) if len(p) == len(g) == 1 else 0.0


THRESHOLDS = np.linspace(0.5, 0.95, 10)


def mean_relative_accuracy(p, g):
    """ "MRA evaluates whether the relative error falls within a set of increasing tolerance
    intervals and averages the resulting binary accuracies." Ten of them, as the benchmark's own
    code has."""
    error = abs(p - g) / abs(g) if g else abs(p - g)  # not in the paper: gold 0
    return float(np.mean(error <= 1 - THRESHOLDS))  # False for NaN and inf


def position_matching(prediction, gold):
    """ "Intersection-over-Union (IoU) between predicted and gold bounding boxes." x1, y1, x2,
    y2."""
    p = _numbers(prediction)
    g = _numbers(gold)
    if len(p) != 4 or len(g) != 4:
        return 0.0
    common = _area([max(p[0], g[0]), max(p[1], g[1]), min(p[2], g[2]), min(p[3], g[3])])
    union = _area(p) + _area(g) - common
    return common / union if 0 < union < math.inf else 0.0


def _area(box):
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def object_phrase(prediction, gold):
    """ "Object-based distance inference: soft exact match after removing parenthetical
    annotations." Case, punctuation, articles and white space do not count."""
    words = _soft(prediction)
    return words != "" and words == _soft(gold)


def _soft(text):
    text = re.sub(r"\([^()]*\)", " ", text.lower())
    words = [word for word in re.findall(r"\w+", text) if word not in ("a", "an", "the")]
    return " ".join(words)  # not in the paper: matching


def camera_motion(prediction, gold):
    """ "Camera motion inference: a weighted combination of Gaussian scores over normalized 2D
    position error and relative depth error." Texts hold x and y of 0..1000 and a depth in
    metres."""
    p = _numbers(prediction)
    g = _numbers(gold)
    if len(p) != 3 or len(g) != 3:
        return 0.0
    d_xy = math.hypot(p[0] - g[0], p[1] - g[1]) / 1000
    d_depth = abs(p[2] - g[2]) / max(abs(g[2]), 0.1)
    score = 0.0
    parts = ((0.5, d_xy, 0.1), (0.5, d_depth, 0.25))  # not in the paper: camera motion
    for weight, error, width in parts:
        score += weight * math.exp(-min(error / width, 1e3) ** 2 / 2)
    return score


# the canonical dimensions, each as (positive name, negative name)
AXES = (("move_right", "move_left"), ("move_up", "move_down"), ("move_forward", "move_backward"),
        ("rotate_right", "rotate_left"), ("rotate_up", "rotate_down"))


def view_change(prediction, gold):
    """ "Motion parameters are parsed into a fixed set of canonical dimensions, and MRA is computed
    independently for each dimension and then averaged." Errors are relative to the gold."""
    p = _motion(prediction)
    g = _motion(gold)
    if p is None or g is None:
        return 0.0
    scores = [mean_relative_accuracy(p[axis], g[axis]) for axis in AXES]
    return sum(scores) / len(AXES)  # not in the paper: view change


def _motion(text):
    """Read "move_left:2.6,rotate_up:10,..." as {axis: signed amount}, 0 for an axis not named. None
    if an item is not of the form name:number, or no name is one of AXES."""
    amounts = {}
    for item in text.split(","):
        found = re.fullmatch(rf"\s*([a-z_]+)\s*:\s*({NUMBER.pattern})\s*", item)
        if not found:
            return None
        name = "move_backward" if found[1] == "move_back" else found[1]  # the data may have either
        amounts[name] = float(found[2])
    if not amounts.keys() & set(itertools.chain(*AXES)):
        return None
    return {axis: amounts.get(axis[0], 0.0) - amounts.get(axis[1], 0.0) for axis in AXES}


TURN = re.compile(r"(left|right) ([0-9]{1,3})")


def camera_turn(prediction, gold):
    """Actial's viewpoint question, "right 20": 0 for the wrong way, else MRA of the degrees."""
    p = TURN.fullmatch(prediction.lower())
    g = TURN.fullmatch(gold.lower())
    if not p or not g or p[1] != g[1]:
        return 0.0
    return mean_relative_accuracy(float(p[2]), float(g[2]))


METRICS = {  # of the fill questions, by how their task begins; select is always `selection`
    "depth_prediction": numeric, "distance_prediction": numeric, "spatial_volume_infer": numeric,
    "room_size": numeric, "obj_count": numeric,
    "distance_infer": object_phrase, "appearance_order": object_phrase,
    "position_matching": position_matching, "camera_motion_infer": camera_motion,
    "view_change_infer": view_change,
    "camera_turn": camera_turn}  # not in the paper: rooms


# ------------------------------------------------------------------------------ C.4, format reward


def format_reward(text, views, block="action"):
    """R_fmt, 0.0 or 1.0: strict adherence to the protocol, for a question about `views` views.

    block: "action", or "think" for reasoning in words (any text that is not blank).
    """
    response = parse_response(text)
    # "R_format = 1 if and only if all of the following conditions are satisfied:
    # The output contains properly closed <action> and <answer> blocks." Once each, in this order,
    # with something in them, and only white space around them.
    layout = rf"\s*<{block}>.*</{block}>\s*<answer>.*</answer>\s*"  # not in the paper: strict form
    if response.answer is None or _block(text, block) is None:
        return 0.0
    if not re.fullmatch(layout, text, re.DOTALL):
        return 0.0
    if block != "action":
        return 1.0
    # "The contents of <action> are parseable as valid JSON." And are what B.2 shows.
    # "The parsed action list covers all required image pairs for the input." And no other.
    covered = response.actions is not None and sorted(response.actions) == required_pairs(views)
    return float(covered)  # Eq. 11


# ------------------------------------------------------------------------------------ Eq. 8, C.1


class Gold(NamedTuple):
    """What a response is compared with. actions: {(i, j): plan} for every pair of views, or {}
    where plans are not scored; task and kind: as in answer_reward."""

    actions: dict
    answer: str
    task: str
    kind: str
    views: int


def gold_plans(poses):
    """The teacher's {(i, j): plan} between all views; poses: cam2world (4, 4) of each."""
    return {(i, j): geometry.actions_from_pose(geometry.relative_pose(poses[i], poses[j]))
            for i, j in required_pairs(len(poses))}


def gold_of(sample, plans=True):
    """The Gold of a geometry.Sample. With plans, the sample's poses are read, and actions holds the
    teacher's plan for each pair of views; else it is {}. Raises DataError if the sample's own
    answer would not earn R_ans 1."""
    views = len(sample.images)
    fits = answer_reward(sample.answer, sample.answer, sample.task, sample.kind)
    if not fits >= 1:  # NaN of an infinite number, too  # not in the paper: unfit golds
        raise geometry.DataError(f"{sample.id}: no answer to a {sample.kind} question of "
                                 f"{sample.task} can match {sample.answer!r:.60}")
    actions = gold_plans([sample.pose(k) for k in range(views)]) if plans else {}
    return Gold(actions, sample.answer, sample.task, sample.kind, views)


WEIGHTS = {"action": 1.0, "answer": 1.0, "format": 1.0}  # Eq. 12


def total_reward(text, gold, weights=WEIGHTS.values(), tau_t=TAU_T, tau_r=TAU_R, block="action"):
    """R and its terms: {"total", "action", "answer", "format"}. gold: Gold; weights: of each term.

    With block "think" there are no actions to reward. The log of GRPO has a field for each name.
    """
    R_act = 0.0  # not in the paper: language variant
    if block == "action":
        R_act = action_reward(text, gold.actions, tau_t, tau_r)
    R_ans = answer_reward(parse_response(text).answer, gold.answer, gold.task, gold.kind)
    R_fmt = format_reward(text, gold.views, block)
    terms = {"action": R_act, "answer": R_ans, "format": R_fmt}  # in the order of WEIGHTS
    R = 0.0
    for weight, term in zip(weights, terms.values(), strict=True):
        R += weight * term  # Eq. 8
    return {"total": R, **terms}


# -------------------------------------------------------------------- what R_act is compared with


def only_turns(actions):
    """Whether no plan of {(i, j): plan} moves the camera from where it stands."""
    names = {name for plan in actions.values() for action in plan for name in action}
    return not any("move" in name for name in names)


def constant_plan(golds):
    """(R_act, plan): which of the golds' plans scores best if it is written for every pair.

    golds: [{(i, j): plan}, ...]. A model that knows this plan and looks at no image scores R_act.
    """
    plans = [plan for gold in golds for plan in gold.values()]
    poses = np.stack([geometry.pose_from_actions(plan) for plan in plans])
    # R_act is a mean over a sample's pairs, so each of k pairs weighs 1 / k
    weights = np.array([1 / len(gold) for gold in golds for _ in gold])
    R_act = [np.average(_similarity(pose, poses, TAU_T, TAU_R), weights=weights) for pose in poses]
    return float(max(R_act)), plans[int(np.argmax(R_act))]


def plan_scores(plan, golds):
    """[R_act] of a text that has this plan for every pair, for each of golds, [{(i, j): plan}]."""
    return [_mean_similarity(dict.fromkeys(gold, plan), gold, TAU_T, TAU_R) for gold in golds]
