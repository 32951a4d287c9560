"""rewards.py: appendix C case by case, the protocol, recorded official scores, hostile text."""

import dataclasses
import itertools
import json
import math
import random
import re
import warnings

import numpy as np
import pytest

import geometry
import rewards

PLANS = {(0, 1): [{"turn_right_deg": 30}, {"turn_up_deg": 15},
                  {"move_forward_m": 1.4}, {"move_up_m": 0.3}],
         (0, 2): [{"turn_left_deg": 90}], (1, 2): []}
GOLD = rewards.Gold(PLANS, "1.5", "depth_prediction_oc_mv", "fill", 3)
TEACHER = rewards.write_response(PLANS, "1.5")
WORDS = "<think>The camera turns right.</think><answer>1.5</answer>"


def test_appendix_b2_example():
    """The teacher's text to the letter, and the paper's layout of the same; as printed that is no
    JSON (a comma before a bracket), which costs the actions and leaves the answer."""
    laid_out = """
    <action>
    [ {"from": 0, "to": 1, "action": [{"turn_right_deg": 30}, {"turn_up_deg": 15},
                                      {"move_forward_m": 1.4}, {"move_up_m": 0.3}]},
      {"from": 0, "to": 2, "action": [{"turn_left_deg": 90}]}, {"from": 1, "to": 2, "action": []} ]
    </action>
    <answer>1.5</answer>
    """
    assert TEACHER == "".join(laid_out.split())
    for text in (TEACHER, laid_out):
        assert rewards.parse_response(text) == (PLANS, "1.5")
        assert rewards.total_reward(text, GOLD) == {
            "total": 3.0, "action": 1.0, "answer": 1.0, "format": 1.0}
    printed = laid_out.replace('"action": []}', '"action": []},')
    assert rewards.parse_response(printed) == (None, "1.5")


def test_plans_of_poses_come_back(rooms):
    """Writing and reading are inverse on what the teacher can produce: plans between all views,
    the earlier one first; a sample's own text scores one on every part."""
    # camera 1 stands 2 m ahead of camera 0 and looks to the right
    poses = np.eye(4), np.array([[0, 0, 1, 0], [0, 1, 0, 0], [-1, 0, 0, 2], [0, 0, 0, 1.0]])
    assert rewards.gold_plans(poses) == {(0, 1): [{"move_forward_m": 2.0}, {"turn_right_deg": 90}]}
    golds = [*map(rewards.gold_of, geometry.load_samples(rooms)[::9])]
    rng = np.random.default_rng(0)
    for views in np.repeat([2, 3, 6], 30):
        places = rng.uniform((0, 0, 0, -4, -1), (5, 5, 3, 4, 1), (views, 5))
        plans = rewards.gold_plans([geometry.look(place[:3], *place[3:]) for place in places])
        golds.append(GOLD._replace(actions=plans, views=views))
    for gold in golds:
        text = rewards.write_response(gold.actions, gold.answer)
        assert rewards.parse_response(text) == (gold.actions, gold.answer)
        parts = rewards.total_reward(text, gold)
        assert parts["answer"] == parts["format"] == 1 and parts["action"] == (gold.views > 1)
        assert rewards.total_reward(gold.answer, gold)["total"] == 0


@pytest.mark.parametrize("task, kind, answer, fits", [
    ("depth_prediction_oc_mv", "fill", "2.1", True), ("depth_prediction_oc_mv", "fill", "", False),
    ("depth_prediction_oc_mv", "fill", "unknown", False), ("room_size", "fill", "about 2", True),
    ("depth_prediction_oc_mv", "fill", "2.1 to 3.4", False), ("camera_turn", "fill", "20", False),
    ("position_matching", "fill", "1,2,3", False), ("position_matching", "fill", "5 5 5 9", False),
    ("view_change_infer", "fill", "move_left:1.0", True), ("obj_count", "fill", "nan", False),
    ("view_change_infer", "fill", "left by 1", False), ("appearance_order", "fill", "()", False),
    ("camera_motion_infer", "fill", "1e999 1 1", False),
    ("anything", "select", " C. left", True), ("anything", "select", " ", False)])
