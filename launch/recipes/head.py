"""The recipe of a drafter's head: its target writes texts, and the head learns to foresee their hidden states."""

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import time
from typing import Any

import torch
from tqdm import tqdm

from stepladder import LLM
from stepladder.cluster.monitor import open_monitor
from stepladder.launch.json_files import write_json
from stepladder.launch.prompts import Options, read_lines
from stepladder.launch.recipes.capturing import capturing
from stepladder.launch.recipes.chat_material import Library
from stepladder.launch.recipes.chat_traffic import KINDS, prompts
from stepladder.launch.recipes.convert import Source
from stepladder.launch.recipes.training import TrainMonitor
from stepladder.launch.typed_config import check_counts
from stepladder.parallel.checkpoint import fingerprints
from stepladder.workers.core import Request, SamplingParams
from stepladder.workers.source.resolve import resolve
from stepladder.workers.speculation.head.files import DataWindow, Head, Manifest, write_head
from stepladder.workers.speculation.head.net import RecurrentHead
from stepladder.workers.speculation.head.teach import Judged, Teacher
from stepladder.workers.speculation.head.vocabulary import TargetVocabulary, most_frequent
from stepladder.workers.speculation.learning.lessons import Lesson, Lessons, number_of
from stepladder.workers.speculation.learning.objectives import named

LOG_EVERY = 10  # steps
DEPTH = 4  # places of a draft that are judged


@dataclass(frozen=True, kw_only=True)
class HeadRecipe:
    """The head goes to run_dir/head: `speculate=head speculate.model=` that.

    Attributes:
        name: of the recipe. run_dir: where everything goes. threads: of torch.
        model: the target.
        prompts: files as `launch.generate` takes them; of a line only prompt or messages count. kinds: without any,
            traffic of suite=speculate, `requests` of it.
        tokens: of an answer, at most. temperatures: of sampling, in turns. together: requests that are served at once.
        held_out: every so many answers one is not learnt from but judged.
        drafted: tokens of the vocabulary that the head drafts. inner: size of its cell.
        steps, batch, rate, depth, objective: of learning, as `Teacher` has them; without steps a head is a linear fit.
        seed: of prompts, sampling and learning.
    """

    name: str
    run_dir: str
    threads: int
    monitor: TrainMonitor
    model: Source
    prompts: tuple[str, ...]
    kinds: tuple[str, ...]
    requests: int
    tokens: int
    temperatures: tuple[float, ...]
    together: int
    held_out: int
    drafted: int
    inner: int
    steps: int
    batch: int
    rate: float
    depth: int
    objective: str
    seed: int

    def __post_init__(self) -> None:
        check_counts(self, "threads", "requests", "tokens", "together", "drafted", "inner", "batch", "depth")
        named(self.objective)
        if self.held_out < 2:
            raise ValueError(f"held_out is {self.held_out}; it must be 2 or more: every so many answers one is judged")
        if self.steps < 0 or self.rate <= 0:
            raise ValueError(f"steps is {self.steps} and rate {self.rate}; they must be 0 or more, and above 0")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError(f"temperatures is {self.temperatures}; it must hold one or more, none below 0")
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise ValueError(f"kinds has {unknown[0]!r}; it takes {', '.join(KINDS)}")
        if not self.prompts and not self.kinds:
            raise ValueError("there is nothing to learn from; give prompts (files) or kinds of traffic")


