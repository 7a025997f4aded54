"""The proof of a conversion as files beside the weights: `conversion_report.json`, and `CONVERSION.md` for people."""

import datetime
import json
import platform
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .plan import Plan
from .reference import compare_with_original
from .tensors import read_folder
from .verify import (
    NEW_TOKENS,
    VerificationError,
    bytes_to_hash,
    file_label,
    hash_file,
    self_check,
    source_repository,
    verify_tensors,
)


REPORT_FILE, SUMMARY_FILE = "conversion_report.json", "CONVERSION.md"
_PACKAGES = ("videollama2-hf", "transformers", "torch", "torchvision", "timm", "safetensors", "tokenizers")

logger = logging.get_logger(__name__)


def bytes_to_verify(plan: Plan) -> int:
    """How many bytes [`prove`] reads, for a progress bar."""
    return bytes_to_hash(plan) + sum(path.stat().st_size for path in _source_files(plan))


def prove(
    plan: Plan,
    folder: Path,
    progress: Any,
    reference: str | Path | None = None,
    reference_python: str | None = None,
) -> dict[str, Any]:
    """
    Checks a conversion that was just written and writes the report into its folder.

    Args:
        plan: What was carried out.
        folder: Its result.
        progress: A progress bar of [`bytes_to_verify`] bytes.
        reference, reference_python: The original code and its interpreter, see [`compare_with_original`]. `None`: no
            comparison.

    Returns:
        The report.

    Raises:
        VerificationError: A check did not hold; no report is written.
    """
    proof = verify_tensors(plan, folder, progress.update)
    _require(proof.pop("problems"), "The written tensors are not those of the source")
    files = []
    for path in _source_files(plan):
        files.append(
            {"file": file_label(plan, path), "bytes": path.stat().st_size, "sha256": hash_file(path, progress.update)}
        )
    checks = {"self_check": self_check(folder, plan.nbytes)}
    if reference is not None:
        checks["reference"] = compare_with_original(plan, folder, Path(reference), reference_python)
    for name, title in (
        ("self_check", "The converted model does not work"),
        ("reference", "The converted model does not compute what the original does"),
    ):
        _require(checks.get(name, {}).pop("problems", []), title)
    repository, revision = source_repository(plan.source.folder)
    report = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_versions()},
        "source": {"name": repository, "revision": revision, "kind": plan.source.kind, "files": files},
        "notes": list(plan.source.notes),
        "counts": {
            "tensors": len(proof["tensors"]),
            "bytes": plan.nbytes,
            "left_out": len(proof["left_out"]),
            "relations": dict(Counter(tensor["relation"] for tensor in proof["tensors"])),
        },
        "files": [
            {"file": path.name, "bytes": path.stat().st_size}
            for path in sorted({tensor.file for tensor in read_folder(folder).values()})
        ],
        "checks": checks,
        **proof,
    }
    for check in checks.values():
        if "skipped" in check:
            logger.warning(check["skipped"])
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / SUMMARY_FILE).write_text(describe(report), encoding="utf-8")
    return report


def _require(problems: list[str], title: str) -> None:
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems)
        raise VerificationError(
            f"{title}, so nothing was published. Check the disk and begin again with --overwrite; if it happens "
            f"again, report it.\n{shown}"
        )


