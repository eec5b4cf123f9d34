"""The command line: the only place that prints and exits.

Exit status: 0 all goals met, 1 a goal missed (the artefact is still written), 2 bad input, 3 an
error that whet did not foresee (with its traceback), 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import json
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import cloudpickle
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from whet import catalog, inspection, packing, runner
from whet import demo as demonstration
from whet import probe as sensitivity
from whet.codecs.choice import smallest as fast
from whet.codecs.choice import thorough
from whet.errors import BadInput, WhetError
from whet.optional import installed, version
from whet.recipe import Recipe, built_in
from whet.release import VERSION
from whet.report import finding
from whet.report.heatmap import heatmap, probe_tables
from whet.report.page import page
from whet.report.table import layer_table, tables
from whet.search import run as searching
from whet.search import wish
from whet.targets.processor import here
from whet.task import Task
from whet.technique import card, knobs, span

app = typer.Typer(
    name="whet",
    help="Make a trained PyTorch network smaller and faster, and prove it on the deployed file.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
)
out, err = Console(), Console(stderr=True)

TaskArgument = Annotated[
    str, typer.Argument(metavar="TASK", help="path/to/file.py:function or package.module:function")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Target = Annotated[
    str,
    typer.Option("--target", "-t", help="A runtime of `whet targets`, or auto: the fastest."),
]
Threads = Annotated[int, typer.Option(min=1, max=1024, help="Threads of the runtime when timing.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="That try options; default: one for each processor."),
]
EngineOption = Annotated[
    str, typer.Option(help="Where they work: local, or ray for the cluster of RAY_ADDRESS.")
]


def load_task(name: str) -> Task:
    """The Task that `path/to/file.py:function` or `package.module:function` returns.

    Raises:
        BadInput: it cannot be imported, is no function, or returns no Task.
    """
    asked = f"load the task {name!r}"
    place, colon, function = name.rpartition(":")
    if not colon or not place or not function:
        raise BadInput(asked, "there is no colon in it", "Write path/to/file.py:function.")
    mend = "Mend it until python can call that function."
    module = _of_the_user(asked, mend, lambda: _module(place))
    make = getattr(module, function, None)
    if not callable(make):
        known = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        state = "is not a function" if make is not None else "is not in it"
        raise BadInput(
            asked, f"{function} {state}", f"Functions there: {', '.join(known) or 'none'}."
        )
    made = _of_the_user(asked, mend, make)
    if not isinstance(made, Task):
        raise BadInput(
            asked,
            f"it returned {type(made).__name__}",
            "Return a whet.Task(model=..., example=...).",
        )
    return dataclasses.replace(made, name=name)


def _of_the_user(asked: str, todo: str, call: Callable[[], Any]) -> Any:
    """What `call`, which runs code of the user's, returns; whatever it raises is bad input."""
    try:
        return call()
    except WhetError:
        raise
    except (Exception, SystemExit) as error:
        raise BadInput(asked, f"{type(error).__name__}: {error}{_line(error)}", todo) from error


def _line(error: BaseException) -> str:
    """Where in the user's files an error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = str(Path(__file__).parent)
    theirs = [f for f in frames if not f.filename.startswith((ours, "<frozen"))]
    return f" ({theirs[0].filename}, line {theirs[0].lineno})" if theirs else ""


def _module(place: str) -> Any:
    """The module of a .py file, or of a dotted name that is found from here."""
    path = Path(place)
    if path.suffix != ".py":
        sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(place)
    if not path.is_file():
        raise BadInput(f"load {path}", "there is no such file", "Give the path of a Python file.")
    # never in the place of a module that others have imported
    name = path.stem if path.stem not in sys.modules else f"whet_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    cloudpickle.register_pickle_by_value(module)  # other processes could not import it
    sys.path.insert(0, str(path.absolute().parent))
    spec.loader.exec_module(module)
    return module


class _Bars:
    """Progress of each step, with the time left."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.tasks = progress, {}

    def __call__(self, what: str, done: int, of: int) -> None:
        if what not in self.tasks:
            for task in self.tasks.values():
                self.progress.update(task, visible=False)
            self.tasks[what] = self.progress.add_task(what, total=of)
        self.progress.update(self.tasks[what], completed=done, total=of)


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


