"""The world's gold utility and scorers: closed forms, invariances, and the shipped models."""

import ast
import inspect
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.world.pictures import Picture
from fewstep.world.utility import components, gold_utility

ASSETS = Path(__file__).parents[1] / "fewstep" / "world" / "assets"
SCORERS = ["clip", "clip-heldout", "preference"]
COLOURS = {"red": (221, 46, 68), "yellow": (255, 204, 77), "green": (119, 178, 85), "blue": (85, 172, 238), "orange": (244, 144, 12)}


def disc(colour: tuple[int, int, int]) -> np.ndarray:
    """An emoji-like picture: a disc with two dark eyes and a pale mouth on white. (64, 64, 3) uint8."""
    y, x = np.mgrid[:64, :64] - 31.5
    image = np.full((64, 64, 3), 255, np.uint8)
    image[x**2 + y**2 < 28**2] = colour
    image[((abs(x) - 10) ** 2 + (y + 8) ** 2) < 16] = (102, 69, 0)
    image[(x**2 / 4 + (y - 14) ** 2) < 16] = (240, 240, 250)
    return image


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return [
        Picture(disc(c), str(i), "twemoji", f"{n} heart", "heart", "Smileys & Emotion", True) for i, (n, c) in enumerate(COLOURS.items())
    ]


@pytest.fixture(scope="module")
def images(pictures) -> torch.Tensor:
    return torch.from_numpy(np.stack([p.image for p in pictures])).permute(0, 3, 1, 2) / 255


@pytest.fixture(scope="module")
def tokenizer(pictures):
    from fewstep.world.text import make_tokenizer

    return make_tokenizer(pictures)


@pytest.fixture(scope="module")
def tiny(tokenizer):
    from fewstep.world.scorers import make_clip

    torch.manual_seed(0)
    return make_clip(tokenizer, patch=16, width=32, layers=1).eval()


def test_gold_is_all_in_its_file():
    """A report tells it by the hash of that file, which would not see a change in anything else that it called or read."""
    tree = list(ast.walk(ast.parse(Path(inspect.getfile(gold_utility)).read_text())))
    imported = {name for node in tree if isinstance(node, ast.Import) for name in (alias.name for alias in node.names)}
    imported |= {node.module for node in tree if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} == {"__future__", "torch"}
    assert not {"open", "__import__", "load", "from_file"} & {getattr(node, "id", getattr(node, "attr", "")) for node in tree}


def test_gold_has_an_interior_peak_in_saturation_and_sharpness(images):
    from fewstep.world.scorers import saturate, sharpen

    for change, factors in ((saturate, [0, 0.5, 1, 1.2, 2, 4]), (sharpen, [0, 0.5, 1, 1.5, 3, 6])):
        means = [gold_utility(change(images, f)).mean().item() for f in factors]
        best = means.index(max(means))
        assert 0 < best < len(factors) - 1
        assert means[:best] == sorted(means[:best]) and means[best:] == sorted(means[best:], reverse=True)


def test_gold_falls_with_every_step_of_dirt(images):
    outside = (images == 1).all(1, keepdim=True)
    tinted = [gold_utility(torch.where(outside, 1 - tint, images)) for tint in (0.0, 0.02, 0.05, 0.1, 0.3)]
    assert all((a > b).all() for a, b in itertools.pairwise(tinted))


@pytest.mark.parametrize("colour", [(0, 0, 0), (1, 1, 1), (0.5, 0.5, 0.5), (1, 0, 0)])
def test_gold_of_a_constant_image_is_finite_and_so_is_its_gradient(colour):
    image = torch.tensor(colour).float().view(1, 3, 1, 1).repeat(1, 1, 64, 64).requires_grad_()
    value = gold_utility(image)
    value.sum().backward()
    assert value.isfinite().all() and image.grad.isfinite().all()


def test_gold_is_the_sum_of_its_components_and_blind_to_flips(images):
    gold = gold_utility(images)
    assert gold.shape == (len(images),)
    torch.testing.assert_close(gold, sum(components(images).values()))
    torch.testing.assert_close(gold, gold_utility(images.flip(3)))
    assert gold_utility(images.double()).dtype == torch.float64


def test_contrastive_loss_in_closed_form():
    from fewstep.world.scorers import contrastive

    n, scale = 5, torch.tensor(3.0)
    # orthonormal and paired: -log softmax of (scale, 0, ..., 0)
    paired = contrastive(torch.eye(n), torch.eye(n), torch.eye(n).bool(), scale)
    assert paired.item() == pytest.approx(math.log1p((n - 1) * math.exp(-3)), rel=1e-5)
    # every caption fits every picture: equal similarities are the optimum, at the entropy log n
    same = torch.nn.functional.normalize(torch.ones(n, n), dim=1)
    assert contrastive(same, same, torch.ones(n, n).bool(), scale).item() == pytest.approx(math.log(n), rel=1e-5)


