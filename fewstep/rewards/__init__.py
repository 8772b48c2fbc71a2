"""Rewards. A named reward is one entry in this table; anything else is a function of the user's own or a server's URL."""

from __future__ import annotations

from typing import NamedTuple

CLIP_L = "openai/clip-vit-large-patch14@32bd64288804d66eefd0ccbe215aa642df71cc41"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K@1c2b8495b28150b8a4922ee1c8edee224c284c0c"


class Named(NamedTuple):
    """What is known of a reward before it is built."""

    what: str
    built_by: tuple[str, str] | None  # (module, class with `load(folder, device=...)`); None: only behind a server
    range: str
    memory: str  # of the weights alone, as they are held
    code: str  # licence
    weights: str  # licence
    model: str | None = None  # hub id and commit that it is read from when no scorer is named
    processor: str | None = None  # hub id and commit of tokenizer and preprocessing, where the model's own repository lacks them
    asset: str | None = None  # folder among the embedded world's assets
    clip: str | None = None  # hub id and commit of the CLIP that a published pickle of it belongs to (`fewstep convert-reward`)

    @property
    def differentiable(self) -> bool:
        """In process every one is; a server answers with scores alone."""
        return self.built_by is not None


REWARDS = {
    "clip": Named(
        "fit of picture and prompt: 100 x cosine of any transformers CLIP or SigLIP", ("fewstep.rewards.clip", "CLIPScore"),
        "-100 .. 100, mostly 15 .. 35", "1.7 GB (ViT-L/14, fp32)", "Apache-2.0", "the model's own (OpenAI's CLIP: MIT; SigLIP: Apache-2.0)",
        asset="clip", clip=CLIP_L,
    ),
    "pickscore": Named(
        "human preference, Pick-a-Pic: exp(logit scale) x cosine of a CLIP ViT-H/14", ("fewstep.rewards.clip", "PickScore"),
        "-100 .. 100, mostly 17 .. 24", "3.9 GB (fp32)", "MIT", "none stated on the model card (its base, LAION's CLIP-H: MIT)",
        model="yuvalkirstain/PickScore_v1@a4e4367c6dfa7288a00c550414478f865b875800", processor=CLIP_H, clip=CLIP_H,
    ),
    "hps": Named(
        "human preference, HPSv2 and HPSv2.1: cosine of a CLIP ViT-H/14", ("fewstep.rewards.hps", "HPS"),
        "-1 .. 1, mostly 0.2 .. 0.35", "3.9 GB (fp32)", "Apache-2.0", "Apache-2.0", clip=CLIP_H,
    ),
    "aesthetic": Named(
        "looks alone, no prompt: LAION's linear head on CLIP ViT-L/14", ("fewstep.rewards.aesthetic", "Aesthetic"),
        "about 1 .. 10, mostly 4 .. 7", "1.2 GB (fp32)", "Apache-2.0", "Apache-2.0 (its CLIP: MIT)", clip=CLIP_L,
    ),
    "preference": Named(
        "the embedded world's preference model, a PickScore of emoji", ("fewstep.rewards.clip", "PickScore"),
        "mostly 4 .. 5.5", "6 MB", "Apache-2.0", "Apache-2.0", asset="preference",
    ),
    "image-reward": Named(
        "human preference, ImageReward (BLIP)", None,
        "about -2.5 .. 2", "1.8 GB (fp32)", "Apache-2.0", "Apache-2.0",
    ),
    "hps3": Named(
        "human preference, HPSv3 (Qwen2-VL-7B)", None,
        "about -5 .. 15", "17 GB (bf16)", "MIT", "MIT as its package states (its base, Qwen2-VL-7B: Apache-2.0)",
    ),
}  # fmt: skip


def rows() -> list[list[str]]:
    """The table as `fewstep rewards` and docs/rewards.md show it, with its header."""
    header = ["reward", "what it scores", "where", "differentiable", "range", "memory", "licence of the code", "licence of the weights"]
    return [header] + [
        [name, r.what, "in process" if r.built_by else "server", "yes" if r.differentiable else "no", r.range, r.memory, r.code, r.weights]
        for name, r in REWARDS.items()
    ]
