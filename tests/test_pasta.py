"""pasta.py: Eqs. 2-5 against naive loops, the encoder's features, the demo's model, held-out pairs.
What it promises as every trainer does is in test_trainers.py."""

import argparse
import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

import geometry
import pasta
from scenes import render

PROCESSOR = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 448 * 448})
WAVES = 2 * np.random.default_rng(0).normal(size=(3, 3))


# --- the method


def naive_loss(S, e_x, e_y, tau1, tau2, skip_empty=False):
    """Eqs. 2, 3 and 5 one number at a time, in float64. Returns the loss and H(p)."""
    P, CE, H = range(len(S)), 0.0, 0.0
    rows = [i for i in P if not skip_empty or any(S[i][j] > 0 for j in P)]
    for i in rows:
        z = [math.exp(float(S[i][j]) / tau1) for j in P]
        w = [math.exp(float(e_x[i] @ b / math.sqrt(e_x[i] @ e_x[i] * (b @ b))) / tau2) for b in e_y]
        for j in P:
            CE -= z[j] / sum(z) * math.log(w[j] / sum(w)) / len(rows)
            H -= z[j] / sum(z) * math.log(z[j] / sum(z)) / len(rows)
    return CE, H


@pytest.mark.parametrize("skip", [False, True])
def test_loss_against_naive_loop(skip):
    """Both directions of every pair, divided by the pairs of all processes; rows without overlap,
    uniform as Eq. 2 gives them, or left out; a pair without any costs nothing then."""
    g = torch.Generator().manual_seed(0)
    args = pasta.parse_args(["--skip-empty"] * skip)
    e = [torch.randn(9, 5, generator=g, dtype=torch.float64) for _ in range(3)]
    S = [torch.rand(9, 9, generator=g, dtype=torch.float64) * (torch.rand(9, 9, generator=g) < 0.2)
         for _ in range(2)]
    S[0][2], S[0][3], S[0][3, 1] = 0, 0, 0.007  # a real overlap may be a few of a patch's pixels
    pairs = [(0, 1, S[0]), (0, 2, S[1])]
    loss, excess = pasta.alignment_loss(e, [*pairs, (1, 2, 0 * S[0])][:2 + skip], 3, args)
    both = [naive_loss(*its, 0.1, 0.07, skip) for x, y, s in pairs
            for its in ((s, e[x], e[y]), (s.T, e[y], e[x]))]
    wanted, floor = (sum(its) / 3 for its in zip(*both))
    assert abs(float(loss) - wanted) < 1e-9 and abs(float(excess) - (wanted - floor)) < 1e-9
    assert float(excess) > 0


def test_excess_is_zero_for_the_perfect_encoder():
    """cos = S exactly and tau1 = tau2: nothing is left to learn, though the loss is far from 0."""
    S = torch.full((4, 4), 0.1, dtype=torch.float64) + 0.8 * torch.eye(4, dtype=torch.float64)
    rows = S.T.clone()  # e_y[j] . e_x[i] = S[i, j]; norms made 1 by a fifth coordinate
    e_y = torch.cat([rows, (1 - rows.square().sum(-1, keepdim=True)).sqrt()], dim=1)
    e_x = torch.eye(4, 5, dtype=torch.float64)
    CE, H = pasta.directional_loss(S, e_x, e_y, 0.1, 0.1)
    assert abs(float(CE - H)) < 1e-12 and float(H) > 0.001


