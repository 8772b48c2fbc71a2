"""Prompt sets that models are measured on: local files in the forms they were published in, or the hub where they have a place there."""

from __future__ import annotations

import csv
import io
import json
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from fewstep import hub, prompts
from fewstep.disk import visible
from fewstep.prompts import BadPrompts

CAPTIONS = ("prompt", "prompts", "caption", "captions", "text")  # names of the column, or key, that holds what is drawn
HUB = re.compile(hub.NAME + r"(?::([\w.-]+))?")  # perhaps :split
IDENTITIES = ("image_id", "uid", "id", "cocoid")  # of the picture that a caption belongs to


class PromptSet(NamedTuple):
    """Prompts in their published order. The same caption may come more than once; each entry is a unit of its own."""

    name: str
    prompts: list[str]
    ids: list[str] | None = None  # of the pictures they describe


class Published(NamedTuple):
    """What is known of a set before it is read."""

    count: int
    images_per_prompt: int  # in its published protocol
    hub: str | None = None  # data set on the hub, by `datasets`
    files: tuple[str, ...] = ()  # of a data set on the hub, lists of prompts in JSON
    where: str = ""  # to get the file when it is on no hub


SETS = {
    "drawbench": Published(200, 1, hub="sayakpaul/drawbench"),
    "parti": Published(1632, 1, hub="nateraw/parti-prompts"),
    "hpsv2": Published(
        3200, 1, hub="zhwang/HPDv2", files=tuple(f"benchmark/{style}.json" for style in ("anime", "concept-art", "paintings", "photo"))
    ),
    "geneval": Published(553, 4, where="prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval"),
    "coco-2014-30k": Published(30_000, 1, where="30 000 captions of COCO's val2014 (a csv with image_id and caption, or one a line)"),
    "coco-10k": Published(10_000, 1, where="10 000 captions of COCO's val2014 (a csv with image_id and caption, or one a line)"),
}


def load(source: str) -> PromptSet:
    """A set by NAME, by FILE, by NAME=FILE, or by owner/name[@revision][:split] of a data set on the hub. Raises BadPrompts naming the
    file, or the set and what to give for it.

    NAME alone is read from the hub; with a file, or a folder of HPSv2's four, its number of prompts is checked. Any other data set of the
    hub gets the name owner/name@commit:split, under which it can be had again.
    """
    name, equals, file = source.partition("=")
    if name in SETS and equals:
        found = read(Path(file), name=name)
        if len(found.prompts) != SETS[name].count:
            raise BadPrompts(f"{file}: holds {len(found.prompts)} prompts; {name} has {SETS[name].count}")
        return found
    if source in SETS:
        return from_hub(source)
    path, known = Path(source), ", ".join(SETS)
    spelt = f"; did you mean {name.lower()}{equals}{file}?" if name.lower() in SETS else ""
    if equals and not path.exists():
        raise BadPrompts(f"{source}: no such file, and {name!r} is none of the sets {known}{spelt}")
    if not path.exists() and path.suffix.lower() not in (*READERS, ".txt"):
        try:
            parts = hub_parts(source)
        except ValueError as error:
            said = f"{source}: no such file, none of the sets {known}, and not a data set of the hub (owner/name){spelt}"
            raise BadPrompts(said) from error
        return any_of_hub(*parts)
    return read(path)


