"""Real pictures that a discriminator sees: encoded once by the teacher's autoencoder, at every size that a run trains at."""

import functools
import json
from unittest import mock

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import save_file
from test_trainer import run_of

from fewstep import cli, latents, models
from fewstep.errors import UserError
from fewstep.evaluate.pictures import as_tensor
from fewstep.evaluate.store import Shards

DISCRIMINATOR = ("--reward.discriminator", "0.5", "--reuse.rollout", "1", "--lora-rank", "2")
SIZES = ((8, 16), (16, 8))


def picture(i, size=(20, 24)):
    """(width, height) -> a picture that no other number has."""
    generator = torch.Generator().manual_seed(i)
    return Image.fromarray(torch.randint(256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8).numpy())


@pytest.fixture
def folder(tmp_path):
    """Five pictures, one of them in grey."""
    (tmp_path / "real" / "more").mkdir(parents=True)
    for i in range(5):
        picture(i).convert("L" if i == 3 else "RGB").save(tmp_path / "real" / ("more" if i % 2 else "") / f"{i}.png")
    return tmp_path / "real"


@pytest.fixture
def encoder(teacher_folder):
    """(the teacher, a spy on its encoding of pictures)."""
    backbone = models.load(str(teacher_folder))
    with mock.patch.object(backbone, "encode_pictures", wraps=backbone.encode_pictures) as spy:
        yield backbone, spy


def test_a_picture_is_scaled_to_cover_a_size_and_cut_to_its_middle(folder, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda posterior, generator=None: posterior.mode())
    backbone, _ = encoder
    found = latents.of_pictures(str(folder), backbone, SIZES, cache=tmp_path / "cache", progress=False)
    order = [0, 2, 4, 1, 3]  # of their paths: those in `more` come last
    for rows, (height, width) in zip(found.latents, SIZES, strict=True):
        assert rows.shape == (5, *backbone.latent_shape((height, width)))
        for row, i in enumerate(order):
            image = picture(i).convert("L").convert("RGB") if i == 3 else picture(i)
            scale = max(height / 24, width / 20)  # one edge as asked for, the other no shorter
            wide, high = width / scale, height / scale
            box = ((20 - wide) / 2, (24 - high) / 2, (20 + wide) / 2, (24 + high) / 2)
            fitted = image.resize((width, height), Image.Resampling.LANCZOS, box)
            mine = backbone.encode_pictures(as_tensor(fitted)[None])
            torch.testing.assert_close(rows[torch.tensor([row])], mine, rtol=0, atol=1e-5)


def test_what_was_encoded_is_not_encoded_again(folder, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "Shards", functools.partial(Shards, size=2))
    backbone, spy = encoder

    def encode(sizes=SIZES[:1]):
        before = spy.call_count
        found = latents.of_pictures(str(folder), backbone, sizes, cache=tmp_path / "cache", progress=False)
        return spy.call_count - before, found

    made, first = encode()
    assert made == 3
    made, again = encode()
    assert made == 0 and again.version == first.version
    everything = torch.arange(5)
    assert torch.equal(again.latents[0][everything], first.latents[0][everything])
    elsewhere = latents.of_pictures(str(folder), backbone, SIZES[:1], cache=tmp_path / "other", progress=False)
    assert torch.equal(elsewhere.latents[0][everything], first.latents[0][everything])  # what is drawn is drawn the same
    sorted((tmp_path / "cache").glob("*-00001.safetensors"))[0].unlink()  # a run that ended in between
    assert encode()[0] == 1
    assert encode(SIZES[1:])[0] == 3
    backbone.pipe.vae.register_to_config(scaling_factor=0.5)  # another autoencoder
    assert encode()[0] == 3
    backbone.pipe.vae.quant_conv.bias.data += 1
    assert encode()[0] == 3
    picture(9).save(folder / "0.png")
    made, changed = encode()
    assert made == 3 and changed.version != first.version


def test_a_picture_that_comes_again_is_drawn_anew_from_what_the_autoencoder_makes_of_it(folder, encoder, tmp_path, monkeypatch):
    """In the same part or in another: its latents are two draws."""
    monkeypatch.setattr(latents, "Shards", functools.partial(Shards, size=2))
    for path in folder.rglob("*.png"):
        picture(0).save(path)
    (rows,) = latents.of_pictures(str(folder), encoder[0], SIZES[:1], cache=tmp_path / "cache", progress=False).latents
    assert len(rows[:].unique(dim=0)) == 5