@pytest.mark.parametrize("n", [1, 3, 4, 6, 16])
@pytest.mark.parametrize("h, w", [(8, 8), (13, 19), (5, 3)])
def test_cells_have_the_edges_of_the_geometry(n, h, w):
    """Each token is cut into 240 x 240 dots; a cell's feature is the mean of the dots within."""
    tokens = torch.randn(h, w, 3, generator=torch.Generator().manual_seed(0))
    k = 240
    wanted = np.zeros((n * n, 3))
    rows = (np.arange(h * k) + 0.5) / (h * k) * n
    columns = (np.arange(w * k) + 0.5) / (w * k) * n
    for a in range(n):
        for b in range(n):
            in_row = np.bincount(np.arange(h * k)[rows.astype(int) == a] // k, minlength=h)
            in_column = np.bincount(np.arange(w * k)[columns.astype(int) == b] // k, minlength=w)
            weight = np.outer(in_row, in_column) / (in_row.sum() * in_column.sum())
            wanted[a * n + b] = (weight[..., None] * tokens.numpy()).sum((0, 1))
    assert np.abs(pasta.cell_features(tokens, n).numpy() - wanted).max() < 1e-5


def test_matches_by_hand():
    """The most similar patch beside the one that overlaps most; features' lengths mean nothing."""
    e_x = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [3.0, 0, 4.0]])
    e_y = torch.tensor([[1.0, 0, 0], [0, 9.0, 9.0], [0.6, 0, 0.8]])
    S = torch.tensor([[0.9, 0.0, 0.0], [0.2, 0.0, 0.1], [0.0, 0.0, 0.0]])
    guess, gold, overlaps = pasta.matches(S, e_x, e_y)
    assert (guess.tolist(), gold.tolist()[:2]) == ([0, 1, 2], [0, 0])
    assert overlaps.tolist() == [True, True, False]


def test_evaluate_by_hand(monkeypatch):
    """Two pairs of 2 x 2 patches: accuracy over both directions, losses, drift, matches."""
    args = argparse.Namespace(grid=2, tau1=0.1, tau2=0.07, skip_empty=False)
    S = torch.tensor([[0.9, 0, 0, 0], [0, 0, 0.5, 0], [0, 0, 0, 0.1], [0, 0, 0, 0]])
    turned = torch.eye(4).roll(1, 0)  # e_x of patch k is e_y of patch k - 1
    encoded = {1.0: (torch.eye(4), torch.eye(4)), 2.0: (torch.eye(4), turned)}
    monkeypatch.setattr(pasta, "encode", lambda encoder, pixels, grids, n: encoded[pixels])
    heldout = [(None, pixels, None, [(0, 1, S)]) for pixels in (1.0, 2.0, 1.0, 1.0)]
    # patches 0 to 2 of x have an overlap, of y 0, 2 and 3: with equal features each matches itself,
    # 0 rightly; turned, x 1 -> 2, 2 -> 3 and back are right, 0 -> 1 and back not
    record, features, first = pasta.evaluate(None, heldout, args)
    assert record["match_accuracy"] == (3 * 2 + 4) / (4 * 6) and record["chance"] == 0.25
    assert record["drift"] == 0 and features.shape == (4, 2, 4, 4) and len(first) == 4
    assert first[1][0].tolist() == [1, 2, 3, 0] and first[0][0].tolist() == [0, 1, 2, 3]
    CE, H = np.mean([[sum(its) for its in zip(*(naive_loss(s, *e, 0.1, 0.07) for s, e in (
        (S, encoded[pixels]), (S.T, encoded[pixels][::-1]))))] for _, pixels, *_ in heldout], 0)
    assert abs(record["heldout_loss"] - CE) < 1e-5
    assert abs(record["heldout_excess"] - (CE - H)) < 1e-5
    encoded[2.0] = (torch.eye(4), 3 * turned)  # 4 of 32 ones become 3
    record, _, _ = pasta.evaluate(None, heldout, args, features)
    assert abs(record["drift"] - math.sqrt(4 * 2**2 / 32)) < 1e-6


