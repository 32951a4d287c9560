"""geometry.py against hand-computed numbers and naive loops that share no code with it."""

import json
import math

import numpy as np
import pytest
from PIL import Image

import geometry


def view(depth, K=None, cam2world=None):
    depth = np.asarray(depth, np.float32)
    H, W = depth.shape
    K = np.array([[W, 0, (W - 1) / 2], [0, W, (H - 1) / 2], [0, 0, 1.0]]) if K is None else K
    pose = np.eye(4) if cam2world is None else cam2world
    return geometry.View(np.zeros((H, W, 3), np.uint8), depth, K, pose)


def rotation(rng, roll=True):
    """A rotation matrix by Rodrigues' formula (any), or yaw and pitch, axes explicit (no roll)."""
    axis, angle = rng.normal(size=3), rng.uniform(0, math.pi)
    x, y, z = axis / np.linalg.norm(axis)
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + math.sin(angle) * k + (1 - math.cos(angle)) * k @ k


# --- projection, by hand


def test_unproject_by_hand():
    K = np.array([[2.0, 0, 1], [0, 4.0, 0], [0, 0, 1]])
    cam2world = np.array([[0, 0, 1, 10.0], [-1, 0, 0, 20], [0, -1, 0, 30], [0, 0, 0, 1]])  # z up
    depth = np.array([[4, 4, 4], [4, 0, 4]], np.float32)
    points, valid = geometry.unproject(depth, K, cam2world)
    assert valid.tolist() == [[True, True, True], [True, False, True]]
    # pixel (2, 1) at depth 4: X = (2 - 1) * 4 / 2 = 2, Y = (1 - 0) * 4 / 4 = 1, Z = 4 in the
    # camera; in the world Z goes along x, X against y, Y against z
    assert np.allclose(points[1, 2], [10 + 4, 20 - 2, 30 - 1])
    assert np.allclose(points[0, 1], [14, 20, 30])


def test_project_inverts_unproject():
    rng = np.random.default_rng(0)
    K = np.array([[300.0, 0, 201.3], [0, 310.0, 148.8], [0, 0, 1]])
    cam2world = np.eye(4)
    cam2world[:3, :3], cam2world[:3, 3] = rotation(rng), rng.normal(size=3)
    depth = rng.uniform(0.5, 5, (300, 400)).astype(np.float32)
    points, _ = geometry.unproject(depth, K, cam2world)
    uv, z = geometry.project(points, K, cam2world)
    u, v = np.meshgrid(np.arange(400), np.arange(300))
    assert np.abs(uv - np.stack([u, v], -1)).max() < 1e-6
    assert np.abs(z - depth).max() < 1e-6


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -1.0])
def test_depth_without_value(bad):
    depth = np.full((8, 8), 2.0)
    depth[3, 3] = bad
    _, valid = geometry.unproject(depth.astype(np.float32), np.eye(3), np.eye(4))
    assert not valid[3, 3] and valid.sum() == 63


# --- Eq. 1