def _deliver(
    work: Callable[[runner.Tell], runner.Result], folder: Path, force: bool, as_json: bool
) -> NoReturn:
    """Run, save, print, and exit by the goals."""
    try:
        with _progress() as progress:
            result = work(_Bars(progress))
    except KeyboardInterrupt:
        todo = "To go on after the last finished step, give the same command with --resume."
        todo = todo if _steps_kept(folder) else "No step was finished."
        err.print(f"[bold red]whet:[/] interrupted. {todo}", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    finally:
        if not _steps_kept(folder) and (_workspace(folder) / "run.json").exists():
            shutil.rmtree(_workspace(folder), ignore_errors=True)
    result.save(folder, replace=force)
    shutil.rmtree(_workspace(folder), ignore_errors=True)
    if as_json:
        print(json.dumps(result.readings))
    else:
        for part in tables(result.readings):
            out.print(part)
        out.print(f"\nwritten to [bold]{escape(str(folder))}[/]: {', '.join(sorted(result.files))}")
    raise typer.Exit(0 if result.met else 1)


def _workspace(folder: Path) -> Path:
    folder = folder.absolute()
    return folder.with_name(f".{folder.name}.whet-work")


def _steps_kept(folder: Path) -> bool:
    kept = [*_workspace(folder).glob("step-*"), *_workspace(folder).glob("rows.jsonl")]
    return any(path.suffix != ".partial" for path in kept)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("out"),
    target: Target = "onnxruntime",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing folder.")] = False,
    as_json: Json = False,
) -> None:
    """The whole job on data that ships with a dependency, in under three minutes.

    Trains a ResNet-20 on handwritten digits, drops blocks, distils, quantizes to int8, deploys,
    and measures.

    Example: `whet demo -o out/`
    """
    runner.free(output, force)
    runner.targets_of(target)
    with _progress() as progress:
        bars = _Bars(progress)
        task = demonstration.task(tell=lambda done, of: bars("train the original", done, of))
    recipe = Recipe(
        [
            catalog.technique("DropBlocks", {"amount": 0.33, "examples": 300}),
            catalog.technique("Distill", {"epochs": 16, "lr": 0.1}),
            catalog.technique("FoldBatchNorm"),
            catalog.technique("StaticInt8"),
        ]
    )
    goals = {"drop": "1pp", "latency": "0.45x", "size": "0.20x"}
    _deliver(
        lambda tell: runner.apply(recipe, task, target=target, tell=tell, **goals),
        output,
        force,
        as_json,
    )


