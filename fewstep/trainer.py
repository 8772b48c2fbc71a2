"""The loop. It receives built objects and never names a particular reward."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from fewstep import checkpoint, importance, losses
from fewstep.alarms import FROM_BEFORE, Watch
from fewstep.config import LAG_EVERY, Config
from fewstep.cost import in_passes
from fewstep.denoiser import Cond, Denoiser, widened
from fewstep.errors import NumericalError, RewardError
from fewstep.metrics import MetricsLog, health, known, ratios_of, rms, spread_of
from fewstep.prompts import Batches
from fewstep.ranks import Ranks
from fewstep.rewards.base import OnlineReward, Reward, asked, checked
from fewstep.rewards.heldout import HeldOut, Parting
from fewstep.student import Student
from fewstep.transforms import advantages, group_mean, modulate, pull
from fewstep.types import Rollout, Sample, Signal, Term
from fewstep.weights import Adaptive, Fixed

Parameters = dict[str, nn.Parameter]
RATES = "student.lr or fake.lr"  # of the networks that R_dm compares
NEVER_REUSED = 20  # evaluations refused a second use, and not one allowed, after which a run says so


@dataclass
class Block:
    """One evaluation of the rewards, kept for the student updates that it serves. R_dm's may be made anew before the others'."""

    k: Tensor  # (B,) state of each sample
    xk: Tensor  # (B, C, H, W)
    x0: Tensor  # (B, C, H, W), the student's prediction when the rewards were evaluated
    anchor: Tensor  # (B, C, H, W), R_dm's direction: what an importance weight multiplies
    extra: Tensor | None  # (B, C, H, W), the other rewards' part: it belongs to x0, not to xt, and is reused unweighted
    xt: Tensor | None  # (B, C, H, W), where R_dm was evaluated; without it there is nothing to weigh
    t: Tensor | None  # (B,)
    served_anchor: int = 0  # updates that R_dm's part has served
    served: int = 0  # updates that the other rewards' part has


class Predicted(NamedTuple):
    """The student's x0 of a batch."""

    whole: Tensor  # (B, C, H, W), without its graph
    own: Tensor | None  # this process's rows with their graph; None where they are several parts: an update predicts each of them again


def finite_or_stop(value: Tensor, what: str, update: int, advice: str) -> None:
    """NaN or inf stops the run before anything is updated with it: raises NumericalError that says what to do."""
    if not bool(torch.isfinite(value).all()):
        was = value.item() if value.numel() == 1 else "not finite"
        raise NumericalError(f"{what} is {was} at update {update}; nothing was updated with it. {advice}")


def learning_rate(lr: float, progress: float, decay: float) -> float:
    """lr, falling linearly to zero over the last `decay` share of the run; progress in [0, 1)."""
    return lr if decay == 0 else lr * min(1.0, max(0.0, 1 - progress) / decay)


def at_steps(per_step: Tensor, k: Tensor) -> Tensor:
    """Of values at every step (K, B, ...) each sample's at its own k (B,), (B, ...)."""
    return per_step[k, torch.arange(len(k), device=k.device)]


def last_step(rollout: Rollout) -> Tensor:
    """The last step that a rollout has reached, for each sample (B,)."""
    return torch.full_like(rollout.group, len(rollout.states) - 1)


def optimizer_class(name: str) -> Any:
    """AdamW, or its 8-bit version from bitsandbytes. Raises ImportError naming what to install."""
    if name == "adamw":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError('memory.optimizer adamw8bit needs bitsandbytes: pip install "fewstep[lowmem]"') from error
    return AdamW8bit


