"""CLIPScore and PickScore: how well a picture fits its prompt, by a transformers CLIP or SigLIP."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.rewards.base import PixelReward
from fewstep.rewards.files import read_model
from fewstep.rewards.pixels import DEFAULTS, Preprocess, read_preprocess
from fewstep.types import Sample, Signal

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase, SiglipModel

FAMILIES = {"clip": "CLIPModel", "siglip": "SiglipModel"}  # model_type in config.json -> class in transformers
PROCESSORS = tuple(DEFAULTS)  # what transformers calls those that resize, crop and normalise, in this order, and no more


class CLIPScore:
    """100 x cosine of image and text features (Hessel et al., arXiv 2104.08718), not clipped at zero: its gradient never dies.

    model: frozen and put into float32 and eval mode. preprocess: pictures (B, 3, H, W) in [0, 1] -> what the model reads.
    """

    reading: ClassVar[dict[str, Any]] = {}  # what the tokenizer is told beside

    def __init__(
        self, model: CLIPModel | SiglipModel, tokenizer: PreTrainedTokenizerBase, preprocess: Preprocess | Callable[[Tensor], Tensor]
    ):
        self.model = model.float().eval().requires_grad_(False)
        self.tokenizer, self.preprocess = tokenizer, preprocess

    @classmethod
    def load(cls, folder: str | Path, *, processor: str | Path | None = None, device: str | torch.device = "cpu") -> CLIPScore:
        """Read a folder with a CLIPModel or SiglipModel, its tokenizer and its preprocessing (preprocessor_config.json, or
        processor_config.json as transformers 5 writes it). processor: a folder with the last two, for a model that lacks them.

        Raises ValueError naming what is missing or, among the weights, not this model's.
        """
        import transformers

        config = read_config(Path(folder) / "config.json")
        if config.get("model_type") not in FAMILIES:
            raise ValueError(f"{folder} holds a {config.get('model_type')!r} model; this reward needs one of {', '.join(FAMILIES)}")
        beside = folder if processor_file(Path(folder)).is_file() or processor is None else processor
        family = FAMILIES[config["model_type"]]
        size = int(config.get("vision_config", {}).get("image_size", 224))
        preprocess = cls.read_preprocess(Path(beside), size, family.removesuffix("Model"))
        model = read_model(getattr(transformers, family), folder).to(device)
        with_words = folder if any(Path(folder).glob("tokenizer*")) else beside
        return cls(model, transformers.AutoTokenizer.from_pretrained(with_words, trust_remote_code=False), preprocess)

    @classmethod
    def read_preprocess(cls, folder: Path, size: int, kind: str = "CLIP") -> Any:
        """What the folder's image processor does. size: the edge of the pictures that the model reads. kind: what the processor is, of
        pixels.DEFAULTS, where its file does not say.

        Raises ValueError, naming the file, for one that leaves out a step that is taken here, or scales pixels otherwise.
        """
        path, config = read_processor(folder)
        other = [f"{key}: false" for key in ("do_resize", "do_rescale", "do_normalize") if config.get(key) is False]
        factor = config.get("rescale_factor")
        if factor is not None and not (isinstance(factor, (int, float)) and abs(factor * 255 - 1) < 1e-6):
            other.append(f"rescale_factor: {factor!r}")
        if other:
            raise ValueError(
                f"{path}: says {', '.join(other)}, but pictures are resized, scaled by 1/255 and normalised here; "
                "correct the file, or give a function that does all of it, path/to/file.py:function"
            )
        named = kind_of(config)
        try:
            return read_preprocess(config, size, named if named in DEFAULTS else kind)
        except KeyError as error:
            raise ValueError(f"{path}: needs image_mean, image_std and a resample of 2 or 3 (or none); stumbled over {error}") from error

    @property
    def scale(self) -> float:
        """What the cosine is multiplied by."""
        return 100.0

    @property
    def width(self) -> int:
        """d of the features. Asked of the model itself: CLIP and SigLIP keep it under other names."""
        with torch.no_grad():
            return self.image_features(torch.zeros(1, 3, 8, 8)).shape[1]

    @property
    def lowers(self) -> bool:
        """Whether prompts are read in lower case: SigLIP 2 was trained so, and its tokenizer, which is Gemma's, does not see to it."""
        return self.model.config.model_type == "siglip" and "Gemma" in type(self.tokenizer).__name__

    def image_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, d) of unit length, differentiable in the pixels."""
        images = images.to(self.model.device, torch.float32)
        return F.normalize(self.model.get_image_features(pixel_values=self.preprocess(images)).pooler_output, dim=1)

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> Tensor:
        """B prompts -> (B, d) of unit length, without gradient. Each different prompt is encoded once."""
        unique = list(dict.fromkeys(prompts))
        texts = [prompt.lower() for prompt in unique] if self.lowers else unique
        length = self.model.config.text_config.max_position_embeddings
        # SigLIP was trained on padded texts, sees what pads them and reads the last place; CLIP looks no further than its text's end
        padded = self.model.config.model_type == "siglip"
        tokens = self.tokenizer(
            texts, padding="max_length" if padded else True, truncation=True, max_length=length, return_tensors="pt", **self.reading
        ).to(self.model.device)
        output = self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=None if padded else tokens["attention_mask"])
        number = {prompt: i for i, prompt in enumerate(unique)}
        return F.normalize(output.pooler_output, dim=1)[[number[prompt] for prompt in prompts]]

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """scale x cosine of each picture and its own prompt, (B,), differentiable in the pixels."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures but {len(prompts)} prompts")
        return self.scale * (self.image_features(images) * self.text_features(prompts)).sum(1)

    def __call__(self, sample: Sample) -> Signal:
        return PixelReward(self.score, type(self).__name__)(sample)


class PickScore(CLIPScore):
    """exp(logit_scale) x cosine of a CLIPModel trained on preferences (Kirstain et al., arXiv 2305.01569)."""

    @property
    def scale(self) -> float:
        return float(self.model.logit_scale.exp())


def processor_file(folder: Path) -> Path:
    """The file of a folder that describes its image processor, which need not be there. Raises ValueError.

    Many a processor_config.json names a class and no more: then the description is in preprocessor_config.json.
    """
    path = folder / "processor_config.json"
    nested = path.is_file() and isinstance(read_config(path).get("image_processor"), dict)
    return path if nested else path.with_name("preprocessor_config.json")


def read_processor(folder: Path) -> tuple[Path, dict[str, Any]]:
    """What a folder says of its image processor, and the file that says it. Raises ValueError."""
    path = processor_file(folder)
    config = read_config(path)
    return path, config.get("image_processor", config)


def kind_of(config: dict[str, Any]) -> str:
    """What transformers calls the image processor that a file describes, without the words that all have in common: CLIP, Siglip, ViT."""
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type"))
    return re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", kind)


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError naming the file that cannot be read."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: cannot be read (not a JSON object)")
    return config
