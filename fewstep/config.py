"""Everything a run can be told. The field names are the flags and the recipe's keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class StudentConfig:
    lr: float = 5e-5
    """Learning rate of the student (AdamW)."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam betas of the student."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the student."""
    ema: float = 0.98
    """Decay of the exponential moving average that is exported."""
    max_norm: float = 1.0
    """Gradient norm above which the student's gradient is scaled down."""


@dataclass
class FakeConfig:
    lr: float = 3e-4
    """Learning rate of the fake (AdamW)."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam betas of the fake."""
    updates: int = 2
    """Fake updates per student update (two time-scale rule)."""
    condition: Literal["step", "none"] = "step"
    """Whether the fake is told which of the student's steps made a sample (method, section 6)."""
    max_norm: float = 1.0
    """Gradient norm above which the fake's gradient is scaled down."""


@dataclass
class MatchingConfig:
    guidance: float = 3.0
    """Guidance scale of the teacher that the student learns from."""
    normalize: Literal["group", "sample", "batch", "channel", "none"] = "group"
    """What eq. (5) divides by: group is GNDM, sample is DMD."""
    leave_one_out: bool = False
    """Take the group's scale over the other members only."""
    gamma: float = 0.0
    """Exponent of the explicit noise-level weight n(t)^-gamma."""
    t_range: tuple[float, float] = (0.02, 0.98)
    """Noise levels at which teacher and fake are compared."""
    levels: Literal["stratified", "uniform"] = "stratified"
    """How a group's noise levels are drawn."""


@dataclass
class Config:
    teacher: str = "world"
    """A diffusers pipeline folder, a hub id, or `world`, the teacher that ships with fewstep."""
    prompts: str | None = None
    """Text file with one prompt a line; only the world brings its own."""
    output: str = "out"
    """Folder for the student and everything the run leaves behind."""
    steps: int = 4
    """Steps of the student."""
    updates: int = 190
    """Student updates in all."""
    group_size: int = 4
    """Samples per prompt (G); eq. (5) takes its scale over them."""
    groups: int = 16
    """Prompts per update (P); an update sees P x G samples."""
    rollout_updates: int = 1
    """Student updates that one rollout feeds (U), each from other states; 1 is a fresh rollout for each."""
    lora_rank: int = 0
    """Rank of the LoRA adapters of student and fake; 0 trains full copies."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the networks in training (bf16: autocast, weights stay fp32); auto is bf16 where the hardware computes it."""
    save_every: int = 50
    """Updates between checkpoints."""
    sample_every: int = 50
    """Updates between sample grids (0: only the last)."""
    evaluate: bool = True
    """Measure the finished student beside its teacher."""
    resume: bool = False
    """Go on from the newest checkpoint in the output folder."""
    overwrite: bool = False
    """Delete what the output folder holds and start anew."""
    student: StudentConfig = field(default_factory=StudentConfig)
    """The student's optimizer."""
    fake: FakeConfig = field(default_factory=FakeConfig)
    """The fake and its optimizer."""
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    """R_dm, distribution matching as a reward."""

    def problems(self) -> list[str]:
        """What is wrong with the values, one line a key."""
        low, high = self.matching.t_range
        checks = [
            (self.steps >= 1, "steps", f"must be at least 1, got {self.steps}"),
            (self.updates >= 1, "updates", f"must be at least 1, got {self.updates}"),
            (self.group_size >= 1, "group_size", f"must be at least 1, got {self.group_size}"),
            (self.groups >= 1, "groups", f"must be at least 1, got {self.groups}"),
            (self.rollout_updates >= 1, "rollout_updates", f"must be at least 1, got {self.rollout_updates}"),
            (self.lora_rank >= 0, "lora_rank", f"must be 0 (full weights) or more, got {self.lora_rank}"),
            (self.save_every >= 1, "save_every", f"must be at least 1, got {self.save_every}"),
            (self.sample_every >= 0, "sample_every", f"must be 0 or more, got {self.sample_every}"),
            (self.student.lr > 0, "student.lr", f"must be positive, got {self.student.lr}"),
            (0 <= self.student.ema < 1, "student.ema", f"must lie in [0, 1), got {self.student.ema}"),
            (self.fake.lr > 0, "fake.lr", f"must be positive, got {self.fake.lr}"),
            (self.fake.updates >= 0, "fake.updates", f"must be 0 or more, got {self.fake.updates}"),
            (0 <= self.matching.gamma <= 1, "matching.gamma", f"must lie in [0, 1], got {self.matching.gamma}"),
            (0 < low < high <= 1, "matching.t_range", f"must satisfy 0 < low < high <= 1, got {low}, {high}"),
            (not self.matching.leave_one_out or self.group_size > 1, "matching.leave_one_out", "needs group_size of at least 2"),
            (not (self.resume and self.overwrite), "resume", "cannot be combined with overwrite"),
        ]  # fmt: skip
        return [f"{key}: {message}" for fine, key, message in checks if not fine]