def test_pictures_of_matches(monkeypatch, tmp_path):
    """Every patch with overlap, green where right and red where wrong; the first three pairs where
    half of the patches have one, and others only if there are too few."""
    view, texts = render(np.array([4, 4, 3.0]), np.array([2, 2, 1.5]), 0.3, WAVES), []
    guess, colours = torch.arange(16), np.array([(20, 170, 60), (220, 40, 40)])
    monkeypatch.setattr(pasta.ImageDraw.ImageDraw, "text",
                        lambda self, _, text, **more: texts.append(text))
    matched = {k: (guess, guess * (guess < 8), rows) for k, rows in (
        (7, guess < 7), (8, guess < 8), (9, guess >= 7), (16, guess >= 0))}
    for k, said, seen in ((7, "7 of 7", [True, False]), (9, "1 of 9", [True, True]),
                          (16, "8 of 16", [True, True])):
        panel = np.asarray(pasta.match_panel("now", (view, view), matched[k], 4)).reshape(-1, 1, 3)
        assert texts[-3:] == [f"now: {said} right", "view 0", "view 1"]
        assert (panel == colours).all(-1).any(0).tolist() == seen
    for pairs, drawn in (((7, 8, 7, 9, 16, 8), (8, 9, 16)), ((7, 8, 7), (8, 7, 7)), ((7,), (7,))):
        texts.clear()
        its = [matched[k] for k in pairs]
        pasta.draw_matches(tmp_path / "m.png", [((view, view), 0)] * len(pairs), its, its, 4)
        assert [int(text.split()[3]) for text in texts[::6]] == [*drawn]


# --- the encoder


def encoder_of(path):
    return pasta.load_model(str(path))[1].model.visual


def encode(encoder, images, n):
    its = PROCESSOR(images=images, return_tensors="pt")
    return pasta.encode(encoder, its["pixel_values"], its["image_grid_thw"], n)


def noise(*sizes):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (H, W, 3), dtype=np.uint8) for W, H in sizes]


def test_raster_order_in_an_image_wider_than_one_window(tiny_model):
    """A bright square moves over a 336x224 image: the cell that changes most is where it is. With
    attention cut off, each token sees its own pixels only. The merged tokens are 8 x 12, the
    windows 4 x 4: in window order the places would come out permuted."""
    encoder = encoder_of(tiny_model)
    for block in encoder.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
        torch.nn.init.zeros_(block.attn.proj.bias)
    images, places = [np.full((224, 336, 3), 90, np.uint8)], list(range(0, 16, 3)) + [4, 11]
    for place in places:  # cells of a 4 x 4 grid are 2 x 3 tokens
        image = images[0].copy()
        image.reshape(4, 56, 4, 84, 3)[place // 4, :, place % 4] = 250
        images.append(image)
    with torch.no_grad():
        base, *changed = encode(encoder, images, 4)
    assert [int((e - base).norm(dim=-1).argmax()) for e in changed] == places


def test_images_of_different_size_in_both_orders(tiny_model):
    encoder = encoder_of(tiny_model)
    a, b = noise((224, 224), (532, 364))
    with torch.no_grad():
        alone = [encode(encoder, [image], 5)[0] for image in (a, b)]
        forth, back = encode(encoder, [a, b], 5), encode(encoder, [b, a], 5)
    for one, x, y in zip(alone, forth, back[::-1]):
        assert torch.allclose(one, x, atol=1e-5) and torch.allclose(one, y, atol=1e-5)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)


def test_recomputing_changes_no_number_and_keeps_no_activation(tiny_model):
    """Patch product and recomputing: features and gradients of the library's plain tower."""
    S = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    results, kept = [], []

    def hold(tensor):
        kept[-1] += 0 if tensor.requires_grad and tensor.is_leaf else tensor.numel()
        return tensor

    for kind in ("library", "as it is", "recomputing"):
        encoder = encoder_of(tiny_model)
        if kind == "library":
            encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_model).model.visual
        for block in encoder.blocks if kind == "recomputing" else ():
            pasta.recompute_in_backward(block)
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            e = encode(encoder, noise((112, 112), (140, 252)), 4)
        loss, _ = pasta.alignment_loss(e, [(0, 1, S)], 1, pasta.parse_args([]))
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in encoder.parameters()])))
    for loss, gradient in results[1:]:
        assert abs(loss - results[0][0]) < 1e-5
        assert float((gradient - results[0][1]).norm() / results[0][1].norm()) < 1e-4
    assert kept[2] < 0.4 * kept[1]


