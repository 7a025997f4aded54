"""`videollama2 doctor`."""

import json
from typing import Annotated

import typer


_MARKS = {"ok": ("ok", "green"), "warning": ("--", "yellow"), "broken": ("!!", "red")}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False) -> None:
    """
    Look whether this machine has what is needed, and say the command for what is missing.

    Packages and whether they fit together, GPU and CPU, attention kernels, codecs, compiler, the Hub's cache. `--`
    marks what only some uses want, `!!` what has to be repaired; then the exit code is 1.

    **Example**

        videollama2 doctor
    """
    from ..diagnosis import diagnose, summarise, to_dict

    checks = diagnose()
    if as_json:
        typer.echo(json.dumps(to_dict(checks), ensure_ascii=False))
    else:
        section, width = "", max(len(check.name) for check in checks)
        for check in checks:
            if check.section != section:
                section = check.section
                typer.secho(f"\n{section}" if section != checks[0].section else section, bold=True)
            mark, colour = _MARKS[check.status]
            typer.secho(f"  {mark} ", fg=colour, nl=False)
            typer.echo(f"{check.name:<{width}}  {check.value}")
            if check.fix:
                typer.echo(f"     {'':<{width}}  -> {check.fix}")
        typer.echo(f"\n{summarise(checks)}")
    if any(check.status == "broken" for check in checks):
        raise typer.Exit(1)
