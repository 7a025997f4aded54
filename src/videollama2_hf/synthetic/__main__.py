"""`python -m videollama2_hf.synthetic`: write data of the synthetic world, train the small model on it, ask it."""

import argparse
import sys


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m videollama2_hf.synthetic", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    generate = commands.add_parser("generate", help="write a folder of rows with their videos, images and sounds")
    generate.add_argument("--output", required=True, help="folder to write")
    generate.add_argument("--rows", type=int, default=100)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--held-out", action="store_true", help="of the compositions that only the test has")
    generate.add_argument("--medium", action="append", help="only this medium (may be repeated)")
    generate.add_argument("--captions", action="store_true", help="rows that are one caption; with --medium")
    generate.add_argument("--size", type=int, default=64, help="side of the frames in pixels")

    train = commands.add_parser("train", help="run or continue the stages of the small model")
    train.add_argument("--output", required=True, help="folder of all stages")
    train.add_argument("--stage", action="append", help="only this stage (may be repeated); default: all, in order")
    train.add_argument("--minutes", type=float, help="stop after so many minutes, to be continued")
    train.add_argument("--steps", type=int, help="in place of the stage's own")
    train.add_argument("--batch-size", type=int, help="in place of the stage's own")
    train.add_argument("--workers", type=int, default=0, help="processes that draw rows")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--cpu", action="store_true", help="leave an accelerator alone")
    train.add_argument(
        "--compile", action="store_true", help="compile the layers of vision tower and language model (torch.compile)"
    )
    train.add_argument("--model", help="folder of the model to start from, in place of what the stage before wrote")
    train.add_argument(
        "--drill",
        action="append",
        default=[],
        metavar="SKILL=SHARE",
        help="in stage drills: a skill that rows of their own ask for, and their share of all rows, such as "
        "synchrony=0.4 (may be repeated)",
    )

    evaluate = commands.add_parser("evaluate", help="print the table of held-out skills of a model")
    evaluate.add_argument("--model", help="folder of the model; default: the one that comes with the package")
    evaluate.add_argument("--per-skill", type=int, default=100, help="questions of every kind")
    evaluate.add_argument("--seed", type=int, default=1)
    evaluate.add_argument("--seen", action="store_true", help="of the training's compositions instead")
    evaluate.add_argument("--no-files", action="store_true", help="draw media instead of writing and reading files")
    evaluate.add_argument("--output", help="JSON file to write the numbers to")

    export = commands.add_parser("export", help="write a trained model for shipping: bfloat16, no code beside it")
    export.add_argument("--model", required=True, help="folder of the model")
    export.add_argument("--output", required=True, help="folder to write")

    example = commands.add_parser("example", help="write the clip that comes with the package")
    example.add_argument("--output", required=True, help="mp4 file to write")
    example.add_argument(
        "--search", action="store_true", help="write the first one that the model answers rightly about, and say which"
    )
    example.add_argument("--model", help="folder of the model that is asked; default: the one of the package")

    ablate = commands.add_parser("ablate", help="compare connectors on the video part, and print the table")
    ablate.add_argument("--output", required=True, help="folder of all stages, stage 0 finished")
    ablate.add_argument("--seeds", type=int, default=3)
    ablate.add_argument("--steps", type=int, default=1000)
    ablate.add_argument("--batch-size", type=int, default=32)
    ablate.add_argument("--rows", type=int, default=9600, help="different ones; more steps take them again")
    ablate.add_argument("--minutes", type=float, help="begin no training after so many minutes, to be continued")
    ablate.add_argument("--processes", type=int, default=1, help="trainings side by side")
    ablate.add_argument("--cpu", action="store_true", help="leave an accelerator alone")

    options = parser.parse_args(arguments)
    run = {
        "generate": _generate,
        "train": _train,
        "evaluate": _evaluate,
        "export": _export,
        "example": _example,
        "ablate": _ablate,
    }
    try:
        run[options.command](options)
    except (ValueError, FileNotFoundError) as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _generate(options: argparse.Namespace) -> None:
    from .rows import generate

    mix = dict.fromkeys(options.medium, 1.0) if options.medium else None
    print(generate(options.output, options.rows, options.seed, options.held_out, mix, options.size, options.captions))


def _train(options: argparse.Namespace) -> None:
    import time

    from .stages import STAGES, run_stage

    if options.drill and options.stage != ["drills"]:
        raise ValueError("Drills are for the stage of that name; add --stage drills.")
    if options.model and len(options.stage or ()) != 1:
        raise ValueError("A model to start from is for one stage; name it with --stage.")
    drills = {}
    for drill in options.drill:
        skill, _, share = drill.rpartition("=")
        try:
            drills[skill] = float(share)
        except ValueError:
            raise ValueError(f"A drill is SKILL=SHARE, such as synchrony=0.4; got {drill!r}.") from None
    started = time.monotonic()
    for name in options.stage or STAGES:
        minutes = None
        if options.minutes is not None:
            minutes = options.minutes - (time.monotonic() - started) / 60
        is_done = minutes is None or minutes > 0
        is_done = is_done and run_stage(
            name,
            options.output,
            options.steps,
            options.batch_size,
            minutes,
            options.workers,
            options.seed,
            options.cpu,
            options.compile,
            options.model,
            drills,
        )
        if not is_done:
            print(f"Stage {name} is not finished; the same command continues it.")
            return
        print(f"Stage {name} is finished.", flush=True)


def _evaluate(options: argparse.Namespace) -> None:
    from ..assets import get_small_model
    from .evaluation import evaluate_folder

    model = options.model or get_small_model()
    evaluate_folder(model, options.per_skill, options.seed, not options.seen, not options.no_files, options.output)


def _export(options: argparse.Namespace) -> None:
    from .small_model import export

    export(options.model, options.output)


def _example(options: argparse.Namespace) -> None:
    from .example import EXAMPLE_SEED, find_example, write_example

    seed = EXAMPLE_SEED
    if options.search:
        from itertools import islice

        from ..assets import get_small_model
        from ..session import Session

        session = Session.from_pretrained(options.model or get_small_model())
        for seed, wrong in islice(find_example(session), 100):
            print(f"{seed}: {'; '.join(f'{q} {a}' for q, a in wrong.items()) or 'all answers are right'}", flush=True)
            if not wrong:
                break
        else:
            raise ValueError("The model answers rightly about none of the first 100 clips.")
    print(write_example(options.output, seed))


def _ablate(options: argparse.Namespace) -> None:
    from .ablation import format_ablation, run_ablation

    results = run_ablation(
        options.output,
        options.seeds,
        options.steps,
        options.batch_size,
        options.rows,
        minutes=options.minutes,
        processes=options.processes,
        cpu=options.cpu,
    )
    print(format_ablation(results))


if __name__ == "__main__":
    main()
