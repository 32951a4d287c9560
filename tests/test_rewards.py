"""rewards.py: appendix C case by case, the protocol, recorded official scores, hostile text."""

import json
import math
import random
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


# --- the protocol


def test_teacher_text_to_the_letter():
    plan = [{"turn_right_deg": 30}, {"move_forward_m": 1.4}]
    assert rewards.write_response({(0, 1): plan}, "B") == (
        '<action>[{"from":0,"to":1,"action":[{"turn_right_deg":30},{"move_forward_m":1.4}]}]'
        "</action><answer>B</answer>")


def test_teacher_scores_one_on_all_parts():
    assert rewards.total_reward(TEACHER, GOLD) == {
        "total": 3.0, "action": 1.0, "answer": 1.0, "format": 1.0}


def test_appendix_b2_example():
    """As printed it is no JSON (a comma before a bracket, [...], a stray brace); cleaned, it is."""
    printed = '[{"from": 0, "to": 1, "action": [{"turn_right_deg": 30}, {"move_up_m": 0.3}],},]'
    assert rewards.parse_response(f"<action>{printed}</action><answer>C</answer>") == (None, "C")
    cleaned = """
    <action>
    [
      {"from": 0, "to": 1, "action": [{"turn_right_deg": 30}, {"turn_up_deg": 15},
                                      {"move_forward_m": 1.4}, {"move_up_m": 0.3}]},
      {"from": 0, "to": 2, "action": [{"turn_left_deg": 90}]},
      {"from": 1, "to": 2, "action": []}
    ]
    </action>
    <answer>1.5</answer>
    """
    assert rewards.parse_response(cleaned) == (PLANS, "1.5")
    assert rewards.total_reward(cleaned, GOLD)["total"] == 3.0


