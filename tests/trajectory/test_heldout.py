"""The built-in loss on a text, against a loop that scores one token after another."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from merge_cli.errors import InputError, UsageError
from merge_cli.trajectory.evaluators import EvaluationError, Subject
from merge_cli.trajectory.heldout import TextEvaluator, read_documents
from merge_cli.trajectory.results import Result

TEXT = "def f(x):\n    return x + 1  # für alle\n" * 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("heldout") / "ckpt_1"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=None,
    )
    made = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(8)  # losses that differ from token to token
    made.save_pretrained(folder)
    yield folder


def measure(model: Path, text: Path, **options: Any) -> Result:
    evaluator = TextEvaluator(text, model, device="cpu", **options)
    return evaluator.measure(Subject("ckpt_1", model, "1"), text.parent, 0)


def by_hand(model: Path, tokens: list[int], context: int, stride: int) -> tuple[float, int]:
    """The summed loss: every token from the window that first reaches it, never the first of a
    window.
    """
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    nats, count, done = 0.0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + context, len(tokens))
        for place in range(max(begin + 1, done), end):
            with torch.inference_mode():
                logits = loaded(input_ids=torch.tensor([tokens[begin:place]])).logits[0, -1].double()
            nats -= float(torch.log_softmax(logits, 0)[tokens[place]])
            count += 1
        done = end
        if end == len(tokens):
            break
    return nats, count


@pytest.mark.parametrize(("context", "stride"), [(32, 32), (32, 8), (16, 5)])
def test_loss_of_plain_text_is_that_of_a_loop(model: Path, tmp_path: Path, context: int, stride: int) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    tokens = list(TEXT.encode())
    nats, count = by_hand(model, tokens, context, stride)
    found = measure(model, tmp_path / "a.txt", context=context, stride=stride)
    assert found.metrics["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert found.metrics["bits_per_byte"] == pytest.approx(found.metrics["loss"] / math.log(2))
    assert sum(document.tokens for document in found.documents) == count == sum(each.bytes for each in found.documents)
    assert len(found.documents) > 2  # by window


def test_documents_of_jsonl_are_kept_apart(model: Path, tmp_path: Path) -> None:
    documents = [TEXT[:50], "x", TEXT[10:30]]
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps({"text": documents[0]}), "", *map(json.dumps, documents[1:])]))
    found = measure(model, tmp_path / "a.jsonl")
    assert len(found.documents) == 3 and found.documents[1].tokens == 0
    nats, count = by_hand(model, list(documents[2].encode()), 32, 32)
    assert found.documents[2].nats == pytest.approx(nats, rel=1e-5) and found.documents[2].tokens == count
    assert read_documents(tmp_path / "a.jsonl") == documents


def test_the_identity_depends_on_what_changes_the_numbers(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(TEXT + "x")
    one = TextEvaluator(tmp_path / "a.txt", model, device="cpu").identity
    assert one == TextEvaluator(tmp_path / "a.txt", model, device="cpu", stride=32).identity
    others = [
        TextEvaluator(tmp_path / "b.txt", model, device="cpu"),
        TextEvaluator(tmp_path / "a.txt", model, device="cpu", context=16),
        TextEvaluator(tmp_path / "a.txt", model, device="cpu", stride=16),
    ]
    assert len({one, *(other.identity for other in others)}) == 4
    assert json.loads(one)["tokenizer"] == "bytes" and json.loads(one)["text"] == "a.txt"


def test_wrong_inputs_are_named(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "bad.jsonl").write_text('{"text": 5}\n')
    for path, error, message in (
        ("missing.txt", UsageError, "cannot open"),
        ("empty.txt", UsageError, "is empty"),
        ("one.txt", UsageError, "no token that could be predicted"),
        ("bad.jsonl", InputError, "line 1 has no text"),
    ):
        with pytest.raises(error, match=message):
            measure(model, tmp_path / path)
    for options, message in (
        ({"context": 33}, "--context 33"),
        ({"stride": 33}, "--stride 33"),
        ({"tokenizer": str(tmp_path)}, "no tokenizer in"),
    ):
        with pytest.raises(UsageError, match=message):
            measure(model, tmp_path / "a.txt", **options)


def test_no_code_of_a_checkpoint_is_run_and_no_pickle_is_read(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    remote, pickled = tmp_path / "ckpt_2", tmp_path / "ckpt_3"
    for folder in (remote, pickled):
        folder.mkdir()
        config = json.loads((model / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config))
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (remote / "config.json").write_text(json.dumps(config))
    (remote / "evil.py").write_text("raise SystemExit('was run')")
    with pytest.raises(UsageError, match="code of its own"):
        measure(remote, tmp_path / "a.txt")
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(EvaluationError, match="cannot load"):
        measure(pickled, tmp_path / "a.txt")


def test_weights_that_are_missing_are_no_loss(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "a.txt").write_text(TEXT)
    broken = tmp_path / "ckpt_2"
    broken.mkdir()
    weights = load_file(model / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    (broken / "config.json").write_bytes((model / "config.json").read_bytes())
    with pytest.raises(EvaluationError, match="does not load as it should"):
        measure(broken, tmp_path / "a.txt")