def _source_files(plan: Plan) -> list[Path]:
    stored = [tensor.source for tensor in plan.tensors] + [item.source for item in plan.left_out]
    for tensor in plan.tensors:
        if tensor.change is not None:
            stored += [tensor.change.a, tensor.change.b]
    return sorted({tensor.file for tensor in stored})


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a copy of the code
            continue
    return versions


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table in Markdown."""
    header = list(header)
    lines = [header, ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summarise(report: dict[str, Any]) -> str:
    """What was proven, in some sentences."""
    counts, checks = report["counts"], report["checks"]
    relations = ", ".join(f"{count} {relation}" for relation, count in counts["relations"].items())
    sentences = [
        f"Every one of the {counts['tensors']} tensors was read back from disk and compared with its source by "
        f"SHA-256 ({relations}); {counts['left_out']} tensors of the source were left out, each with its reason."
    ]
    trial = checks["self_check"]
    if "skipped" in trial:
        sentences.append(trial["skipped"])
    else:
        sentences.append(
            f"The reloaded model ({trial['dtype']}) gave finite features and logits on synthetic media, the same "
            "features when it encoded them again, and the same tokens from encoded media as from the media themselves."
        )
    reference = checks.get("reference")
    if reference is None:
        sentences.append("It was not run side by side with the original code (`--reference`).")
    elif "skipped" in reference:
        sentences.append(reference["skipped"])
    else:
        worst = max(case["layers"][-1]["difference"] for case in reference["cases"].values())
        sentences.append(
            f"On {len(reference['cases'])} synthetic prompts every layer agrees with the original code in float32 "
            f"within {reference['tolerance']:g} of its largest value (or of 1); the logits differ by at most "
            f"{worst:.2g}."
        )
    return " ".join(sentences)


def describe(report: dict[str, Any]) -> str:
    """`CONVERSION.md`."""
    source = report["source"]
    revision = f", commit `{source['revision']}`" if source["revision"] else ""
    return "\n\n".join(["# Conversion", *_sections(report, source["name"] + revision)]) + "\n"


def _sections(report: dict[str, Any], source: str) -> Iterator[str]:
    yield (
        f"Source: {source} ({report['source']['kind']}). Written {report['created']} with "
        + ", ".join(f"{name} {number}" for name, number in report["versions"].items())
        + "."
    )
    yield summarise(report)
    yield from (f"Note: {note}" for note in report["notes"])
    yield "## Files of the source"
    yield table(
        ("file", "bytes", "SHA-256"),
        ((f"`{entry['file']}`", f"{entry['bytes']:,}", f"`{entry['sha256']}`") for entry in report["source"]["files"]),
    )
    yield "## Tensors"
    yield f"All are listed with their SHA-256 in `{REPORT_FILE}`."
    yield table(("what was done", "tensors"), ((name, count) for name, count in report["counts"]["relations"].items()))
    merged = [tensor["max_difference_from_float64"] for tensor in report["tensors"] if "lora" in tensor]
    if merged:
        yield f"Merged weights lie within {max(merged):.3g} of the sum computed in float64."
    if report["left_out"]:
        yield "Left out:"
        yield table(
            ("tensor", "file", "reason"),
            ((f"`{item['source']}`", f"`{item['file']}`", item["reason"]) for item in report["left_out"]),
        )
    yield "## The reloaded model"
    trial = report["checks"]["self_check"]
    if "skipped" in trial:
        yield trial["skipped"]
    else:
        yield (
            f"In {trial['dtype']} on {trial['device']}, a prompt of {trial['prompt_tokens']} tokens with synthetic "
            f"media. Logits of the next token from {trial['logits']['min']:.4g} to {trial['logits']['max']:.4g}. "
            f"The first {NEW_TOKENS} greedy tokens: {trial['greedy']['ids']}."
        )
        yield table(
            ("features", "tokens", "mean", "standard deviation", "largest", "encoded again differs by"),
            (
                (
                    modality,
                    numbers["tokens"],
                    *(f"{numbers[key]:.4g}" for key in ("mean", "standard_deviation", "max")),
                    f"{numbers['difference_when_encoded_again']:.3g}",
                )
                for modality, numbers in trial["features"].items()
            ),
        )
    yield "## The original code"
    reference = report["checks"].get("reference")
    if reference is None:
        yield "It was not run; `videollama2 convert --reference PATH` compares with it layer by layer."
    elif "skipped" in reference:
        yield reference["skipped"]
    else:
        yield (
            "float32 on the CPU, eager attention; the original ran with "
            + ", ".join(f"{name} {number}" for name, number in reference["versions"].items())
            + ". Largest absolute difference of every case; all layers are in the JSON file."
        )
        yield table(
            ("prompt", "tokens", "layers compared", "layer that differs most", "by", "of at most", "logits differ by",
             "equal next tokens"),
            (_case_row(name, case) for name, case in reference["cases"].items()),
        )  # fmt: skip


def _case_row(name: str, case: dict[str, Any]) -> tuple:
    worst = max(case["layers"], key=lambda layer: layer["difference"] / max(1.0, layer["max"]))
    return (
        name.replace("_", " "),
        case["tokens"],
        len(case["layers"]),
        f"`{worst['module']}`",
        f"{worst['difference']:.3g}",
        f"{worst['max']:.3g}",
        f"{case['layers'][-1]['difference']:.3g}",
        f"{case['equal_predictions']} of {case['tokens']}",
    )
