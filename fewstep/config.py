"""Everything a run can be told. The field names are the flags and the recipe's keys."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, is_dataclass
from operator import attrgetter
from typing import Any, Literal

from fewstep.rewards.address import TIMEOUT
from fewstep.weights import START

RESERVED = {
    "dm": "distribution matching itself",
    **dict.fromkeys(("student", "teacher", "fake", "decoder"), "the passes of one of the run's own networks"),
    **dict.fromkeys(("weights", "rewards", "reuse", "policy", "evaluations"), "numbers of the run's own"),
}  # names that no reward can have, and what metrics.jsonl has under them
LAG_EVERY = 8  # rollouts from one measurement of the fake's lag to the next, where no adaptive weight follows it
# what may differ between a run and its continuation
FREE_ON_RESUME = ("updates", "teacher_guidance", "save_every", "sample_every", "evaluate", "device", "judge", "remote",
                  "memory.micro_groups", "memory.checkpointing", "compile")  # fmt: skip
OF_A_CALL = ("resume", "overwrite", "dry_run", "output")  # and not of the run
MOVABLE = ("teacher", "prompts", "scorer", "init", "discriminator.latents")  # what lies elsewhere by then may be the same
LIMITS = ("student.max_norm", "fake.max_norm", "weights.lag_limit", "weights.clip", "reuse.rho_max")  # infinite: no limit
POSITIVE, NO_LIMIT = (lambda v: v > 0, "be positive"), (lambda v: v > 0, "be positive (.inf: no limit)")
AT_LEAST_1, AT_LEAST_0 = (lambda v: v >= 1, "be at least 1"), (lambda v: v >= 0, "be 0 or more")
SHARE, BELOW_1 = (lambda v: 0 <= v <= 1, "lie in [0, 1]"), (lambda v: 0 <= v < 1, "lie in [0, 1)")
BETAS = (lambda v: all(0 <= beta < 1 for beta in v), "both lie in [0, 1)")
# what each number must be by itself; `problems` has what goes with what
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "teacher_guidance": (lambda v: v >= 1, "be 1, which is no guidance, or more"),
    "seed": (lambda v: 0 <= v < 2**32, "be from 0 to 2^32 - 1"),
    "steps": AT_LEAST_1, "updates": AT_LEAST_1, "group_size": AT_LEAST_1, "groups": AT_LEAST_1,
    "lora_rank": (lambda v: v >= 0, "be 0 (full weights) or more"), "save_every": AT_LEAST_1, "sample_every": AT_LEAST_0,
    "student.lr": POSITIVE, "student.betas": BETAS, "student.max_norm": NO_LIMIT, "student.decay": SHARE,
    "student.weight_decay": AT_LEAST_0, "student.ema": BELOW_1,
    "fake.lr": POSITIVE, "fake.betas": BETAS, "fake.max_norm": NO_LIMIT, "fake.decay": SHARE, "fake.updates": AT_LEAST_0,
    "matching.gamma": SHARE, "matching.shift": POSITIVE, "matching.draws": AT_LEAST_1,
    "reuse.rollout": AT_LEAST_1, "reuse.evaluation": AT_LEAST_1, "reuse.rho_max": AT_LEAST_1, "reuse.min_ess": SHARE,
    "weights.eta": POSITIVE, "weights.cap": (lambda v: v > START, f"be above {START}, where the weight starts"),
    "weights.lag_limit": AT_LEAST_0, "weights.clip": POSITIVE, "weights.max_masked": SHARE,
    "remote.timeout": (lambda v: 0 < v <= 86400, "be positive and at most a day (86400)"),
    "memory.micro_groups": (lambda v: v >= 0, "be 0 (all) or more"), "discriminator.lr": POSITIVE,
}  # fmt: skip


@dataclass
class StudentConfig:
    lr: float = 2e-4
    """Learning rate of the student (AdamW)."""
    decay: float = 1.0
    """Share of the run, at its end, over which the student's learning rate falls linearly to zero (0: constant)."""
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
    decay: float = 1.0
    """Share of the run, at its end, over which the learning rate of the fake, and of a discriminator, falls linearly to zero (0:
    constant). Falling with the student's, it lets the fake average over more of the student's outputs as they move less."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam betas of the fake, and of a discriminator."""
    updates: int = 4
    """Updates of the fake, and of a discriminator, per student update (two time-scale rule)."""
    on: Literal["all", "last"] = "all"
    """Whether the fake, and a discriminator, learns the student's predictions at all K steps or only the finished samples."""
    condition: Literal["step", "none"] = "step"
    """Whether the fake is told which of the student's steps made a sample."""
    max_norm: float = 1.0
    """Gradient norm above which the gradient of the fake, or of a discriminator, is scaled down."""


