"""The command ``aigc``: run the course, look at the machine and the data, train and sample a model."""

# Nothing heavy is imported up here: ``aigc --help`` answers at once, and torch comes in with the command that needs it.
import argparse
import codecs
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NoReturn

from . import __version__, classroom

PUBLISHED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


class _Parser(argparse.ArgumentParser):
    """A parser whose mistakes take one line."""

    def error(self, message: str) -> NoReturn:
        line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in message)  # it quotes what was typed
        self.exit(2, f"aigc: {line}; see {self.prog} --help\n")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 if it found something amiss, 2 for a mistake, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a redirected stream may not know the sign ≤
    try:
        return args.command(args)
    except KeyboardInterrupt:
        print("aigc: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        from .runtime import CourseError

        if not isinstance(error, CourseError | OSError):
            raise
        print(f"aigc: {error}", file=sys.stderr)
        return 2


def doctor(args: argparse.Namespace) -> int:
    """Is this machine ready, and what will be slow on it?"""
    from .doctor import report

    rows = report()
    width = max(len(row.topic) for row in rows)
    for row in rows:
        print(f"{row.level:<5}  {row.topic:<{width}}  {row.value}")
    return 1 if any(row.level == "error" for row in rows) else 0


def course(args: argparse.Namespace) -> int:
    """Execute the lessons and render them as pages that read offline."""
    from . import course
    from .runtime import CourseError, pick_profile

    profile, limit = pick_profile(args.profile), args.cell_timeout
    if limit is not None and limit < 0:
        raise CourseError(f"--cell-timeout is {limit}: give seconds, or 0 for no limit")
    if args.bands:
        passed = course.measure_bands(course.pick_lessons(args.number), profile, args.out, cell_timeout=limit)
        return 0 if passed else 1
    if not args.store:
        return course.run_course(profile=profile, out=args.out, only=args.number, cell_timeout=limit)
    if profile != "quick":
        raise CourseError(f"--store keeps the quick profile's outputs: leave out the profile {profile!r}")
    results = course.store(course.pick_lessons(args.number), args.out, limit)
    print(course.summary(results))
    return 0 if all(result.passed for result in results) else 1


def check_data(args: argparse.Namespace) -> int:
    """Verify every data file and trained model against its checksum."""
    from . import datasets, recipes

    files = [*datasets.check_data(), *recipes.check_pretrained()]
    for file in files:
        print(f"{'ok   ' if file.ok else 'error'}  {file.path}  {file.message}")
    damaged = sum(not file.ok for file in files)
    print(f"{len(files)} files, {damaged or 'none'} damaged")
    return 1 if damaged else 0


def train(args: argparse.Namespace) -> int:
    """Train a model as its lesson does."""
    from . import ranks
    from .runtime import run_dir

    rank, _ = ranks.join()
    recipe, out = _recipe(args), args.out or run_dir(args.name)
    recipe.train(out, on_log=_print_log)
    if rank == 0:
        print(f"{args.name}: trained, its files lie in {out}")
    return 0


def sample(args: argparse.Namespace) -> int:
    """Draw samples from a trained run into one PNG file."""
    from . import plots, recipes
    from .checkpoints import writable
    from .runtime import CourseError, rng_for, run_dir

    if args.n < 1:
        raise CourseError(f"--n is {args.n}: ask for at least one sample")
    if args.out.suffix != ".png":
        raise CourseError(f"--out is {args.out}: give it a name that ends in .png")
    if args.name in recipes.LANGUAGE_NAMES:
        raise CourseError(f'{args.name} writes texts, not pictures: aigc generate "" --model {args.name}')
    recipe, run = _recipe(args), args.run or run_dir(args.name)
    writable(args.out.absolute().parent, "--out")  # before the work
    if args.run is None and not run.exists() and args.name in recipes.pretrained():
        print(f"there is no run {run}: sampling from the model that comes with the course")
        model = recipes.load_pretrained(args.name, device=args.device)
    else:
        model = recipe.load(run)
    images = recipe.sample(model, args.n, rng_for(args.seed, "sample", device=recipe.device))
    plots.save_image_grid(images, args.out)
    print(f"{args.n} samples of {args.name}: {args.out}")
    return 0


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"aigc: {message}", file=sys.stderr)
        yield


