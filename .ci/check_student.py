"""What a finished run must have left behind; the student is opened by stock diffusers with fewstep out of reach."""

import json
import sys
from pathlib import Path

sys.modules["fewstep"] = None  # importing it now fails

import torch
from diffusers import DiffusionPipeline
from PIL import Image

out = Path(sys.argv[1])
names = (
    "model_index.json", "samples.png", "curves.png", "metrics.jsonl", "README.md", "config.yaml", "checkpoints",
    "samples/update-00000002.png",
)  # fmt: skip
missing = [name for name in names if not (out / name).exists()]
assert not missing, f"missing: {missing}"
lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
assert [line["update"] for line in lines] == [1, 2, 3, 4], lines
assert min(Image.open(out / "samples.png").size) > 300
pipe = DiffusionPipeline.from_pretrained(out)
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
images = pipe("cat face", num_inference_steps=4, guidance_scale=1, generator=generator, output_type="pt").images
assert images.shape == (1, 3, 64, 64) and bool(torch.isfinite(images).all())
assert pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249], pipe.scheduler.timesteps
