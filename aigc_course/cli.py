"""The command ``aigc``: run the course, look at the machine and the data, train and sample a model."""

# Nothing heavy is imported up here: ``aigc --help`` answers at once, and torch comes in with the command that needs it.
import argparse
import sys
from pathlib import Path
from typing import NoReturn

from . import __version__


class _Parser(argparse.ArgumentParser):
    """A parser whose mistakes take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"aigc: {message}; see {self.prog} --help\n")


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

    profile = pick_profile(args.profile)
    if args.bands:
        return 0 if course.measure_bands(course.pick_lessons(args.number), profile, args.out) else 1
    if not args.store:
        return course.run_course(profile=profile, out=args.out, only=args.number)
    if profile != "quick":
        raise CourseError(f"--store keeps the quick profile's outputs: leave out the profile {profile!r}")
    results = course.store(course.pick_lessons(args.number), args.out)
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
    from .runtime import run_dir

    recipe, out = _recipe(args), args.out or run_dir(args.name)
    recipe.train(out, on_log=_print_log)
    print(f"{args.name}: trained, its files lie in {out}")
    return 0


def sample(args: argparse.Namespace) -> int:
    """Draw samples from a trained run into one PNG file."""
    from . import plots, recipes
    from .runtime import CourseError, rng_for, run_dir

    if args.n < 1:
        raise CourseError(f"--n is {args.n}: ask for at least one sample")
    if args.out.suffix != ".png":
        raise CourseError(f"--out is {args.out}: give it a name that ends in .png")
    recipe, run = _recipe(args), args.run or run_dir(args.name)
    if args.run is None and not run.exists() and args.name in recipes.pretrained():
        print(f"there is no run {run}: sampling from the model that comes with the course")
        model = recipes.load_pretrained(args.name, device=args.device)
    else:
        model = recipe.load(run)
    images = recipe.sample(model, args.n, rng_for(args.seed, "sample", device=recipe.device))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plots.save_image_grid(images, args.out)
    print(f"{args.n} samples of {args.name}: {args.out}")
    return 0


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

    def add_model(to: argparse.ArgumentParser) -> None:
        to.add_argument("name", metavar="NAME", help="the model, such as gmm")
        add_profile(to)
        to.add_argument("--seed", type=int, default=0, metavar="N", help="where randomness starts (default 0)")
        to.add_argument("--device", default="auto", metavar="D", help="auto (the default), cpu, cuda or mps")

    add("doctor", doctor)

    lessons = add("course", course)
    lessons.add_argument("number", nargs="*", type=int, metavar="NUMBER", help="lessons to run (default: all)")
    add_profile(lessons)
    lessons.add_argument("--out", type=Path, metavar="DIR", help="where the pages go (default: build/course)")
    keep = lessons.add_mutually_exclusive_group()
    keep.add_argument("--bands", action="store_true", help="measure the figures over five seeds, into data/bands")
    keep.add_argument("--store", action="store_true", help="write the executed lessons back into notebooks/")

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

    sampling = add("sample", sample)
    add_model(sampling)
    sampling.add_argument("--run", type=Path, metavar="DIR", help="the run to sample from (default: runs/NAME)")
    sampling.add_argument("--n", type=int, default=64, metavar="N", help="how many samples (default 64)")
    sampling.add_argument("--out", type=Path, default=Path("samples.png"), metavar="FILE", help="the picture to write")
    return parser