class Trainer:
    """Distils `student` along the directions of `terms`.

    encode: prompts -> conditions, one row each; where matching.guidance is a range, (prompts, scales (B,)) -> those that tell each its
    scale. decode: latents -> images; latent_shapes: (C, H, W) of each size, which the rollouts take in turn; weights: how the terms other
    than the anchor join it, one for each (ValueError naming one without);
    counted: denoisers by role and whatever else counts its passes, logged. judges: functions of (images, prompts) that score what the
    rewards score, once a rollout, and push nothing: one with the name of a reward stands beside that one, any other beside all of them.
    news: what happened since it was last asked, by name, logged after each update. ranks: the processes that share the run's batches, whole
    groups each (ValueError where they cannot share them evenly); the first one logs and saves. Raises ValueError also for a one-step
    student where a term goes by policy gradient.
    One cycle: a rollout without gradient, then `reuse.rollout` evaluations of the rewards at its states (in turn: up to K evaluations see
    each state once, more come round again) at fresh noise levels, each serving up to `reuse.evaluation` student updates; after each
    evaluation's updates the online rewards learn the rollout's predictions, `updates` times for every student update.
    """

    def __init__(
        self,
        student: Student,
        parameters: Parameters,
        terms: dict[str, Term],
        batches: Batches,
        *,
        encode: Callable[..., Cond],
        decode: Callable[[Tensor], Tensor],
        latent_shapes: Sequence[tuple[int, int, int]],
        config: Config,
        device: torch.device | str = "cpu",
        weights: Fixed | Adaptive | None = None,
        counted: dict[str, Any] | None = None,
        judges: dict[str, Callable[[Tensor, list[str]], Any]] | None = None,
        news: dict[str, Callable[[], dict[str, float]]] | None = None,
        ranks: Ranks | None = None,
    ):
        self.student, self.parameters, self.terms, self.batches = student, parameters, terms, batches
        self.encode, self.decode, self.latent_shapes = encode, decode, latent_shapes
        self.config, self.device = config, torch.device(device)
        self.ranks = ranks or Ranks()
        self.turns = itertools.count()  # in which processes had random numbers of their own
        if batches.groups % self.ranks.size:
            raise ValueError(f"{batches.groups} groups cannot be shared evenly by {self.ranks.size} processes")
        self.ranks.broadcast([*parameters.values(), *(p for term in terms.values() for p in (term.parameters or {}).values())])
        if self.ranks.size > 1:  # what the processes drew until now need not be the same
            started = checkpoint.rng_state(self.device)
            self.ranks.broadcast(list(started.values()))
            checkpoint.set_rng_state(started, self.device)
        own = config.student
        adamw = optimizer_class(config.memory.optimizer)
        self.optimizer = adamw(parameters.values(), lr=own.lr, betas=own.betas, weight_decay=own.weight_decay)
        self.ema = EMAModel(list(parameters.values()), decay=own.ema, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        self.online = {
            name: adamw(term.parameters.values(), lr=term.lr, betas=term.betas, weight_decay=0.0)
            for name, term in terms.items()
            if term.parameters is not None
        }
        self.update, self.rollouts = 0, 0  # rollouts that the student was trained on, the present one among them
        anchors = [name for name, term in terms.items() if term.anchor]
        if len(anchors) != 1:
            raise ValueError(f"exactly one term is the anchor, got {', '.join(anchors) or 'none'}")
        (self.anchor,) = anchors
        self.weights = weights or Fixed({})
        self.lag_every = 1 if isinstance(self.weights, Adaptive) else LAG_EVERY  # it costs an update two passes in nineteen or so
        unweighted = [name for name, term in terms.items() if not term.anchor and name not in self.weights.now()]
        if unweighted:
            raise ValueError(f"no weight for the term {', '.join(unweighted)}: a term other than the anchor joins it by one of `weights`")
        self.counted = counted or ({"student": student.denoiser} if isinstance(student.denoiser, Denoiser) else {})
        self.news = news or {}
        self.rollout: Rollout | None = None
        self.earlier: dict[int, Rollout] = {}  # the last of each other size, by its place in `latent_shapes`
        self.fed = 0  # evaluations that have been made of the current rollout
        self.block: Block | None = None
        self.advantages: dict[str, Tensor] = {}  # (B,) of the current rollout, by reward, for policy gradients
        self.old_log_prob: Tensor | None = None  # (B, K-1) of the current rollout, once a policy gradient has been taken of it
        self.judges: dict[str, Reward] = {name: HeldOut(function, f"judge.{name}") for name, function in (judges or {}).items()}
        # a discriminator's score is of its own network's making: no judge stands beside it
        judged = [name for name, term in terms.items() if not term.anchor and term.parameters is None]
        self.partings = {(name, judge): Parting() for name in judged for judge in self.judges if judge == name or judge not in judged}
        policies = dict.fromkeys((name for name, term in terms.items() if term.via == "policy"), "policy")
        if policies and student.steps == 1:
            raise ValueError(f"a one-step student is deterministic: no policy gradient for the term {', '.join(policies)}; use pathwise")
        self.alarms = Watch({self.anchor: "anchor"} | policies)
        self.running: dict[str, float] = {}
        self.denoisers = [denoiser for denoiser in self.counted.values() if isinstance(denoiser, Denoiser)]
        for denoiser in self.denoisers:
            denoiser.micro_batch = config.memory.micro_groups * config.group_size

    # -- one update ------------------------------------------------------------------------------------------------

    def against_nan(self, rates: str) -> str:
        """What to do about a number that is not finite of the student, or of what it is held to. rates: those that may have made it."""
        finer = "" if self.config.precision == "fp32" else ", or try --precision fp32"
        if self.update:
            return f"Lower {rates}" + (f"; where it is the teacher's, look at its weights{finer}" if rates == RATES else "")
        # the conditions are finite (`Embeddings`), and no rate has had a part in it yet
        began = f"the teacher {self.config.teacher}" if self.config.init is None else f"the student of {self.config.init}"
        return f"Nothing has been trained yet: look at the weights of {began}{finer}"

    def progress(self) -> float:
        """Share of the run that is over, in [0, 1)."""
        return self.update / self.config.updates

    def precision(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.config.precision == "bf16" else nullcontext()

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Within, passes without gradient take a whole batch and are shared out among the processes."""
        for denoiser in self.denoisers:
            denoiser.ranks = self.ranks if self.ranks.size > 1 else None
        try:
            yield
        finally:
            for denoiser in self.denoisers:
                denoiser.ranks = None

    def size_of(self, number: int) -> int:
        """Which of `latent_shapes` the rollout of this number has, counted from 0: they take the sizes in turn."""
        return number % len(self.latent_shapes)

    def new_rollout(self, until: int | None = None, *, number: int | None = None) -> Rollout:
        """A rollout of the next prompts from fresh noise, up to state `until` or the last; of the size that comes next, or of that of the
        rollout of this number. Raises NumericalError where the student predicts what is not finite, before any reward sees it."""
        prompts, group = self.batches.next()
        cond = self.conditions(prompts, self.draw_guidance(group))
        place = self.size_of(self.rollouts if number is None else number)
        noise = torch.randn(len(prompts), *self.latent_shapes[place], device=self.device)
        with self.precision(), self.sharing():
            rollout = self.student.rollout(noise, cond, group=group.to(self.device), prompts=prompts, until=until)
        finite_or_stop(rollout.x0, "the student's prediction", self.update, self.against_nan("student.lr"))  # its states are made of it
        return rollout

    def draw_guidance(self, group: Tensor) -> Tensor | None:
        """A guidance scale for each sample (B,) float64, one for all of its group; None where one is distilled in. group (B,)."""
        within = self.config.matching.guidance_range
        if within is None:
            return None
        low, high = within
        return (low + (high - low) * torch.rand(self.batches.groups, dtype=torch.float64))[group]

    def conditions(self, prompts: list[str], guidance: Tensor | None) -> Cond:
        """Conditions on the device, one row a prompt, each told its scale where there are scales (B,)."""
        cond = self.encode(prompts) if guidance is None else self.encode(prompts, guidance)
        return {key: value.to(self.device) for key, value in cond.items()}

    def sample_of(self, rollout: Rollout, k: Tensor, x0: Tensor | None = None) -> Sample:
        """The batch with sample i taken at state k_i; where steps are mixed, a group is (prompt, k)."""
        x0 = at_steps(rollout.x0, k) if x0 is None else x0
        group = rollout.group * self.student.steps + k
        t_k = self.student.t(k, len(k), self.device)
        return Sample(x0, t_k, rollout.cond, rollout.prompts, group, k=k, decode=self.decode)

    def parts(self, size: int) -> list[slice]:
        """Rows of a batch of `size` that pass through this process's networks together, whole groups each (memory.micro_groups)."""
        own = self.ranks.rows(size)
        most = self.config.memory.micro_groups * self.config.group_size or size
        return [slice(at, min(at + most, own.stop)) for at in range(own.start, own.stop, most)]

    def predict(self, rollout: Rollout, xk: Tensor, k: Tensor) -> Predicted:
        """The student's x0 of a batch xk (B, C, H, W), each process's rows by its own networks."""
        rows = self.ranks.rows(len(k))
        own = self.predict_rows(rollout.rows(rows), xk[rows], k[rows], grad=len(self.parts(len(k))) == 1)
        whole = self.ranks.all_gather(own.detach())
        finite_or_stop(whole, "the student's prediction", self.update, self.against_nan("student.lr"))
        return Predicted(whole, own if own.requires_grad else None)

    def predict_rows(self, rollout: Rollout, xk: Tensor, k: Tensor, *, grad: bool = True) -> Tensor:
        with self.precision(), torch.set_grad_enabled(grad):
            return widened(self.student.predict(xk, k, rollout.cond))

    def student_x0(self, rollout: Rollout, xk: Tensor, k: Tensor, *, fresh: bool) -> Predicted:
        """The student's x0 where it is evaluated. An update of several parts predicts each of them again, for its graph, so that here a
        fresh rollout's own numbers serve, which are of the same weights."""
        if fresh and len(self.parts(len(k))) > 1:
            return Predicted(widened(at_steps(rollout.x0, k)), None)
        return self.predict(rollout, xk, k)

    def evaluate(self, rollout: Rollout, lag: float | None) -> tuple[Block, Predicted, dict[str, float]]:
        """Ask every reward about the student's predictions; returns what its updates need, the predictions, and the logs."""
        k = self.evaluated_steps(rollout)
        xk, fresh = at_steps(rollout.states, k), self.fed == 0
        x0 = self.student_x0(rollout, xk, k, fresh=fresh)
        others = {name: term.reward for name, term in self.terms.items() if term.via == "pathwise" and not term.anchor}
        # R_dm brings its own gradient; the rewards beside it may need one in x0, but for those that only scale R_dm's direction
        wanted = bool(others) and self.config.weights.mode != "advantage"
        sample = self.sample_of(rollout, k, x0.whole.detach().requires_grad_(wanted))
        anchor, at, logs = self.ask_anchor(sample, lag)
        with self.precision():
            signals, judged = self.ask_with_judges(others, sample) if fresh else (self.ask_in_parts(others, sample), {})
        anchor, extra, more = self.combine(anchor, signals, sample.group)
        return Block(k, xk, x0.whole, anchor, extra, at.xt, at.t), x0, logs | judged | more

    def evaluated_steps(self, rollout: Rollout) -> Tensor:
        """The step at which each sample is evaluated, (B,): the last of a simulation, else one for every prompt's group, in turn over a
        rollout's evaluations: up to K see each state once."""
        if self.config.reuse.backward_simulation:
            return last_step(rollout)
        turn = math.ceil(self.rollouts / len(self.latent_shapes))  # among those of its size, so that each size goes through every step
        return (rollout.group + self.fed + turn) % self.student.steps

    def ask_anchor(self, sample: Sample, lag: float | None) -> tuple[Tensor, Signal, dict[str, float]]:
        """(R_dm's direction (B, C, H, W), its whole signal, logs); the weights of the other rewards hear its score."""
        name = self.anchor
        try:
            with self.precision(), self.sharing():
                at = checked(name, self.terms[name].reward(sample), sample)
        except NumericalError as error:  # it names the network, which knows of no update
            advice = self.against_nan(RATES)
            raise NumericalError(f"{error} at update {self.update}; nothing was updated with it. {advice}") from error
        if at.direction is None:
            raise RewardError(f"{name} is the anchor and gave no direction")
        finite_or_stop(at.direction, f"the direction of {name}", self.update, self.against_nan(RATES))
        logs = {f"{name}/direction_rms": rms(at.direction)}
        if at.magnitude is not None:  # latents that collapse, or a teacher that reproduces them, make the scale of eq. (5) vanish
            logs[f"{name}/scale_min"] = float(group_mean(at.magnitude, sample.group).min())
        if at.moments is not None:
            logs |= {f"{name}/{key}": value for key, value in health(at.moments).items()}
        if at.score is not None:
            logs[f"{name}/score"] = float(at.score.mean())
            logs |= {f"weights/{key}": value for key, value in self.weights.observe(logs[f"{name}/score"], lag).items()}
        return at.direction, at, logs

    def ask_anchor_again(self, rollout: Rollout, block: Block, x0: Tensor) -> dict[str, float]:
        """R_dm's part of a block, made anew at the same states where the student is now, x0 (B, C, H, W); the others' part stays."""
        sample = self.sample_of(rollout, block.k, x0)
        block.anchor, at, logs = self.ask_anchor(sample, None)
        block.x0, block.xt, block.t, block.served_anchor = sample.x0, at.xt, at.t, 0
        return logs

    def ask_in_parts(self, rewards: dict[str, Reward], sample: Sample) -> dict[str, Signal]:
        """What rewards say of a sample, part by part, each part's pictures decoded once for all of them, each process asking its own."""
        if not rewards:
            return {}
        found: dict[str, list[Signal]] = {name: [] for name in rewards}
        parts, size = self.parts(len(sample.group)), len(sample.group)
        drawn = {name: reward.draw_for_call(sample) for name, reward in rewards.items() if hasattr(reward, "draw_for_call")}
        with self.ranks.own_random(self.device, next(self.turns)):
            for rows in parts:
                piece = sample if rows == slice(0, size) else sample.rows(rows)
                for name, reward in rewards.items():
                    own = {key: value[rows] for key, value in drawn.get(name, {}).items()}
                    found[name].append(asked(name, reward, piece, **own))

        given = {
            name: [all(value is not None for value in values) for values in zip(*signals, strict=True)] for name, signals in found.items()
        }
        of_all = self.ranks.all_gather_object(given)  # decided together: no process gathers alone
        whole = {name: [all(values) for values in zip(*(one[name] for one in of_all), strict=True)] for name in found}

        def joined(values: tuple[Any, ...], there: bool) -> Tensor | None:
            return self.ranks.all_gather(torch.cat(values)) if there else None

        return {name: Signal(*map(joined, zip(*signals, strict=True), whole[name])) for name, signals in found.items()}

    def ask_with_judges(self, rewards: dict[str, Reward], sample: Sample) -> tuple[dict[str, Signal], dict[str, float]]:
        """(what rewards say of a sample, logs of what their judges say of the same pictures)."""
        beside = {judge: self.judges[judge] for name, judge in self.partings if name in rewards}
        # judges come last: the picture is decoded with its graph for those that need one
        found = self.ask_in_parts(rewards | {f"judge.{name}": judge for name, judge in beside.items()}, sample)
        judged = {name: found.pop(f"judge.{name}").score for name in beside}
        logs: dict[str, float] = {}
        for (name, judge), parting in self.partings.items():
            if name not in rewards or found[name].score is None:
                continue
            both = torch.stack([found[name].score.detach().double(), judged[judge].double()])
            both = both[:, torch.isfinite(both).all(0)]
            if not both.numel():
                continue
            trained, held_out = both.mean(1).tolist()
            logs[f"{name}/judge/{judge}"] = held_out
            if self.weights.now()[name] > 0:  # what does not push the student cannot be over-optimised
                self.watch(name, judge, parting, trained, held_out)
            logs[f"{name}/parted/{judge}"] = float(parting.parted)
        return found, logs

    def watch(self, name: str, judge: str, parting: Parting, trained: float, held_out: float) -> None:
        """The alarm of a reward that its held-out judge no longer follows, once a run."""
        found = parting.observe(trained, held_out)
        if found is not None:
            warnings.warn(
                f"update {self.update}: reward {name!r} has risen from {found.trained[0]:.4g} to {found.trained[1]:.4g} while its held-out "
                f"judge {judge!r} has fallen from {found.judged[0]:.4g} to {found.judged[1]:.4g}: the student may be exploiting {name!r}. "
                f"Compare the sample grids; then lower the reward's weight or weights.budget and {FROM_BEFORE}",
                stacklevel=2,
            )

    def combine(self, anchor: Tensor, signals: dict[str, Signal], group: Tensor) -> tuple[Tensor, Tensor | None, dict[str, float]]:
        """(the anchor's part, the other rewards' part or None, logs) of the direction, by `weights.mode`."""
        own, values = self.config.weights, self.weights.now()
        valid, logs = self.heard(anchor, signals, group)
        logs |= {f"{name}/weight": values[name] for name in signals}
        if own.mode == "advantage":
            advantage = {name: advantages(signal.score.detach(), group) for name, signal in signals.items()}
            return modulate(anchor, advantage, values), None, logs
        pulls = {
            name: pull(anchor, signal.direction, values[name], group, valid[name], mode=own.mode, projected=own.project)
            for name, signal in signals.items()
        }
        force = {name: rms(part) for name, part in pulls.items()}
        # an advantage of size 1 pushes as hard as a direction of RMS 1 (policy_updates)
        force |= {name: values[name] * rms(value[torch.isfinite(value)]) for name, value in self.advantages.items()}
        whole = rms(anchor) + sum(force.values())  # zero where neither pulls, as at first a fake that is still the unguided teacher
        logs |= {f"{name}/share": part / whole if whole else math.nan for name, part in force.items()}
        if not signals:
            return anchor, None, logs
        extra = sum(pulls.values(), torch.zeros_like(anchor))
        logs["rewards/share"] = rms(extra) / max(rms(extra) + rms(anchor), 1e-30)
        # without weight, as while a budget is measured, there is nothing in it that could be served again
        return anchor, extra if any(values[name] for name in signals) else None, logs

    def heard(self, anchor: Tensor, signals: dict[str, Signal], group: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
        """(which samples each reward could score (B,), logs). Raises RewardError where a signal lacks what `weights.mode` needs, or too
        many samples their score, and NumericalError for a direction that is not finite."""
        valid, logs = {}, {}
        for name, signal in signals.items():
            valid[name], of_scores = self.scored(name, signal.score, group)
            logs |= of_scores
            if self.config.weights.mode == "advantage":
                if signal.score is None:
                    raise RewardError(f"reward {name!r} gave no score, which weights.mode advantage needs")
                continue
            if signal.direction is None:
                raise RewardError(f"reward {name!r} is not differentiable (it gave no direction): use --via.{name} policy")
            advice = f"Look at this reward's gradient, as of a root or a norm at 0; --via.{name} policy asks for none"
            if self.terms[name].parameters is not None:
                advice = f"Lower {name}.lr"
            finite_or_stop(signal.direction[valid[name]], f"the direction of {name}", self.update, advice)
            cosine = torch.nn.functional.cosine_similarity(signal.direction.flatten(1), anchor.flatten(1))[valid[name]]
            logs |= {f"{name}/direction_rms": rms(signal.direction[valid[name]]), f"{name}/cosine": float(cosine.mean())}
        return valid, logs

    def scored(self, name: str, score: Tensor | None, group: Tensor) -> tuple[Tensor, dict[str, float]]:
        """(which samples a reward could score (B,), logs of its scores (B,)); all of them where it gives none. Raises RewardError when too
        many failed."""
        size = len(group)
        valid = torch.ones(size, dtype=torch.bool, device=self.device) if score is None else torch.isfinite(score.detach())
        masked = size - int(valid.sum())
        if masked > self.config.weights.max_masked * size:
            raise RewardError(f"reward {name!r} could not score {masked} of {size} samples at update {self.update} (weights.max_masked)")
        logs = {f"{name}/masked": float(masked)}
        if score is not None:
            score = score.detach()
            logs[f"{name}/score"] = float(score[valid].mean())
            logs |= {f"{name}/{key}": value for key, value in spread_of(score, group).items()}
        return valid, logs

    def student_update(self, rollout: Rollout, block: Block, x0: Predicted, weight: Tensor | None) -> dict[str, float]:
        """One step of the student along a block's direction, from its predictions; weight (B,) of R_dm's part or None."""
        logs: dict[str, float] = {}
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        for rows in self.parts(len(x0.whole)):
            some = x0.own if x0.own is not None else self.predict_rows(rollout.rows(rows), block.xk[rows], block.k[rows])
            of_part = losses.pathwise(some, block.anchor[rows], None if weight is None else weight[rows])
            if block.extra is not None:
                of_part = of_part + losses.pathwise(some, block.extra[rows])
            of_part = of_part * (len(some) / len(x0.whole))  # a mean over the batch is the weighted mean of its parts'
            of_part.backward()
            loss += of_part.detach()
        if self.advantages:
            policy_loss, logs = self.policy_updates(rollout)
            loss = loss + policy_loss
        own, parameters = self.config.student, list(self.parameters.values())
        lr = learning_rate(own.lr, self.progress(), own.decay)
        advice = self.against_nan("student.lr")
        norm = self.descend(self.optimizer, parameters, loss, lr=lr, max_norm=own.max_norm, who="the student", advice=advice)
        self.ema.step(parameters)
        block.served_anchor, block.served = block.served_anchor + 1, block.served + 1
        return logs | {
            "loss": float(loss),
            "grad_norm": float(norm),
            "x0_mean": float(x0.whole.mean()),
            "x0_std": float(x0.whole.std()),
        }

    def descend(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        loss: Tensor,
        *,
        lr: float,
        max_norm: float,
        who: str,
        advice: str,
    ) -> Tensor:
        """One step of an optimizer on loss and gradients summed over the processes, which become those sums; returns the gradient norm.
        who: whose they are. Raises NumericalError with the advice for what is not finite, before anything is updated."""
        self.ranks.all_reduce([loss, *(parameter.grad for parameter in parameters)])
        finite_or_stop(loss, f"the loss of {who}", self.update, advice)
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        finite_or_stop(norm, f"the gradient norm of {who}", self.update, advice)
        for settings in optimizer.param_groups:
            settings["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()  # frees them: no two networks' gradients are held at once
        return norm

    def policy_updates(self, rollout: Rollout) -> tuple[Tensor, dict[str, float]]:
        """Adds the gradient of the clipped policy loss of every reward that goes by its score, over the K-1 stochastic transitions;
        returns (the loss of this process's samples, logs).

        The old log-probabilities are those of a rollout's first pass with a gradient, when the weights are still those that made it: of
        the very numbers that are differentiated, so that every ratio is then exactly 1. The rollout's own predictions may come from other
        kernels (a GPU has attention without a gradient that rounds otherwise), and a sum over all dimensions makes much of a rounding.

        Times 1 / sqrt(dimensions): an advantage of size 1 pushes the mean along a unit vector, a pathwise direction of RMS 1 has
        length sqrt(dimensions) and is averaged over them, so with this factor a weight means the same force by either way.
        """
        values, clip, reuse = self.weights.now(), self.config.weights.clip, self.config.reuse
        logs = {f"{name}/weight": values[name] for name in self.advantages}
        if not any(logs.values()) and reuse.rollout * reuse.evaluation == 1:  # no later update asks for the old log-probabilities either
            return torch.zeros((), device=self.device), logs
        known = {name: int((~torch.isnan(advantage)).sum()) for name, advantage in self.advantages.items()}
        total, log_probs = torch.zeros((), device=self.device), []
        transitions = self.student.steps - 1
        for rows in self.parts(len(rollout.group)):
            part, columns = rollout.rows(rows), []
            for k in range(transitions):  # each backward at once: the graph of one pass is held, not of all
                with self.precision():
                    column = self.student.log_prob_from(part, k)[:, None]
                old = column.detach() if self.old_log_prob is None else self.old_log_prob[rows, k : k + 1]
                loss = column.new_zeros(())
                for name, advantage in self.advantages.items():
                    some = advantage[rows]
                    share = int((~torch.isnan(some)).sum()) / max(known[name], 1)  # the loss is a mean over the samples with an advantage
                    force = values[name] * share / transitions / rollout.x0[0, 0].numel() ** 0.5
                    loss = loss + force * losses.policy(column, old, some, clip=clip)
                loss.backward()
                total += loss.detach()
                columns.append(column.detach())
            log_probs.append(torch.cat(columns, 1))
        log_prob = self.ranks.all_gather(torch.cat(log_probs))
        self.old_log_prob = log_prob if self.old_log_prob is None else self.old_log_prob
        logs |= {f"policy/{key}": value for key, value in ratios_of(log_prob - self.old_log_prob).items()}
        for name, advantage in self.advantages.items():
            logs[f"{name}/clip_fraction"] = losses.clip_fraction(log_prob, self.old_log_prob, advantage, clip=clip)
        return total, logs

    def score_finished(self, rollout: Rollout) -> dict[str, float]:
        """Advantages of a rollout's finished samples, for the rewards that go by policy gradient."""
        rewards = {name: term.reward for name, term in self.terms.items() if term.via == "policy"}
        if not rewards:
            return {}
        with self.precision(), torch.no_grad():
            found, logs = self.ask_with_judges(rewards, self.sample_of(rollout, last_step(rollout)))
        for name, signal in found.items():
            if signal.score is None:
                raise RewardError(f"reward {name!r} gave no score, which a policy gradient needs")
            logs |= self.scored(name, signal.score, rollout.group)[1]
            self.advantages[name] = advantages(signal.score, rollout.group)
        return logs

    def online_updates(self, rollout: Rollout, times: int) -> dict[str, float]:
        """Each online reward learns the student's predictions, `updates` times for each of `times`, with fresh noise every time. Of
        backward simulation each time has a size of its own, in turn."""
        logs = {}
        for name, optimizer in self.online.items():
            term = self.terms[name]
            parameters, advice = list(term.parameters.values()), f"Lower {'fake' if term.anchor else name}.lr"
            for turn in range(term.updates * times):
                if self.config.reuse.backward_simulation:  # the size that the student was just trained at, then the others
                    rollout = self.simulate(last=term.on == "last", number=self.rollouts - 1 + turn)
                    sample = self.sample_of(rollout, last_step(rollout))
                else:
                    sample = self.sample_of(rollout, self.online_step(rollout, term.on))
                optimizer.zero_grad(set_to_none=True)
                loss = self.online_loss(term.reward, sample)
                lr = learning_rate(term.lr, self.progress(), term.decay)
                who = f"{name}'s own network"
                self.descend(optimizer, parameters, loss, lr=lr, max_norm=term.max_norm, who=who, advice=advice)
                logs[f"{name}/own_loss"] = float(loss)
        return logs

    def online_loss(self, reward: OnlineReward, sample: Sample) -> Tensor:
        """The loss of an online reward's own network on this process's rows of a sample; its gradient is added up part by part."""
        size, total = len(sample.group), torch.zeros((), device=self.device)
        parts = self.parts(size)
        drawn = reward.draw(sample) if hasattr(reward, "draw") else {}
        with self.ranks.own_random(self.device, next(self.turns)):
            for rows in parts:
                piece = sample if rows == slice(0, size) else sample.rows(rows)
                with self.precision():
                    loss = reward.loss(piece, **{key: value[rows] for key, value in drawn.items()})
                loss = loss * (len(piece.group) / size)  # a mean over the batch is the weighted mean of its parts'
                loss.backward()
                total += loss.detach()
        return total

    def simulate(self, *, last: bool = False, number: int | None = None) -> Rollout:
        """Fresh prompts simulated up to one state, drawn anew (DMD2's backward simulation), or up to the last one; of the size that comes
        next, or of that of the rollout of this number."""
        steps = self.student.steps
        return self.new_rollout(steps - 1 if last else int(torch.randint(steps, (1,))), number=number)

    def online_step(self, rollout: Rollout, on: Literal["all", "last"]) -> Tensor:
        """The step at which an online reward learns each sample, (B,): the last, or every step equally often up to rounding, which sample
        gets which drawn anew."""
        if on == "last":
            return last_step(rollout)
        return (torch.randperm(len(rollout.group)) % self.student.steps).to(self.device)

    def lags(self, new: Rollout, old: Rollout) -> tuple[dict[str, float], float | None]:
        """(logs: how much worse each online reward knows the newest outputs than those it was trained on; the anchor's lag in the unit of
        its score, None where nobody asks)."""
        logs, kl = {}, None
        for name in self.online:
            reward = self.terms[name].reward
            if not hasattr(reward, "lag"):
                continue
            k, wanted = self.online_step(new, self.terms[name].on), isinstance(self.weights, Adaptive) and name == self.anchor
            with self.precision(), self.sharing():
                found = reward.lag(self.sample_of(new, k), self.sample_of(old, k), kl=wanted)
            logs[f"{name}/lag"] = found.loss
            if found.kl is not None:
                kl = logs[f"{name}/lag_kl"] = found.kl
        return logs, kl

    def step(self) -> dict[str, float]:
        """One student update and what goes with it; returns what is logged, finite numbers alone."""
        logs: dict[str, float] = {}
        x0 = weight = None
        self.turns = itertools.count(self.update << 20)  # from the update alone, as it is where a run goes on
        if self.block is not None:
            x0, weight, logs = self.serve_again(self.block)
        if self.block is None:
            x0, more = self.evaluate_next()
            logs |= more
        logs |= self.student_update(self.rollout, self.block, x0, weight)
        if self.block.served == self.config.reuse.evaluation:
            logs |= self.finish_block()
        self.update += 1
        logs |= {f"evaluations/{name}": float(in_passes(*counts)) for name, counts in self.passes().items()}
        logs = known(logs)
        for alarm in self.alarms.observe(logs):
            warnings.warn(f"update {self.update}: {alarm}", stacklevel=2)
        for key, value in logs.items():
            self.running[key] = value if key not in self.running else self.running[key] + 0.1 * (value - self.running[key])
        # not averaged: there is none where nothing happened
        return logs | self.ranks.sum_by_name({f"{name}/{key}": value for name, ask in self.news.items() for key, value in ask().items()})

    def passes(self) -> dict[str, list[int]]:
        """[forward, backward] passes so far, in samples, of all processes, by what makes them."""
        counts = torch.tensor([[one.forwards, one.backwards] for one in self.counted.values()])
        self.ranks.all_reduce([counts])
        return dict(zip(self.counted, counts.tolist(), strict=True))

    def serve_again(self, block: Block) -> tuple[Predicted, Tensor | None, dict[str, float]]:
        """(x0 today, importance weights or None, logs) of a block's next update; where the student has left the place of its evaluation,
        R_dm is asked again, or the block is finished if there is nothing else in it."""
        x0, weight, refused, logs = self.reweigh(self.rollout, block)
        if refused:
            if block.extra is None:
                logs |= self.finish_block()
            else:  # what the other rewards said of x0 bears the move, and may have cost far more
                logs |= self.online_updates(self.rollout, block.served_anchor)
                logs |= self.ask_anchor_again(self.rollout, block, x0.whole)
        return x0, weight, logs

    def evaluate_next(self) -> tuple[Predicted, dict[str, float]]:
        """(the student's predictions, logs) of a new block at the next states, those of a new rollout where this one has served."""
        logs, lag = {}, None
        if self.config.reuse.backward_simulation:
            self.rollout, self.fed = self.simulate(), 0
            self.rollouts += 1
        elif self.rollout is None or self.fed == self.config.reuse.rollout:
            logs, lag = self.roll_out()
        self.block, x0, more = self.evaluate(self.rollout, lag)
        return x0, logs | more

    def roll_out(self) -> tuple[dict[str, float], float | None]:
        """Puts a new rollout in the place of the last and scores its samples for the policies; (logs, the anchor's lag or None)."""
        if self.rollout is not None:
            self.earlier[self.size_of(self.rollouts - 1)] = self.rollout
        old = self.earlier.pop(self.size_of(self.rollouts), None)  # outputs of another size are harder or easier to denoise
        before = self.rollouts // len(self.latent_shapes)  # rollouts of this size
        self.rollout, self.fed, self.advantages, self.old_log_prob = self.new_rollout(), 0, {}, None
        self.rollouts += 1
        # of each size the second is the first that has one
        logs, lag = ({}, None) if old is None or (before - 1) % self.lag_every else self.lags(self.rollout, old)
        return logs | self.score_finished(self.rollout), lag

    def finish_block(self) -> dict[str, float]:
        """The evaluation has served: now the online rewards may change, as often as the student did."""
        logs = self.online_updates(self.rollout, self.block.served_anchor)
        self.fed, self.block = self.fed + 1, None
        return logs

    def reweigh(self, rollout: Rollout, block: Block) -> tuple[Predicted, Tensor | None, bool, dict[str, float]]:
        """(x0 today, importance weights of the block's evaluation or None, whether they have degenerated and serve no more, logs)."""
        reuse = self.config.reuse
        x0 = self.predict(rollout, block.xk, block.k)
        if block.xt is None or not reuse.weighted:
            return x0, None, False, {}
        alpha, sigma = self.student.schedule.alpha(block.t), self.student.schedule.sigma(block.t)
        log_ratio = importance.log_ratio(block.xt, block.x0, x0.whole, alpha, sigma)
        moves = importance.move(block.x0, x0.whole, alpha, sigma)
        # by quarters of the noise levels: the low ones lose their weight long before the batch as a whole does
        quarters = block.t.argsort().chunk(4)
        ess = min(importance.expected_sample_size(moves[rows]) for rows in quarters)
        refused = self.ranks.of_first(not ess >= reuse.min_ess)
        logs = {
            "reuse/ess": ess,
            "reuse/ess_of_all": float(importance.effective_sample_size((log_ratio - log_ratio.max()).exp())),
            "reuse/refused": float(refused),
        }
        logs |= {f"reuse/{key}": value for key, value in ratios_of(log_ratio).items()}
        if block.served_anchor == 1:
            least = max(reuse.min_ess, 1e-3)
            logs["reuse/permitted"] = min(importance.permitted_updates(moves[rows], min_ess=least) for rows in quarters)
            if refused and block.extra is None:
                self.warn_if_never_reused(logs["reuse/permitted"])
        return x0, None if refused else importance.weights(log_ratio, rho_max=reuse.rho_max), refused, logs

    def warn_if_never_reused(self, permitted: float) -> None:
        """An evaluation with nothing in it but R_dm's part has been refused: says so once if all have been. permitted: by its last move."""
        # refused each time, every evaluation has served one update, so the updates count them
        never = self.update == NEVER_REUSED and self.running["reuse/refused"] == 1
        to_come = isinstance(self.weights, Adaptive) and self.weights.b is None  # other rewards, which may be served again
        if never and not to_come:
            warnings.warn(
                f"reuse.evaluation {self.config.reuse.evaluation}: none of the first {NEVER_REUSED} evaluations could serve a second "
                f"update, since the student moves too far in one (the last move permits {permitted:.3g}); what this costs, a pass of the "
                "student an update, buys nothing. Set reuse.evaluation to 1, or lower student.lr",
                stacklevel=2,
            )

    def run(self, output: Path, *, stop: Callable[[], bool]) -> Iterator[dict[str, float]]:
        """Update until `config.updates`, logging to metrics.jsonl and saving as the config says; yields after each update.

        When `stop()` turns true in any process the run saves at the end of the current update and ends.
        """
        log = MetricsLog(output, self.update) if self.ranks.rank == 0 else None
        try:
            while self.update < self.config.updates:
                began = time.perf_counter()
                logs = self.step() | {"seconds": time.perf_counter() - began}
                if log:
                    log.write(self.update, logs)
                stopping = self.ranks.any(stop())
                if stopping or self.update % self.config.save_every == 0 or self.update == self.config.updates:
                    self.save(output)
                yield logs
                if stopping:
                    return
        finally:
            if log:
                log.close()

    # -- weights and state -----------------------------------------------------------------------------------------

    def averaged(self) -> dict[str, Tensor]:
        """The EMA weights of the student, by parameter name."""
        return {name: value.detach().clone() for name, value in zip(self.parameters, self.ema.shadow_params, strict=True)}

    def state(self) -> dict[str, Any]:
        def kept(rollout: Rollout) -> dict[str, Any]:
            scale = {} if self.config.matching.guidance_range is None else {"guidance": rollout.cond["guidance"]}
            return {"states": rollout.states, "x0": rollout.x0, "group": rollout.group, "prompts": rollout.prompts} | scale

        return {
            "config": self.config.lasting(),
            "update": self.update,
            "rollouts": self.rollouts,
            "fed": self.fed,
            "running": self.running,
            "student": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "online": {name: {key: p.detach() for key, p in self.terms[name].parameters.items()} for name in self.online},
            "online_optimizer": {name: optimizer.state_dict() for name, optimizer in self.online.items()},
            "rng": checkpoint.rng_state(self.device),
            "batches": self.batches.state(),
            "rollout": None if self.rollout is None else kept(self.rollout),
            "earlier": {size: kept(rollout) for size, rollout in self.earlier.items()},
            "block": None if self.block is None else dict(vars(self.block)),
            "advantages": self.advantages,
            "old_log_prob": self.old_log_prob,
            "weights": self.weights.state(),
            "partings": {f"{name} {judge}": parting.state() for (name, judge), parting in self.partings.items()},
            "alarms": self.alarms.state(),
            "counted": self.passes(),
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state()` was taken; nothing of it is kept but copies. Raises DamagedCheckpoint when it is of another
        model."""
        copy_parameters(self.parameters, state["student"], "student")
        for name, optimizer in self.online.items():
            copy_parameters(self.terms[name].parameters, state["online"][name], name)
            load_optimizer(optimizer, state["online_optimizer"][name])
        load_optimizer(self.optimizer, state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.ema.to(self.device)
        self.update, self.rollouts, self.fed, self.running = state["update"], state["rollouts"], state["fed"], state["running"]
        self.batches.load_state(state["batches"])
        self.rollout = None if state["rollout"] is None else self.as_rollout(state["rollout"])
        self.earlier = {size: self.as_rollout(saved) for size, saved in state["earlier"].items()}
        block = state["block"]  # by name: KeyError for what another version's lacks
        self.block = None if block is None else Block(*(self.here(block[field.name]) for field in fields(Block)))
        self.advantages = {name: self.here(value) for name, value in state["advantages"].items()}
        self.old_log_prob = self.here(state["old_log_prob"])
        self.weights.load_state(state["weights"])
        for (name, judge), parting in self.partings.items():  # a judge that is new to the run begins anew
            if f"{name} {judge}" in state["partings"]:
                parting.load_state(state["partings"][f"{name} {judge}"])
        self.alarms.load_state(state["alarms"])
        for name, (forwards, backwards) in state["counted"].items():
            first = self.ranks.rank == 0  # of all processes together
            self.counted[name].forwards, self.counted[name].backwards = (forwards, backwards) if first else (0, 0)
        checkpoint.set_rng_state(state["rng"], self.device)  # last: nothing above may draw from it

    @torch.no_grad()
    def start_from(self, state: dict[str, Any]) -> None:
        """Begin with the averaged student of another run's `state()` and, as far as both have them, its online rewards' networks: a fake
        that knows that student already. Optimizers, rates and the average begin anew. Raises DamagedCheckpoint when they are of
        another model."""
        copy_parameters(self.parameters, checkpoint.averaged(state), "student")
        self.ema.shadow_params = [p.detach().clone() for p in self.parameters.values()]
        for name in self.online.keys() & state["online"].keys():
            copy_parameters(self.terms[name].parameters, state["online"][name], name)

    def as_rollout(self, saved: dict[str, Any]) -> Rollout:
        """A rollout as `state` keeps it; its conditions are made again from its prompts and scales."""
        cond = self.conditions(saved["prompts"], None if self.config.matching.guidance_range is None else saved["guidance"])
        states, x0, group = (self.here(saved[key]) for key in ("states", "x0", "group"))
        return Rollout(states, x0, self.student.times[: len(states)], cond, group, saved["prompts"])

    def here(self, value: Any) -> Any:
        return value.to(self.device, copy=True) if isinstance(value, Tensor) else value

    def save(self, output: Path) -> None:
        """A checkpoint, by the first process. Raises RuntimeError where another holds another student."""
        self.ranks.check_same(list(self.parameters.values()), "the student")
        state = self.state()
        if self.ranks.rank == 0:
            checkpoint.save(output / "checkpoints", self.update, state)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Give an optimizer its saved state. On a CPU it would keep those tensors themselves, on a GPU those that count its steps."""
    optimizer.load_state_dict(saved)
    for held in optimizer.state.values():
        held.update({key: value.clone() for key, value in held.items() if isinstance(value, Tensor) and value.device.type == "cpu"})


def copy_parameters(own: Parameters, saved: dict[str, Tensor], who: str) -> None:
    if own.keys() != saved.keys() or any(own[name].shape != saved[name].shape for name in own):
        raise checkpoint.DamagedCheckpoint(
            f"the checkpoint's {who} is another network than this run's (other teacher, steps, LoRA rank, fake.condition, a "
            "range of guidance, or another version of fewstep?)"
        )
    for name, parameter in own.items():
        parameter.copy_(saved[name])