def test_a_gold_that_no_answer_can_match(task, kind, answer, fits):
    sample = geometry.Sample("a", "s", task, kind, "?", answer, [], [], {})
    if fits:
        assert rewards.gold_of(sample) == rewards.Gold({}, answer, task, kind, 0)
    else:
        with pytest.raises(geometry.DataError, match=f"^a: no answer to a {kind} question of"):
            rewards.gold_of(sample)


# --- C.4


def wrap(*more, plans=slice(3), **first):
    """The teacher's text with those of its three plans, the first of them changed, and more."""
    plain = [{"from": i, "to": j, "action": plan} for (i, j), plan in PLANS.items()]
    plain[0] = {**plain[0], **first}
    return f"<action>{json.dumps([*plain[plans], *more])}</action><answer>1.5</answer>"


@pytest.mark.parametrize("text", [
    "", "1.5", "<answer>1.5</answer>", TEACHER.upper(), TEACHER + TEACHER, TEACHER + " done",
    *(TEACHER.replace(tag, "") for tag in ("<action>", "</action>", "<answer>", "</answer>")),
    TEACHER.replace("1.5</answer>", " \n</answer>"), "So: " + TEACHER,
    TEACHER.replace("</action><answer>", "</action> thus <answer>"),
    TEACHER + "<answer>2</answer>", "<answer>1.5</answer>" + TEACHER.split("<answer>")[0],
    TEACHER.replace("1.5</answer>", "<answer>1.5</answer></answer>"),
    TEACHER.replace("]</action>", "</action>"), "<action>{}</action><answer>1.5</answer>",
    TEACHER.replace("1.4", "1e999"), TEACHER.replace('"from":0', '"from":0,"from":0', 1),
    TEACHER.replace("30", "３０"), wrap(plans=slice(0)), wrap(plans=slice(2)),
    *(wrap({"from": i, "to": j, "action": []}) for i, j in ((0, 1), (0, 3), (1, 1), (-1, 1))),
    wrap(**{"from": 1, "to": 0}), wrap(**{"from": "0"}), wrap(**{"from": 0.0}), wrap(to=True),
    wrap(why="because"), wrap(action="left"), wrap(action={}),
    *(wrap(action=[step]) for step in ({"fly_m": 1}, {"move_up_m": "1"}, {"move_up_m": math.nan},
                                       {"move_up_m": math.inf}))])
def test_each_violated_condition_alone_gives_format_zero(text):
    """... and what is none: white space, another order of pairs, every action, either sign."""
    assert rewards.format_reward(text, 3) == 0.0
    for fine in (f" {TEACHER}\n", TEACHER.replace("><", "> <"), wrap(plans=slice(None, None, -1)),
                 wrap(action=[{"move_backward_m": 2}, {"turn_left_deg": -3.5}])):
        assert [rewards.format_reward(fine, views) for views in (2, 3, 4)] == [0.0, 1.0, 0.0]


def test_reasoning_in_words():
    """The ablation's block: any words, once, before the answer; moves in it are not rewarded."""
    assert rewards.parse_response(WORDS) == (None, "1.5")
    assert rewards.total_reward(WORDS, GOLD, block="think")["total"] == 2.0
    assert rewards.format_reward(WORDS, 3) == rewards.format_reward(TEACHER, 3, "think") == 0.0
    for bad in (WORDS.replace("The camera turns right.", " "), WORDS + "!", "!" + WORDS,
                WORDS.replace("</think>", ""), "<think><answer>B</think></answer>",
                "<think>x<answer>B</think> foo</answer>", "<answer>B</answer><think>x</think>"):
        assert rewards.format_reward(bad, 3, block="think") == 0.0
    for text, tags in ((rewards.ACTION_INSTRUCTION, ["action", "answer"]),
                       (rewards.LANGUAGE_INSTRUCTION, ["think", "answer"])):
        assert re.findall("<([a-z]+)></[a-z]+>", text) == tags  # what is asked for is what is read
    moves = f"<think>{TEACHER.replace('<answer>', '</think><answer>')}"
    assert rewards.total_reward(moves, GOLD, block="think")["total"] == 2.0