def read(path: Path, *, name: str | None = None) -> PromptSet:
    """A file by its suffix: .tsv and .csv with a header, .json, .jsonl, or text with a prompt a line; a folder of .json files.

    A tsv whose prompts are quoted as in a csv is told in a warning.
    """
    if path.is_dir():
        parts = [read(part) for part in visible(path, "*.json")]
        if not parts:
            raise BadPrompts(f"{path}: holds no .json file of prompts")
        return PromptSet(name or path.name, [prompt for part in parts for prompt in part.prompts])
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        return PromptSet(name or path.name, prompts.read(path, repeats=True))
    try:
        entries = reader(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise BadPrompts(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise BadPrompts(f"{path}: not UTF-8 text (byte {error.start + 1}); save the file as UTF-8") from error
    except ValueError as error:
        raise BadPrompts(f"{path}: {error}") from error
    found = as_set(entries, name or path.name, str(path))
    quoted = [prompt for prompt in found.prompts if is_quoted(prompt)] if path.suffix.lower() == ".tsv" else []
    if quoted:
        warnings.warn(
            f"{path}: {len(quoted)} of {len(found.prompts)} prompts are quoted as in a csv, the first: {quoted[0][:60]}; in a tsv quotes "
            "are part of the text, so write it without them, or as a .csv with commas",
            stacklevel=2,
        )
    return found


def is_quoted(text: str) -> bool:
    """Whether a text is quoted as a csv's writer quotes one that holds quotes: in quotes, and each inside of them twice."""
    inside = text[1:-1]
    return text == f'"{inside}"' and '""' in inside and '"' not in inside.replace('""', "")


def as_set(entries: Iterable[dict[str, Any]], name: str, where: str, *, mendable: bool = True) -> PromptSet:
    """Entries, each with a caption and perhaps its picture's id, as a set. Raises BadPrompts naming the entry without a usable caption, or,
    where such cannot be mended, leaves them out and counts them in a warning."""
    captions, ids, problems, number = [], [], [], 0
    for number, entry in enumerate(entries, 1):
        lower = {str(key).strip().lower(): value for key, value in entry.items()}
        if problem := problem_of(lower):
            if mendable:
                raise BadPrompts(f"{where}, entry {number}: {problem}")
            problems.append(problem)
            continue
        captions.append(caption_of(lower).strip())
        ids.append(next((str(lower[key]) for key in IDENTITIES if lower.get(key) is not None), None))
    if problems:
        warnings.warn(f"{where}: {len(problems)} of {number} rows are left out, the first: {problems[0]}", stacklevel=2)
    if not captions:
        raise BadPrompts(f"{where}: holds no prompt")
    known = [i for i in ids if i is not None]
    return PromptSet(name, captions, known if len(known) == len(captions) else None)


def caption_of(lower: dict[str, Any]) -> Any:
    """What an entry, by names in lower case, holds under the first of CAPTIONS that it has; None where it has none."""
    return next((lower[key] for key in CAPTIONS if lower.get(key) is not None), None)


def problem_of(lower: dict[str, Any]) -> str | None:
    """Why an entry's caption cannot be drawn; None where it can."""
    caption, named = caption_of(lower), [key for key in CAPTIONS if key in lower]
    if not named:
        return f"no text under any of the names {', '.join(CAPTIONS)}; it has {', '.join(lower) or 'nothing'}"
    if caption is None or (isinstance(caption, str) and not caption.strip()):
        return f"no text under {' or '.join(named)}: it is empty"
    if not isinstance(caption, str):
        return f"one text is needed under {' or '.join(named)}, not {type(caption).__name__} ({repr(caption)[:60]})"
    if "\0" in caption or len(caption) > prompts.LONGEST:
        return f"holds a NUL character or more than {prompts.LONGEST} characters"
    if any("\ud800" <= c <= "\udfff" for c in caption):  # JSON can escape one; no tokenizer takes it
        return "holds half of a surrogate pair, which is no character; write the whole"
    return None


def table(delimiter: str) -> Callable[[str], list[dict[str, Any]]]:
    """Reader of a table with a header: PartiPrompts.tsv, DrawBench's and COCO's csv. In a tsv quotes are part of the text.

    It raises ValueError naming the line, which only a line feed ends: U+2028 and its like are part of the text.
    """
    tabs = delimiter == "\t"
    quoting = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    hint = "" if tabs else "; a quoted field ends with a quote, and a quote inside of one is written twice"

    def rows(text: str) -> list[dict[str, Any]]:
        csv.field_size_limit(2**20)
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
        found, line = [], 1  # where the row begins that is read next
        try:
            named = len(reader.fieldnames or ())
            line = reader.line_num + 1
            for row in reader:
                if None in row:  # where DictReader puts what is beyond the header's columns
                    many = named + len(row[None])
                    rule = "a field holds no tab" if tabs else "put a field that holds a comma in quotes"
                    raise ValueError(f"line {reader.line_num}: has {many} fields, but the header names {named}; {rule}")
                found.append(row)
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"line {line}: {error}{hint}") from error
        return found

    return rows


def parsed(text: str) -> Any:
    """A JSON value. Raises ValueError, for one that is nested too deeply as well."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("lists or objects are nested too deeply") from error


def lines_of_json(text: str) -> list[dict[str, Any]]:
    """GenEval's evaluation_metadata.jsonl: an object a line."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                found.append(as_entry(parsed(line)))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    return found


def whole_json(text: str) -> list[dict[str, Any]]:
    """HPSv2's lists of prompts, lists of objects, or COCO's captions_val2014.json with its list under `annotations`."""
    value = parsed(text)
    if isinstance(value, dict) and isinstance(value.get("annotations"), list):
        value = value["annotations"]
    if not isinstance(value, list):
        raise ValueError("a list of prompts, a list of objects, or COCO's annotations are read; this is neither")
    return [as_entry(entry) for entry in value]


def as_entry(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"prompt": value}
    if not isinstance(value, dict):
        raise ValueError(f"a prompt is a text or an object with one, not {type(value).__name__}")
    return value


READERS = {".tsv": table("\t"), ".csv": table(","), ".jsonl": lines_of_json, ".json": whole_json}


def hub_parts(source: str) -> tuple[str, str | None, str | None]:
    """(name, revision, split) of what can be a data set on the hub, which is not asked. Raises ValueError."""
    found = HUB.fullmatch(source)
    if found is None or hub.is_path(source):
        raise ValueError(f"{source}: no such folder, and not a data set of the hub (owner/name, owner/name:split)")
    return found[1], found[2], found[3]


def rows_of_hub(name: str, revision: str | None, split: str | None) -> tuple[Any, dict[str, str]]:
    """(rows of a data set's split, which `datasets` keeps on disk; its name, commit and split). Raises ValueError."""
    try:
        datasets = import_datasets()
    except ImportError as error:
        raise ValueError(f"{name}: no such file or folder; {error}") from error
    import huggingface_hub

    try:
        commit = huggingface_hub.HfApi().dataset_info(name, revision=revision).sha
        parts = datasets.load_dataset(name, revision=commit)
    except Exception as error:  # the hub's clients raise many kinds; each means that this set cannot be had
        raise ValueError(f"{name}: no such file or folder, and it cannot be read from the hub ({type(error).__name__}: {error})") from error
    if split is None and len(parts) > 1:
        raise ValueError(f"{name}: has the splits {', '.join(parts)}; name one, as {name}:{next(iter(parts))}")
    if split is not None and split not in parts:
        raise ValueError(f"{name}: has no split {split!r}; it has {', '.join(parts)}")
    chosen = split or next(iter(parts))
    return parts[chosen], {"hub": name, "commit": commit, "split": chosen}


def any_of_hub(name: str, revision: str | None, split: str | None) -> PromptSet:
    """The captions of a data set's split; rows without a usable one are counted in a warning. Raises BadPrompts."""
    try:
        rows, identity = rows_of_hub(name, revision, split)
    except ValueError as error:
        raise BadPrompts(str(error)) from error
    where = f"{name}@{identity['commit']}:{identity['split']}"
    columns = {column.strip().lower(): column for column in rows.column_names}
    if not columns.keys() & set(CAPTIONS):
        raise BadPrompts(f"{where}: no column has any of the names {', '.join(CAPTIONS)}; it has {', '.join(rows.column_names)}")
    wanted = [column for name, column in columns.items() if name in (*CAPTIONS, *IDENTITIES)]
    return as_set(rows.select_columns(wanted), where, where, mendable=False)  # whatever else they hold, as pictures, is not read


def from_hub(name: str) -> PromptSet:
    """A published set from its place on the hub. Raises BadPrompts."""
    known = SETS[name]
    if known.hub is None:
        raise BadPrompts(f"{name}: on no hub; get {known.where} and give --prompts {name}=FILE")
    try:
        if known.files:
            import huggingface_hub

            paths = [Path(huggingface_hub.hf_hub_download(known.hub, file, repo_type="dataset")) for file in known.files]
            found = PromptSet(name, [prompt for path in paths for prompt in read(path).prompts])
        else:
            datasets = import_datasets()
            entries = [entry for part in datasets.load_dataset(known.hub).values() for entry in part]
            found = as_set(entries, name, known.hub)
    except (BadPrompts, ImportError) as error:
        raise BadPrompts(f"{name}: {error}") from error
    except Exception as error:  # the hub's clients raise many kinds; each means that this set cannot be had from there
        raise BadPrompts(
            f"{name}: cannot be read from {known.hub} on the hub ({type(error).__name__}: {error}); give --prompts {name}=FILE"
        ) from error
    if len(found.prompts) != known.count:
        raise BadPrompts(f"{name}: {known.hub} on the hub holds {len(found.prompts)} prompts, not {known.count}")
    return found


def import_datasets() -> Any:
    """The `datasets` package. Raises ImportError that says how to get it."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f'data sets on the hub need the package datasets: pip install "fewstep[data]" ({error})') from error
    return datasets
