"""A sample, drawn part by part: what each scorer, judge and extractor sees of it is kept, so that it can be gone on with."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn

from fewstep.disk import replace, replace_text
from fewstep.evaluate.distances import Matrix
from fewstep.evaluate.drawing import (
    BATCH,
    Noise,
    Source,
    batches,
    counted,
    draw,
    noise_generator,
    open_pipeline,
    schedulers_of,
    teacher_rows,
)
from fewstep.evaluate.features import Extractor, to_bytes
from fewstep.evaluate.protocol import Utility, device_name, utility_hash, version
from fewstep.evaluate.store import SHARD, Shards, keep, my_share, nameless, sha256
from fewstep.rewards.base import score_of
from fewstep.rewards.clip import CLIPScore
from fewstep.rewards.remote import Remote, server_of

Judge = Callable[[Tensor, list[str]], Tensor]  # pictures (B, 3, H, W) in [0, 1] and their B prompts -> (B,), higher is better
Look = Callable[[Tensor, list[str]], Tensor]  # pictures (B, 3, H, W) in [0, 1] and their B prompts -> what is kept of them, B rows
Seen = Mapping[str, Matrix]
OUT_OF_REACH = 3  # batches in a row without an answer of a judge's server, after which drawing on would only lose time
COST = "cost"  # among what is kept of a sample: seconds and network evaluations of its drawing


def looks(
    scorers: Mapping[str, CLIPScore],
    utility: Utility | None = None,
    judges: Mapping[str, Judge] | None = None,
    extractors: Sequence[Extractor] = (),
) -> dict[str, Look]:
    """All that the metrics need to see of pictures, by name: each scorer's unit image features (B, d) and those of the extractors that
    are no scorers (features/NAME), the utility (B,), the judges' scores (B,) (score/NAME)."""

    def alone(function: Callable[[Tensor], Tensor]) -> Look:
        return lambda images, prompts: function(images)

    found = {f"features/{name}": alone(scorer.image_features) for name, scorer in scorers.items()}
    if utility is not None:
        found["utility"] = alone(utility)
    found |= {f"score/{name}": functools.partial(score_of, judge, name) for name, judge in (judges or {}).items()}
    return found | {f"features/{e.name}": alone(e.function) for e in extractors if e.function is not None and e.name not in scorers}


@torch.no_grad()
def observe(images: Tensor, looks: Mapping[str, Look], prompts: list[str]) -> dict[str, Tensor]:
    """What each look sees of pictures (B, 3, H, W) and their B prompts, B rows, on the CPU."""
    return {name: torch.as_tensor(look(images, prompts)).detach().float().cpu() for name, look in looks.items()}


def observe_sample(
    pipe: Any,
    prompts: list[str],
    images_per_prompt: int,
    scorers: Mapping[str, CLIPScore],
    utility: Utility | None = None,
    *,
    device: str | torch.device = "cpu",
    **sampling: Any,
) -> dict[str, Tensor]:
    """What `observe` sees of a whole sample, and the seconds per image of each of its batches. sampling: as `batches` takes it."""
    parts, seconds = [], []
    rows = (prompt for prompt in prompts for _ in range(images_per_prompt))
    for images, each in batches(pipe, prompts, images_per_prompt, **sampling):
        parts.append(observe(images.to(device), looks(scorers, utility), list(itertools.islice(rows, len(images)))))
        seconds.append(each)
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]} | {"seconds": torch.tensor(seconds)}


def shipped_path(folder: Path, row: dict[str, Any], content: dict[str, Any]) -> Path:
    """Where a shipped sample lies: named by all that decides its pictures and what is seen of them, and by no machine or version."""
    return folder / f"{sha256({'row': row, **content})[:16]}.safetensors"


def content_of(
    pipe: Any, prompts: list[str], images_per_prompt: int, batch: int, scorers: Mapping[str, CLIPScore], utility: Utility | None
) -> dict[str, Any]:
    """What decides a sample of a teacher, beside its row: networks by their weights alone.

    Libraries add keys to configurations and rename weights (transformers 5.24 has no `text_model.` in a CLIP text encoder's, 5.4 does), and
    a sample that ships has to be found under other versions too; its teacher and scorers are those that ship with it. So of configurations
    only what a schedule hangs on is here, and of weights not their names, where a stamp has all of them.
    """
    schedule = ("prediction_type", "beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr", "timestep_spacing")
    return {
        "weights": {name: nameless(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)},
        "scheduler": {key: pipe.scheduler.config.get(key) for key in schedule},
        "prompts": sha256(prompts),
        "images_per_prompt": images_per_prompt,
        "batch": batch,
        "scorers": {name: nameless(scorer.model) for name, scorer in scorers.items()},
        "utility": utility_hash(utility),
    }