def test_write_and_parse_are_inverse():
    """On everything the teacher can produce: plans of random poses of 2 to 6 views, any answer."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        views = int(rng.integers(2, 7))
        poses = [geometry.look(rng.uniform(0, 5, 3), rng.uniform(-4, 4), rng.uniform(-1, 1))
                 for _ in range(views)]
        actions = {(i, j): geometry.actions_from_pose(geometry.relative_pose(poses[i], poses[j]))
                   for i, j in rewards.required_pairs(views)}
        answer = str(rng.choice(["A", "1.5", "(606,69),2.8", "red ball (blue point)",
                                 "move_left:2.6,rotate_up:10"]))
        text = rewards.write_response(actions, answer)
        assert rewards.parse_response(text) == (actions, answer)
        assert rewards.format_reward(text, views) == 1 and rewards.action_reward(text, actions) == 1


def test_gold_of_a_sample(rooms):
    for sample in geometry.load_samples(rooms)[::5]:
        gold = rewards.gold_of(sample)
        assert list(gold.actions) == rewards.required_pairs(len(sample.images))
        text = rewards.write_response(gold.actions, sample.answer)
        parts = rewards.total_reward(text, gold)
        assert parts["answer"] == 1 and parts["format"] == 1
        assert gold.views == 1 or parts["action"] == 1
        assert rewards.total_reward(sample.answer, gold) == {
            "total": 0.0, "action": 0.0, "answer": 0.0, "format": 0.0}


# --- C.4


def items(**change):
    """Three plans as a list of dicts, the first of them changed."""
    plain = [{"from": i, "to": j, "action": plan} for (i, j), plan in PLANS.items()]
    plain[0] = {**plain[0], **change}
    return plain


def wrap(plain, answer="1.5"):
    return f"<action>{json.dumps(plain)}</action><answer>{answer}</answer>"


@pytest.mark.parametrize("text", [
    "", "1.5", "<answer>1.5</answer>",
    TEACHER.replace("</action>", ""), TEACHER.replace("</answer>", ""),
    TEACHER.replace("<action>", ""), TEACHER.replace("<answer>", ""),
    TEACHER.replace("1.5</answer>", "</answer>"),
    TEACHER.replace("1.5</answer>", " \n</answer>"), TEACHER + " done", "So: " + TEACHER,
    TEACHER.replace("</action><answer>", "</action> thus <answer>"), TEACHER + TEACHER,
    TEACHER + "<answer>2</answer>", "<answer>1.5</answer>" + TEACHER.split("<answer>")[0],
    TEACHER.replace("]</action>", "</action>"), TEACHER.replace("<action>[", "<action>[,"),
    TEACHER.upper(), wrap({"from": 0}), wrap([]), wrap(items()[:2]), wrap(items() + items()[:1]),
    wrap(items() + [{"from": 0, "to": 3, "action": []}]), wrap(items(**{"from": 1, "to": 0})),
    wrap(items(**{"from": "0"})), wrap(items(**{"from": 0.0})), wrap(items(to=True)),
    wrap(items(action="left")), wrap(items(action=[{"fly_m": 1}])),
    wrap(items(action=[{"move_up_m": "1"}])), wrap(items(why="because")),
    wrap(items(action=[{"move_up_m": math.nan}])), wrap(items(action=[{"move_up_m": math.inf}])),
    TEACHER.replace("1.4", "1e999"), TEACHER.replace('"from":0', '"from":0,"from":0', 1),
    TEACHER.replace("30", "３０"),
    TEACHER.replace("1.5</answer>", "<answer>1.5</answer></answer>"),
])
def test_each_violated_condition_alone_gives_format_zero(text):
    assert rewards.format_reward(text, 3) == 0.0


@pytest.mark.parametrize("text", [
    TEACHER, f"  {TEACHER}\n", TEACHER.replace("</action>", "</action>\n"), wrap(items()[::-1]),
    wrap(items(action=[{"move_backward_m": 2}, {"turn_left_deg": -3.5}])),
])
def test_what_the_format_allows(text):
    assert rewards.format_reward(text, 3) == 1.0
    assert rewards.format_reward(text, 2) == 0.0 and rewards.format_reward(text, 4) == 0.0


def test_reasoning_in_words():
    text = "<think>The camera turns right.</think><answer>B</answer>"
    assert rewards.format_reward(text, 3, block="think") == 1.0
    assert rewards.format_reward(text, 3) == 0.0
    assert rewards.parse_response(text) == (None, "B")
    for bad in (text.replace("The camera turns right.", " "), text + "!",
                text.replace("</think>", ""), "<think><answer>B</think></answer>",
                "<think>x<answer>B</think> foo bar</answer>", "<answer>B</answer><think>x</think>"):
        assert rewards.format_reward(bad, 3, block="think") == 0.0
    moves = TEACHER.replace("<action>", "<think><action>").replace("</action>", "</action></think>")
    assert rewards.total_reward(TEACHER, GOLD)["action"] == 1
    assert rewards.total_reward(moves, GOLD, block="think")["action"] == 0  # words, not moves
    gold = GOLD._replace(answer="B", kind="select")
    assert rewards.total_reward(text, gold, block="think")["total"] == 2.0


def test_instructions_name_every_tag():
    assert all(tag in rewards.ACTION_INSTRUCTION
               for tag in ("<action>", "</action>", "<answer>", "</answer>"))
    assert "<think>" in rewards.LANGUAGE_INSTRUCTION and "<" not in rewards.ANSWER_INSTRUCTION


# --- C.2


def act(plan, gold, **options):
    text = rewards.write_response({(0, 1): plan}, "A")
    return rewards.action_reward(text, {(0, 1): gold}, **options)


@pytest.mark.parametrize("plan, gold, tau_t, tau_r, wanted", [
    ([{"move_forward_m": 2}], [{"move_forward_m": 3}], 1, 30, math.exp(-1)),
    ([{"move_forward_m": 3}, {"move_up_m": 4}], [{"turn_left_deg": 15}], 2, 30,
     math.exp(-2.5) * math.exp(-0.5)),
    ([{"turn_right_deg": 30}], [{"turn_left_deg": 30}], 1, 30, math.exp(-2)),
    ([{"turn_right_deg": 350}], [{"turn_left_deg": 10}], 1, 30, 1.0),
    ([{"turn_up_deg": 20}], [{"turn_up_deg": 50}], 1, 10, math.exp(-3)),
    ([{"move_down_m": 0.5}], [{"move_up_m": 0.5}], 0.5, 30, math.exp(-2)),
])
def test_eq_10_by_hand(plan, gold, tau_t, tau_r, wanted):
    assert abs(act(plan, gold, tau_t=tau_t, tau_r=tau_r) - wanted) < 1e-9


def test_stop_like_plans():
    gold = [{"move_forward_m": 0.1}]
    for stop in ([], [{"move_forward_m": 0}], [{"turn_left_deg": 20}, {"turn_right_deg": 20}]):
        assert act(stop, gold) == 0.0
        assert act(stop, []) == 1.0  # where the gold stays too, staying is right
    assert act([{"turn_left_deg": 2}], gold) > 0.8
    far = [{"turn_left_deg": 40}, {"move_forward_m": 2}]  # a token move is no move
    assert act([{"turn_left_deg": 3}, {"move_forward_m": 0.1}], far) == 0.0
    assert act([{"turn_left_deg": 3}, {"move_forward_m": 0.3}], far) > 0.0


def test_mean_over_the_required_pairs():
    text = rewards.write_response({(0, 1): PLANS[0, 1], (1, 2): PLANS[1, 2], (4, 5): []}, "A")
    assert abs(rewards.action_reward(text, PLANS) - 2 / 3) < 1e-9
    assert rewards.action_reward("<action>[</action>", PLANS) == 0.0
    assert rewards.action_reward(TEACHER, {}) == 0.0


def test_plans_whose_pose_overflows():
    for value in (1e308, -1e308, 1e200):
        huge = [{"move_forward_m": value}, {"turn_left_deg": value}] * 3
        assert act(huge, [{"move_up_m": 1}]) == 0.0


# --- C.3


@pytest.mark.parametrize("task, kind, prediction, gold, wanted", [
    # select: exact, or the first character
    ("obj_spatial_relation_oo", "select", "C", "C", 1),
    ("obj_spatial_relation_oo", "select", "C. left", "C", 1),
    ("obj_spatial_relation_oo", "select", " c", "C", 1),
    ("obj_spatial_relation_oo", "select", "(C)", "C", 0),
    ("obj_spatial_relation_oo", "select", "B", "C", 0),
    ("obj_spatial_relation_oo", "select", "left", "left", 1),
    # numbers: MRA of ten thresholds, exactly one number a side
    ("depth_prediction_oc", "fill", "1.5", "1.5", 1),
    ("depth_prediction_oc", "fill", "1.5 m", "1.5", 1),
    ("depth_prediction_oc", "fill", "1.0", "0.9", 0.8),
    ("depth_prediction_oc", "fill", "1.8", "2.0", 0.9),
    ("distance_prediction_oo_mv", "fill", "0.49", "1.0", 0),
    ("room_size", "fill", "10 or 12", "10", 0),
    ("obj_count", "fill", "many", "3", 0), ("depth_prediction_oo", "fill", "0.3", "0.0", 0.5),
    ("depth_prediction_oo", "fill", "-1.5", "-1.5", 1),
    ("depth_prediction_oo", "fill", "1e999", "1.5", 0),
    ("depth_prediction_oo", "fill", "١", "1", 0),
    ("spatial_volume_infer", "fill", "2.1", "2.0", 1),
    # boxes
    ("position_matching", "fill", "(0,0,10,10)", "(0,0,10,10)", 1),
    ("position_matching", "fill", "[[0, 0, 10, 20]]", "0,0,10,10", 0.5),
    ("position_matching", "fill", "5 0 15 10", "(0,0,10,10)", 1 / 3),
    ("position_matching", "fill", "20,20,30,30", "0,0,10,10", 0),
    ("position_matching", "fill", "10,10,0,0", "0,0,10,10", 0),
    ("position_matching", "fill", "0,0,10", "0,0,10,10", 0),
    ("position_matching", "fill", "3,3,3,3", "5,5,5,5", 0),
    # camera motion: half for the place, half for the depth
    ("camera_motion_infer", "fill", "(606,69),2.8", "(606,69),2.8", 1),
    ("camera_motion_infer", "fill", "Image Coor:(606, 69), Depth:2.8 meters", "(606,69),2.8", 1),
    ("camera_motion_infer", "fill", "(606,169),2.8", "(606,69),2.8", 0.5 * math.exp(-0.5) + 0.5),
    ("camera_motion_infer", "fill", "(606,69),3.5", "(606,69),2.8", 0.5 + 0.5 * math.exp(-0.5)),
    ("camera_motion_infer", "fill", "(606,69)", "(606,69),2.8", 0),
    # object phrases
    ("distance_infer_center_oo_mv", "fill", "fusebox", "fusebox (green point)", 1),
    ("distance_infer_center_oo", "fill", "The Fusebox (red point).", "fusebox (green point)", 1),
    ("distance_infer_center_oc", "fill", "fuse", "fusebox (green point)", 0),
    ("distance_infer_center_oc", "fill", "(green point)", "(green point)", 0),
    # view change: five axes, relative to the gold
    ("view_change_infer", "fill", "move_left:2.6,rotate_up:10", "move_left:2.6,rotate_up:10", 1),
    ("view_change_infer", "fill", "move_left:1.3,rotate_up:10", "move_left:2.6,rotate_up:10", 0.82),
    ("view_change_infer", "fill", "move_right:-2.6, rotate_up:10", "move_left:2.6,rotate_up:10", 1),
    ("view_change_infer", "fill", "move_back:0.5", "move_backward:0.5", 1),
    ("view_change_infer", "fill", "move_backward:0.5", "move_back:0.5", 1),
    ("view_change_infer", "fill", "It moved left", "move_left:2.6", 0),
    ("view_change_infer", "fill", "jump:3", "move_left:2.6", 0),
])
def test_answers_by_hand(task, kind, prediction, gold, wanted):
    assert abs(rewards.answer_reward(prediction, gold, task, kind) - wanted) < 1e-9


def test_missing_answers():
    for prediction, gold in ((None, "A"), ("A", None), ("", "A"), ("A", ""), ("  ", "A")):
        assert rewards.answer_reward(prediction, gold, "obj_spatial_relation_oo", "select") == 0.0


def test_every_fill_task_of_spar_has_a_metric():
    tasks = """camera_motion_infer depth_prediction_oc_mv depth_prediction_oo_mv
        distance_infer_center_oc_mv distance_infer_center_oo_mv distance_prediction_oc_mv
        distance_prediction_oo_mv position_matching view_change_infer depth_prediction_oc
        depth_prediction_oo distance_infer_center_oc distance_infer_center_oo
        distance_prediction_oc distance_prediction_oo spatial_volume_infer appearance_order
        distance_infer_center_oo_video distance_prediction_oo_video obj_count room_size""".split()
    metrics = {task: [its for name, its in rewards.METRICS.items() if task.startswith(name)]
               for task in tasks}
    assert all(len(found) == 1 for found in metrics.values())
    assert metrics["distance_prediction_oo_video"] == metrics["obj_count"] == [rewards.numeric]
    assert metrics["distance_infer_center_oo_mv"] == [rewards.object_phrase]


@pytest.mark.parametrize("prediction, score", [
    ("right 20", 1.0), ("Right 21", 1.0), ("right 24", 0.6), ("right 30", 0.1), ("left 20", 0.0),
    ("20", 0.0), ("right", 0.0), ("right 20 degrees", 0.0), ("turn right 20", 0.0)])
def test_camera_turn(prediction, score):
    """The way must be right; then the degrees are scored as any number."""
    assert rewards.answer_reward(prediction, "right 20", "camera_turn", "fill") == score


def test_constant_plan():
    """Two golds that turn right by 30 and one that goes forward: the turn is the better bet."""
    turn, go = [{"turn_right_deg": 30}], [{"move_forward_m": 2.0}]
    score, plan = rewards.constant_plan([{(0, 1): its} for its in (turn, go, turn)])
    assert plan == turn and abs(score - (2 + math.exp(-2 - 1)) / 3) < 1e-9
    score, plan = rewards.constant_plan([{(0, 1): go, (0, 2): turn, (1, 2): turn}])
    assert plan == turn and abs(score - (2 + math.exp(-2 - 1)) / 3) < 1e-9  # mean over pairs
    assert rewards.only_turns({(0, 1): turn, (0, 2): []})
    assert not rewards.only_turns({(0, 1): turn, (0, 2): go})


def test_gold_plans_of_poses():
    """Camera 1 stands 2 m ahead of camera 0 and looks to the right."""
    poses = np.eye(4), np.array([[0, 0, 1, 0], [0, 1, 0, 0], [-1, 0, 0, 2], [0, 0, 0, 1.0]])
    assert rewards.gold_plans(poses) == {(0, 1): [{"move_forward_m": 2.0}, {"turn_right_deg": 90}]}


def test_unknown_tasks_fall_back_and_say_so_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert rewards.answer_reward("1.8", "2.0", "new_task", "fill") == 0.9
            assert rewards.answer_reward("Yes", "yes", "new_task", "judge") == 1.0
            assert rewards.answer_reward("B.", "B", "newer_task", "select") == 1.0
    assert len(caught) == 2 and "new_task (fill): numeric is used" in str(caught[0].message)


ONE_NUMBER = "Both must contain exactly one numeric value; otherwise the reward is 0."
EXACT = "an exact-match criterion with a permissive first-character rule"
BY_GOLD = ("MRA is computed independently for each dimension (relative to the gold, not to the "
           "prediction)")
OFFICIAL_DIFFERS = {  # (prediction, gold) -> the sentence of C.3, or its reading, that differs
    ("", "D"): "If either is missing, the reward is set to 0.",
    ("left", "left, above"): EXACT,
    (" A", "A"): EXACT, ("\nB", "B"): EXACT,  # an answer block is stripped before it is compared
    ("In image 2 the depth is 2.4", "2.4"): ONE_NUMBER,
    ("2,5", "2.5"): ONE_NUMBER,
    ('<answer>1.5</answer><action>[{"from":0,"to":1}]</action>', "1.5"): ONE_NUMBER,
    ('<action>[{"from":0,"to":1,"action":[{"turn_right_deg":30}]}]</action><answer>1.5</answer>',
     "1.5"): ONE_NUMBER,
}


def test_recorded_official_scores(shared):
    """Each case equal, or listed with the sentence of C.3 that makes it differ."""
    explained = set()
    for line in (shared / "scorer_cases/spar_cases.jsonl").read_text().splitlines():
        case = json.loads(line)
        ours = rewards.answer_reward(case["prediction"], case["gold"],
                                     case["task"], case["question_type"])
        key = case["prediction"], case["gold"]
        if abs(ours - case["official_score"]) > 1e-9:
            if case["task"] == "view_change_infer":
                # only the normaliser may differ: swap it, and it agrees
                p, g = rewards._motion(key[0]), rewards._motion(key[1])
                swapped = np.mean([rewards.mean_relative_accuracy(g[axis], p[axis])
                                   for axis in rewards.AXES])
                assert abs(swapped - case["official_score"]) < 1e-9, case
            else:
                assert key in OFFICIAL_DIFFERS, (case, ours)
            explained.add(key)
    assert explained >= set(OFFICIAL_DIFFERS)


# --- any text whatsoever


def hostile(rng):
    """A text that a policy under pressure, or an enemy, might write."""
    number = rng.choice(["1", "-0", "1e999", "-1e999", "NaN", "Infinity", "1" * 5000, "0x10",
                         "1_000", "٣", "1e-999", "true", "null", '"3"', "[]", "9" * 400,
                         "1." + "3" * 5000, "-" * 50, "1e308"])
    action = rng.choice(["turn_left_deg", "move_forward_m", "move_up_m", "fly", "", "\ud800",
                         "\x00"])
    item = '{"from":%s,"to":%s,"action":[{"%s":%s}]}' % (
        rng.choice(["0", number]), rng.choice(["1", "2", number]), action, number)
    pieces = ["<action>", "</action>", "<answer>", "</answer>", "<think>", "</think>", item,
              f"[{item}]", f"[{item},{item}]", number, "[" * rng.choice([3, 1000]), "]" * 5,
              '{"a":' * 500, '"', "\ud800", "\U0001f600", "\x00", "<", ">", "</", " \n", "\u202e",
              "move_left:", f"move_left:{number},", f"({number},{number}),{number}", "A", "(" * 200,
              "<action><action>", "é" * 50, json.dumps(items()), TEACHER]
    kind = rng.random()
    if kind < 0.4:
        return "".join(rng.choice(pieces) for _ in range(rng.randrange(12)))
    if kind < 0.7:
        return f"<action>[{item}]</action><answer>{rng.choice(pieces)}</answer>"
    if kind < 0.9:  # the teacher's text with a few characters exchanged
        text = list(TEACHER)
        for _ in range(rng.randrange(1, 6)):
            text[rng.randrange(len(text))] = rng.choice(
                '[]{}":,<>/0123456789eE+-.\x00 \ud800\u0663aN')
        return "".join(text)
    return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(200)))


HUGE = [
    "[" * 200_000, "<action>" + "[" * 200_000 + "</action><answer>A</answer>",
    "<action>" + '{"a":' * 40_000 + "</action><answer>" + "(" * 200_000 + "</answer>",
    "<action>" + "[" * 90_000 + "</action><answer>1</answer>",
    "<answer>" + "1," * 500_000 + "</answer>", "<action></action>" * 5000,
    "<answer>" * 100_000, "<answer>A</answer>" * 20_000, "a" * 2_000_000,
    "<answer>" + "9" * 1_000_000 + "</answer>", "<answer>" + "(a" * 300_000 + "</answer>",
    "<answer>" + "move_left:1," * 100_000 + "</answer>",
    " " * 1_000_000 + TEACHER + " " * 1_000_000,
    "<action>[" + json.dumps(items()[0]) * 5000 + "]</action><answer>-</answer>",
    "<answer>" + "." * 500_000 + "</answer>",
    "<answer>" + "_" * 500_000 + ":" * 500_000 + "</answer>",
]


def test_any_text_whatsoever():
    """10,000 hostile texts, every task: no exception, no NaN, within [0, 1]."""
    rng = random.Random(0)
    golds = {"select": "C", "numeric": "1.5", "object_phrase": "fusebox (green point)",
             "exact": "yes", "position_matching": "(1,2,30,40)", "camera_motion": "(606,69),2.8",
             "view_change": "move_left:2.6,rotate_up:10", "camera_turn": "left 20"}
    cases = [*sorted(rewards.METRICS), "unheard_of"]
    seen = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the unknown task; numpy's are errors here
        warnings.simplefilter("error", RuntimeWarning)
        for k in range(10_000):
            text = HUGE[k % len(HUGE)] if k % 100 == 0 else hostile(rng)
            task, kind = cases[k % len(cases)], "select" if k % 5 == 0 else "fill"
            metric = rewards.METRICS.get(task, rewards.exact).__name__
            gold = GOLD._replace(answer=golds["select" if kind == "select" else metric],
                                 task=task, kind=kind)
            parts = rewards.total_reward(text, gold)
            for name in ("action", "answer", "format"):
                assert 0 <= parts[name] <= 1, (text[:200], parts)
            assert parts["format"] in (0, 1)
            assert parts["total"] == parts["action"] + parts["answer"] + parts["format"]
            assert rewards.answer_reward(text, gold.answer, task, kind) <= 1  # and without tags
            seen.add((parts["format"], parts["action"] > 0, parts["answer"] > 0))
    assert len(seen) >= 4  # hostile, but not all worthless: the paths behind the checks are reached


def test_what_is_no_text():
    for thing in (None, 3, b"<answer>A</answer>", ["A"], {}):
        assert rewards.total_reward(thing, GOLD)["total"] == 0.0