def test_words_need_no_poses(rooms, tmp_path):
    """Reasoning in words is asked for and scored on a tree that has no poses."""
    sample = geometry.load_samples(rooms, tasks=("depth_prediction_oc_mv",))[0]
    sample = dataclasses.replace(sample, images=[tmp_path / path.name for path in sample.images])
    gold = rewards.gold_of(sample, plans=False)
    assert gold.actions == {} and gold.views == 2
    text = WORDS.replace("1.5", sample.answer)
    assert rewards.total_reward(text, gold, block="think") == {
        "total": 2.0, "action": 0.0, "answer": 1.0, "format": 1.0}
    with pytest.raises(geometry.DataError, match="pose/.*txt: cannot be read"):
        rewards.gold_of(sample)


# --- C.2

AHEAD, TENTH = [{"move_forward_m": 2}], [{"move_forward_m": 0.1}]
FAR = [{"turn_left_deg": 40}, {"move_forward_m": 2}]
BACK = [{"turn_left_deg": 20}, {"turn_right_deg": 20}]


@pytest.mark.parametrize("plan, gold, taus, wanted", [
    ([{"move_forward_m": 3}, {"move_up_m": 4}], [{"turn_left_deg": 15}], (2,), math.exp(-3)),
    ([{"turn_right_deg": 30}], [{"turn_left_deg": 30}], (), math.exp(-2)),
    ([{"turn_right_deg": 350}], [{"turn_left_deg": 10}], (), 1),
    ([{"turn_up_deg": 20}], [{"turn_up_deg": 50}], (1, 10), math.exp(-3)),
    ([{"move_down_m": 0.5}], [{"move_up_m": 0.5}], (0.5,), math.exp(-2)),
    # a plan that stays is worth nothing, unless the gold stays, too
    ([], TENTH, (), 0), (BACK, TENTH, (), 0), ([], [], (), 1), (BACK, [], (), 1),
    ([], [{"turn_left_deg": 0.9}], (), math.exp(-0.03)), ([], [{"turn_left_deg": 1.1}], (), 0),
    ([], [{"move_up_m": 0.009}], (), math.exp(-0.009)), ([], [{"move_up_m": 0.011}], (), 0),
    # so is one under a tenth of the way and of the turn, and under a degree and a centimetre
    ([{"move_forward_m": 0.19}], AHEAD, (), 0),
    ([{"move_forward_m": 0.21}], AHEAD, (), math.exp(-1.79)),
    ([{"turn_left_deg": 3}, {"move_forward_m": 0.1}], FAR, (), 0),
    ([{"turn_left_deg": 40}], FAR, (), math.exp(-2))])
def test_eq_10_by_hand(plan, gold, taus, wanted):
    text = rewards.write_response({(0, 1): plan}, "A")
    assert abs(rewards.action_reward(text, {(0, 1): gold}, *taus) - wanted) < 1e-9


def longest_text(*actions):
    """A text of two views whose action block, these actions again and again, is as long as may be,
    and what the parser makes of it."""
    head = '[{"from":0,"to":1,"action":['
    inside = ""
    for action in itertools.cycle(actions):
        if len(head + inside + action) + 3 > rewards.LONGEST_PLAN:
            break
        inside += action + ","
    text = f"<action>{head}{inside[:-1]}]}}]</action><answer>1.5</answer>"
    return text, rewards.parse_response(text).actions


@pytest.mark.parametrize("actions, mirrored, wanted", [
    (['{"move_up_m":%s}'], 0, 0), (['{"move_up_m":%s}', '{"move_up_m":-%s}'], 1, 1),
    (['{"move_up_m":%s}', '{"move_forward_m":%s}'], 0, 0),
    (['{"move_up_m":%s}', '{"turn_up_deg":%s}'], 0, 0), (['{"turn_left_deg":%s}'], None, None),
    (['{"move_up_m":%s}', '{"turn_right_deg":-%s}', '{"move_forward_m":-%s}'], 0, 0)])