def ship(
    folder: Path,
    *,
    teacher: str | Path,
    prompts: list[str],
    scorers: Mapping[str, CLIPScore],
    utility: Utility | None,
    steps: int,
    guidance: float,
    images_per_prompt: int,
    seed: int = 0,
    batch: int = BATCH,
    device: str = "cpu",
) -> None:
    """Draw the teacher's samples of the default evaluation and keep what is seen of them (float16) in `folder`, to ship with it.

    A sample that is there already is not drawn again. Beside each lies, in JSON, what it was drawn with.
    """
    pipe = open_pipeline(teacher, device)
    content = content_of(pipe, prompts, images_per_prompt, batch, scorers, utility)
    schedulers = schedulers_of(pipe)
    for row in teacher_rows(steps, guidance, seed):
        path = shipped_path(folder, row, content)
        if path.is_file():
            continue
        pipe.scheduler = schedulers[row["solver"]]
        sampling = {key: row[key] for key in ("steps", "guidance", "seed")}
        seen = observe_sample(
            pipe, prompts, images_per_prompt, scorers, utility, device=device, **sampling, batch=batch, progress=row["name"]
        )
        seen.pop("seconds")  # of another machine
        versions = {package: version(package) for package in ("torch", "diffusers", "transformers")}
        keep(path, {name: value.half() for name, value in seen.items()}, {"row": row, **content, "drawn with": versions})