def test_changes_at_their_neutral_strength(images):
    from fewstep.world.scorers import saturate, sharpen

    torch.testing.assert_close(saturate(images, 1.0), images)
    torch.testing.assert_close(sharpen(images, 1.0), images)
    assert torch.equal(saturate(images, torch.full((len(images),), 0.5)), saturate(images, 0.5))


def test_training_steps_lower_the_loss(pictures, tokenizer, images):
    from fewstep.world.scorers import contrastive, image_features, make_clip, text_features, tokenize

    torch.manual_seed(0)
    model = make_clip(tokenizer, patch=16, width=32, layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = tokenize(tokenizer, [p.name for p in pictures])
    losses = []
    for _ in range(15):
        loss = contrastive(image_features(model, images), text_features(model, ids), torch.eye(len(images)).bool(), model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_saved_scorer_loads_as_stock_clip_with_the_same_scores(tiny, tokenizer, pictures, images, tmp_path):
    from PIL import Image
    from transformers import CLIPModel, CLIPProcessor

    from fewstep.world.scorers import image_features, save_scorer, text_features, tokenize

    save_scorer(tiny, tokenizer, tmp_path)
    model, processor = CLIPModel.from_pretrained(tmp_path), CLIPProcessor.from_pretrained(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    names = [p.name for p in pictures]
    inputs = processor(text=names, images=[Image.fromarray(p.image) for p in pictures], padding=True, return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], images * 2 - 1)
    with torch.no_grad():
        stock = model(**inputs).logits_per_image / model.logit_scale.exp()
        ours = image_features(tiny, images) @ text_features(tiny, tokenize(tokenizer, names)).T
    torch.testing.assert_close(stock, ours, atol=5e-3, rtol=0)


def test_retrieval_counts_what_is_nearer_than_the_truth(monkeypatch):
    """Six pictures whose own name comes first, second .. sixth; all of one kind, which comes first."""
    from fewstep.world import scorers

    made = [Picture(disc((9, 9, 9)), str(i), "noto", f"name {i}", "heart", "Smileys & Emotion", True) for i in range(6)]
    texts = {text: number for number, text in enumerate(["a heart", *(p.name for p in made), *(f"noto {p.name}" for p in made)])}

    def words(model, chosen):
        return torch.eye(len(texts))[[texts.get(text, -1) for text in chosen]] * torch.tensor([text in texts for text in chosen])[:, None]

    near = torch.zeros(6, len(texts))
    for i in range(6):
        order = [j for j in range(6) if j != i]
        order.insert(i, i)  # its own name stands at place i
        near[i, 0] = 1
        for place, j in enumerate(order):
            near[i, 1 + j] = near[i, 7 + j] = 1 - place / 10
    monkeypatch.setattr(scorers, "image_features", lambda model, images: near)
    monkeypatch.setattr(scorers, "tokenize", lambda tokenizer, texts: texts)
    monkeypatch.setattr(scorers, "text_features", words)
    found = scorers.retrieval(None, None, made)
    share = {"name_top1": 1 / 6, "name_top5": 5 / 6, "styled_name_top1": 1 / 6, "styled_name_top5": 5 / 6, "subcategory_top1": 1.0}
    assert {key: found[key] for key in share} == pytest.approx(share) and found["pictures"] == found["names"] == 6


def test_image_features_take_any_size(tiny, images):
    from fewstep.world.scorers import image_features

    large = torch.nn.functional.interpolate(images, (128, 128), mode="bilinear")
    similarity = (image_features(tiny, large) * image_features(tiny, images)).sum(1)
    assert (similarity > 0.99).all()


@pytest.mark.parametrize("name", SCORERS)
def test_shipped_scorers_are_small_and_load_as_float32(name):
    from transformers import CLIPModel

    assert sum(f.stat().st_size for f in (ASSETS / name).iterdir()) < 5e6
    assert {p.dtype for p in CLIPModel.from_pretrained(ASSETS / name).parameters()} == {torch.float32}


def test_shipped_preference_rises_with_saturation_where_gold_falls(pictures):
    from transformers import CLIPModel, CLIPTokenizer

    from fewstep.world.scorers import saturation_sweep

    folder = ASSETS / "preference"
    sweep = saturation_sweep(CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder), pictures, [0.3, 1.0, 2.5])
    assert sweep["preference"] == sorted(sweep["preference"])
    assert sweep["gold"][0] < sweep["gold"][1] > sweep["gold"][2]