def run(recipe: HeadRecipe) -> None:
    """Let the target write, teach a head, and write it with what was found."""
    torch.set_num_threads(recipe.threads)
    directory = Path(recipe.run_dir)
    source = resolve(recipe.model.path, cache=recipe.model.cache, fetching=True, progress=True)
    llm = LLM(source, "cpu", max_sequences=recipe.together)
    answers = written(llm, [*requests(recipe, llm)])
    random.Random(recipe.seed).shuffle(answers)  # else one temperature or kind might be held out
    judged = Lessons.of(answers[:: recipe.held_out], DEPTH)
    seen = [lesson for number, lesson in enumerate(answers) if number % recipe.held_out]
    spec = llm.engine.executor.model.spec
    target = TargetVocabulary(spec, source)
    tokens = most_frequent([lesson.tokens.tolist() for lesson in seen], recipe.drafted, spec.vocab_size)
    torch.manual_seed(recipe.seed)
    net = RecurrentHead(spec.hidden_size, recipe.inner)
    teacher = Teacher(net, target, tokens, recipe.depth, recipe.objective)
    figures = _taught(teacher, Lessons.of(seen, recipe.depth), judged, recipe, directory)
    figures |= {"answers": len(answers), "tokens": sum(len(lesson.tokens) for lesson in answers)}
    manifest = Manifest(spec.hidden_size, recipe.inner, 1, fingerprints(source), figures)
    manifest = replace(manifest, window=DataWindow(figures["answers"], figures["tokens"]), made=round(time(), 3))
    manifest = replace(manifest, scores={"overlap": figures["taught"]["overlap"][0]})
    write_head(Head(net, tokens, manifest), directory / "head")
    write_json(directory / "head.json", figures)
    for name in ("fit", "taught"):
        print(_told(name, Judged(**figures[name])))
    print(f"written to {directory / 'head'}")


def requests(recipe: HeadRecipe, llm: LLM) -> Iterator[Request]:
    """With the sampling of the recipe; every one has a seed of its own."""
    for number, prompt in enumerate(_prompts(recipe, llm)):
        temperature = recipe.temperatures[number % len(recipe.temperatures)]
        room = llm.engine.config.max_model_len - recipe.tokens
        params = SamplingParams(max_tokens=recipe.tokens, temperature=temperature, seed=recipe.seed + number)
        yield Request(id=str(number), prompt=prompt[-room:], params=params)


def written(llm: LLM, asked: list[Request]) -> list[Lesson]:
    """What the target answers, in the order of the requests, under a progress bar."""
    engine, longest = llm.engine, max(request.params.max_tokens for request in asked)
    for request in asked:
        engine.add(request)
    with capturing(engine, longest) as found, tqdm(total=len(asked), unit="answer") as bar:  # each in one piece
        while engine.has_work:
            engine.step()
            bar.update(len(found) - bar.n)
    return [found[number_of(request)][0].lesson for request in asked]


def _prompts(recipe: HeadRecipe, llm: LLM) -> Iterator[tuple[int, ...]]:
    for file in recipe.prompts:
        for line in read_lines(Path(file), Options(recipe.model.path, {}, {})):
            yield line.tokens(llm.tokenizer)[1]
    if recipe.prompts:
        return
    library = Library.read()
    for kind in recipe.kinds:
        yield from prompts(llm.tokenizer, kind, -(-recipe.requests // len(recipe.kinds)), recipe.seed, library)


def _taught(teacher: Teacher, seen: Lessons, judged: Lessons, recipe: HeadRecipe, directory: Path) -> dict[str, Any]:
    """How good the linear fit was, and how good the head is after all steps."""
    directory.mkdir(parents=True, exist_ok=True)
    monitor, losses = recipe.monitor, list[float]()
    rows = open_monitor(directory, monitor.wandb, monitor.project, directory.name, asdict(recipe))
    with tqdm(total=recipe.steps, unit="step", desc=recipe.name) as bar:

        def told(loss: float) -> None:
            losses.append(loss)
            bar.update()
            if len(losses) % LOG_EVERY == 0:
                rows.log({"train/step": len(losses), "train/loss": sum(losses[-LOG_EVERY:]) / LOG_EVERY})

        teacher.fit(seen)
        fit = teacher.judge(judged, DEPTH)
        teacher.teach(seen, recipe.steps, recipe.batch, told, recipe.rate, recipe.seed)
    taught = teacher.judge(judged, DEPTH)
    rows.log({f"held_out/overlap_{place}": value for place, value in enumerate(taught.overlap, 1)})
    rows.close()
    return {"fit": fit._asdict(), "taught": taught._asdict()}


def _told(name: str, judged: Judged) -> str:
    overlap, same = (", ".join(f"{value:.3f}" for value in values) for values in judged)
    return f"{name}: overlap with the model's distribution, by place in a draft, {overlap}; the same token {same}"