def test_the_longest_plan_of_the_largest_amounts(actions, mirrored, wanted):
    """What the parser lets through leads to finite poses and distances: no overflow, no NaN. It is
    compared with itself, with a plan that stays, with one that moves, and with its mirror image."""
    text, plans = longest_text(*(action.replace("%s", "9e299") for action in actions))
    assert len(plans[0, 1]) > 4000
    assert longest_text(*(action.replace("%s", "1e300") for action in actions))[1] is None
    mirror = [{name: -amount for name, amount in action.items()} for action in plans[0, 1]]
    with warnings.catch_warnings(), np.errstate(over="raise", invalid="raise", divide="raise"):
        warnings.simplefilter("error")
        for gold, score in ((plans[0, 1], 1), ([], wanted), (AHEAD, 0), (mirror, mirrored)):
            gold = GOLD._replace(actions={(0, 1): gold}, views=2)
            parts = rewards.total_reward(text, gold, tau_t=0.001)
            assert parts["format"] == 1 and 0 <= parts["action"] <= 1
            if score is not None:
                assert abs(parts["action"] - score) < 1e-9


def test_means_and_weights():
    """Eq. 10 is averaged over the required pairs; Eq. 8 takes weights, one a term and in the order
    of the terms, and Eq. 10's tau."""
    text = rewards.write_response({(0, 1): AHEAD, (1, 2): [], (4, 5): []}, "1.8")
    gold = GOLD._replace(actions={(0, 1): [{"move_forward_m": 3}], (0, 2): [], (1, 2): []},
                         answer="2.0")
    parts = rewards.total_reward(text, gold, (2, 3, 5), tau_t=0.5)
    assert abs(parts["action"] - (math.exp(-2) + 1) / 3) < 1e-9 and parts["format"] == 0
    assert abs(parts["total"] - 2 * parts["action"] - 3 * 0.9) < 1e-9
    assert rewards.total_reward(TEACHER, GOLD, (2, 3, 5))["total"] == 10
    assert [*parts] == ["total", *rewards.WEIGHTS]
    with pytest.raises(ValueError):
        rewards.total_reward(TEACHER, GOLD, (2, 3, 5, 7))


def test_constant_plan():
    """Of golds that turn right by 30 and one that goes forward the turn is the better bet."""
    turn = [{"turn_right_deg": 30}]
    for golds in ([{(0, 1): turn}, {(0, 1): AHEAD}, {(0, 1): turn}, {}],
                  [{(0, 1): AHEAD, (0, 2): turn, (1, 2): turn}]):  # mean over pairs, then samples
        score, plan = rewards.constant_plan(golds)
        assert plan == turn and abs(score - (2 + math.exp(-2 - 1)) / 3) < 1e-9
    assert rewards.only_turns({(0, 1): turn, (0, 2): []}) and not rewards.only_turns(golds[0])


def test_scores_of_a_plan_are_those_of_its_text():
    """To the last bit, though nothing is written and read; one view has no pair to score."""
    rng = np.random.default_rng(0)
    golds = [{}]
    for views in np.repeat([2, 3, 4], 10):
        places = rng.uniform((0, 0, 0, -4, -1), (5, 5, 3, 4, 1), (views, 5))
        golds.append(rewards.gold_plans([geometry.look(place[:3], *place[3:]) for place in places]))
    best, plan = rewards.constant_plan(golds)
    scores = rewards.plan_scores(plan, golds)
    texts = [rewards.write_response(dict.fromkeys(gold, plan), "-") for gold in golds]
    assert scores == [rewards.action_reward(text, gold) for text, gold in zip(texts, golds)]
    assert scores[0] == 0 and abs(np.mean(scores[1:]) - best) < 1e-12
    others = [np.mean(rewards.plan_scores(other, golds[1:])) for gold in golds
              for other in gold.values()]
    assert abs(max(others) - best) < 1e-12 < np.ptp(others)


# --- C.3

