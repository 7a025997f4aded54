"""The same question about many files: batches of answers, written as they come, gone on with after an interruption."""

import glob
import json
import os
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .session import EncodedMedia, Session


MEDIA_SUFFIXES = {
    "video": (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".ogv", ".gif"),
    "image": (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"),
    "audio": (".wav", ".mp3", ".flac", ".m4a", ".ogg", ".opus", ".aac", ".wma"),
}


def find_kind(path: str | os.PathLike) -> str | None:
    """`"video"`, `"image"` or `"audio"` by the end of a file's name; a folder is a video of its frames."""
    if os.path.isdir(path):
        return "video"
    suffix = Path(path).suffix.lower()
    return next((kind for kind, suffixes in MEDIA_SUFFIXES.items() if suffix in suffixes), None)


def list_media(source: str) -> list[str]:
    """
    The media files that `source` stands for, in order.

    Args:
        source: A media file; a folder, searched with what is below it; a pattern (`clips/*.mp4`); or a list of paths,
            relative to its own folder: a `.txt` with a path per line, or `.jsonl` or `.parquet` with a column `media`.

    Raises:
        FileNotFoundError: There is nothing of that name, or no media in it.
        ValueError: A list lacks the column `media`.
    """
    path = Path(source)
    if path.is_dir():
        found = sorted(str(file) for file in path.rglob("*") if file.is_file() and find_kind(file))
    elif path.suffix in (".txt", ".jsonl", ".parquet") and path.is_file():
        found = [str(path.parent / entry) for entry in _read_list(path)]
    elif path.is_file():
        found = [source]
    else:
        found = sorted(file for file in glob.glob(source, recursive=True) if find_kind(file))
    if not found:
        raise FileNotFoundError(f"{source!r} is no file, and there are no videos, images or sounds in it.")
    return found


def _read_list(path: Path) -> list[str]:
    if path.suffix == ".txt":
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        rows = parquet.read_table(path).to_pylist()
    else:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    wrong = next((number for number, row in enumerate(rows) if not isinstance(row, dict) or "media" not in row), None)
    if wrong is not None:
        raise ValueError(f"Row {wrong} of {path} has no `media`, the path of a file.")
    return [row["media"] for row in rows]


@dataclass
class CaptionReport:
    """
    What became of the files.

    Args:
        num_answered: Files that were answered now.
        num_before: Files that the output had already.
        failed: Files that could not be read, and why.
        seconds: How long it took.
        waiting_seconds: How long of that the language model had to wait for media.
    """

    num_answered: int = 0
    num_before: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    waiting_seconds: float = 0.0


def caption(
    session: Session,
    media: list[str],
    output: str | os.PathLike,
    question: str = "Describe this in detail.",
    batch_size: int = 4,
    block_options: dict[str, Any] | None = None,
    num_workers: int = 2,
    show_progress: bool | None = None,
    **generation: Any,
) -> CaptionReport:
    """
    Asks the same question about every file and writes a line of JSON for each: `media`, `question`, `text`,
    `num_new_tokens`, `finish_reason`.

    Files whose line the output has already are left out, so a run that was interrupted goes on where it stopped. A
    file that cannot be read gets no line; the others go on.

    Args:
        media: Paths, see [`list_media`].
        output: A `.jsonl` file, written line by line; or a `.parquet` file, made at the end of the `.jsonl` file that
            lies beside it, for which pyarrow is needed.
        block_options: Options of every video's content block (`num_frames`, `load_audio_from_video`, ...).
        num_workers: Threads that read and encode the next files while a batch is answered.
        show_progress: Whether to show a bar. `None`: on a terminal.
        generation: Arguments of `generate`, such as `max_new_tokens`.
    """
    target, report = Path(output), CaptionReport()
    output = target.with_suffix(".jsonl")
    done = _read_answered(output, question)
    waiting = [path for path in media if path not in done]
    report.num_before = len(media) - len(waiting)
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(output, "a", encoding="utf-8") as file,
        tqdm(
            total=len(waiting), unit="clip", disable=None if show_progress is None else not show_progress
        ) as progress,
        closing(_encode_ahead(session, waiting, block_options or {}, num_workers, batch_size)) as encoded,
    ):
        started = time.perf_counter()
        for start in range(0, len(waiting), batch_size):
            paths = waiting[start : start + batch_size]
            conversations = []
            for path in paths:
                asked = time.perf_counter()
                future = next(encoded)
                try:
                    block = future.result()
                except (OSError, ValueError) as error:
                    report.failed[path] = str(error)
                    continue
                finally:
                    report.waiting_seconds += time.perf_counter() - asked
                conversations.append([{"role": "user", "content": [block, {"type": "text", "text": question}]}])
            readable = [path for path in paths if path not in report.failed]
            for path, answer in zip(readable, session.answer(conversations, **generation) if conversations else ()):
                record: dict[str, Any] = {"media": path, "question": question, "text": answer.text}
                record |= {"num_new_tokens": answer.num_new_tokens, "finish_reason": answer.finish_reason}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                report.num_answered += 1
            file.flush()
            progress.update(len(paths))
        report.seconds = time.perf_counter() - started
    if target.suffix == ".parquet":
        from pyarrow import json as lines
        from pyarrow import parquet

        parquet.write_table(lines.read_json(output), target)
    return report


def _encode_ahead(
    session: Session, paths: list[str], options: dict[str, Any], num_workers: int, batch_size: int
) -> Generator[Future[dict[str, Any]], None, None]:
    """The content block of every file, encoded, in order; two batches ahead of what is taken."""

    def encode(path: str) -> dict[str, Any]:
        block = _make_block(path, options)
        encoded: EncodedMedia = session.encode(block)
        return {"type": block["type"], block["type"]: encoded}

    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="encode")
    ahead: deque[Future[dict[str, Any]]] = deque()
    try:
        for path in paths:
            ahead.append(pool.submit(encode, path))
            if len(ahead) > 2 * batch_size:
                yield ahead.popleft()
        while ahead:
            yield ahead.popleft()
    finally:  # after Ctrl-C too: what has not begun is not read any more
        pool.shutdown(cancel_futures=True)


def _make_block(path: str, options: dict[str, Any]) -> dict[str, Any]:
    if not os.path.exists(path):
        raise FileNotFoundError(f"There is no file {path!r}.")
    kind = find_kind(path)
    if kind is None:
        raise ValueError(f"The name of {path!r} does not say whether it is a video, an image or a sound.")
    return {"type": kind, kind: path} | (options if kind == "video" else {})


def _read_answered(output: Path, question: str) -> set[str]:
    """Files with a whole line."""
    return {record["media"] for record in _records(output) if record.get("question") == question}


def read_whole_lines(path: Path) -> list[str]:
    """The lines of a file that is gone on with; the rest of a line that an interruption left is cut off the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) != len(content):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    return whole.decode("utf-8").splitlines()


def _records(output: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(read_whole_lines(output)):
        try:
            record = json.loads(line)
            record["media"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"Line {number + 1} of {output} is not one that captioning writes. Choose another output."
            ) from None
        yield record


__all__ = ["MEDIA_SUFFIXES", "CaptionReport", "caption", "find_kind", "list_media", "read_whole_lines"]
