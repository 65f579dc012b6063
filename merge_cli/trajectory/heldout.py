"""The built-in evaluator: the loss of any transformers causal model on a held-out text, per token
and per byte.

The text is cut into windows of `context` tokens, each of which scores the tokens that no earlier
window has scored, but never its first; with a `stride` below the context a window begins with
tokens that are context only. The sum of the loss is kept by document (for plain text: by window),
so that two models can be compared document by document.

Safetensors weights only, local files only, never code of the checkpoint. torch and transformers are
imported when the first model is loaded (`pip install pmerge[eval]`).

Not guaranteed: that the text is no part of the training data, which makes every number here too
good.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from merge_cli.errors import InputError, UsageError
from merge_cli.formats.checkpoint import read_config
from merge_cli.stores.store import read_file
from merge_cli.system.json_text import parse_json
from merge_cli.trajectory.evaluators import EvaluationError, Subject
from merge_cli.trajectory.ledger import Document
from merge_cli.trajectory.results import Result

BYTES = "bytes"  # the tokenizer of a model that reads bytes
MAX_TEXT_BYTES = 4 << 30
_MAX_CONTEXT = 2048  # unless more is asked for
_MAX_DOCUMENTS = 1024  # sums that are kept; more are added up in the order of the file
_LOGITS_BYTES = 256 << 20
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class Window(NamedTuple):
    """Tokens of one pass of the model; those from `first` on are scored. `num_bytes` is their share
    of the document.
    """

    document: int
    tokens: list[int]
    first: int
    num_bytes: int


@dataclass(frozen=True)
class _Library:
    torch: Any
    transformers: Any


class TextEvaluator:
    """The loss on the text in `text` (.txt, .jsonl with a "text" in each line, .parquet with a
    column text, where pyarrow is).

    Context, tokenizer and config are those of `model`, a checkpoint of the run, for all of them;
    `tokenizer` is another folder, or "bytes". `device` is auto, cpu or cuda[:K].
    """

    warnings: Sequence[str] = ()
    at_once = 1

    def __init__(
        self,
        text: Path,
        model: Path,
        *,
        tokenizer: str | None = None,
        context: int | None = None,
        stride: int | None = None,
        device: str = "auto",
        local_rank: int = 0,
    ) -> None:
        """Raises UsageError or InputError, before anything large is imported."""
        for package in ("torch", "transformers"):
            if importlib.util.find_spec(package) is None:
                raise UsageError(f"--text needs {package}", hint="pip install 'pmerge[eval]'")
        self._documents = read_documents(text)
        self._config = read_config(str(model / "config.json"))
        if "auto_map" in self._config:
            raise UsageError(
                f"{model} needs code of its own, which is never run",
                hint="evaluate it by a command of yours:  --command 'CMD {path}'",
            )
        self._tokenizer = tokenizer or _tokenizer_of(model, self._config)
        limit = self._config.get("max_position_embeddings")
        limit = limit if isinstance(limit, int) and limit > 1 else _MAX_CONTEXT
        self._context = context or min(limit, _MAX_CONTEXT)
        self._stride = stride or self._context
        if not 2 <= self._context <= limit or not 1 <= self._stride <= self._context:
            raise UsageError(
                f"--context {self._context} with --stride {self._stride} cannot be",
                details=[f"expected  2 <= context <= {limit}, which the model can take, and 1 <= stride <= context"],
            )
        self._device = device
        self._local_rank = local_rank
        self._windows: list[Window] = []
        self._library: _Library | None = None
        self.identity = json.dumps(
            {
                "text": text.name,
                "sha256": hashlib.sha256("\0".join(self._documents).encode("utf-8", "surrogatepass")).hexdigest(),
                "tokenizer": self._tokenizer if self._tokenizer == BYTES else _digest(Path(self._tokenizer)),
                "config": hashlib.sha256(json.dumps(self._config, sort_keys=True).encode()).hexdigest()[:16],
                "context": self._context,
                "stride": self._stride,
                "transformers": importlib.metadata.version("transformers"),
                "device": "cuda" if self._on_gpu() else "cpu",
            },
            sort_keys=True,
        )

    def measure(self, subject: Subject, folder: Path, slot: int) -> Result:
        torch, transformers = self._load_library()
        where = torch.device("cuda", self._gpu()) if self._on_gpu() else torch.device("cpu")
        model = self._load_model(subject.path, where)
        if not self._windows:
            self._windows = list(self._cut(transformers))
        vocabulary = model.config.get_text_config().vocab_size
        batch = max(1, min(64, _LOGITS_BYTES // (4 * self._context * vocabulary)))
        documents = [Document(0.0, 0, 0)] * (1 + max(window.document for window in self._windows))
        with torch.inference_mode():
            for begin in range(0, len(self._windows), batch):
                windows = self._windows[begin : begin + batch]
                for window, nats in zip(windows, _nats(torch, model, windows, where), strict=True):
                    nat, tokens, num_bytes = documents[window.document]
                    documents[window.document] = Document(
                        nat + nats, tokens + len(window.tokens) - window.first, num_bytes + window.num_bytes
                    )
        total = math.fsum(document.nats for document in documents)
        if not math.isfinite(total):
            raise EvaluationError(f"the loss of {subject.name} is {total}", hint=f"pmerge inspect {subject.path}")
        loss = total / sum(document.tokens for document in documents)
        per_byte = total / sum(document.bytes for document in documents)
        metrics = {"loss": loss, "bits_per_byte": per_byte / math.log(2)}
        return Result(metrics, {}, tuple(_grouped(documents)), "--text")

    def stop(self) -> None:
        """Nothing outlives the call of `measure`."""

    def _load_library(self) -> tuple[Any, Any]:
        if self._library is None:
            import torch
            import transformers

            transformers.logging.set_verbosity_error()
            transformers.logging.disable_progress_bar()
            self._library = _Library(torch, transformers)
        return self._library.torch, self._library.transformers

    def _load_model(self, path: Path, where: Any) -> Any:
        torch, transformers = self._load_library()
        try:
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                path,
                dtype="auto" if self._on_gpu() else torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise EvaluationError(
                f"transformers cannot load {path}: {lines[0][:200]}",
                hint="evaluate it by a command of yours:  --command 'CMD {path}'",
            ) from error
        wrong = {key: sorted(map(str, value))[:3] for key, value in report.items() if value and key != "error_msgs"}
        if wrong:
            raise EvaluationError(f"{path} does not load as it should: {wrong}")
        return model.to(where).eval()

    def _cut(self, transformers: Any) -> Iterator[Window]:
        """The windows of all documents."""
        number = 0
        by_window = len(self._documents) == 1
        for ids, num_bytes in self._tokenized(transformers):
            for begin in range(0, max(len(ids) - 1, 0), self._stride):
                done = 0 if begin == 0 else begin - self._stride + self._context
                end = min(begin + self._context, len(ids))
                first = max(1, done - begin)
                if end - begin > first:
                    share = num_bytes * end // len(ids) - num_bytes * (begin + first) // len(ids)
                    yield Window(number, ids[begin:end], first, share)
                    number += by_window
                if end == len(ids):
                    break
            number += not by_window
        if number == 0:
            raise UsageError("the text has no token that could be predicted", hint="--text FILE with more text")

    def _tokenized(self, transformers: Any) -> Iterator[tuple[list[int], int]]:
        if self._tokenizer == BYTES:
            for document in self._documents:
                raw = document.encode("utf-8", "surrogatepass")
                yield list(raw), len(raw)
            return
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self._tokenizer, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise EvaluationError(f"transformers cannot load the tokenizer of {self._tokenizer}: {error}") from error
        for document in self._documents:
            yield list(tokenizer(document, verbose=False)["input_ids"]), len(document.encode("utf-8", "surrogatepass"))

    def _on_gpu(self) -> bool:
        if self._device == "cpu":
            return False
        import torch

        if torch.cuda.is_available():
            return True
        if self._device == "auto":
            return False
        raise UsageError(f"--device {self._device}: there is no GPU", hint="--device cpu")

    def _gpu(self) -> int:
        import torch

        _, _, number = self._device.partition(":")
        return int(number) if number.isdecimal() else self._local_rank % torch.cuda.device_count()


def read_documents(path: Path) -> list[str]:
    """The documents of a text: the whole of a .txt, the `text` of each line of a .jsonl, of each
    row of a .parquet.

    Raises InputError or UsageError.
    """
    if path.suffix == ".parquet":
        return _read_parquet(path)
    try:
        text = read_file(str(path), MAX_TEXT_BYTES).decode("utf-8", "replace")
    except InputError as error:
        raise UsageError(f"--text: {error.message}", hint=f"ls -l {path}") from error
    documents = [text]
    if path.suffix in (".jsonl", ".json"):
        documents = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                documents.append(_text_of(line, f"{path}, line {number}"))
    if not any(documents):
        raise UsageError(f"--text: {path} is empty")
    return [document for document in documents if document]


def _text_of(line: str, where: str) -> str:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}") from error
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise InputError(f"{where} has no text", details=['expected  an object with "text", or a string'])
    return text


def _read_parquet(path: Path) -> list[str]:
    if importlib.util.find_spec("pyarrow") is None:
        raise UsageError("--text with a .parquet file needs pyarrow", hint="pip install pyarrow, or convert it to .jsonl")
    import pyarrow.parquet  # type: ignore[import-not-found,import-untyped,unused-ignore]

    try:
        table = pyarrow.parquet.read_table(path, columns=["text"])
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"--text: {path} cannot be read: {error}", details=["expected  a column named text"]) from error
    return [str(text) for text in table.column("text").to_pylist() if text]


def _tokenizer_of(model: Path, config: Any) -> str:
    """The checkpoint's own tokenizer; bytes where it has none and a vocabulary of 256. Raises
    UsageError.
    """
    if any((model / name).is_file() for name in _VOCABULARIES):
        return str(model)
    if config.get("vocab_size") == 256:
        return BYTES
    raise UsageError(f"{model} has no tokenizer", hint="--tokenizer FOLDER, or --tokenizer bytes for a model that reads bytes")


def _digest(folder: Path) -> str:
    """The sha256 of the files that make a tokenizer. Raises UsageError where there are none."""
    digest = hashlib.sha256()
    names = [name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not names:
        raise UsageError(f"there is no tokenizer in {folder}", hint="--tokenizer FOLDER with a tokenizer.json")
    for name in names:
        digest.update(name.encode() + hashlib.sha256(read_file(str(folder / name), MAX_TEXT_BYTES)).digest())
    return digest.hexdigest()[:16]


def _nats(torch: Any, model: Any, windows: Sequence[Window], where: Any) -> list[float]:
    """The summed loss of the scored tokens of each window, in nats."""
    longest = max(len(window.tokens) for window in windows)
    ids = torch.zeros((len(windows), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    scored = torch.zeros((len(windows), longest - 1), dtype=torch.bool)
    for i, window in enumerate(windows):
        ids[i, : len(window.tokens)] = torch.tensor(window.tokens)
        mask[i, : len(window.tokens)] = 1
        scored[i, window.first - 1 : len(window.tokens) - 1] = True
    ids, mask, scored = ids.to(where), mask.to(where), scored.to(where)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return [float(value) for value in (losses.double() * scored).sum(dim=1).cpu()]


def _grouped(documents: Sequence[Document]) -> Iterator[Document]:
    """At most 1024 sums: neighbors are added up."""
    size = -(-len(documents) // _MAX_DOCUMENTS)
    for begin in range(0, len(documents), size):
        group = documents[begin : begin + size]
        nats = math.fsum(document.nats for document in group)
        yield Document(nats, sum(document.tokens for document in group), sum(document.bytes for document in group))
