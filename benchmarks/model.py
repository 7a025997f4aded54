"""
Encoding media and answering: the original's code, transformers' towers, timm's connector, and the machine's limits.

    python benchmarks/model.py --original CHECKOUT   # about half an hour of CPU time
    python benchmarks/model.py --only tower chat     # rows whose name has one of these words
    python benchmarks/model.py --short               # small models, one round, for tests: equality

The weights are random, in the shapes of the published models; 0.5B is Qwen2's. One thread, CPU seconds, variants in
turns: a ratio is how many times more CPU time the reference takes in the same round. Whatever a row says, it fails if
the results differ. `CHECKOUT` is https://github.com/DAMO-NLP-SG/VideoLLaMA2, branch audio_visual; without it, BEATs is
compared with eager attention and a position bias as in the original. Results: `results/model.{json,md}`; with `--only`
the other rows of a table that is there stay.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import answering
import torch
import towers
from common import RESULTS, describe_machine, write_results


Row = dict[str, Any]


def all_rows(short: bool, rounds: int, original: Path | None) -> dict[str, Callable[[], Row]]:
    """The rows by name, each to be measured when it is called."""
    few, bf16 = min(rounds, 2), torch.bfloat16
    return {
        "import": lambda: answering.importing(few),
        "load": lambda: answering.load(few),
        "beats float32": lambda: towers.beats(short, few, original, torch.float32, 2.2),
        "beats bfloat16": lambda: towers.beats(short, rounds, original, bf16, 2.4),
        "tower clip": lambda: towers.vision_tower(short, rounds, "CLIP-L/14-336", 2, bf16),
        "tower siglip": lambda: towers.vision_tower(short, rounds, "SigLIP-so400m/14-384", 1, bf16),
        "image clip": lambda: towers.image_question(short, few, "CLIP-L/14-336", 8, bf16),
        "image siglip": lambda: towers.image_question(short, 1, "SigLIP-so400m/14-384", 16, bf16),
        "connector 2": lambda: towers.stc_connector(short, few, "2", bf16),
        "connector 2.1": lambda: towers.stc_connector(short, few, "2.1", bf16),
        "long video": lambda: towers.long_video(short),
        "prefill": lambda: answering.prefill(short),
        "decode float32": lambda: answering.decode(short, rounds, torch.float32),
        "decode bfloat16": lambda: answering.decode(short, rounds, bf16),
        "chat": lambda: answering.five_turns(short),
        "questions": lambda: answering.many_questions(short, few),
        "captions": lambda: answering.captions(short, few),
    }


@torch.inference_mode()
def main(short: bool, only: list[str], original: Path | None, rounds: int, results: Path) -> list[Row]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    makers = all_rows(short, 1 if short else rounds, original)
    chosen = {name for name in makers if not only or any(word in name for word in only)}
    if not chosen:
        raise SystemExit(f"No row has {' or '.join(only)} in its name; the rows are {', '.join(makers)}.")
    path = results / "model.json"
    rows = {row["row"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() and only else {}
    for name in makers:
        if name not in chosen:
            continue
        rows[name] = {"row": name, **makers[name]()}
        print(json.dumps(rows[name]), flush=True)
        if not short:
            machine = describe_machine("torch", "transformers", "timm")
            ordered = [rows[key] for key in makers if key in rows]
            write_results("model", "Encoding and answering", ordered, machine, results)
    return list(rows.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="words in the names of rows")
    parser.add_argument("--short", action="store_true", help="small models, one round, nothing written")
    parser.add_argument("--original", type=Path, metavar="CHECKOUT", help="the original's code")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the tables go")
    arguments = parser.parse_args()
    main(arguments.short, arguments.only, arguments.original, arguments.rounds, arguments.results)
