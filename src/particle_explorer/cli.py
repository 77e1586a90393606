"""The command line: one small class per command.

Its fields are the options, read by pydantic-settings, so a default, a bound or a help text is declared once,
in `configs` or here. What comes out (the path of a run, of a file) goes to standard output; the tale of how
it fared to standard error. Exit status: 0; 2 for bad input, with one sentence; 1 for a fault of ours.

Everything heavy is imported inside the function that needs it: `--help` and bad input answer at once.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError, create_model
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings.exceptions import SettingsError

from particle_explorer.commands.averaging import Average, Independent, Refine
from particle_explorer.commands.command import PROGRAM, Command
from particle_explorer.commands.exploring import Cluster, Embed, HoldStill, Regroup
from particle_explorer.commands.exporting import Export, ExportClasses, Merge, Transfer
from particle_explorer.commands.fitting import Encode, PoseMap, Train
from particle_explorer.commands.importing import Import, ImportLatents, Inspect
from particle_explorer.commands.judging import (
    Amend,
    CompareClasses,
    Examine,
    ExportAligned,
    ReportClasses,
    Reproduce,
)
from particle_explorer.commands.measuring import (
    Bench,
    BenchAccuracy,
    BenchAverages,
    BenchInterface,
    BenchSpeed,
)
from particle_explorer.commands.starting import DecodeServer, Demo, Open, Simulate
from particle_explorer.commands.traversing import Film, Traverse
from particle_explorer.configs import ClassMapConfig, Config, ModelConfig, describe
from particle_explorer.files import UserError

COMMANDS: dict[str, type[Command]] = {
    "inspect": Inspect,
    "import": Import,
    "train": Train,
    "encode": Encode,
    "import-latents": ImportLatents,
    "pose-map": PoseMap,
    "embed": Embed,
    "cluster": Cluster,
    "regroup": Regroup,
    "hold-still": HoldStill,
    "traverse": Traverse,
    "film": Film,
    "average": Average,
    "refine": Refine,
    "average-independent": Independent,
    "examine": Examine,
    "amend": Amend,
    "compare-classes": CompareClasses,
    "reproduce": Reproduce,
    "report-classes": ReportClasses,
    "export-aligned": ExportAligned,
    "export": Export,
    "export-classes": ExportClasses,
    "merge": Merge,
    "transfer": Transfer,
    "open": Open,
    "simulate": Simulate,
    "demo": Demo,
}


BENCH: dict[str, type[Command]] = {
    "bench accuracy": BenchAccuracy,
    "bench averages": BenchAverages,
    "bench speed": BenchSpeed,
    "bench interface": BenchInterface,
}


HIDDEN: dict[str, type[Command]] = {"decode-server": DecodeServer}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or file of another encoding has no Å
            stream.reconfigure(errors="replace")
    # Threads that wait by spinning starve their partners when another program wants a core: a fit beside
    # one busy program took twice as long. Sleeping costs nothing on a quiet machine. torch reads this once.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "--status" in words:  # a job stands back for the window from its first import on
        from particle_explorer.status import give_way

        give_way()
    try:
        command = parse(words)
        if command is not None:
            command.execute()
    except UserError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        _report_failure(words, error)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def parse(words: Sequence[str]) -> Command | None:
    """The command that these words ask for; None when they asked for help, which was given."""
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return None
    if words[0] == "--version":
        from particle_explorer import __version__

        print(__version__)
        return None
    name, rest = words[0], list(words[1:])
    commands = COMMANDS | HIDDEN
    if name == "bench":
        commands = BENCH
        if not rest or rest[0] in ("-h", "--help"):
            print(_list_commands(str(Bench.__doc__), BENCH))
            return None
        name, rest = f"bench {rest[0]}", rest[1:]
    if name not in commands:
        known = ", ".join(command for command in commands if command not in HIDDEN)
        raise UserError(f"there is no command {name!r}; choose one of {known}")
    command = commands[name]
    if {"-h", "--help"} & set(rest):
        describe(command)
    if command is Train:
        command = _train_of_kind(_kind(rest))
    settings = _settings_class(command, name)
    try:
        source: CliSettingsSource[Any] = CliSettingsSource(
            settings, formatter_class=_Help, cli_exit_on_error=False
        )
        return CliApp.run(settings, cli_args=_plain_flags(rest, command), cli_settings_source=source)
    except SystemExit:  # --help was given
        return None
    except SettingsError as error:
        text = str(error).removeprefix("error parsing CLI: ")
        raise UserError(f"{name}: {text}; see {PROGRAM} {name} --help") from error
    except ValidationError as error:
        raise UserError(_sentence(error, name, command)) from error


class _Help(argparse.HelpFormatter):
    """Help as argparse writes it, without the defaults that are empty texts."""

    def _expand_help(self, action: argparse.Action) -> str:
        return super()._expand_help(action).removesuffix("(default: )").rstrip()


def _settings_class(command: type[Command], name: str) -> type[Any]:
    """`command` as pydantic-settings reads it: from the words alone, never from the environment."""

    class FromWords(BaseSettings, command):  # type: ignore[misc, valid-type]
        __doc__ = command.__doc__
        model_config = SettingsConfigDict(
            cli_prog_name=f"{PROGRAM} {name}",
            cli_kebab_case=True,
            cli_implicit_flags=True,
            cli_hide_none_type=True,
            cli_avoid_json=True,
            cli_enforce_required=True,
            nested_model_default_partial_update=True,
            case_sensitive=True,
        )

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (init_settings,)

    return FromWords


def _plain_flags(words: Sequence[str], command: type[Config]) -> list[str]:
    """`--flag true` as `--flag`, `--flag false` as `--no-flag`, and `--n` as `-n`.

    So whoever builds a command line need not know which options are flags, and which have one letter.
    """
    flags = set(_flags(command, "--"))
    plain: list[str] = []
    for word in words:
        if word.partition("=")[0] == "--n":
            word = word[1:]
        if word in ("true", "false") and plain and plain[-1] in flags:
            if word == "false":
                plain[-1] = "--no-" + plain[-1][2:]
        else:
            plain.append(word)
    return plain


def _flags(config: type[Config], prefix: str) -> Iterator[str]:
    for name, field in config.model_fields.items():
        option = prefix + name.replace("_", "-")
        if field.annotation is bool:
            yield option
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            yield from _flags(field.annotation, option + ".")


def _kinds() -> dict[str, type[Config]]:
    """The model configs by the name of their kind."""
    union = get_args(ModelConfig)[0]
    return {get_args(config.model_fields["kind"].annotation)[0]: config for config in get_args(union)}


def _kind(words: Sequence[str]) -> str:
    """What --model.kind says, or the default."""
    for i, word in enumerate(words):
        if word.startswith("--model.kind="):
            return word.partition("=")[2]
        if word == "--model.kind" and i + 1 < len(words):
            return words[i + 1]
    return ClassMapConfig().kind


def _train_of_kind(kind: str) -> type[Command]:
    """`train` with the settings of one kind of model: its help shows just those, others are refused."""
    kinds = _kinds()
    if kind not in kinds:
        raise UserError(f"--model.kind {kind}: there is no such model; choose one of {', '.join(kinds)}")
    others = ", ".join(f"--model.kind {other}" for other in kinds if other != kind)
    about = (
        f"{Train.__doc__} The model settings below are those of {kind}; for others add --help to {others}."
    )
    return create_model("Train", __base__=Train, __doc__=about, model=(kinds[kind], kinds[kind]()))


def _sentence(error: ValidationError, name: str, command: type[Command]) -> str:
    """The first problem, with the option as it is typed."""
    problem = error.errors()[0]
    parts = [str(part).replace("_", "-") for part in problem["loc"]]
    field = command.model_fields.get(str(problem["loc"][0])) if problem["loc"] else None
    positional = field is not None and any("Positional" in type(item).__name__ for item in field.metadata)
    option = parts[0].upper() if positional else "--" + ".".join(parts)
    message = problem["msg"][:1].lower() + problem["msg"][1:]
    return f"{name}: {option} {problem['input']!s}: {message}; see {PROGRAM} {name} --help"


def _overview() -> str:
    about = "Explore single-particle electron microscopy images by content, with pose set apart."
    return _list_commands(about, COMMANDS | {"bench": Bench})


def _list_commands(about: str, commands: dict[str, type[Command]]) -> str:
    width = max(map(len, commands)) + 2
    lines = [
        f"  {name:{width}}{(command.__doc__ or '').splitlines()[0]}" for name, command in commands.items()
    ]
    usage = f"usage: {PROGRAM} COMMAND ...   ({PROGRAM} COMMAND --help says more of one)"
    return "\n".join([usage, "", about, "", *lines])


def _report_failure(words: Sequence[str], error: UserError) -> None:
    """Tell whoever follows the folder of --status of a failure that came before the job reported itself."""
    if "--status" not in words[:-1]:
        return
    from particle_explorer.status import StatusWriter

    folder = Path(words[words.index("--status") + 1])
    if folder.is_dir():
        StatusWriter.note_failure(folder, error)


if __name__ == "__main__":
    sys.exit(main())