class Drawing(NamedTuple):
    """What every part of a sample is drawn and looked at with."""

    prompts: list[str]
    ids: list[str] | None
    images_per_prompt: int
    noise: Noise
    batch: int
    looks: Mapping[str, Look]
    judges: Mapping[str, Judge]  # whose scores are among the looks
    device: str | torch.device
    progress: bool

    @property
    def n(self) -> int:
        return len(self.prompts) * self.images_per_prompt

    def part_size(self) -> int:
        """Pictures of a part: whole batches, so that what a batch's noise belongs to does not depend on who draws which part."""
        return max(1, SHARD // self.batch) * self.batch if self.noise == "batch" else SHARD

    def together(self) -> int:
        """Pictures of a call of the pipeline; the last call of a part may have fewer."""
        return min(self.batch, self.part_size(), self.n)

    def generators(self, seed: int, first: int, end: int) -> torch.Generator | list[torch.Generator]:
        if self.noise == "batch":
            return noise_generator(seed, first // self.batch)
        return [noise_generator(seed, i) for i in range(first, end)]


def draw_parts(
    source: Source, row: dict[str, Any], kept: Mapping[str, Shards], wanted: Mapping[int, list[str]], drawing: Drawing, folder: Path | None
) -> None:
    """Draw the wanted parts of a row's sample, look at each as wanted, and keep what is seen as soon as the part is whole.

    kept, wanted: by look, and of each part which looks, COST among both. folder: for the pictures themselves.
    Raises ValueError when a judge's server stays silent, NumericalError as `draw` does.
    """
    parts = kept[COST].pictures
    servers = {f"score/{name}": Hearing(server) for name, judge in drawing.judges.items() if (server := server_of(judge)) is not None}
    batches = [(i, first) for i in wanted for first in range(parts(i).start, parts(i).stop, drawing.batch)]
    told = source.call(row["guidance"]) | {"num_inference_steps": row["steps"]}
    seen: list[dict[str, Tensor]] = []
    source.pipe.set_progress_bar_config(disable=True)
    with counted(source.pipe) as calls:
        for i, first in track(batches, row["name"], disable=not drawing.progress):
            end = min(first + drawing.batch, parts(i).stop)
            chunk = [drawing.prompts[p // drawing.images_per_prompt] for p in range(first, end)]
            images, seconds = draw(source.pipe, chunk, drawing.generators(row["seed"], first, end), **told)
            asked = {name: drawing.looks[name] for name in wanted[i] if name != COST}
            seen.append(observe(images.to(drawing.device), asked, chunk) | {"seconds": torch.tensor([seconds])})
            for name in servers.keys() & asked.keys():
                servers[name].hear(len(chunk))
            if folder is not None:
                save_pictures(folder, images, first)
            if end == parts(i).stop:
                whole = {name: torch.cat([each[name] for each in seen]) for name in seen[0]}
                for name in wanted[i]:
                    cost = {"seconds": whole["seconds"], "evaluations": torch.tensor([float(sum(calls))])}
                    found = cost if name == COST else {name: whole[name]}
                    if name.startswith("score/"):
                        heard = servers[name].news() if name in servers else {}
                        found |= asking(kept[name], i, name.removeprefix("score/"), len(parts(i)), heard)
                    said = {"drawn_together": str(drawing.together())} if name == COST else {}
                    kept[name].save(i, found, device=device_name(drawing.device), **said)
                seen.clear()
                calls.clear()


class Hearing:
    """What a judge's server leaves unsaid while a sample is drawn."""

    def __init__(self, server: Remote):
        self.server, self.silent = server, 0
        self.unanswered = self.told = server.unanswered
        server.news()  # what went wrong before is of no part of this sample

    def hear(self, pictures: int) -> None:
        """After each batch. Raises ValueError when OUT_OF_REACH of them in a row got no answer."""
        lost, self.unanswered = self.server.unanswered - self.unanswered, self.server.unanswered
        self.silent = self.silent + 1 if lost == pictures else 0
        if self.silent == OUT_OF_REACH:
            raise ValueError(
                f"judge {self.server.name}: {self.server.url} gave no answer for {OUT_OF_REACH} batches in a row. Every part that was "
                "whole is kept: bring the server back and make the same call again"
            )

    def news(self) -> dict[str, int]:
        """Since this was last asked: tries that were repeated (retried), pictures that no answer came for (unanswered)."""
        lost, self.told = self.server.unanswered - self.told, self.server.unanswered
        return {"retried": int(self.server.news().get("retries", 0)), "unanswered": lost}


def asking(shards: Shards, i: int, judge: str, asked: int, heard: Mapping[str, int]) -> dict[str, Tensor]:
    """Pictures of a part that a judge was asked for, and tries that were repeated, added to those of the time before; pictures that no
    answer came for, this time."""
    before = shards.read(i, "") if shards.whole(i) else {}
    counts = {f"asked/{judge}": asked, f"retried/{judge}": heard.get("retried", 0)}
    total = {name: torch.tensor([count]) + before.get(name, 0) for name, count in counts.items()}
    return total | {f"unanswered/{judge}": torch.tensor([heard.get("unanswered", 0)])}


def asked_of(seen: Seen, judge: str) -> dict[str, int]:
    """Pictures that a judge was asked for (more than there are, where it was asked again), those that have no score now, repeated tries."""
    masked = int((~torch.isfinite(seen[f"score/{judge}"][:])).sum())
    return {"asked": int(seen[f"asked/{judge}"][:].sum()), "masked": masked, "retried": int(seen[f"retried/{judge}"][:].sum())}


def timing(devices: Sequence[str], together: Sequence[str]) -> dict[str, Any]:
    """What seconds per image belong to: the device, and how many pictures a call of the pipeline draws; where a sample's parts were drawn
    on several, or with several, the list of them. An earlier version did not say the second: None."""
    numbers = sorted({int(number) if number.isdecimal() else None for number in together}, key=lambda number: number or 0)
    return {key: found[0] if len(found) == 1 else found for key, found in (("device", [*devices]), ("drawn_together", numbers))}


def pictures_folder(inside: Path, row: dict[str, Any], key: str) -> Path:
    """Where a sample's pictures lie: named by the row, and by the sample's key, so that two samples never mix."""
    name = "".join(c if c.isalnum() else "-" for c in row["name"].lower())
    return inside / f"{name}-{key[:8]}"


def picture_path(folder: Path, i: int) -> Path:
    return folder / f"{i:06d}.png"


def save_pictures(folder: Path, images: Tensor, first: int) -> None:
    """Pictures as PNG files named by their number."""
    from PIL import Image

    for i, pixels in enumerate(to_bytes(images).permute(0, 2, 3, 1).numpy(), first):
        replace(picture_path(folder, i), lambda temporary, pixels=pixels: Image.fromarray(pixels).save(temporary, format="PNG"))


def write_index(folder: Path, row: dict[str, Any], drawing: Drawing) -> None:
    """A line in pictures.jsonl for each picture of a whole sample."""
    lines = []
    for i in range(drawing.n):
        prompt = i // drawing.images_per_prompt
        line = {"file": picture_path(folder, i).name, "prompt": drawing.prompts[prompt], "seed": row["seed"], "picture": i}
        lines.append(json.dumps(line | ({"id": drawing.ids[prompt]} if drawing.ids else {})) + "\n")
    replace_text(folder / "pictures.jsonl", "".join(lines))


def undrawn(shards: Shards, folder: Path | None) -> list[int]:
    """Parts whose pictures are not all in the folder that keeps them, if there is one."""
    if folder is None:
        return []
    return [i for i in range(shards.count) if not all(picture_path(folder, p).is_file() for p in shards.pictures(i))]


def unseen(kept: Mapping[str, Shards]) -> dict[int, list[str]]:
    """Part -> the looks that it lacks; whole parts are not among them."""
    missing = {name: set(shards.missing()) for name, shards in kept.items()}
    return {i: names for i in range(kept[COST].count) if (names := [name for name in kept if i in missing[name]])}


def unscored(kept: Mapping[str, Shards], lacks: Mapping[int, list[str]]) -> dict[int, list[str]]:
    """Part -> the judges, as looks, whose server gave no answer for a picture of it. NaN is an answer, and is not asked for again."""
    judges = {name: f"unanswered/{name.removeprefix('score/')}" for name in kept if name.startswith("score/")}
    silent = {
        i: [name for name, count in judges.items() if name not in lacks.get(i, ()) and kept[name].read(i, count)[count].any()]
        for i in range(kept[COST].count)
    }
    return {i: names for i, names in silent.items() if names}


def in_short(looks: Mapping[int, list[str]]) -> str:
    """The names of what is looked for, each once."""
    return ", ".join(dict.fromkeys(name.partition("/")[2] or name for names in looks.values() for name in names))


@dataclass(frozen=True)
class Sampler:
    """Makes samples that are kept by all that decides them, each look apart: to add one is to look once more, at the same pictures."""

    drawing: Drawing
    decided: Mapping[str, Any]  # look, COST among them -> what decides what it sees
    common: Mapping[str, Any]  # of the protocol, what decides the pictures
    pictures: Path | None  # a folder for the pictures themselves
    share: tuple[int, int]
    say: Callable[[str], None]

    def collect(self, source: Source, row: dict[str, Any], identity: Mapping[str, str], folder: Path) -> tuple[dict[str, Any], Seen | None]:
        """(the row, saying where its sample came from; what was seen of it, or None where only a share was drawn)."""
        drawing, say = self.drawing, self.say
        note = {**identity, "protocol": self.common, "row": row, "call": source.call(row["guidance"])}
        kept = {name: Shards(folder, note | {"look": [name, by]}, drawing.n, size=drawing.part_size()) for name, by in self.decided.items()}
        count, pictures = kept[COST].count, pictures_folder(self.pictures, row, sha256(note)) if self.pictures else None
        lacks = unseen(kept)
        silent = unscored(kept, lacks)
        some = {i: names for i, names in lacks.items() if len(names) < len(kept)}
        if silent:
            said = f"{len(silent)} of {count} parts have pictures without an answer by {in_short(silent)}"
            say(f"{row['name']}: {said}; drawn again to ask again")
        if some:
            say(f"{row['name']}: {len(some)} of {count} parts lack {in_short(some)}; drawn again for that alone")
        if len(some) < len(lacks) < count and self.share == (0, 1):
            say(f"{row['name']}: {count - len(lacks)} of {count} parts are in {folder}, going on with the others")
        wanted = {i: lacks.get(i, []) + silent.get(i, []) for i in sorted({*lacks, *silent, *undrawn(kept[COST], pictures)})}
        draw_parts(source, row, kept, {i: wanted[i] for i in my_share(list(wanted), self.share)}, drawing, pictures)
        if not wanted:
            say(f"{row['name']}: read from {folder}")
        if self.share != (0, 1):
            return row, None
        if pictures is not None:
            write_index(pictures, row, drawing)
            say(f"{row['name']}: pictures in {pictures}")
        seen: dict[str, Matrix] = {name: rows for shards in kept.values() for name, rows in shards.open().items()}
        devices = sorted({device for shards in kept.values() for device in shards.said("device")})
        timed = timing(kept[COST].said("device"), kept[COST].said("drawn_together"))
        judges = [name.removeprefix("score/") for name in self.decided if name.startswith("score/")]
        told = {"judges": {name: asked_of(seen, name) for name in judges}} if judges else {}
        return row | {"sample": "drawn" if wanted else "kept", "device": ", ".join(devices), "timed": timed} | told, seen