def naive_overlap(x, y, n, t, t_rel):
    """Every pixel in a loop, in float64, straight from section 3.3."""
    P = n * n
    M, points, pixels = np.zeros((P, P)), np.zeros(P), np.zeros(P)
    inverse_y = np.linalg.inv(y.cam2world)
    (H, W), (H_y, W_y) = x.depth.shape, y.depth.shape
    for v in range(H):
        for u in range(W):
            i = int((v + 0.5) / H * n) * n + int((u + 0.5) / W * n)
            pixels[i] += 1
            d = float(x.depth[v, u])
            if not (math.isfinite(d) and d > 0):
                continue
            points[i] += 1
            X = np.linalg.inv(x.K) @ [u * d, v * d, d]
            Z = inverse_y @ (x.cam2world @ [*X, 1.0])
            if Z[2] <= 0:
                continue
            a, b, _ = y.K @ (Z[:3] / Z[2])
            if not (-0.5 < a < W_y - 0.5 and -0.5 < b < H_y - 0.5):
                continue
            d_y = float(y.depth[round(b), round(a)])
            if math.isfinite(d_y) and d_y > 0 and abs(Z[2] - d_y) < max(t, t_rel * Z[2]):
                M[i, int((b + 0.5) / H_y * n) * n + int((a + 0.5) / W_y * n)] += 1
    for i in range(P):
        M[i] = M[i] / points[i] if points[i] >= 0.25 * pixels[i] and points[i] else 0
    return M


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16])
def test_overlap_against_naive_loop(n):
    """Two random views of different sizes of a bumpy wall, with holes in the depth."""
    rng = np.random.default_rng(n)
    poses = [np.eye(4), np.eye(4)]
    poses[1][:3, 3] = [0.4, -0.1, 0.2]
    a = math.radians(12)
    poses[1][:3, :3] = [[math.cos(a), 0, -math.sin(a)], [0, 1, 0], [math.sin(a), 0, math.cos(a)]]
    views = []
    for pose, (H, W) in zip(poses, ((36, 48), (40, 32))):
        depth = 3 + 0.03 * rng.normal(size=(H, W))
        depth[rng.uniform(size=(H, W)) < 0.1] = 0
        depth[: H // 3, : W // 3] = rng.choice([0, np.nan, np.inf], (H // 3, W // 3))
        views.append(view(depth, cam2world=pose))
    for x, y in (views, views[::-1]):
        M = geometry.directional_overlap(x, y, n, stride=1)
        assert np.abs(M - naive_overlap(x, y, n, 0.05, 0.05)).max() < 1e-9
    S = geometry.correspondence(*views, n, stride=1)
    forth, back = naive_overlap(*views, n, 0.05, 0.05), naive_overlap(*views[::-1], n, 0.05, 0.05)
    assert np.abs(S - (forth + back.T) / 2).max() < 1e-9
    assert S.max() > 0.02 and S.min() >= 0 and S.max() <= 1


def test_overlap_by_hand():
    """A wall 2 m away; camera y stands to the right by one cell's width, so cells shift by one."""
    W, n = 16, 4
    K = np.array([[W, 0, (W - 1) / 2], [0, W, (W - 1) / 2], [0, 0, 1.0]])
    shifted = np.eye(4)
    shifted[0, 3] = 2.0 * 4 / W  # four pixels at depth 2
    x, y = view(np.full((W, W), 2.0), K), view(np.full((W, W), 2.0), K, shifted)
    M = geometry.directional_overlap(x, y, n, stride=1)
    wanted = np.zeros((16, 16))
    for i in range(16):
        if i % 4:  # the leftmost column of x is outside y
            wanted[i, i - 1] = 1
    assert np.array_equal(M, wanted)


def test_overlap_of_a_view_with_itself_is_the_identity():
    x = view(np.full((30, 50), 1.5))
    assert np.array_equal(geometry.correspondence(x, x, 5), np.eye(25))


def test_occlusion_and_tolerance():
    """A surface 10 % behind y's depth map does not count; within 5 cm or 5 % it does."""
    x = view(np.full((20, 20), 2.0))
    for depth_y, seen in ((1.8, False), (2.08, True), (2.12, False), (1.92, True)):
        M = geometry.directional_overlap(x, view(np.full((20, 20), depth_y)), 2)
        assert (M.sum() > 3.9) == seen and (M.sum() == 0) != seen
    near = geometry.directional_overlap(
        view(np.full((20, 20), 0.5)), view(np.full((20, 20), 0.54)), 2)
    assert near.sum() > 3.9  # 4 cm at half a metre is 8 %, but under 5 cm


def test_nothing_is_seen_behind_the_camera():
    turned = np.diag([-1.0, 1, -1, 1])  # looks the other way
    x, y = view(np.full((20, 20), 2.0)), view(np.full((20, 20), 2.0), cam2world=turned)
    assert geometry.directional_overlap(x, y, 3).sum() == 0


def test_patch_with_little_depth_has_an_empty_row():
    depth = np.full((40, 40), 2.0)
    depth[:20, :20] = 0
    depth[:4, :20] = 2.0  # a fifth of patch 0
    M = geometry.directional_overlap(view(depth), view(np.full((40, 40), 2.0)), 2, stride=1)
    assert M[0].sum() == 0 and np.allclose(M[1:].sum(-1), 1)


def test_stride_changes_little(shared):
    samples = geometry.load_samples(shared / "spar", tasks=("depth_prediction_oc_mv",))
    worst = 0
    for sample in samples[:6]:
        x, y, _ = sample.views()
        worst = max(worst, np.abs(geometry.correspondence(x, y, 4, stride=1)
                                  - geometry.correspondence(x, y, 4)).max())
    assert worst < 0.03


def test_bad_views():
    with pytest.raises(ValueError, match="K must be"):
        view(np.ones((4, 4)), K=np.eye(4))
    with pytest.raises(ValueError, match="cam2world must be"):
        view(np.ones((4, 4)), cam2world=np.full((4, 4), np.inf))
    with pytest.raises(ValueError, match="needs image"):
        geometry.View(np.zeros((4, 4), np.uint8), np.ones((4, 4)), np.eye(3), np.eye(4))
    with pytest.raises(ValueError, match="smaller --grid"):
        geometry.directional_overlap(view(np.ones((4, 9))), view(np.ones((9, 9))), 5)


# --- actions


@pytest.mark.parametrize("action, gaze, up, place", [
    # OpenCV axes of the first camera: x right, y down, z forward
    ({"turn_right_deg": 90}, (1, 0, 0), (0, -1, 0), (0, 0, 0)),
    ({"turn_left_deg": 90}, (-1, 0, 0), (0, -1, 0), (0, 0, 0)),
    ({"turn_up_deg": 90}, (0, -1, 0), (0, 0, -1), (0, 0, 0)),
    ({"turn_down_deg": 90}, (0, 1, 0), (0, 0, 1), (0, 0, 0)),
    ({"move_forward_m": 2}, (0, 0, 1), (0, -1, 0), (0, 0, 2)),
    ({"move_backward_m": 2}, (0, 0, 1), (0, -1, 0), (0, 0, -2)),
    ({"move_up_m": 2}, (0, 0, 1), (0, -1, 0), (0, -2, 0)),
    ({"move_down_m": 2}, (0, 0, 1), (0, -1, 0), (0, 2, 0)),
])
def test_sign_of_every_action(action, gaze, up, place):
    pose = geometry.pose_from_actions([action])
    assert np.allclose(pose[:3, 2], gaze) and np.allclose(-pose[:3, 1], up)
    assert np.allclose(pose[:3, 3], place)


def test_each_action_acts_in_the_frame_the_ones_before_left():
    pose = geometry.pose_from_actions([
        {"turn_right_deg": 90}, {"move_forward_m": 1}, {"turn_left_deg": 90},
        {"move_forward_m": 2}, {"turn_up_deg": 90}, {"move_forward_m": 3}])
    assert np.allclose(pose[:3, 3], [1, -3, 2]) and np.allclose(pose[:3, 2], [0, -1, 0])


def test_appendix_b2_example():
    """turn right 30, up 15, forward 1.4, up 0.3, multiplied out by hand."""
    pose = geometry.pose_from_actions(
        [{"turn_right_deg": 30}, {"turn_up_deg": 15}, {"move_forward_m": 1.4}, {"move_up_m": 0.3}])
    s30, c30, s15, c15 = 0.5, math.sqrt(3) / 2, math.sin(math.pi / 12), math.cos(math.pi / 12)
    gaze = np.array([s30 * c15, -s15, c30 * c15])
    up = np.array([-s30 * s15, -c15, -c30 * s15])
    assert np.allclose(pose[:3, 2], gaze) and np.allclose(pose[:3, 3], 1.4 * gaze + 0.3 * up)


def roll_free(rng):
    """A pose whose plan needs no roll: turn, move, turn, in plain angles."""
    yaw, pitch, distance = rng.uniform(-180, 180), rng.uniform(-75, 75), rng.uniform(0.3, 6)
    return geometry.pose_from_actions([
        {"turn_right_deg": yaw}, {"turn_up_deg": pitch}, {"move_forward_m": distance},
        {"turn_left_deg": rng.uniform(-180, 180)}, {"turn_down_deg": rng.uniform(-80, 80)}])


def test_round_trip_roll_free():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        pose = roll_free(rng)
        back = geometry.pose_from_actions(geometry.actions_from_pose(pose))
        d_t, d_r = geometry.pose_error(pose, back)
        # half a degree of yaw and of pitch, half a centimetre
        assert d_t < 0.006 + np.linalg.norm(pose[:3, 3]) * math.radians(0.71)
        gaze = math.degrees(math.acos(min(1, pose[:3, 2] @ back[:3, 2])))
        # rounded yaw, tilted
        assert gaze < 0.72 and abs(geometry.residual_roll(pose)) < 4 and d_r < 4.1


def test_round_trip_any_rotation():
    """With roll: place and gaze come back, and the roll that is lost is what residual_roll says."""
    rng = np.random.default_rng(1)
    for _ in range(3000):
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = rotation(rng), rng.normal(size=3) * rng.choice([0.1, 1, 5])
        back = geometry.pose_from_actions(geometry.actions_from_pose(pose))
        distance = np.linalg.norm(pose[:3, 3])
        d_t, d_r = geometry.pose_error(pose, back)
        level = math.hypot(pose[0, 3], pose[2, 3])  # under 5 cm beside a steep target: not aimed at
        assert d_t < 0.006 + max(distance * math.radians(0.71), 0.05 if level < 0.05 else 0)
        assert math.degrees(math.acos(min(1, pose[:3, 2] @ back[:3, 2]))) < 0.72
        assert abs(d_r - abs(geometry.residual_roll(pose))) < 0.8


def test_residual_roll_by_hand():
    for roll in (-100, -20, 0, 35, 170):
        a = math.radians(roll)
        pose = np.eye(4)
        pose[:3, :3] = [[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]]
        assert geometry.actions_from_pose(pose) == []
        assert abs(geometry.residual_roll(pose) - roll) < 1e-9


@pytest.mark.parametrize("place, plan", [
    ((0, 0, 0), []),
    ((0.02, 0.03, 0.02), []),  # nearer than 5 cm
    ((0, 0, 1.234), [{"move_forward_m": 1.23}]),
    ((0, -1.5, 0), [{"move_up_m": 1.5}]),
    ((0.01, 2, 0.02), [{"move_down_m": 2.0}]),
    ((0.1, -2, 0), [{"turn_right_deg": 90}, {"move_forward_m": 0.1}, {"move_up_m": 2.0},
                    {"turn_left_deg": 90}]),
    ((1, 0, 1), [{"turn_right_deg": 45}, {"move_forward_m": 1.41}, {"turn_left_deg": 45}]),
    ((0, 0, -2), [{"turn_right_deg": 180}, {"move_forward_m": 2.0}, {"turn_left_deg": 180}]),
])
def test_plans_by_hand(place, plan):
    pose = np.eye(4)
    pose[:3, 3] = place
    got = geometry.actions_from_pose(pose)
    if place == (0, 0, -2):  # turning about may go either way round
        got = [{k.replace("left", "right"): v for k, v in a.items()} for a in got]
        plan = [{k.replace("left", "right"): v for k, v in a.items()} for a in plan]
    assert got == plan
    json.dumps(got)  # plain numbers


@pytest.mark.parametrize("actions", [
    [{"fly_m": 1}], [{"turn_left_deg": "3"}], [{"turn_left_deg": math.inf}],
    [{"move_up_m": math.nan}], [{"move_up_m": True}], [{}], [{"move_up_m": 1, "move_down_m": 1}],
    ["move_up_m"], [None], [{"move_up_m": 10**400}],
])
def test_bad_actions(actions):
    with pytest.raises(ValueError):
        geometry.pose_from_actions(actions)


def test_pose_error_by_hand():
    a = np.eye(4)
    b = geometry.pose_from_actions([{"move_forward_m": 3}, {"move_up_m": 4}, {"turn_left_deg": 60}])
    assert np.allclose(geometry.pose_error(a, b), (5, 60))
    assert geometry.pose_error(b, b) == (0, 0)
    tiny = geometry.pose_from_actions([{"turn_up_deg": 1e-6}])
    assert abs(geometry.pose_error(a, tiny)[1] - 1e-6) < 1e-12  # an arc cosine of the trace gives 0
    assert abs(geometry.pose_error(a, np.diag([-1.0, 1, -1, 1]))[1] - 180) < 1e-6


def test_relative_pose_is_camera_j_seen_by_camera_i():
    i, j = geometry.look((1, 2, 1.5), 0, 0), geometry.look((3, 2, 1.5), math.pi / 2, 0)
    pose = geometry.relative_pose(i, j)
    assert np.allclose(pose[:3, 3], [0, 0, 2])  # two metres ahead
    assert np.allclose(pose[:3, 2], [-1, 0, 0])  # looking left: from x to y is anticlockwise
    assert geometry.actions_from_pose(pose) == [{"move_forward_m": 2.0}, {"turn_left_deg": 90}]


# --- reading SPAR-7M-RGBD


def write_tree(root, source="scannet", scene="scene0000_00", image=(64, 48), depth=(64, 48), K=None,
               frames=2, task="view_change_infer", kind="fill", record=None, pose=None):
    """A tree with one sample, written by hand."""
    folder = root / source / "images" / scene
    for sub in ("image_color", "image_depth", "pose", "intrinsic"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    pose = np.eye(4) if pose is None else pose
    if K is None:
        K = np.array([[60.0, 0, (depth[0] - 1) / 2], [0, 60.0, (depth[1] - 1) / 2], [0, 0, 1]])
    K4 = np.eye(4)
    K4[:3, :3] = K
    for name in range(frames):
        Image.new("RGB", image, (90, 90, 90)).save(folder / "image_color" / f"{name}.jpg")
        Image.fromarray(np.full(depth[::-1], 1500, np.uint16)).save(
            folder / "image_depth" / f"{name}.png")
        np.savetxt(folder / "pose" / f"{name}.txt", pose)
        if source == "structured3d":
            np.savetxt(folder / "intrinsic" / f"{name}.txt", K)
    if source != "structured3d":
        np.savetxt(folder / "intrinsic" / "intrinsic_color.txt", K4)
        np.savetxt(folder / "intrinsic" / "intrinsic_depth.txt", K4)
    names = [f"{scene}/image_color/{name}.jpg" for name in range(frames)]
    line = {"id": f"{scene}_0", "image": names, "type": task,
            "conversations": [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "So."}]}
    line.update(record or {})
    qa = root / source / "qa_jsonl" / "train" / task / kind
    qa.mkdir(parents=True, exist_ok=True)
    (qa / f"{kind}_1.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def test_scannet_habits(tmp_path):
    write_tree(tmp_path)
    (sample,) = geometry.load_samples(tmp_path)
    assert (sample.kind, sample.task, sample.question, sample.answer) == (
        "fill", "view_change_infer", "How?", "So.")
    x, y = sample.views()  # depth maps named by derivation: the record has no `depth`
    assert x.depth.dtype == np.float32 and np.all(x.depth == 1.5) and x.image.shape == (48, 64, 3)
    assert x.K[0, 0] == 60 and x.K[0, 2] == 31.5


def test_structured3d_habits(tmp_path):
    """Poses in millimetres, 3x3 intrinsics per frame."""
    pose = np.eye(4)
    pose[:3, 3] = [1200, -300, 50]
    write_tree(tmp_path, source="structured3d", scene="scene_00806", pose=pose)
    (sample,) = geometry.load_samples(tmp_path)
    assert np.allclose(sample.view(1).cam2world[:3, 3], [1.2, -0.3, 0.05])
    assert np.allclose(np.diag(sample.view(0).K), [60, 60, 1])


def test_scannetpp_habits(tmp_path):
    """Depth smaller than the image that its K belongs to: fx scales, cx by pixel centres."""
    K = np.array([[1440.0, 0, 955], [0, 1440.0, 718], [0, 0, 1]])
    write_tree(tmp_path, source="scannetpp", scene="8a20d62ac0", image=(1920, 1440),
               depth=(256, 192), K=K)
    view = geometry.load_samples(tmp_path)[0].view(0)
    s = 256 / 1920
    assert np.allclose(view.K, [[1440 * s, 0, 955.5 * s - 0.5], [0, 1440 * s, 718.5 * s - 0.5],
                                [0, 0, 1]])
    assert view.image.shape == (1440, 1920, 3) and view.depth.shape == (192, 256)


def test_intrinsics_of_neither_grid(tmp_path):
    """Image and depth both resized after K was stated: its own centre tells its grid."""
    K = np.array([[1000.0, 0, 639.5], [0, 1000.0, 479.5], [0, 0, 1]])
    write_tree(tmp_path, image=(320, 240), depth=(160, 120), K=K)
    assert np.allclose(geometry.load_samples(tmp_path)[0].view(0).K,
                       [[125, 0, 79.5], [0, 125, 59.5], [0, 0, 1]])


def test_question_with_image_tags(tmp_path):
    turns = [{"from": "human", "value": "<image>\n<image>\nHow far?"},
             {"from": "gpt", "value": "2.0"}]
    write_tree(tmp_path, record={"conversations": turns})
    assert geometry.load_samples(tmp_path)[0].question == "How far?"


def test_filters_and_order(tmp_path):
    write_tree(tmp_path, task="view_change_infer", kind="fill")
    write_tree(tmp_path, task="position_matching", kind="select", scene="scene0001_00")
    write_tree(tmp_path, task="position_matching", kind="sentence", scene="scene0002_00")
    load = geometry.load_samples
    assert [(s.task, s.kind) for s in load(tmp_path)] == [
        ("position_matching", "select"), ("view_change_infer", "fill")]
    assert len(load(tmp_path, tasks=("position_matching",))) == 1
    assert len(load(tmp_path, kinds=("sentence",))) == 1
    assert len(load(tmp_path, kinds=("select", "fill", "sentence"))) == 3
    assert load(tmp_path)[-1].task == "view_change_infer" and len(load(tmp_path)[:5]) == 2
    with pytest.raises(IndexError):
        load(tmp_path)[2]


def test_index_of_many_lines(tmp_path):
    """Blank lines, Windows line ends, no final line end; blocks that cut lines anywhere."""
    write_tree(tmp_path)
    path = tmp_path / "scannet/qa_jsonl/train/view_change_infer/fill/fill_1.jsonl"
    record = json.loads(path.read_text())
    rng = np.random.default_rng(0)
    text, ids = "", []
    for k in range(50):
        text += "\n" * int(rng.integers(3)) + json.dumps(
            {**record, "id": f"s{k}", "pad": "x" * int(rng.integers(90))})
        text += "\r\n" if k % 2 else ("\n" if k < 49 else "")
        ids.append(f"s{k}")
    path.write_bytes(text.encode())
    assert [s.id for s in geometry.load_samples(tmp_path)] == ids
    whole = geometry._line_offsets(path)
    for block in (1, 7, 100):
        assert np.array_equal(geometry._line_offsets(path, block), whole)


def red(picture):
    rgb = np.asarray(picture).astype(int)
    return (rgb[..., 0] > 200) & (rgb[..., 1] < 90) & (rgb[..., 2] < 90)


def test_markers_at_native_size(tmp_path):
    """On 1296x968 a point is a disc of radius 20, on the image that point_img_idx names."""
    record = {"red_point": [[500, 250]], "blue_point": [[100, 100]], "point_img_idx": [[1, 0]]}
    write_tree(tmp_path, image=(1296, 968), depth=(640, 480), task="depth_prediction_oc_mv",
               record=record)
    first, second = geometry.load_samples(tmp_path)[0].pictures()
    v, u = np.nonzero(red(second))
    assert (u.min(), u.max(), v.min(), v.max()) == (648 - 20, 648 + 20, 242 - 20, 242 + 20)
    assert abs(len(u) - math.pi * 20**2) < 80 and not red(first).any()
    assert np.asarray(first)[96, 129, 2] > 200  # blue is on the first


def test_box_outline_at_native_size(tmp_path):
    write_tree(tmp_path, image=(1296, 968), depth=(640, 480), task="position_matching",
               record={"red_bbox": [[250, 250, 500, 500]]})
    first, second = geometry.load_samples(tmp_path)[0].pictures()
    v, u = np.nonzero(red(first))
    assert abs(u.min() - (324 - 17.5)) <= 1 and abs(v.max() - (484 + 17.5)) <= 1
    assert not red(first)[363, 486] and red(first)[363, 315] and not red(second).any()


@pytest.mark.parametrize("task, index, colours, where", [
    ("distance_infer_center_oo_mv", [1, 0, 1], ("red", "green", "blue"), (1, 0, 1)),
    ("depth_prediction_oo_mv", [1, 0, 0], ("red", "blue", "green"), (1, 0, 0)),
    ("obj_spatial_relation_oo_mv", [1, 0], ("blue", "green"), (1, 0)),
    ("spatial_imagination_oc_mv", [0, 1, 1], ("green", "blue", "red"), (0, 1, 1)),
    ("obj_spatial_relation_oc_mv", [1, 0], ("red", "blue"), (1, 1)),
    ("view_change_infer", [0, 0], ("red", "blue"), (None, None)),
])
def test_marker_order(tmp_path, task, index, colours, where):
    shape = "bbox" if task.startswith("obj") else "point"
    mark = {"point": [500, 500], "bbox": [300, 300, 600, 600]}[shape]
    record = {f"{colour}_{shape}": [mark] for colour in colours} | {f"{shape}_img_idx": [index]}
    write_tree(tmp_path, image=(1280, 960), depth=(640, 480), task=task, record=record)
    sample = geometry.load_samples(tmp_path)[0]
    drawn = []
    sample_draw = geometry._draw_marker
    try:
        pictures = {}
        geometry._draw_marker = lambda picture, mark, rgb: drawn.append(
            (pictures.setdefault(id(picture), picture), rgb))
        shown = sample.pictures()
    finally:
        geometry._draw_marker = sample_draw
    got = {rgb: next(k for k, p in enumerate(shown) if p is picture) for picture, rgb in drawn}
    wanted = {geometry.MARKER_RGB[c]: w for c, w in zip(colours, where) if w is not None}
    assert got == wanted


@pytest.mark.parametrize("record", [
    {"red_point": [5, 5]}, {"red_point": [[500, 500]], "point_img_idx": [7]},
    {"red_point": [[500, 500]], "point_img_idx": [[7]]}, {"red_bbox": [["a", 1, 2, 3]]},
])
def test_markers_that_cannot_be_drawn(tmp_path, record):
    write_tree(tmp_path, task="position_matching", record=record)
    with pytest.raises(geometry.DataError, match="scene0000_00_0: its point or box fields"):
        geometry.load_samples(tmp_path)[0].pictures()


def test_box_with_swapped_corners(tmp_path):
    write_tree(tmp_path, task="position_matching", record={"red_bbox": [[600, 700, 200, 300]]})
    assert red(geometry.load_samples(tmp_path)[0].pictures()[0]).any()


# --- bad input: one line that names the thing


@pytest.mark.parametrize("harm, message", [
    (lambda f: (f / "image_depth/1.png").unlink(), "1.png: no such depth map"),
    (lambda f: (f / "image_color/1.jpg").write_bytes(b"\xff\xd8 not a jpg"),
     "1.jpg: cannot be read as an image"),
    (lambda f: (f / "image_color/1.jpg").write_bytes((f / "image_color/1.jpg").read_bytes()[:300]),
     "1.jpg: cannot be read as an image"),
    (lambda f: (f / "pose/1.txt").write_text("inf " * 16), "1.txt: holds inf or NaN"),
    (lambda f: (f / "pose/1.txt").write_text("0 " * 16), "1.txt: not a rigid pose"),
    (lambda f: (f / "pose/1.txt").write_text("1 2 3"), "1.txt: holds 3 numbers, expected 4x4"),
    (lambda f: (f / "pose/1.txt").unlink(), "1.txt: cannot be read as a matrix"),
    (lambda f: (f / "intrinsic/intrinsic_depth.txt").write_text("1 0 0 1"),
     "holds 4 numbers, expected 3x3 or 4x4"),
    (lambda f: Image.new("RGB", (64, 48)).save(f / "image_depth/1.png"),
     "a depth map is a 16-bit one-channel png"),
    (lambda f: Image.fromarray(np.ones((64, 48), np.uint16)).save(f / "image_depth/1.png"),
     "differ in shape"),
])
def test_frames_that_cannot_be_read(tmp_path, harm, message):
    folder = write_tree(tmp_path)
    harm(folder)
    with pytest.raises(geometry.DataError, match=message) as caught:
        geometry.load_samples(tmp_path)[0].view(1)
    assert "\n" not in str(caught.value)


def test_trees_that_cannot_be_read(tmp_path):
    with pytest.raises(geometry.DataError, match="no such directory"):
        geometry.load_samples(tmp_path / "nowhere")
    with pytest.raises(geometry.DataError, match=r"found there: nothing"):
        geometry.load_samples(tmp_path)
    write_tree(tmp_path, kind="sentence")
    with pytest.raises(geometry.DataError, match=r"found there: view_change_infer/sentence"):
        geometry.load_samples(tmp_path)
    path = next(tmp_path.glob("*/qa_jsonl/train/*/*/*.jsonl"))
    good = json.loads(path.read_text())
    for line in ("{broken", '{"id": 3}', "[1, 2, 3]", '{"conversations": 5, "image": []}',
                 json.dumps({**good, "image": [None]}), json.dumps({**good, "image": [3, 4]})):
        path.write_text(line + "\n")
        with pytest.raises(geometry.DataError, match="byte 0: not a SPAR record"):
            geometry.load_samples(tmp_path, kinds=("sentence",))[0]


def test_real_frames(shared):
    """Every sample of the tree of real frames reads; neighbours agree as their README says."""
    samples = geometry.load_samples(shared / "spar")
    assert len(samples) == 106 and {s.source for s in samples} == {"scannet", "structured3d"}
    for sample in samples[::7]:
        assert all(view.depth.max() > 0.5 for view in sample.views()) and sample.pictures()
    neighbours = next(s for s in samples if [p.stem for p in s.images] == ["51", "55"])
    x, y = neighbours.views()
    right = geometry.directional_overlap(x, y, 1, t_rel=0)[0, 0]
    x.cam2world, y.cam2world = np.linalg.inv(x.cam2world), np.linalg.inv(y.cam2world)
    wrong = geometry.directional_overlap(x, y, 1, t_rel=0)[0, 0]  # read as world2cam
    assert right > 0.4 and wrong < 0.5 * right


# --- rendered rooms


def test_room_depth_by_hand():
    """A camera amid a 4x5x3 room looking along y: the wall is 2.5 m away at every pixel."""
    room = geometry.make_room(np.random.default_rng(0))
    room.size, room.solids = np.array([4.0, 5.0, 3.0]), []
    K = np.array([[100.0, 0, 31.5], [0, 100.0, 31.5], [0, 0, 1]])
    pose = geometry.look((2, 2.5, 1.5), math.pi / 2, 0)
    depth, surface, points = geometry.cast(room, K, pose, 64, 64)
    assert np.allclose(depth, 2.5, atol=1e-5) and np.all(surface == 3)
    ball = geometry.Solid("ball", "red", np.array([2, 4.0, 1.5]), np.full(3, 0.5), 0.0)
    box = geometry.Solid("box", "blue", np.array([2, 4.0, 1.5]), np.array([0.2, 0.3, 0.4]), 0.0)
    pillar = geometry.Solid("pillar", "green", np.array([2, 4.0, 1.5]), np.array([0.4, 0.4, 0.5]),
                            0.0)
    K[:2, 2] = 32  # pixel (32, 32) looks along the axis
    for solid, nearest in ((ball, 1.0), (box, 1.2), (pillar, 1.1)):
        room.solids = [solid]
        depth, surface, _ = geometry.cast(room, K, pose, 64, 64)
        assert abs(depth[32, 32] - nearest) < 1e-5 and surface[32, 32] == 6
    # the box's edge: 0.2 m to the side at 1.2 m depth is 16.7 pixels
    room.solids = [box]
    _, surface, _ = geometry.cast(room, K, pose, 64, 64)
    assert (surface[32] == 6).nonzero()[0].tolist() == list(range(16, 49))


def test_rendering_is_the_inverse_of_unproject(rooms):
    """Depth read back from the png lands on the surface it was cast from."""
    rng = np.random.default_rng(4)
    room = geometry.make_room(rng)
    K, poses = geometry._pick_cameras(room, rng, 96)
    depth, _, points = geometry.cast(room, K, poses[0], 96, 96)
    again, valid = geometry.unproject(depth, K, poses[0])
    assert valid.all() and np.abs(points - again).max() < 1e-4


def test_rooms_overlap_and_stand_upright(rooms):
    seen = set()
    for sample in geometry.load_samples(rooms):
        scene = sample.images[0].parts[-3]
        if len(sample.images) < 3 or scene in seen:
            continue
        seen.add(scene)
        views = sample.views()
        for view in views:
            assert abs(view.cam2world[2, 0]) < 1e-6  # right is level: no roll
            assert 1.2 <= view.cam2world[2, 3] <= 1.7 and view.image.shape == (224, 224, 3)
        for a in views:
            for b in views:
                if a is not b:
                    assert 0.15 < geometry.directional_overlap(a, b, 1)[0, 0] < 0.85
    assert len(seen) == 6


def test_rooms_ask_what_they_should(rooms):
    asked = {(s.task, s.kind) for s in geometry.load_samples(rooms)}
    assert asked >= {("depth_prediction_oc_mv", "fill"), ("distance_prediction_oo_mv", "fill"),
                     ("view_change_infer", "fill"), ("position_matching", "fill"),
                     ("position_matching", "select"),
                     ("camera_motion_infer", "fill"), ("camera_motion_infer", "select"),
                     ("obj_spatial_relation_oc_mv", "select"),
                     ("distance_infer_center_oo_mv", "select"),
                     ("depth_prediction_oc", "fill"), ("obj_spatial_relation_oo", "select")}
    rows = [json.loads(line) for line in (rooms / "benchmark/rooms.jsonl").read_text().splitlines()]
    assert set(rows[0]) == {
        "id", "img_type", "format_type", "task", "source", "image", "question", "answer", "pose"}
    assert all((rooms / "benchmark" / path).exists() for row in rows for path in row["image"])


def test_answers_of_rooms_are_exact(rooms):
    """Answers against the files: depth pngs and poses, read without this project's reader."""
    def point(sample, colour):
        k = dict(zip(geometry.MARKER_ORDER.get(sample.task, ("red", "blue")),
                     sample.markers["point_img_idx"][0]))[colour]
        depth = np.asarray(Image.open(sample.depths[k])) / 1000
        x, y = (int(c / 1000 * 224) for c in sample.markers[f"{colour}_point"][0])
        scene = sample.images[k].parent.parent
        K = np.loadtxt(scene / "intrinsic/intrinsic_depth.txt")
        pose = np.loadtxt(scene / "pose" / f"{sample.images[k].stem}.txt")
        d = depth[y, x]
        return d, (pose @ [(x - K[0, 2]) / K[0, 0] * d, (y - K[1, 2]) / K[1, 1] * d, d, 1])[:3]

    checked = 0
    for sample in geometry.load_samples(rooms):
        if sample.task == "depth_prediction_oc_mv":
            assert abs(point(sample, "blue")[0] - float(sample.answer)) < 0.08
            checked += 1
        elif sample.task == "distance_prediction_oo_mv":
            apart = np.linalg.norm(point(sample, "red")[1] - point(sample, "blue")[1])
            assert abs(apart - float(sample.answer)) < 0.1
            checked += 1
        elif sample.task in ("view_change_infer", "camera_motion_infer") and sample.kind == "fill":
            scene = sample.images[0].parent.parent
            first, second = (np.loadtxt(scene / "pose" / f"{p.stem}.txt") for p in sample.images)
            x, y, z = first[:3, :3].T @ (second[:3, 3] - first[:3, 3])
            if sample.task == "camera_motion_infer":
                K = np.loadtxt(scene / "intrinsic/intrinsic_color.txt")
                u, v = ((K[0, 0] * x / z + K[0, 2] + 0.5) / 0.224,
                        (K[1, 1] * y / z + K[1, 2] + 0.5) / 0.224)
                said = [float(s)
                        for s in sample.answer.replace("(", "").replace(")", "").split(",")]
                assert np.allclose(said, [u, v, z], atol=0.6) and abs(said[2] - z) < 0.051
            else:
                said = dict(part.split(":") for part in sample.answer.split(","))
                for value, plus, minus in (
                        (x, "right", "left"), (y, "down", "up"), (z, "forward", "backward")):
                    got = float(said.get(f"move_{plus}", 0)) - float(said.get(f"move_{minus}", 0))
                    assert abs(got - value) < 0.051
            checked += 1
    assert checked > 15


def test_view_change_agrees_with_the_real_tree(shared):
    """Our reading of the five canonical dimensions against answers that somebody else computed."""
    for sample in geometry.load_samples(shared / "spar", tasks=("view_change_infer",)):
        views = sample.views()
        pose = geometry.relative_pose(*(v.cam2world for v in views))
        said = dict(part.split(":") for part in sample.answer.split(","))
        x, y, z = pose[:3, 3]
        for value, plus, minus in (
                (x, "right", "left"), (y, "down", "up"), (z, "forward", "backward")):
            got = float(said.get(f"move_{plus}", 0)) - float(said.get(f"move_{minus}", 0))
            assert abs(got - value) < 0.051
        right = math.degrees(math.atan2(pose[0, 2], pose[2, 2]))
        up = math.degrees(math.asin(-pose[1, 2]))
        assert abs(
            float(said.get("rotate_right", 0)) - float(said.get("rotate_left", 0)) - right) < 0.6
        assert abs(float(said.get("rotate_up", 0)) - float(said.get("rotate_down", 0)) - up) < 0.6


def test_rooms_are_deterministic_reused_and_redone(tmp_path, capsys):
    def content(root):
        return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}

    first = geometry.render_rooms(tmp_path / "a", rooms=3, held_out=0.34)
    assert content(first) == content(geometry.render_rooms(tmp_path / "b", rooms=3, held_out=0.34))
    other = content(geometry.render_rooms(tmp_path / "c", rooms=3, held_out=0.34, seed=1))
    assert other != content(first)
    before = (first / "rooms.json").stat().st_mtime_ns
    geometry.render_rooms(first, rooms=3, held_out=0.34)
    assert (first / "rooms.json").stat().st_mtime_ns == before  # reused
    (tmp_path / "d.partial" / "rooms").mkdir(parents=True)  # what an interruption leaves
    capsys.readouterr()
    geometry.render_rooms(tmp_path / "d", rooms=3, held_out=0.34)
    assert "interrupted" in capsys.readouterr().out and not (tmp_path / "d.partial").exists()
    assert content(tmp_path / "d") == content(first)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(geometry.DataError, match="not a tree of rendered rooms"):
        geometry.render_rooms(mine, rooms=3)
    assert (mine / "thesis.txt").exists()
