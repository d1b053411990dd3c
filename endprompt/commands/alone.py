"""The commands without a recipe to resolve: what scripts ask, and what is done with a run that is there."""

import os

from endprompt.runs import launch


def status(arguments) -> None:
    import json

    from endprompt.runs import runfolder

    found = runfolder.summary(arguments.run)
    print(json.dumps(found) if arguments.json else runfolder.describe(found))


def path(arguments) -> None:
    from endprompt.recipe import settings_file

    folder = arguments.out / settings_file.recipe(arguments.recipe)[0]
    if arguments.method:
        from endprompt import methods

        folder /= methods.get(arguments.method).name
    print(folder)


def export_run(arguments) -> None:
    from endprompt.runs import export

    form = arguments.position_dependent, arguments.dtype, arguments.share, arguments.gguf
    print(f"{export.export(arguments.run, arguments.to, *form)}: written")


def gpus(arguments) -> None:
    print(launch.gpus(os.environ))


def init(arguments) -> None:
    from endprompt.commands import starting

    starting.init(arguments)


def doctor(arguments) -> None:
    from endprompt.commands import checkup

    checkup.doctor(arguments)


def report(arguments) -> None:
    from endprompt.reports import run_report

    run_report.write(arguments.runs, arguments.out)
    print(f"{arguments.out}: written; open it in a browser")


COMMANDS = {
    "init": init,
    "doctor": doctor,
    "status": status,
    "report": report,
    "export": export_run,
    "path": path,
    "gpus": gpus,
}
