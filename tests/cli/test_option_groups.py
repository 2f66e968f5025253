"""Groups of options: a dataclass in a command's signature stands for one option per field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from meteora_cli.option_groups import with_option_groups
from meteora_cli.typer_app import App


@dataclass(frozen=True)
class Size:
    width: Annotated[int | None, typer.Option("--width", min=1, help="Width in cells.")] = None
    tall: Annotated[bool, typer.Option("--tall", help="Twice the height.")] = False


@dataclass(frozen=True)
class Required:
    name: Annotated[str, typer.Option("--name")]


def draw(
    ctx: typer.Context, *, title: Annotated[str, typer.Argument(help="Title.")], size: Size, loud: Annotated[bool, typer.Option("--loud")] = False
) -> None:
    """Draw a box."""
    typer.echo(f"{title} {size} {loud} {sorted(ctx.params)}")


def wrong(size: Size, width: int = 0) -> None: ...


def unset(required: Required) -> None: ...


def test_a_group_becomes_options_in_their_order_and_the_command_gets_one_value() -> None:
    app = App(add_completion=False)
    app.command("draw")(draw)
    assert [parameter.name for parameter in typer.main.get_command(app).params] == ["title", "width", "tall", "loud"]
    done = CliRunner().invoke(app, ["box", "--tall", "--width", "3"])
    assert done.output.strip() == "box Size(width=3, tall=True) False ['loud', 'tall', 'title', 'width']"
    assert CliRunner().invoke(app, ["box"]).output.startswith("box Size(width=None, tall=False) False")
    assert CliRunner().invoke(app, ["box", "--width", "0"]).exit_code == 2


def test_a_command_without_groups_stays_the_same_function() -> None:
    def plain(ctx: typer.Context, name: str = "") -> None: ...

    assert with_option_groups(plain) is plain


def test_options_of_the_same_name_and_fields_without_a_default_are_refused() -> None:
    with pytest.raises(TypeError, match="wrong has more than one option named width"):
        with_option_groups(wrong)
    with pytest.raises(TypeError, match=r"Required\.name has no default"):
        with_option_groups(unset)
