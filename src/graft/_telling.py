"""How commands tell people what is wrong: a sentence and an exit code, or one JSON value; `--debug` adds the trace."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import typer

from graft._verb_command import Commands
from graft.errors import GraftError, Problem, RequestError, UnknownName, forbidden, without_memory

F = TypeVar("F", bound=Callable[..., Any])
UsageError: Any = typer.BadParameter.__base__
"""What is wrong with the words of a command, as typer's parser says it."""


class Plainly(Commands):
    """All commands. What is wrong with their words is told as every other error."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is named. Raises typer's exception for one that is not there, with the nearest."""
        if args[0] not in self.commands and not args[0].startswith("-"):
            raise UsageError(str(UnknownName("command", args[0], self.commands)))
        return super().resolve_command(ctx, args)

    def main(self, args: Sequence[str] | None = None, *more: Any, **named: Any) -> Any:
        """Run the command that `args` (the command line, if not given) say, and exit."""
        words = sys.argv[1:] if args is None else list(args)
        if not words:
            return super().main(words, *more, **named)  # prints the help
        try:
            code = super().main(words, *more, **{**named, "standalone_mode": False})
        except UsageError as error:
            _show_error(_refused(error), "--json" in words)
            code = RequestError.exit_code
        except typer.Abort:
            code = GraftError.exit_code
        sys.exit(code or 0)


def _refused(error: Any) -> RequestError:
    """What is wrong with a command's words, with where to read more."""
    if error.ctx is None:
        return RequestError(error.message)
    said = error.format_message().strip().rstrip(".")
    option = getattr(error, "option_name", "")
    if option.startswith("--") and any("--set" in known.opts for known in error.ctx.command.params):
        said += f"; settings are given as `--set {option[2:].replace('-', '_')}=…`"
    return RequestError(f"{said[0].lower()}{said[1:]}; `{error.ctx.command_path} --help` shows what there is")


def tidy(command: F) -> F:
    """Errors as a message and an exit code: 1 failed while running, 2 the request was wrong, 130 stopped by Ctrl-C."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        as_json = bool(kwargs.get("json_"))
        if as_json:
            os.environ["GRAFT_QUIET"] = "1"
        try:
            return command(*args, **kwargs)
        except GraftError as error:
            _show_error(error, as_json)
            raise typer.Exit(error.exit_code) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:  # noqa: BLE001  (said in one line, with the way to see more)
            if _unread():
                raise typer.Exit(1) from None
            told = _told(error)
            told.__cause__ = error
            _show_error(told, as_json)
            raise typer.Exit(told.exit_code) from None
        except KeyboardInterrupt:
            typer.echo("stopped; the same command goes on from where it stood", err=True)
            raise typer.Exit(130) from None

    return run  # type: ignore[return-value]


def _unread() -> bool:
    """Whether stdout is a pipe that nobody reads any more (`… | head`); the rest of the answer is dropped."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _told(error: Exception) -> GraftError:
    """What no room of graft's has put into words: a file that may not be used, or a defect."""
    if isinstance(error, PermissionError) and error.filename is not None:
        return forbidden(error)
    if words := without_memory(error):
        return GraftError(words)
    return GraftError(f"{type(error).__name__}: {error}; this is a defect of graft: --debug shows where")


def _show_error(error: GraftError, as_json: bool) -> None:
    if as_json:
        answer = getattr(error, "answer", {})
        said = {"error": str(error), "kind": type(error).__name__, "exit_code": error.exit_code}
        typer.echo(json.dumps({**answer, **said}))
    else:
        typer.echo(f"graft: {error}", err=True)
    if os.environ.get("GRAFT_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
        for name, failure in getattr(error, "failures", {}).items():
            typer.echo(f"{name}:\n{failure.trace}", err=True)


def by_option(problem: Problem) -> Problem:
    """What is wrong with a measure, by the option that says it."""
    place = problem.path[2:]
    if problem.path[:1] != ("evaluate",):
        return problem
    if not place:
        return Problem((), problem.message)
    option = f"--{place[0]}" if place[0] in ("on", "measure", "task") else f"--set {'.'.join(map(str, place))}=…"
    return Problem((option,), problem.message)