@dataclass
class MatchingConfig:
    guidance: float | tuple[float, float] = 2.5
    """Guidance scale of the teacher inside R_dm, 1 for none. It acts on densities at every noise level, which pulls harder than the same
    scale does in a sampler. One scale is distilled in and fixed; a range, as [1.5, 8], stays a knob: each group is drawn a scale of its own
    from it, student and fake are told which, and the student is called with guidance_scale (`fewstep models`: families with a range)."""
    negative_prompt: str = ""
    """Prompt that this guidance leads the teacher away from, here and in its own pictures; none: the empty one of its family. It is
    distilled in with the guidance: a student is sampled without either."""
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
    level_density: Literal["uniform", "logit-normal", "shifted"] = "uniform"
    """Where in t_range noise levels lie, for teacher, fake and the fake's training: evenly, most in the middle, or shifted towards noise;
    those drawn more often weigh more."""
    shift: float = 3.0
    """How far shifted levels are: t -> shift t / (1 + (shift - 1) t)."""
    draws: int = 1
    """Noise levels at which every sample is compared: a steadier direction, for three more network evaluations each."""
    score_weight: Literal["likelihood", "matching"] = "matching"
    """W of the score (4): matching is the value of R_dm that the direction ascends, but for normalize, gamma and guidance; likelihood is
    log p/q (very noisy)."""

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """(low, high) where the student keeps the guidance scale as a knob, None where one is distilled in."""
        return self.guidance if isinstance(self.guidance, tuple) else None

    def guidance_in_words(self) -> str:
        within = self.guidance_range
        return f"{self.guidance:g}" if within is None else f"from {within[0]:g} to {within[1]:g}"


@dataclass
class WeightsConfig:
    mode: Literal["fixed", "adaptive", "sum", "advantage"] = "fixed"
    """fixed: eq. (6) with the given weights; adaptive: eq. (7), the weights are shares; sum: raw gradients added (DMDR);
    advantage: rewards only scale R_dm's direction."""
    project: bool = False
    """Drop the part of each reward's direction that opposes R_dm's (fixed only)."""
    budget: float = 1.2
    """Adaptive: the KL allowed, as a multiple of the KL that distribution matching alone reaches."""
    warmup: int = 50
    """Adaptive: evaluations of R_dm (an update each, without reuse.evaluation) at weight 0 in which that KL is measured."""
    eta: float = 0.1
    """Adaptive: step of the log weight."""
    cap: float = 10.0
    """Adaptive: largest total weight."""
    lag_limit: float = 0.5
    """Adaptive: the weight does not grow while the fake's lag is above this share of the budget."""
    clip: float = 0.2
    """Clip range of the ratio of the policy gradient."""
    max_masked: float = 0.5
    """Largest share of a batch that a reward may fail to score before the run stops."""


@dataclass
class ReuseConfig:
    rollout: int = 1
    """Evaluations of R_dm that one rollout feeds (U), each from other states; 1 is a fresh rollout for each."""
    evaluation: int = 1
    """Student updates that one evaluation of the rewards serves (M): R_dm's with importance weights, eq. (8), and made anew where they
    degenerate; the other rewards' directions as they are."""
    weighted: bool = True
    """Weigh a reused evaluation by its importance ratio; false reuses it as it is (the rival to beat)."""
    rho_max: float = 2.0
    """Truncation of the importance weights."""
    min_ess: float = 0.5
    """Expected effective sample size of the weights, of the quarter of a batch's noise levels where it is smallest, under which R_dm's
    evaluation is not reused any more."""
    backward_simulation: bool = False
    """Fresh prompts simulated for every student and every fake update, keeping one state, as DMD2 does (a baseline)."""


@dataclass
class DiscriminatorConfig:
    lr: float = 1e-4
    """Learning rate of the discriminator's head (AdamW); all else of its training is as the fake's (`fake.*`)."""
    latents: str | None = None
    """Of real pictures: a folder of them, or a data set on the hub (owner/name[@revision][:split]), which the teacher's autoencoder encodes
    once for every size; or a safetensors file with `latents` (N, C, H, W). The world brings its own."""