def test_pictures_that_are_enlarged_are_counted(folder, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "Shards", functools.partial(Shards, size=2))
    backbone, _ = encoder
    with pytest.warns(UserWarning, match="5 of 5 pictures are smaller than 24 x 32 and were enlarged"):
        latents.of_pictures(str(folder), backbone, [(16, 16), (24, 32)], cache=tmp_path / "cache", progress=False)
    for path in (tmp_path / "cache").glob("*-00002.safetensors"):
        path.unlink()
    with pytest.warns(UserWarning, match="1 of 1 pictures"):  # of those that were looked at
        latents.of_pictures(str(folder), backbone, [(24, 32)], cache=tmp_path / "cache", progress=False)


def test_a_run_at_several_sizes_sees_each_in_its_own(folder, teacher_folder, prompt_file, tmp_path):
    sizes = ("--size", "[8x16,16x8]")
    run = run_of(teacher_folder, prompt_file, *DISCRIMINATOR, *sizes, "--discriminator.latents", str(folder))
    seen, discriminator = [], run.trainer.terms["discriminator"].reward
    draw = discriminator.draw

    def watched(sample):
        drawn = draw(sample)
        seen.append((tuple(sample.x0.shape), tuple(drawn["real"].shape)))
        return drawn

    discriminator.draw = watched
    for _ in range(2):
        assert run.trainer.step()["discriminator/own_loss"] > 0
    assert all(students == reals for students, reals in seen)
    assert {reals[1:] for _, reals in seen} == {run.backbone.latent_shape(size) for size in SIZES}


def test_the_command_makes_a_student_beside_pictures_and_says_which_they_were(
    folder, teacher_folder, prompt_file, tmp_path, small_grid, capsys
):
    output = tmp_path / "out"
    call = [
        *("distill", "dmd2", "--teacher", str(teacher_folder), "--prompts", str(prompt_file), "--output", str(output), "--size", "8x16"),
        *("--groups", "2", "--group-size", "2", "--lora-rank", "2", "--device", "cpu", "--evaluate", "false"),
        *("--discriminator.latents", str(folder)),
    ]
    assert cli.main([*call, "--updates", "1"]) == 0
    (record,) = json.loads((output / "rewards.json").read_text())
    assert record["rewards"]["discriminator"]["source"] == str(folder)
    capsys.readouterr()
    picture(9).save(folder / "0.png")
    assert cli.main([*call, "--updates", "2", "--resume"]) == 0
    assert "reward 'discriminator' is version" in capsys.readouterr().out


def test_what_cannot_be_seen_is_refused_before_anything_is_trained(folder, teacher_folder, prompt_file, tmp_path):
    def said(source):
        with pytest.raises(UserError) as raised:
            config = ("--size", "8x16", "--discriminator.latents", str(source))
            run_of(teacher_folder, prompt_file, *DISCRIMINATOR, *config)
        assert str(raised.value).startswith("discriminator.latents: ")
        return str(raised.value)

    path = tmp_path / "real.safetensors"
    path.write_bytes(b"nothing of the kind")
    assert "cannot be read as a safetensors file" in said(path)
    save_file({"images": torch.zeros(3, 4, 4, 8)}, path)
    assert "holds no tensor `latents`; it has images" in said(path)
    save_file({"latents": torch.zeros(3, 4)}, path)
    assert "must be (N, C, H, W), one or more; got (3, 4)" in said(path)
    shape = models.load(str(teacher_folder)).latent_shape((8, 16))
    save_file({"latents": torch.zeros(3, *shape).index_fill(0, torch.tensor([1]), float("nan"))}, path)
    assert "1 of 3 latents are not finite, the first is number 1" in said(path)
    save_file({"latents": torch.zeros(3, shape[0], shape[2], shape[1])}, path)
    assert f"has latents of {(shape[0], shape[2], shape[1])}, and this run trains with {shape}" in said(path)
    (tmp_path / "empty").mkdir()
    assert "holds no picture" in said(tmp_path / "empty")
    (folder / "5.png").write_bytes(b"no picture")
    assert "5.png: cannot be read as a picture" in said(folder)