@app.command()
def compress(
    task: TaskArgument,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", "-r", help="YAML of steps; default: a built-in one.")
    ] = None,
    drop: Annotated[str | None, typer.Option(help="Most loss of the metric, as 0.5pp.")] = None,
    latency: Annotated[str | None, typer.Option(help="Most time, as 0.5x or 3ms.")] = None,
    size: Annotated[str | None, typer.Option(help="Most bytes, as 0.25x or 100KB.")] = None,
    macs: Annotated[str | None, typer.Option(help="Most operations, as 0.5x or 20M.")] = None,
    memory: Annotated[str | None, typer.Option(help="Most peak memory, as 0.5x or 30MB.")] = None,
    target: Target = "onnxruntime",
    threads: Threads = 1,
    seed: Seed = 0,
    rounds: Annotated[int, typer.Option(min=5, help="Rounds of the final timing.")] = 40,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("out"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing folder.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was interrupted.")
    ] = False,
    preset: Annotated[
        str | None,
        typer.Option(help="Usual goals: mobile, edge, realtime, cloud; others beside it count."),
    ] = None,
    minimize: Annotated[
        str | None,
        typer.Option(
            help="Search: what to make small within the limits: latency, size, macs, drop."
        ),
    ] = None,
    time: Annotated[str | None, typer.Option(help="Search: time for it, as 30m.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Search: plans to try.")] = 4,
    finals: Annotated[int, typer.Option(min=0, help="Search: plans to recover longer.")] = 2,
    epochs: Annotated[
        float, typer.Option(help="Search: of a short recovery, where no --time is given.")
    ] = 1.0,
    technique: Annotated[
        list[str] | None, typer.Option(help="Search: choose from these; several times for several.")
    ] = None,
    finish: Annotated[
        list[str] | None,
        typer.Option(help="Search: what may be done at the end: float, int8, '4-bit weights'."),
    ] = None,
    workers: Workers = None,
    engine: EngineOption = "local",
    pick: Annotated[
        int | None,
        typer.Option(help="Take this trial of the search that wrote the folder."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compress a network, deploy it, and measure the deployed file beside the original.

    With --recipe, as it says. With goals alone, the recipe is searched for: the report says what
    was tried, `whet explain` why each layer got what it got, and every trial that no other beats is
    kept in trials/, to be taken later with --pick. With neither, by a built-in recipe.

    Examples:

    `whet compress my_task.py:task --recipe recipe.yaml -o out/`

    `whet compress my_task.py:task --drop 0.5pp --latency 0.5x --target auto`

    `whet compress my_task.py:task --drop 0.5pp --minimize latency --time 30m`

    `whet compress my_task.py:task --preset mobile`

    `whet compress my_task.py:task --pick 3 -o out/`
    """
    if pick is not None:
        _pick(task, output, pick, threads, rounds, as_json)
    runner.free(output, force)
    usual = {} if preset is None else wish.preset(preset)
    if recipe is None and minimize is None:
        minimize = usual.get("minimize")
    limits = {"drop": drop, "latency": latency, "size": size, "macs": macs, "memory": memory}
    own = {name: text for name, text in limits.items() if text is not None}
    limits = {name: text for name, text in usual.items() if name in limits} | own
    options: dict[str, Any] = {"target": target, "threads": threads, "seed": seed} | limits
    options["rounds"] = rounds
    runner.settings_of(options)
    runner.targets_of(target)
    steps = None if recipe is None else Recipe.read(recipe)
    sought: dict[str, Any] = {
        "minimize": minimize, "time": time, "techniques": technique, "finishes": finish,
    }  # fmt: skip
    sought = {name: value for name, value in sought.items() if value is not None}
    if steps is not None and sought:
        found = ", ".join(f"--{name.removesuffix('s')}" for name in sought)
        raise BadInput(f"search with {found}", "a recipe is given", "Leave one of them out.")
    loaded = load_task(task)
    if steps is None and (sought or (limits and loaded.validation is not None)):
        options |= sought | {"trials": trials, "finals": finals, "epochs": epochs}
        options |= {"workers": workers, "engine": engine}
        options |= {"workspace": _workspace(output), "resume": resume}
        _deliver(
            lambda tell: searching.search(loaded, tell=tell, **options), output, force, as_json
        )
    if steps is None:
        steps = built_in(loaded)
        names = ", ".join(step.name for step in steps.steps)
        err.print(f"no --recipe given: the built-in one is {names}", highlight=False)
    workspace = _workspace(output)
    options |= {"workspace": workspace, "resume": resume}
    _deliver(lambda tell: runner.apply(steps, loaded, tell=tell, **options), output, force, as_json)


def _pick(
    task: str, folder: Path, number: int, threads: int, rounds: int, as_json: bool
) -> NoReturn:
    """Another trial of the search that wrote `folder` takes the place of the one it took."""
    goals = _report(folder).get("search", {}).get("goals", {})
    loaded = load_task(task)
    options = {"threads": threads, "rounds": rounds} | goals
    _deliver(
        lambda tell: searching.pick(loaded, folder, number, tell=tell, **options),
        folder,
        True,
        as_json,
    )


@app.command()
def inspect_(
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK|FILE",
            help="path/to/file.py:function, package.module:function, or FILE.whet",
        ),
    ],
    target: Target = "onnxruntime",
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Layers, parameters, MACs, bytes, share of measured latency, and coupled channels.

    Of a file that ends in .whet: what its bytes are spent on.

    Examples: `whet inspect my_task.py:task`, `whet inspect out/model.whet`
    """
    if task.endswith(".whet"):
        _contents(Path(task), as_json)
        return
    loaded = load_task(task)
    loaded.check()
    found = inspection.look(loaded, catalog.target(target), threads)
    if as_json:
        print(json.dumps(found))
        return
    table = Table("layer", "type", "params", "MACs", "bytes", "share of time", title=loaded.name)
    for row in found["layers"]:
        share = "" if row["share"] is None else f"{row['share']:.1%}"
        numbers = [f"{row[k]:,}" for k in ("params", "macs", "bytes")]
        table.add_row(row["path"], row["type"], *numbers, share)
    table.add_section()
    table.add_row("all", "", *[f"{found['totals'][k]:,}" for k in ("params", "macs", "bytes")], "")
    out.print(table)
    ms = found["latency_ms"]
    out.print(
        f"{ms['median']:.3f} ms in {found['target']} at {threads} thread(s), batch {found['batch']}"
    )
    if found["int8"] is not None:
        out.print(escape(_worth(found["int8"])), highlight=False)
    names = {"channel groups": found["groups"], "droppable blocks": found["blocks"]}
    for what, each in names.items():
        out.print(escape(f"{len(each)} {what}: {', '.join(each) or 'none'}"), highlight=False)
    for name, reason in found["left_alone"].items():
        out.print(f"[dim]{escape(f'{name} is left alone: {reason}')}[/]")


app.registered_commands[-1].name = "inspect"


def _worth(found: dict[str, Any]) -> str:
    """What int8 would be worth, in words."""
    ratio, layers, slower = found["ratio"], found["layers"], ", ".join(found["slower"][:5])
    said = (
        f"int8 would take {ratio['value']:.2f}x of it [{ratio['low']:.2f}, {ratio['high']:.2f}], "
        f"{ratio['verdict']}; {layers['found']} of {layers['expected']} layers on integers"
    )
    return said + (f"; slower: {slower}" if slower else "")


def _contents(file: Path, as_json: bool) -> None:
    """Print what the bytes of a packed file are spent on."""
    found = packing.contents(file)
    if as_json:
        print(json.dumps(found))
        return
    heads = (Column("tensor", overflow="fold"), "type", "shape", "bits", "codec", "bytes")
    table = Table(*heads, "uncoded", title=str(file))
    for row in found["tensors"]:
        shape = "x".join(map(str, row["shape"])) or "1"
        sizes = [f"{row[key]:,.0f}" for key in ("bytes", "raw")]
        table.add_row(row["name"], row["dtype"], shape, str(row["bits"]), row["codec"], *sizes)
    out.print(table)
    table = Table("bytes of", "", "share")
    for kind, size in found["kinds"].items():
        table.add_row(kind, f"{size:,.0f}", f"{size / found['bytes']:.1%}")
    table.add_section()
    table.add_row("the file", f"{found['bytes']:,}", "")
    out.print(table)


@app.command()
def pack(
    file: Annotated[
        Path, typer.Argument(help="A .safetensors, a state_dict of torch.save, or a .whet file.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The packed file.")],
    smallest: Annotated[
        bool,
        typer.Option(
            "--smallest", help="Try a slow codec too: some 10,000 to 50,000 weights a second."
        ),
    ] = False,
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Tensors that are coded at the same time.")
    ] = 1,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Make a file of weights smaller without loss; a model.whet is coded anew.

    Examples: `whet pack weights.safetensors -o weights.whet`,
    `whet pack out/model.whet -o small.whet --smallest`
    """
    _free(output, force)
    packing.pack(file, output, thorough if smallest else fast, workers)
    before, after = file.stat().st_size, output.stat().st_size
    out.print(f"{before:,} bytes became {after:,}, {after / before:.3f}x", highlight=False)


@app.command()
def unpack(
    file: Annotated[Path, typer.Argument(help="A file that whet pack wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file of weights.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Give back the tensors of a packed file, bit for bit, as the kind of file they came from.

    Example: `whet unpack weights.whet -o weights.safetensors`
    """
    _free(output, force)
    packing.unpack(file, output)
    out.print(f"{output.stat().st_size:,} bytes in {escape(str(output))}", highlight=False)


def _free(output: Path, force: bool) -> None:
    if output.exists() and not force:
        raise BadInput(f"write {output}", "it exists", "Choose another name, or give --force.")


@app.command()
def probe(
    task: TaskArgument,
    technique: Annotated[
        list[str] | None, typer.Option(help="What to try; give it several times for several.")
    ] = None,
    values: Annotated[
        str | None, typer.Option(help="Strengths to try: 0.25,0.5,0.75; default: its own ladder.")
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Validation examples of each try.")] = 1000,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Measure latency in this runtime as well.")
    ] = None,
    threads: Threads = 1,
    seed: Seed = 0,
    workers: Workers = None,
    engine: EngineOption = "local",
    output: Annotated[
        Path, typer.Option("-o", "--output", help="For the picture and the rows.")
    ] = (Path("probe")),
    as_json: Json = False,
) -> None:
    """What each layer or channel group costs alone, at a ladder of strengths, and what it saves.

    The network is left as it is. What was measured before is kept in the output folder, so that a
    stopped probe goes on where it was.

    Example: `whet probe my_task.py:task --technique L1Filters --values 0.25,0.5,0.75`
    """
    loaded = load_task(task)
    loaded.check()
    kinds = [catalog.technique(name) for name in technique or ["L1Filters"]]
    strengths = None if values is None else _numbers(values)
    tries = len(sensitivity.options(loaded, kinds, strengths))
    rows = output / "rows.jsonl"
    try:
        output.mkdir(parents=True, exist_ok=True)
        rows.open("a").close()
    except OSError as error:
        raise runner.unwritable(output, error) from error
    err.print(f"{tries} tries on {examples} validation examples each", highlight=False)
    with _progress() as progress:
        bars = _Bars(progress)
        found = sensitivity.probe(
            loaded,
            kinds,
            values=strengths,
            examples=examples,
            cache=rows,
            target=None if target is None else catalog.target(target),
            threads=threads,
            seed=seed,
            workers=workers,
            engine=engine,
            tell=lambda done, of: bars("probe", done, of),
        )
    (output / "probe.json").write_text(json.dumps(found))
    (output / "probe.html").write_text(heatmap(found))
    if as_json:
        print(json.dumps(found))
        return
    for part in probe_tables(found):
        out.print(part)
    out.print(f"\nwritten to [bold]{escape(str(output))}[/]: probe.html, probe.json, rows.jsonl")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise BadInput(
            f"read --values {text}", "it is not a list of numbers", "Write 0.25,0.5,0.75"
        ) from error


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that compress wrote.")],
    task: Annotated[
        str | None, typer.Option(help="TASK; default: the one named in report.json.")
    ] = None,
    threads: Threads = 1,
    rounds: Annotated[int, typer.Option(min=5, help="Rounds of timing.")] = 40,
    integer: Annotated[
        bool, typer.Option("--integer", help="Compare int8 codes with integer-only inference.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure the artefact again in its runtime, beside the original.

    Example: `whet verify out/`
    """
    report = _report(folder)
    if task is None and ":" not in report["task"]:
        raise BadInput(
            f"verify {folder}",
            f"its report calls the task {report['task']!r}, which cannot be loaded",
            "Give --task path/to/file.py:function.",
        )
    loaded = load_task(task or report["task"])
    loaded.check()
    found = inspection.again(folder, report, loaded, threads, rounds, integer)
    if as_json:
        print(json.dumps(found))
    else:
        table = Table("", "reported", "measured now", title=f"{folder}")
        for name, (then, now) in found["figures"].items():
            table.add_row(name, then, now)
        out.print(table)
        for goal in found["goals"]:
            out.print(
                f"{goal['name']} {goal['limit']}: {goal['value']}"
                f" {'met' if goal['met'] else 'MISSED'}"
            )
        if found["integer"] is not None:
            out.print(_codes(found["integer"]))
    raise typer.Exit(0 if all(goal["met"] for goal in found["goals"]) else 1)


def _codes(found: dict[str, Any]) -> str:
    """How many int8 codes integer-only inference shares, in words."""
    said = [f"{t['share']:.3%} equal, at most {t['largest']} apart" for t in found.values()]
    values = found["together"]["values"]
    return f"{values:,} int8 codes on integers alone: {said[0]}; each operation alone: {said[1]}"


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A folder that compress wrote.")],
    layers: Annotated[
        bool, typer.Option("--layers", help="Print the table of layers too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print the report, and write report.html anew from report.json.

    Example: `whet report out/ --layers`
    """
    found = _report(folder)
    if as_json:
        print(json.dumps(found))
        return
    (folder / "report.html").write_text(page(found))
    for part in tables(found):
        out.print(part)
    if layers:
        out.print(layer_table(found))
    out.print(f"\n{folder / 'report.html'}")


@app.command()
def explain(
    folder: Annotated[Path, typer.Argument(help="A folder that a search of compress wrote.")],
    as_json: Json = False,
) -> None:
    """Why each layer got what it got, what was tried, and why the other techniques were not taken.

    Example: `whet explain out/`
    """
    search = finding.search_of(_report(folder))
    if search is None:
        raise BadInput(
            f"explain {folder}",
            "no search wrote it: its recipe was given",
            "Search with goals alone: whet compress TASK --drop 0.5pp.",
        )
    if as_json:
        print(json.dumps(search))
        return
    for head, lines in finding.explained(search):
        out.print(f"\n[bold]{escape(head)}[/]", highlight=False)
        for line in lines:
            out.print(f"  {escape(line)}", highlight=False, soft_wrap=True)


def _report(folder: Path) -> dict[str, Any]:
    path = folder / "report.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(
            f"read {path}", str(error), "Give a folder that whet compress wrote."
        ) from error
    if not isinstance(found, dict) or not {"original", "compressed", "target"} <= set(found):
        raise BadInput(f"read {path}", "it is not a report of whet", "Give a folder that it wrote.")
    return found


@app.command()
def techniques(
    name: Annotated[str | None, typer.Argument(help="Show one card.")] = None, as_json: Json = False
) -> None:
    """The catalogue; with a NAME, that technique's card and knobs.

    Example: `whet techniques StaticInt8`
    """
    known = catalog.techniques()
    if name is not None:
        catalog.technique(name)
        known = {name: known[name]}
    if as_json:
        print(
            json.dumps(
                {
                    n: {"family": catalog.family(t), "card": card(t), "knobs": knobs(t)}
                    for n, t in known.items()
                }
            )
        )
        return
    if name is not None:
        out.print(card(known[name]), markup=False, highlight=False, soft_wrap=True)
        table = Table("knob", "default", "range", "what")
        for knob, facts in knobs(known[name]).items():
            default, what = json.dumps(facts.get("default")), facts.get("description", "")
            table.add_row(knob, default, span(facts), what)
        out.print(table)
        return
    table = Table("technique", "family", "what it does")
    for each, kind in known.items():
        table.add_row(each, catalog.family(kind), card(kind).splitlines()[0].partition(": ")[2])
    out.print(table)


@app.command()
def targets(as_json: Json = False) -> None:
    """Which runtimes are here and what they speed up.

    Example: `whet targets`
    """
    found = {
        name: {
            "installed": installed(target.package),
            "version": version(target.package),
            "install": target.install,
            "facts": dict(target.facts) | {"int8 here": _int8_here(target.weight_bits(here()))},
        }
        for name, target in catalog.targets().items()
    }
    if as_json:
        print(json.dumps(found))
        return
    for name, facts in found.items():
        state = facts["version"] if facts["installed"] else f"not installed: {facts['install']}"
        table = Table("what", "how", title=escape(f"{name} ({state})"), title_justify="left")
        for what, how in facts["facts"].items():
            table.add_row(what, how)
        out.print(table)


def _int8_here(bits: int) -> str:
    processor = here()
    found = ", ".join(processor.features) or processor.machine
    why = " (8 would overflow: products of bytes are added in pairs, in 16 bits)"
    return f"weights of {bits} bits on {found}{why if bits < 8 else ''}"


def _show_version(value: bool) -> None:
    if value:
        print(f"whet {VERSION}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; errors of whet are one sentence and exit status 2."""
    try:
        app(prog_name="whet")
    except WhetError as error:
        said = escape(f"could not {error.asked}: {error.found.rstrip('.')}. {error.todo}")
        err.print(f"[bold red]whet:[/] {said}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        sys.exit(3)


if __name__ == "__main__":
    main()
