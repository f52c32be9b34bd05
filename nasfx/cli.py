"""The command line: `nasfx inspect`, `nasfx profile` and `nasfx calibrate`."""

import importlib
import importlib.util
import json
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nasfx.errors import NasfxError


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error of nasfx's own is shown as its message."""
        try:
            return super().invoke(ctx)
        except NasfxError as error:
            typer.echo(f"nasfx: {error}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Group,
    help="Neural architecture search on torch.fx: look at search spaces, predict latencies.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Runtime(StrEnum):
    """A runtime that predictors can be calibrated for on this machine."""

    ONNXRUNTIME = "onnxruntime"
    MNN = "mnn"


def _list_hardware(wanted: bool) -> None:
    if wanted:
        from nasfx.costs.profiling import known_hardware

        typer.echo("\n".join(known_hardware()))
        raise typer.Exit


@app.command()
def profile(
    model: Annotated[Path, typer.Argument(help="An ONNX file with static shapes of batch size 1.")],
    hardware: Annotated[
        str, typer.Option(help="A name that --list shows, or a folder with predictors.")
    ],
    minimum_coverage: Annotated[
        float, typer.Option(help="The fraction of the MACs that must have a price.")
    ] = 0.9,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")] = False,
    _list: Annotated[
        bool,
        typer.Option("--list", callback=_list_hardware, is_eager=True, help="Print known names."),
    ] = False,
) -> None:
    """Predict the latency of an ONNX file on a device, kernel by kernel."""
    from nasfx.costs.profiling import profile

    found = profile(model, hardware, minimum_coverage=minimum_coverage)
    if not as_json:
        typer.echo(str(found))
        return
    values = asdict(found) | {
        "milliseconds": found.milliseconds,
        "coverage": found.coverage._asdict(),
    }
    typer.echo(json.dumps(values, indent=2))


@app.command()
def calibrate(
    runtime: Annotated[Runtime, typer.Option(help="The runtime to measure.")],
    out: Annotated[Path, typer.Option(help="The folder to write the predictors to.")],
    kernels: Annotated[
        int | None, typer.Option(min=1, help="About how many kernels to measure.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Which kernels are drawn.")] = None,
    space: Annotated[
        list[Path] | None,
        typer.Option(help="ONNX file of a subnet of your space; at least four, an option each."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A first look in some ten seconds; less accurate.")
    ] = False,
) -> None:
    """Measure kernels on this machine and fit predictors for `nasfx profile --hardware FOLDER`."""
    from nasfx.costs.calibration.calibrating import QUICK, calibrate

    given = {"kernels": kernels, "seed": seed, "space": space or None}
    options: Any = dict(QUICK) if quick else {}
    options |= {name: value for name, value in given.items() if value is not None}
    typer.echo(str(calibrate(runtime.value, out, **options)))


@app.command()
def inspect(
    factory: Annotated[
        str, typer.Argument(help='Makes the model: "package.module:name" or "file.py:name".')
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help='The shape of an input, "1,3,32,32"; one for each input.'),
    ] = None,
) -> None:
    """Show the search space of a model, and with its inputs' shapes what candidates cost."""
    import torch

    from nasfx.costing import cost
    from nasfx.space import search_space

    examples = tuple(torch.zeros(_shape(text)) for text in inputs or ())
    model = _made(factory)
    typer.echo(repr(search_space(model)))
    if examples:
        from rich.console import Console

        Console().print(cost(model, examples).table())


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a shape such as 1,3,32,32.") from error


def _made(factory: str) -> Any:
    """The model of "package.module:name" or "file.py:name", where the name is called or one."""
    from torch import nn

    place, _, name = factory.rpartition(":")
    if not place or not name:
        raise typer.BadParameter(f"{factory!r} is neither package.module:name nor file.py:name.")
    made = getattr(_imported(place), name, None)
    if made is None:
        raise typer.BadParameter(f"{place} has nothing named {name!r}.")
    model = made if isinstance(made, nn.Module) else made()
    if not isinstance(model, nn.Module):
        raise typer.BadParameter(f"{factory} gives a {type(model).__name__}, not an nn.Module.")
    return model


def _imported(place: str) -> Any:
    path = Path(place)
    is_file = path.suffix == ".py"
    sys.path.insert(0, str(path.parent.resolve()) if is_file else "")  # as Python does for scripts
    if not is_file:
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise  # of a module that the user's code imports
            raise typer.BadParameter(f"There is no module {place}.") from error
    if not path.is_file():
        raise typer.BadParameter(f"There is no file {place}.")
    spec = importlib.util.spec_from_file_location("_inspected", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["_inspected"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """The console script."""
    app(prog_name="nasfx")


if __name__ == "__main__":
    main()
