"""Shared fixtures: everything offline, on the CPU, on one thread a worker."""

import gc
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # subprocesses too: another number of threads rounds differently

import pytest
import torch

torch.set_num_threads(1)
gc.set_threshold(100_000, 50, 100)  # looking through all that the libraries hold takes a tenth of the time otherwise
CACHE = tempfile.TemporaryDirectory()  # of this process alone: what an earlier version of the code cached proves nothing
os.environ["XDG_CACHE_HOME"] = CACHE.name


# the files whose tests take longest, so that none of those comes when a worker has nothing else left to do
FIRST = ("test_compare.py", "test_export.py", "test_families.py", "test_memory.py", "test_cli.py", "test_trainer.py", "test_evaluation.py")


def pytest_collection_modifyitems(items):
    place = {name: at for at, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(FIRST)))  # a file's tests stay beside one another: they share what they made


def tiny_pipeline(prediction: str = "v_prediction"):
    """A random StableDiffusionPipeline of a few thousand parameters, weights as they come, that reads eight tokens.

    Its UNet has one level and, like BK-SDM's, no middle: the tests that train take most of their time in it.
    """
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from pipelines import parts, sd
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = parts.clip_tokenizer(length=8)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    unet = sd.network(
        block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=8,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=CLIPTextModel(text).eval(), tokenizer=tokenizer, scheduler=sd.scheduler(prediction),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    """A tiny teacher saved as any user's would be."""
    folder = tmp_path_factory.mktemp("teacher") / "pipeline"
    tiny_pipeline().save_pretrained(folder, safe_serialization=True)
    return folder


def saved(root, makers):
    """`root`, with a folder of each maker's pipeline by its name; the larger parts in several files, as a large model's are."""
    for name, maker in makers.items():
        maker().save_pretrained(root / name, safe_serialization=True, max_shard_size="20KB")
    return root


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    """Folder with a folder of each family's tiny teacher, and of the incomplete ones, saved as any user's would be."""
    from pipelines import INCOMPLETE, PIPELINES

    return saved(tmp_path_factory.mktemp("teachers"), PIPELINES | INCOMPLETE)


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a cat\na dog\na fish\na bird\na hat\n")
    return path


@pytest.fixture
def small_grid(monkeypatch):
    """A run's last picture shows one sample a prompt, and a teacher of two steps: drawing it takes as long as all its updates do here."""
    monkeypatch.setattr("fewstep.run.SAMPLES_PER_PROMPT", 1)
    monkeypatch.setattr("fewstep.evaluate.drawing.TEACHER_STEPS", 2)


@pytest.fixture
def in_float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
