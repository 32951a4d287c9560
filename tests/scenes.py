"""What the tests train on: empty rooms with waves on their walls, ray cast by hand, three views
each, in SPAR-7M-RGBD's layout. They share no code with geometry's reader, Eq. 1 or rooms. And what
the tests do to a model's files."""

import itertools
import json
import shutil

import numpy as np
from PIL import Image
from safetensors.torch import load_file, save_file

import geometry


def render(size, place, heading, waves, W=112, H=112):
    """The View of a level camera, 90 degrees wide, that stands at `place` in a room of `size`."""
    f, c, s = W / 2, np.cos(heading), np.sin(heading)
    K, pose = np.array([[f, 0, (W - 1) / 2], [0, f, (H - 1) / 2], [0, 0, 1]]), np.eye(4)
    pose[:3] = np.array([[s, 0, c, place[0]], [-c, 0, s, place[1]], [0, -1, 0, place[2]]])
    v, u = np.mgrid[:H, :W]
    rays = np.stack([(u - K[0, 2]) / f, (v - K[1, 2]) / f, np.ones((H, W))], -1) @ pose[:3, :3].T
    depth = ((np.where(rays > 0, size, 0) - place) / rays).min(-1)  # the nearest wall
    image = np.rint(128 + 100 * np.sin((place + depth[..., None] * rays) @ waves))
    return geometry.View(image.astype(np.uint8), depth.astype(np.float32), K, pose)


