"""`python -m vit_adapter.conversion`: convert, convert-14to16, export and push, the same as `vit-adapter …`."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from ..configuration.presets import PRESETS
from .convert import convert_source, read_config
from .convert_14to16 import convert_14to16
from .export_reference import export_reference
from .hub import push_folder
from .hub_code import export_hub_code
from .mapping import Conversion, CoverageError
from .source_kinds import KINDS

SHOWN_NAMES = 5


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds this package's commands; each sets `run`, a function of the parsed arguments.

    What `run` raises: CoverageError (exit code 1), any other ValueError or OSError (exit code 2, the input's fault).
    """
    convert = _command(commands, "convert", run_convert, "turn published weights into a from_pretrained folder")
    convert.add_argument("source", help="a .pth, .npz or .safetensors file, a Hugging Face folder or a Hub id")
    convert.add_argument("out", type=Path, help="the new folder")
    convert.add_argument("--preset", choices=PRESETS, metavar="NAME", help=f"one of {', '.join(PRESETS)}")
    convert.add_argument("--kind", choices=KINDS, metavar="KIND", help=f"one of {', '.join(KINDS)}")
    convert.add_argument("--config", type=Path, help="JSON of the model, ours or the original's, in place of a preset")
    convert.add_argument("--revision", help="of a Hub id")
    convert.add_argument("--push-to-hub", metavar="REPO", help="upload the folder as well")

    to_16 = _command(commands, "convert-14to16", run_14to16, "write FILE_14to16.pth as the original's script does")
    to_16.add_argument("filename", type=Path, help="a DINOv2 checkpoint, for instance dinov2_vits14_pretrain.pth")

    export = _command(commands, "export", run_export, "write a model folder in another form")
    export.add_argument("model", type=Path, help="a model folder")
    export.add_argument("out", type=Path, help="the new folder (hub-code) or the new .pth file (reference)")
    export.add_argument(
        "--format",
        choices=("hub-code", "reference"),
        default="hub-code",
        help="hub-code: with its own code, for trust_remote_code=True; reference: the original's .pth",
    )

    push = _command(commands, "push", run_push, "upload a model folder to the Hugging Face Hub")
    push.add_argument("folder", type=Path)
    push.add_argument("repo", help="for instance me/my-detector; created where it does not exist")
    push.add_argument("--private", action="store_true")


def run_convert(arguments: argparse.Namespace) -> None:
    if arguments.config and arguments.preset:
        raise ValueError("--config and --preset both say what the model is: give one of them")
    report = convert_source(
        arguments.source,
        arguments.out,
        kind=arguments.kind,
        preset=arguments.preset,
        config=read_config(arguments.config) if arguments.config else None,
        revision=arguments.revision,
        card_name=arguments.push_to_hub,
    )
    print(f"{arguments.source}: recognised as {report.kind}, converted as {report.preset or arguments.config}")
    print("\n".join(summary(report.conversion)))
    print(f"{report.folder}: every tensor read back and compared")
    print(", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in report.seconds.items()))
    if arguments.push_to_hub:
        print(push_folder(report.folder, arguments.push_to_hub))


def run_14to16(arguments: argparse.Namespace) -> None:
    print(convert_14to16(arguments.filename))


def run_export(arguments: argparse.Namespace) -> None:
    if arguments.format == "hub-code":
        export_hub_code(arguments.model, arguments.out)
    else:
        left = export_reference(arguments.model, arguments.out)
        for name, reason in left:
            print(f"left behind: {name}: {reason}")
    print(arguments.out)


def run_push(arguments: argparse.Namespace) -> None:
    print(push_folder(arguments.folder, arguments.repo, private=arguments.private))


def summary(conversion: Conversion) -> list[str]:
    """A line for what was used, and one for each reason to resize, drop, fill or leave a tensor new."""
    lines = [f"used {len(conversion.used)} tensors of the source"]
    for verb in ("resized", "dropped", "filled", "new"):
        reasons: dict[str, str] = getattr(conversion, verb)
        for reason in dict.fromkeys(reasons.values()):
            names = [name for name, why in reasons.items() if why == reason]
            shown = ", ".join(names[:SHOWN_NAMES]) + (" ..." if names[SHOWN_NAMES:] else "")
            lines.append(f"{verb} {len(names)}: {reason} ({shown})")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. Returns 0, 1 where the weights do not cover the model, 2 where the input is at fault."""
    parser = argparse.ArgumentParser(prog="python -m vit_adapter.conversion", description=__doc__)
    add_commands(parser.add_subparsers(required=True, metavar="COMMAND"))
    parsed = parser.parse_args(arguments)
    try:
        parsed.run(parsed)
    except CoverageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], None],
    purpose: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=purpose, description=purpose)
    command.set_defaults(run=run)
    return command


if __name__ == "__main__":
    sys.exit(main())
