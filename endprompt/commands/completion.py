"""Shell completion, by argcomplete, and what completes recipes, methods and tasks."""

import argparse
from typing import Any


def methods(**_) -> list[str]:
    from endprompt import methods

    return list(methods.METHODS)


def tasks(**_) -> list[str]:
    from endprompt.recipe import task_names

    return [*task_names.GROUPS, *task_names.TASKS]


def recipes(prefix: str, **more) -> list[str]:
    """Files in YAML, and the names of the recipes that come with this program."""
    from argcomplete.completers import FilesCompleter

    from endprompt.recipe import settings_file

    shipped = sorted(path.stem for path in (settings_file.SHIPPED / "recipes").glob("*.yaml"))
    files = list(FilesCompleter(("yaml", "yml"))(prefix, **more))
    return [*files, *(name for name in shipped if name.startswith(prefix) and name != "sft")]


OF: dict[str, Any] = {"method": methods, "tasks": tasks, "recipe": recipes}


def equip(parser: argparse.ArgumentParser) -> None:
    """Tells ``parser`` and the parsers of its commands what completes which argument."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                equip(command)
        elif action.dest in OF and not action.choices:
            setattr(action, "completer", OF[action.dest])  # noqa: B010 (argcomplete's name, unknown to types)


def answer(parser: argparse.ArgumentParser) -> None:
    import argcomplete

    equip(parser)
    argcomplete.autocomplete(parser, always_complete_options="long")