def write_view(scene, k, view):
    for folder in ("image_color", "image_depth", "pose", "intrinsic"):
        (scene / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(view.image).save(scene / f"image_color/{k}.jpg", quality=95)
    depth = np.rint(view.depth * 1000).astype(np.uint16)
    Image.fromarray(depth).save(scene / f"image_depth/{k}.png")
    np.savetxt(scene / f"pose/{k}.txt", view.cam2world, fmt="%.8f")
    np.savetxt(scene / "intrinsic/intrinsic_depth.txt", view.K)


def write_question(root, split, task, kind, name, views, question, answer, **more):
    """Append a question about `views` of scene `name`; its id is name_task."""
    path = root / f"boxes/qa_jsonl/{split}/{task}/{kind}/{kind}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"id": f"{name}_{task}", "image": [f"{name}/image_color/{k}.jpg" for k in views],
              "conversations": [{"from": "human", "value": "<image>\n" * len(views) + question},
                                {"from": "gpt", "value": answer}], **more}
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def make_scenes(root, train=6, val=2):
    """Write `train` + `val` scenes: view 1 stands elsewhere, view 2 only turns from view 0."""
    rng = np.random.default_rng(0)
    for number in range(train + val):
        size, heading = np.array([*rng.uniform(3, 5, 2), 2.6]), rng.uniform(0, 2 * np.pi)
        place, turn, waves = size * rng.uniform(0.3, 0.7, 3), rng.integers(15, 40), 2 * rng.normal(
            size=(3, 3))
        elsewhere = place + [*rng.uniform(-0.5, 0.5, 2), 0]
        views = [render(size, place, heading, waves),
                 render(size, elsewhere, heading + rng.uniform(-0.4, 0.4), waves),
                 render(size, place, heading - np.radians(turn), waves)]
        name, split = f"scene_{number}", "train" if number < train else "val"
        for k, view in enumerate(views):
            write_view(root / "boxes/images" / name, k, view)
        x, y = rng.integers(100, 900, 2)
        deep = views[1].depth[y * 112 // 1000, x * 112 // 1000]
        right, _, forward = (elsewhere - place) @ views[0].cam2world[:3, :3]
        for task, kind, which, question, answer, more in (
                ("depth_prediction_oc_mv", "fill", (0, 1, 2), "How deep is the red point?",
                 f"{deep:.1f}", {"red_point": [[int(x), int(y)]], "point_img_idx": [[1]]}),
                ("view_change_infer", "fill", (0, 1), "How did the camera get there?",
                 f"move_right:{right:.1f},move_forward:{forward:.1f}", {}),
                ("camera_turn", "fill", (0, 2), "Which way did the camera turn?",
                 f"right {turn}", {}),
                ("obj_spatial_relation_oc_mv", "select", (2, 1, 0),
                 "Where is the second camera? A. left B. right", "AB"[int(right > 0)], {})):
            write_question(root, split, task, kind, name, which, question, answer, **more)
    return root


def write_recordings(frames, scenes):
    """Scenes of a tree as ScanNet exports them; the first frame of the first one was lost."""
    for scene in scenes:
        there = frames / scene.name
        there.mkdir(parents=True)
        for name in ("image_color", "image_depth", "intrinsic"):
            (there / name.removeprefix("image_")).symlink_to(scene / name)
        shutil.copytree(scene / "pose", there / "pose")
    first = min((frames / scenes[0].name / "pose").iterdir())
    np.savetxt(first, np.full((4, 4), -np.inf))


def write_tum(folder):
    """A TUM RGB-D recording of a room: ten pictures of each view, one a tenth of a second; poses of
    other times between the right ones; the last depth map was taken too late. Returns the poses
    and the depth maps in metres."""
    room = geometry.make_room(np.random.default_rng(0))
    K = np.array([[129, 0, 79.5], [0, 129, 63.5], [0, 0, 1]])  # freiburg1's, of a quarter's size
    lists = {"rgb": ["# colour"], "depth": ["# depth"], "groundtruth": ["# t x y z qx qy qz qw"]}
    depths = []
    for name in ("rgb", "depth"):
        (folder / name).mkdir(parents=True)
    for k, pose in enumerate(room.poses):
        depth, number = geometry.cast(room, K, pose, 160, 120)
        depths.append(depth)
        picture = geometry.paint(room, number, geometry.unproject(depth, K, pose)[0])
        Image.fromarray(picture).save(folder / f"rgb/{k}.png")
        Image.fromarray(np.rint(5000 * depth).astype(np.uint16)).save(folder / f"depth/{k}.png")
        w = np.sqrt(1 + np.trace(pose[:3, :3])) / 2
        axis = (pose[[2, 0, 1], [1, 2, 0]] - pose[[1, 2, 0], [2, 0, 1]]) / (4 * w)
        seconds = 1305031102.175304 + k
        late = 0.3 if k == 4 else 0.01
        lists["depth"].append(f"{seconds + late:.6f} depth/{k}.png")
        lists["rgb"] += [f"{seconds + tenth / 10:.6f} rgb/{k}.png" for tenth in range(10)]
        for off, numbers in ((-0.015, [9, 9, 9, 0, 0, 0, 1]), (0.004, [*pose[:3, 3], *axis, w])):
            lists["groundtruth"].append(" ".join(f"{number:.6f}" for number in (
                seconds + off, *numbers)))
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return room.poses, depths


def change_weights(model, change, file="model.safetensors"):
    """Rewrite a file of weights: {name: tensor} -> the same."""
    save_file(change(load_file(model / "model.safetensors")), model / file, {"format": "pt"})


def change_json(path, **changes):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def as_published(model):
    """Two shards with an index, and one more that it does not name; config.json of version 4, whose
    dtype is not the weights'."""
    names, shards = sorted(load_file(model / "model.safetensors")), [
        f"model-0000{k + 1}-of-00002.safetensors" for k in range(3)]
    for k, shard in enumerate(shards):  # the last one has other values
        change_weights(model, lambda tensors: {
            key: tensors[key] + k // 2 for key in names[k % 2::2]}, shard)
    (model / "model.safetensors").unlink()
    change_json(model / "model.safetensors.index.json", metadata={}, weight_map=dict(
        zip(names, itertools.cycle(shards[:2]))))
    config = json.loads((model / "config.json").read_text())
    config = config.pop("text_config") | config | {"torch_dtype": "float16"}
    rope, _ = config.pop("rope_parameters"), config.pop("dtype")
    (model / "config.json").write_text(json.dumps(config | {
        "rope_theta": rope["rope_theta"], "rope_scaling": {
            "type": "mrope", "mrope_section": rope["mrope_section"]}}, indent=1) + "\n \n")
