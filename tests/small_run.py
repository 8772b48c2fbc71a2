"""A whole run of networks of a few numbers, an update of which takes milliseconds."""

import torch
from torch import nn

from fewstep import flags
from fewstep.denoiser import Denoiser
from fewstep.prompts import Batches
from fewstep.rewards.base import as_reward
from fewstep.rewards.discriminator import Discriminator
from fewstep.rewards.distribution import DistributionMatching
from fewstep.schedule import Flow
from fewstep.student import Student
from fewstep.trainer import Trainer
from fewstep.types import Term
from fewstep.weights import Adaptive, Fixed

PROMPTS = ["a cat", "a dog", "a fish", "a bird", "a hat", "a bat", "a fox"]


class Network(nn.Module):
    """A flow network of a few numbers that hears its time and its prompt, and whose middle a discriminator may look at."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave, self.told = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1), nn.Linear(4, 8)

    def features(self, xt, timestep, cond):
        step, text = cond.get("step", torch.zeros(len(xt))), cond["text"] + 0.1 * cond.get("guidance", torch.zeros(1))[:, None]
        told = torch.cat([text, timestep[:, None] / 1000, step[:, None]], 1).to(xt)
        return torch.nn.functional.silu(self.enter(xt) + self.told(told)[:, :, None, None])

    def forward(self, xt, timestep, cond):
        return self.leave(self.features(xt, timestep, cond))


def encode(prompts, guidance=None):
    cond = {"text": torch.tensor([[float(len(prompt)), float(ord(prompt[-1]))] for prompt in prompts]) / 100}
    return cond if guidance is None else cond | {"guidance": guidance}


def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1].pow(2).mean((1, 2))


def contrast(images, prompts):
    return [float(one.std()) if one.mean() < 0.55 else None for one in images]  # a black box that does not answer every picture


def brightness(images, prompts):
    return images.mean((1, 2, 3))


ADAPTIVE = ("--weights.mode", "adaptive", "--weights.warmup", "2", "--weights.max-masked", "1")
SEVERAL = (
    *("--reward.redness", "0.3", "--reward.contrast", "0.2", "--via.contrast", "policy", *ADAPTIVE),
    *("--reuse.rollout", "2", "--reuse.evaluation", "2", "--reuse.min-ess", "0"),
)


def trainer_of(options, ranks=None, judges=None):
    config = flags.parse_config([
        *("--groups", "4", "--group-size", "3", "--reuse.rollout", "3", "--updates", "8", "--precision", "fp32"),
        *("--student.lr", "1e-2", "--fake.lr", "1e-2", "--fake.updates", "2", *options),
    ])  # fmt: skip
    torch.manual_seed(7)
    networks = [Network() for _ in range(3)]
    for network in networks[1:]:
        network.load_state_dict(networks[0].state_dict())
    student, teacher, fake = (Denoiser(network, Flow(), "flow", uncond=encode([" "])) for network in networks)
    teacher.requires_grad_(False)
    matching = DistributionMatching(
        teacher, fake, Flow(), guidance=None if config.matching.guidance_range else config.matching.guidance,
        normalize=config.matching.normalize, gamma=config.matching.gamma, draws=config.matching.draws, step_condition=True,
        score_weight="matching",
    )  # fmt: skip
    own = config.fake
    terms = {"dm": Term(matching, dict(fake.named_parameters()), lr=own.lr, updates=own.updates, on=own.on, anchor=True)}
    functions = {"redness": redness, "contrast": contrast}
    for name in config.reward:
        if name == "discriminator":
            head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 16, 1), nn.Flatten(0))
            lookalike = Discriminator(teacher, head, torch.randn(20, 3, 4, 4))
            terms[name] = Term(lookalike, dict(head.named_parameters()), lr=1e-2, on=own.on)
        else:
            terms[name] = Term(as_reward(functions[name], name), via=config.via.get(name, "pathwise"))
    adaptive = config.weights.mode == "adaptive"
    weights = Adaptive(config.reward, 1.5, config.weights.warmup) if adaptive else Fixed(config.reward)
    return Trainer(
        Student(student, Flow(), [1.0, 0.7, 0.4]), dict(student.named_parameters()), terms, Batches(PROMPTS, 4, 3, seed=0),
        encode=encode, decode=torch.sigmoid, latent_shapes=[(3, 4, 4)], config=config, weights=weights,
        judges=judges or ({"redness": brightness} if "redness" in config.reward else None),
        counted={"student": student, "teacher": teacher, "fake": fake}, ranks=ranks,
    )  # fmt: skip