MOVES = "move_left:2.6,rotate_up:10"
ANSWERS = {  # task: [(prediction, gold, wanted), ...]
    "obj_spatial_relation_oo": [  # select: exact, or the first character
        ("C", "C", 1), ("C. left", "C", 1), (" c", "C", 1), ("(C)", "C", 0), ("B", "C", 0),
        ("left", "left", 1), (None, "A", 0), ("A", None, 0), ("", "A", 0), ("A", " ", 0)],
    "depth_prediction_oc": [  # MRA of ten thresholds, exactly one number a side
        ("1.5 m", "1.5", 1), ("1.0", "0.9", 0.8), ("1.8", "2.0", 0.9), ("0.49", "1.0", 0),
        ("10 or 12", "10", 0), ("many", "3", 0), ("0.3", "0.0", 0.5), ("-1.5", "-1.5", 1),
        (".5e1", "5", 1), ("1e999", "1.5", 0), ("١", "1", 0), ("1.5" + " " * 997 + ".", "1.5", 0)],
    "position_matching": [
        ("[[0, 0, 10, 20]]", "0,0,10,10", 0.5), ("5 0 15 10", "(0,0,10,10)", 1 / 3),
        ("2,3,7,9", "0,4,6,9", 20 / 40), ("20,20,30,30", "0,0,10,10", 0),
        ("10,10,0,0", "0,0,10,10", 0), ("0,0,10", "0,0,10,10", 0), ("3,3,3,3", "5,5,5,5", 0)],
    "camera_motion_infer": [  # half for the place, half for the depth
        ("Image Coor:(606, 69), Depth:2.8 meters", "(606,69),2.8", 1), ("(6,9)", "(6,9),2.8", 0),
        ("(666,149),2.8", "(606,69),2.8", 0.5 * math.exp(-0.5) + 0.5),
        ("(606,69),3.5", "(606,69),2.8", 0.5 + 0.5 * math.exp(-0.5)),
        ("(606,69),0.05", "(606,69),0", 0.5 + 0.5 * math.exp(-2))],  # relative to 0.1 or more
    "distance_infer_center_oo_mv": [
        ("fusebox", "fusebox (green point)", 1), ("fuse", "fusebox (green point)", 0),
        ("The Fusebox (red point).", "a fusebox", 1), ("(green point)", "(green point)", 0)],
    "view_change_infer": [  # five axes, relative to the gold
        ("move_left:1.3,rotate_up:10", MOVES, 0.82), ("move_right:-2.6, rotate_up : 10", MOVES, 1),
        ("move_right:2.6,rotate_up:10", MOVES, 0.8), ("move_back:0.5", "move_backward:0.5", 1),
        ("move_backward:0.5", "move_back:0.5", 1), ("It moved left", MOVES, 0), ("a:3", MOVES, 0)],
    "camera_turn": [  # the way must be right; then the degrees are scored as any number
        ("Right 21", "right 20", 1), ("right 24", "right 20", 0.6), ("right 30", "right 20", 0.1),
        ("left 20", "right 20", 0), ("20", "right 20", 0), ("right 20 degrees", "right 20", 0)],
    "new_task": [  # unknown: as a number if the gold is one, else to the letter
        ("1.8", "2.0", 0.9), ("Yes", "yes", 1), ("Yes.", "yes", 0)]}


@pytest.mark.parametrize("task, case", [(task, its) for task in ANSWERS for its in ANSWERS[task]])
@pytest.mark.filterwarnings("ignore:appendix C.3 has no metric")
def test_answers_by_hand(task, case):
    prediction, gold, wanted = case
    kind = "select" if task.startswith("obj") else "fill"
    assert abs(rewards.answer_reward(prediction, gold, task, kind) - wanted) < 1e-9


def test_every_fill_task_of_spar_has_a_metric():
    """Beside those above; what has none is warned of once, not every time."""
    for metric, tasks in ((rewards.numeric, "depth_prediction_oo_mv distance_prediction_oo_video "
                                            "obj_count room_size spatial_volume_infer"),
                          (rewards.object_phrase, "distance_infer_center_oc appearance_order")):
        for task in tasks.split():
            found = [its for begin, its in rewards.METRICS.items() if task.startswith(begin)]
            assert found == [metric]
    with pytest.warns(UserWarning, match=r"no metric for newer \(fill\): numeric is") as caught:
        warnings.simplefilter("default")
        assert [rewards.answer_reward("2", "2", "newer", "fill") for _ in range(3)] == [1.0] * 3
        assert rewards.answer_reward("B.", "B", "newer", "select") == 1.0
    assert len(caught) == 1