def test_gradient_reaches_the_whole_encoder_and_learning_lowers_the_loss(tiny_model, scenes):
    encoder, args = encoder_of(tiny_model), pasta.parse_args(["--data", "-", "--lr", "1e-3"])
    sample = geometry.load_samples(scenes, tasks=("depth_prediction_oc_mv",))[0]
    _, pixels, grids, pairs = pasta.prepare(sample, args, PROCESSOR)
    optimizer, losses = pasta.Optimizer(encoder, args, torch.float32, torch.device("cpu")), []
    for step in range(6):
        loss, _ = pasta.alignment_loss(pasta.encode(encoder, pixels, grids, 4), pairs, 3, args)
        optimizer.backward(loss)
        norm, masters = optimizer.reduce(), [its for _, its in optimizer.tensors.values()]
        assert len(masters) == len(list(encoder.parameters()))
        assert step or all(float(its.grad.norm()) > 0 for its in masters)
        optimizer.step(norm)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05


def test_demo_model_is_made_anew_for_other_rooms(scenes, tmp_path, monkeypatch):
    """For another seed or other texts, which its tokenizer is trained on; else it is left alone."""
    path, times = tmp_path / "model", []
    for seed, version in ((0, 1), (0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(geometry, "ROOM_VERSION", version)
        pasta.make_demo_model(path, scenes, seed)
        times.append((path / "model.safetensors").stat().st_mtime_ns)
    assert times[0] == times[1] < times[2] < times[3]


def test_a_head_looks_at_the_token_before(tiny_model):
    """Layer 2's first head, by the library's own attention: in a text nearly all weight is on the
    token before, wherever and whatever it is; the two heads beside it have no such habit."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tiny_model, attn_implementation="eager")
    ids = torch.randint(20, 200, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attention = model(input_ids=ids, output_attentions=True).attentions[2][0]  # (3, L, L)
    to_previous = attention.diagonal(-1, 1, 2)  # (3, L - 1)
    assert to_previous[0].min() > 0.9 and to_previous[1:].mean() < 0.2


# --- samples


def test_what_a_step_needs(scenes):
    """All pairs x < y with Eq. 1's S by the arguments; the views' own pixels, no marker drawn."""
    args = pasta.parse_args(["--data", "-", "--grid", "3", "--t", "0.4", "--t-rel", "0"])
    sample = geometry.load_samples(scenes, tasks=("depth_prediction_oc_mv",))[0]
    views, pixels, grids, pairs = pasta.prepare(sample, args, PROCESSOR)
    assert [(x, y) for x, y, _ in pairs] == [(0, 1), (0, 2), (1, 2)]
    for x, y, S in pairs:
        wanted = geometry.correspondence(views[x], views[y], 3, 0.4, 0)
        assert S.dtype == torch.float32 and np.allclose(S, wanted) and (wanted > 0).any()
    plain = [Image.open(path).convert("RGB") for path in sample.images]
    wanted = PROCESSOR(images=plain, return_tensors="pt")
    assert torch.equal(grids, wanted["image_grid_thw"])
    assert torch.equal(pixels, wanted["pixel_values"])


def test_held_out_pairs(scenes, shared):
    """With a val split its pairs, each once; without, none that a sample to train on shows."""
    walk = geometry.Walk(scenes, 100, 0)
    pairs = pasta.heldout_pairs(walk, 100)
    assert {(*(path.parts[-3] for path in pair.images), *(path.stem for path in pair.images))
            for pair in pairs} == {(scene, scene, *stems) for scene in ("scene_6", "scene_7")
                                   for stems in (("0", "1"), ("0", "2"), ("1", "2"))} and (
        len(pairs) == 6)
    assert all(len(pair.views()) == 2 for pair in pairs) and len(pasta.heldout_pairs(walk, 2)) == 2
    walk = geometry.Walk(shared / "spar", 1000, 0)
    held = {frozenset(pair.images) for pair in pasta.heldout_pairs(walk, 64)}
    trained = [walk.samples[k].images for k in walk.drawn]
    assert held and trained and not any(pair <= set(images) for pair in held for images in trained)

