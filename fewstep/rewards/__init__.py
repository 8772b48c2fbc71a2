"""Rewards. A named reward is one line in this table."""

from __future__ import annotations

# name -> (module, class with `load(folder)`, folder among the world's assets)
REWARDS = {
    "clip": ("fewstep.rewards.clip", "CLIPScore", "clip"),
    "preference": ("fewstep.rewards.clip", "PickScore", "preference"),
}