def test_recorded_official_scores(shared):
    """Each case equal, or listed with the sentence of C.3 that makes it differ; a view change with
    the roles swapped: errors are relative to the gold here, to the prediction there."""
    listed = {
        "If either is missing, the reward is set to 0.": [("", "D")],
        "an exact-match criterion with a permissive first-character rule": [
            ("left", "left, above"), (" A", "A"), ("\nB", "B")],  # answers are stripped
        "Both must contain exactly one numeric value": [
            ("In image 2 the depth is 2.4", "2.4"), ("2,5", "2.5"),
            *((f"{before}<answer>1.5</answer>{after}", "1.5") for before, after in (
                ("", '<action>[{"from":0,"to":1}]</action>'),
                ('<action>[{"from":0,"to":1,"action":[{"turn_right_deg":30}]}]</action>', "")))]}
    differ = set()
    for case in map(json.loads, (shared / "scorer_cases/spar_cases.jsonl").open()):
        texts = case["prediction"], case["gold"]
        scores = [rewards.answer_reward(*texts, case["task"], case["question_type"])]
        if case["task"] == "view_change_infer":
            scores.append(rewards.view_change(*reversed(texts)))
        if min(abs(score - case["official_score"]) for score in scores) > 1e-9:
            differ.add(texts)
    assert differ == set(sum(listed.values(), []))


def hostile(rng):
    """A text that a policy under pressure, or an enemy, might write."""
    number = rng.choice(["1", "-0", "1e999", "NaN", "Infinity", "0x10", "1_000", "٣", "1e-999",
                         "true", "null", '"3"', "[]", "1" * 5000, "1." + "3" * 5000, "1e308"])
    action = rng.choice(["turn_left_deg", "move_forward_m", "fly", "", "\ud800", "\x00"])
    item = '{"from":%s,"to":%s,"action":[{"%s":%s}]}' % (
        rng.choice(["0", number]), rng.choice(["1", "2", number]), action, number)
    pieces = ["<action>", "</action>", "<answer>", "</answer>", "<think>", "</think>", item, number,
              "[" * 1000, '{"a":' * 500, '"', "\ud800", "\x00", "<", "</", " \n", "A", TEACHER,
              f"move_left:{number},", f"({number},{number}),{number}"]
    at, other = rng.randrange(len(TEACHER)), rng.choice('[]{}":,<>/09eE+-.\x00 \ud800\u0663')
    return rng.choice([f"<action>[{item}]</action><answer>{rng.choice(pieces)}</answer>",
                       TEACHER[:at] + other + TEACHER[at + 1:], chr(rng.randrange(0x110000)) * 9,
                       "".join(rng.choices(pieces, k=rng.randrange(12)))])


def test_any_text_whatsoever():
    """Hundreds of hostile texts, every task: no exception, no warning, each part within [0, 1];
    what is no text is worth nothing."""
    rng, seen = random.Random(0), set()
    texts = [None, 3, b"<answer>A</answer>", ["A"], {}, *(hostile(rng) for _ in range(800)),
             "<answer>" * 100_000, "<action></action>" * 5000, TEACHER + " " * 10**6]
    for inside, answer in (("[" * 200_000, "(" * 200_000), ("[" * 90_000, "9" * 1_000_000),
                           ('{"a":' * 15_000, "1," * 500_000), ("", "move_left:1," * 100_000),
                           ("1", "(a" * 300_000), ("1", "_" * 500_000 + ":" * 500_000)):
        texts.append(f"<action>{inside}</action><answer>{answer}</answer>")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "appendix C.3 has no metric")
        for task, ((_, answer, _), *_) in ANSWERS.items():
            gold = rewards.Gold(PLANS, answer, task, "select" if answer == "C" else "fill", 3)
            for text in texts:
                total, *parts = rewards.total_reward(text, gold).values()
                assert min(parts) >= 0 and max(parts) <= 1 and total == sum(parts)
                assert total == 0 or isinstance(text, str)
                assert 0 <= rewards.answer_reward(text, *gold[1:4]) <= 1  # and without tags
                seen.add(tuple(part > 0 for part in parts))
    assert len(seen) >= 4  # hostile, but not all worthless: the paths behind the checks are reached