@_warnings_in_a_line()
def generate(args: argparse.Namespace) -> int:
    """Write on from a prompt with a language model."""
    import torch

    from .generate import beam_search, stream
    from .runtime import CourseError, rng_for

    if args.n < 1:
        raise CourseError(f"--n is {args.n}: ask for at least one text")
    drawing = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    drawing = {name: value for name, value in drawing.items() if value is not None}
    if args.beams is not None and (drawing or args.n > 1):
        option = f"--{next(iter(drawing), 'n').replace('_', '-')}"
        raise CourseError(f"--beams draws nothing, and takes no {option}: leave out one of the two")
    try:
        args.prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"{args.prompt[error.start]!r} at character {error.start}"
        raise CourseError(f"PROMPT is not UTF-8, with {found}: save the file or set the terminal to UTF-8") from error

    model, tokenizer, poems = _language_model(args.model, args.device)
    ids = tokenizer.encode(args.prompt)
    if poems or not ids:
        ids = [tokenizer.end, *ids]  # a poem stands between two end tokens
    room = max(1, min(100, model.config.block_size - len(ids)))
    prompt = torch.tensor([ids], device=model.wte.weight.device)
    common = {
        "max_new_tokens": room if args.max_new_tokens is None else args.max_new_tokens,
        "repetition_penalty": args.repetition_penalty,
        "no_repeat_ngram_size": args.no_repeat_ngram,
        "stop": tokenizer.end,
    }
    for i in range(args.n):
        if args.beams is not None:
            tokens = beam_search(model, prompt, num_beams=args.beams, **common)[0, len(ids) :].tolist()
        else:
            tokens = stream(model, prompt, rng=rng_for(args.seed, "generate", i), **drawing, **common)
        pieces = (tokenizer.token_bytes(token) for token in tokens if token != tokenizer.end)
        print(end="\n" if i else "")
        last = ""
        for text in chain([args.prompt], _characters(pieces)):
            text = text.replace("。", "。\n") if poems else text
            print(text, end="", flush=True)
            last = text or last
        print(end="" if last.endswith("\n") else "\n")
    return 0


def _language_model(name: str, device: str):
    """A GPT-2, its tokenizer, and whether it writes poems: one of the course's, a published one, or one in a folder."""
    from . import recipes
    from .checkpoints import MANIFEST, read_card
    from .gpt2 import GPT2
    from .runtime import CourseError, pick_device
    from .tokenizer import Tokenizer

    if name in recipes.LANGUAGE_NAMES:
        return *recipes.load_pretrained(name, device=device), name == "tang"
    device = pick_device(device)
    if name in PUBLISHED:
        return GPT2.from_pretrained(name).to(device), Tokenizer.gpt2(), False
    folder = Path(name) / "model" if (Path(name) / "model").is_dir() else Path(name)  # of a run, or as it is
    if not folder.is_dir():
        known = ", ".join((*recipes.LANGUAGE_NAMES, *PUBLISHED))
        raise CourseError(f"there is no model {name!r}: choose from {known}, or name a folder")
    card = read_card(folder) if (folder / MANIFEST).exists() else {}
    return GPT2.from_pretrained(folder).to(device), Tokenizer.load(folder), card.get("recipe") == "tang"