@dataclass
class RemoteConfig:
    timeout: float = TIMEOUT
    """Seconds for one try of one request to a server that a reward or a judge stands behind, up to the last byte of its answer."""


@dataclass
class MemoryConfig:
    micro_groups: int = 0
    """Prompts whose samples pass through the networks together; an update is the same, its gradient added up over the parts of the
    batch (0: all at once)."""
    checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: a third more time, far less memory."""
    frozen: Literal["auto", "fp32", "bf16"] = "auto"
    """Numbers that hold what is not trained; auto is bf16 on a GPU that trains in bf16."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps AdamW's two moments in 2 bytes a parameter instead of 8 (bitsandbytes)."""
    teacher: Literal["exact", "int8"] = "exact"
    """int8: the teacher's linear layers in 8 bits (torchao); for full weights only."""


@dataclass
class Config:
    """A run"""

    teacher: str = "world"
    """A diffusers pipeline folder, a hub id (owner/name[@revision], else the newest), or `world`, the teacher that ships with fewstep."""
    prompts: str | None = None
    """File of prompts, such as a text with one a line or a csv with a column of captions, or a data set on the hub
    (owner/name[@revision][:split]); only the world brings its own."""
    output: str = "out"
    """Folder for the student and everything the run leaves behind."""
    init: str | None = None
    """Folder of another run on this teacher, or one of its checkpoints (RUN/checkpoints/step-XXXXXXXX), whose averaged student and fake
    this one begins with, to align a student that is distilled already, or to train it on with other settings; none: both begin as the
    teacher."""
    teacher_guidance: float = 3.0
    """Guidance scale of the teacher's own pictures, 1 for none, which the student is compared with. A student with a range
    (matching.guidance) is drawn and measured beside them at this scale too, or at the end of its range that lies nearest, and so is then
    its teacher."""
    steps: int = 4
    """Steps of the student."""
    size: list[str] = field(default_factory=list)
    """Sizes of the pictures, HEIGHTxWIDTH in pixels, which the rollouts take in turn; none: the teacher's own."""
    updates: int = 305
    """Student updates in all."""
    group_size: int = 2
    """Samples per prompt (G); eq. (5) takes its scale over them, and a reward by its score ranks them: for one it must be 2 or more."""
    groups: int = 32
    """Prompts per update (P); an update sees P x G samples."""
    lora_rank: int = 0
    """Rank of the LoRA adapters of student and fake; 0 trains full copies."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the networks in training (bf16: autocast, weights stay fp32); auto is bf16 where the hardware computes it faster."""
    save_every: int = 100
    """Updates between checkpoints."""
    sample_every: int = 100
    """Updates between sample grids (0: only the last)."""
    evaluate: bool = True
    """Measure the finished student beside its teacher."""
    resume: bool = False
    """Go on from the newest checkpoint in the output folder."""
    overwrite: bool = False
    """Delete what the output folder holds and start anew."""
    dry_run: bool = False
    """Print what the run will need (memory, operations, disk) and what to change if it does not fit; read no weights, write nothing."""
    student: StudentConfig = field(default_factory=StudentConfig)
    """The student's optimizer."""
    fake: FakeConfig = field(default_factory=FakeConfig)
    """The fake and its optimizer; all but lr and condition are a discriminator's too."""
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    """R_dm, distribution matching as a reward."""
    reward: dict[str, float] = field(default_factory=dict)
    """Other rewards: name -> weight (or share, when adaptive), as `--reward.clip 0.3`; `fewstep rewards` lists the named ones."""
    via: dict[str, Literal["pathwise", "policy"]] = field(default_factory=dict)
    """How a reward reaches the student: its gradient through the decoder (pathwise, the default in process), or its score by clipped
    policy gradient (the default of a server, which has no gradient)."""
    scorer: dict[str, str] = field(default_factory=dict)
    """Where a reward comes from: a folder or a hub id (owner/name@commit) with the weights of a named one (the world brings its own),
    path/to/file.py:function (by your own flag, never from a recipe), or a server's address."""
    judge: dict[str, str | None] = field(default_factory=dict)
    """Held-out judges: scored beside the rewards once a rollout and never trained on, as `--judge.hps FOLDER`; named and found as rewards
    and scorers are. One with the name of a reward stands beside that one, any other beside all; an alarm tells when a reward still rises
    and its judge falls. `held-out` is the embedded world's own twin of clip (another CLIP) and of preference (the gold utility)."""
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    """Rewards and judges behind a server."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    """How the other rewards join R_dm."""
    reuse: ReuseConfig = field(default_factory=ReuseConfig)
    """What is used more than once."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """What a run trades for memory."""
    compile: bool = False
    """Compile the networks' repeated blocks (torch.compile): slow first updates, faster ones after."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """The discriminator, when `--reward.discriminator` is given (DMD2)."""

    def shown_guidance(self) -> float:
        """The scale of the pictures in which the teacher is shown and measured: inside the student's range, where it has one."""
        within = self.matching.guidance_range
        return self.teacher_guidance if within is None else min(max(self.teacher_guidance, within[0]), within[1])

    def shown_negative_prompt(self) -> str:
        """The prompt that those pictures are guided away from; "" where it is the family's empty one, or they are not guided."""
        return self.matching.negative_prompt if self.shown_guidance() != 1 else ""

    def student_guidance(self) -> float | None:
        """The scale that the student is told in its pictures beside them; None where one is distilled in."""
        return None if self.matching.guidance_range is None else self.shown_guidance()

    def not_finite(self) -> dict[str, Any]:
        """Dotted name -> value of every number that is NaN or infinite, but for the limits that infinity switches off."""

        def walk(node: Any, name: str) -> dict[str, Any]:
            if isinstance(node, dict):
                return {k: v for key, value in node.items() for k, v in walk(value, f"{name}.{key}" if name else key).items()}
            if isinstance(node, (list, tuple)):
                return {name: node} if any(walk(value, name) for value in node) else {}
            fine = not isinstance(node, float) or math.isfinite(node) or (node == math.inf and name in LIMITS)
            return {} if fine else {name: node}

        return walk(asdict(self), "")

    def lasting(self) -> dict[str, Any]:
        """Dotted name -> value, as JSON holds it, of what a checkpoint is of: all that may not change but for what can move."""
        plain, found = json.loads(json.dumps(asdict(self))), {}
        for key, value in plain.items():
            found |= {f"{key}.{name}": inner for name, inner in value.items()} if is_dataclass(getattr(self, key)) else {key: value}
        return {name: v for name, v in found.items() if {name, name.partition(".")[0]}.isdisjoint((*FREE_ON_RESUME, *OF_A_CALL, *MOVABLE))}

    def sizes(self) -> list[tuple[int, int] | None]:
        """(height, width) of each size; None is the teacher's own. Raises ValueError naming what is not HEIGHTxWIDTH."""
        found: list[tuple[int, int] | None] = []
        for text in self.size:
            height, cross, width = text.partition("x")
            if not (cross and height.isdecimal() and width.isdecimal()):
                raise ValueError(f"HEIGHTxWIDTH, as 1024x768; got {text!r}")
            found.append((int(height), int(width)))
        return found or [None]

    def batches(self) -> int:
        """Batches of prompts that the run takes at most: one a rollout, and in backward simulation one for each update of a network that
        learns along, the fake and the discriminator."""
        learning = 1 + ("discriminator" in self.reward)
        return self.updates * (1 + learning * self.fake.updates if self.reuse.backward_simulation else 1)

    def problems(self) -> list[str]:
        """What is wrong with the values, one line a key: what is out of its range, then what does not go with the others."""
        low, high = self.matching.t_range
        within = self.matching.guidance_range
        least = self.matching.guidance if within is None else within[0]
        weights, mode, backward = self.weights, self.weights.mode, self.reuse.backward_simulation
        policies = ", ".join(name for name, via in self.via.items() if via == "policy")
        checks = [
            (least >= 1, "matching.guidance", f"must be 1, which is no guidance, or more, got {self.matching.guidance}"),
            (
                least < 1 or within is None or within[0] < within[1],
                "matching.guidance", f"a range runs from a lower scale to a higher one, got {self.matching.guidance}",
            ),
            (
                not self.matching.negative_prompt or self.matching.guidance != 1,
                "matching.negative_prompt", "nothing is guided away from it at guidance 1: set matching.guidance, or leave it out",
            ),
            (0 < low < high <= 1, "matching.t_range", f"must satisfy 0 < low < high <= 1, got {low}, {high}"),
            (not self.matching.leave_one_out or self.group_size > 1, "matching.leave_one_out", "needs group_size of at least 2"),
            (
                not self.matching.leave_one_out or self.matching.normalize in ("group", "batch"),
                "matching.leave_one_out",
                f"needs a scale that several samples share, matching.normalize group or batch, not {self.matching.normalize}",
            ),
            (self.matching.draws == 1 or not self.matching.leave_one_out, "matching.draws", "must be 1 with matching.leave_one_out"),
            (
                self.matching.draws == 1 or self.reuse.evaluation == 1 or not self.reuse.weighted,
                "matching.draws",
                "must be 1 where an evaluation is reused with weights: eq. (8) weighs one draw",
            ),
            (not (self.resume and self.overwrite), "resume", "cannot be combined with overwrite"),
            (not backward or self.reuse.rollout == 1, "reuse.rollout", "backward simulation makes fresh rollouts: it cannot reuse one"),
            (not (backward and policies), "via", "a policy gradient needs whole rollouts: not with reuse.backward_simulation"),
            (not backward or mode != "adaptive", "weights.mode", "adaptive needs the lag between rollouts: no backward simulation"),
            (
                not (policies and self.steps == 1),
                "via", f"policy ({policies}): a one-step student has no stochastic step; use 2 steps or more, or leave it out: for a "
                "reward with a gradient, and for one without under weights.mode advantage",
            ),
            (mode not in ("sum", "advantage") or not policies, "via", f"policy is for fixed and adaptive weights, not {mode}"),
            (
                not (policies and self.group_size == 1),
                "group_size", f"policy ({policies}) ranks the samples of a group by their scores: it needs 2 or more",
            ),
            (
                not (mode == "advantage" and self.reward and self.group_size == 1),
                "group_size", "weights.mode advantage ranks the samples of a group by their scores: it needs 2 or more",
            ),
            *(
                (name not in RESERVED, f"reward.{name}", f"metrics.jsonl has {RESERVED.get(name)} under this name; give the reward another")
                for name in self.reward
            ),
            (mode != "adaptive" or any(self.reward.values()), "reward", "adaptive shares out its weight: add --reward.NAME SHARE"),
            (all(weight >= 0 for weight in self.reward.values()), "reward", "weights must not be negative"),
            (self.via.keys() <= self.reward.keys(), "via", f"names {sorted(self.via.keys() - self.reward.keys())}, not in reward"),
            (self.scorer.keys() <= self.reward.keys(), "scorer", f"names {sorted(self.scorer.keys() - self.reward.keys())}, not in reward"),
            (not self.judge or any(name != "discriminator" for name in self.reward), "judge", "nothing to judge: add --reward.NAME WEIGHT"),
            (weights.budget >= 1, "weights.budget", f"below 1 it lies under the KL that R_dm alone reaches, got {weights.budget}"),
            (
                mode != "adaptive" or (weights.warmup >= 1 and weights.warmup * self.reuse.evaluation < self.updates),
                "weights.warmup", f"counts evaluations of R_dm, each of up to reuse.evaluation updates: it must be at least 1 and end "
                f"before update {self.updates}, got {weights.warmup} x {self.reuse.evaluation}; until then no other reward has weight",
            ),
            (
                self.fake.on == "all" or self.fake.condition == "none" or self.steps == 1,
                "fake.on", "last leaves the fake untrained at every other step that it is conditioned on: set fake.condition to none",
            ),
            (not weights.project or mode == "fixed", "weights.project", f"is for fixed weights, not {mode}"),
            (
                not self.lora_rank or self.memory.teacher == "exact",
                "memory.teacher", "int8 needs full weights (lora_rank 0): LoRA shares the base",
            ),
            (self.via.get("discriminator") != "policy", "via.discriminator", "its gradient is what it gives: pathwise, not policy"),
        ]  # fmt: skip
        infinite = self.not_finite()
        found = [f"{key}: must be a finite number, got {value}" for key, value in infinite.items()]
        for key, (fine, words) in RANGES.items():
            value = attrgetter(key)(self)
            if key not in infinite and not fine(value):
                found.append(f"{key}: must {words}, got {value}")
        return found + [f"{key}: {message}" for fine, key, message in checks if not fine and key not in infinite]