def _characters(pieces: Iterable[bytes]) -> Iterator[str]:
    """The text of UTF-8 in pieces, as it comes: a character is held back until its last byte is there."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece in pieces:
        yield decoder.decode(piece)
    yield decoder.decode(b"", final=True)


def ship(args: argparse.Namespace) -> int:
    """Put a trained model among those that come with the course, in data/checkpoints."""
    from . import recipes
    from .runtime import run_dir

    print(f"{args.name}: {recipes.ship(args.name, args.run or run_dir(args.name))}")
    return 0


def experiment(args: argparse.Namespace) -> int:
    """Run a side experiment and record it in data/histories."""
    from . import experiments

    print(f"recorded in {experiments.record(args.name, args.device)}")
    return 0


def _recipe(args: argparse.Namespace):
    from . import recipes

    return recipes.build(args.name, args.profile, seed=args.seed, device=args.device)


def _print_log(step: int, figures: dict[str, float]) -> None:
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    print(f"step {step}: {numbers}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="aigc", description="AIGC: generative models from theory to practice.")
    parser.add_argument("--version", action="version", version=f"aigc {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command, within=commands) -> argparse.ArgumentParser:
        made = within.add_parser(name, help=command.__doc__, description=command.__doc__)
        made.set_defaults(command=command)
        return made

    def add_profile(to: argparse.ArgumentParser) -> None:
        to.add_argument("--profile", help="quick (two cores, minutes; the default) or full (a GPU)")

    def add_seed_and_device(to: argparse.ArgumentParser) -> None:
        to.add_argument("--seed", type=int, default=0, metavar="N", help="where randomness starts (default 0)")
        to.add_argument("--device", default="auto", metavar="D", help="auto (the default), cpu, cuda or mps")

    def add_model(to: argparse.ArgumentParser) -> None:
        to.add_argument("name", metavar="NAME", help="the model, such as gmm")
        add_profile(to)
        add_seed_and_device(to)

    add("doctor", doctor)

    lessons = add("course", course)
    lessons.add_argument("number", nargs="*", type=int, metavar="NUMBER", help="lessons to run (default: all)")
    add_profile(lessons)
    lessons.add_argument("--out", type=Path, metavar="DIR", help="where the pages go (default: build/course)")
    lessons.add_argument(
        "--cell-timeout",
        type=int,
        metavar="SECONDS",
        help="fail a lesson whose cell takes longer; 0: never (default: 300 at the quick profile, 0 at the full one)",
    )
    keep = lessons.add_mutually_exclusive_group()
    keep.add_argument("--bands", action="store_true", help="measure the figures over five seeds, into data/bands")
    keep.add_argument("--store", action="store_true", help="write the executed lessons back into notebooks/")

    teaching = commands.add_parser("class", help="Hand out the lessons to a class, and grade what comes back.")
    classroom.add_commands(add, teaching.add_subparsers(title="commands", metavar="COMMAND", required=True))

    data = commands.add_parser("data", help="Look after the data sets.")
    add("check", check_data, data.add_subparsers(title="commands", metavar="COMMAND", required=True))

    training = add("train", train)
    add_model(training)
    training.add_argument("--out", type=Path, metavar="DIR", help="where the run's files go (default: runs/NAME)")

    shipping = add("ship", ship)
    shipping.add_argument("name", metavar="NAME", help="the model, such as vae")
    shipping.add_argument("--run", type=Path, metavar="DIR", help="the run that trained it (default: runs/NAME)")

    side = add("experiment", experiment)
    side.add_argument("name", metavar="NAME", help="the experiment, such as vae_beta")
    side.add_argument("--device", default="auto", metavar="D", help="auto (the default), cpu, cuda or mps")

    writing = add("generate", generate)
    writing.add_argument(
        "prompt", metavar="PROMPT", help='the beginning of the text; "" for none; last, after --, if it starts with -'
    )
    writing.add_argument(
        "--model", default="tang", metavar="M", help="tang (the default), shakespeare, gpt2, or a folder with a GPT-2"
    )
    writing.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 100, or what the context holds")
    writing.add_argument("--temperature", type=float, metavar="T", help="0: the most likely token (default 1)")
    writing.add_argument("--top-k", type=int, metavar="K", help="draw among the K most likely tokens")
    writing.add_argument("--top-p", type=float, metavar="P", help="draw among the tokens that make up P of probability")
    writing.add_argument("--min-p", type=float, metavar="P", help="drop tokens below P times the most likely one")
    writing.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: repeat less")
    writing.add_argument("--no-repeat-ngram", type=int, default=0, metavar="N", help="no N tokens in a row twice")
    writing.add_argument("--beams", type=int, metavar="B", help="search for a likely text with B beams, draw nothing")
    writing.add_argument("--n", type=int, default=1, metavar="N", help="how many texts (default 1)")
    add_seed_and_device(writing)

    sampling = add("sample", sample)
    add_model(sampling)
    sampling.add_argument("--run", type=Path, metavar="DIR", help="the run to sample from (default: runs/NAME)")
    sampling.add_argument("--n", type=int, default=64, metavar="N", help="how many samples (default 64)")
    sampling.add_argument("--out", type=Path, default=Path("samples.png"), metavar="FILE", help="the picture to write")
    return parser
